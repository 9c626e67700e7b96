"""Packs a folder of recordings into one file of levels: ``python -m benchmarks.pack_levels FOLDER LEVELS.npz``."""

from pathlib import Path

import numpy as np
import torch

from audio.codec import Codec
from audio.files import find_audio, read_clip, to_mono
from audio.splits import FSDD_NAME
from core.cli import run


def pack(folder: str, out: str, sample_rate: int = 8000) -> None:
    """Writes ``levels`` (uint8, 256 mu-law levels, clips laid end to end) and ``meta`` (clips, 4).

    A row of ``meta`` is digit, speaker, take and length; only the Free Spoken Digit Dataset has the first three.

    Args:
        folder: The recordings, taken in the order of their names.
        out: The file.
        sample_rate: In Hz; recordings of other rates are resampled.
    """
    codec, levels, meta = Codec(normalize="peak"), [], []
    paths = find_audio(Path(folder))
    names = [FSDD_NAME.fullmatch(path.stem) for path in paths]
    speakers = sorted({name[2] for name in names if name})
    for path, name in zip(paths, names, strict=True):
        clip = codec.encode(to_mono(read_clip(path), sample_rate)).to(torch.uint8)
        levels.append(clip.numpy())
        said = (int(name[1]), speakers.index(name[2]), int(name[3])) if name else (0, 0, 0)
        meta.append((*said, len(clip)))
    np.savez(out, levels=np.concatenate(levels), meta=np.array(meta, np.int32))


if __name__ == "__main__":
    run(pack)
