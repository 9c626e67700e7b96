"""Sound: raw waveforms modelled sample by sample, from any folder of recordings."""
