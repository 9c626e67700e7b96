"""Trains a model of raw sound: ``python -m audio.train``, ``python -m audio.train digits --data.root DIR``."""

from core.cli import main

LINKS = {f"data.{name}": f"model.{name}" for name in ("codec", "sample_rate", "class_names")}

if __name__ == "__main__":
    main("audio", "audio.module.SoundModel", "audio.datasets.AudioData", default_recipe="digits", links=LINKS)
