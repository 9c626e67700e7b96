"""How fast bases become token tensors: ``python -m benchmarks.genome_data [--megabases 200] [--fasta FILE]``.

Random windows of a genome file on one core, from the memory-mapped cache to int64 tensors as the language model's data
set gives them, on either strand; beside it the time to make the cache. Without a file, random bases stand in.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from genomics.datasets import Windows
from genomics.fasta import Fasta
from genomics.intervals import tile, whole_records

LENGTHS = (1024, 16384, 131072, 1048576)
BATCH_BASES = 1 << 18


def main() -> None:
    """Prints a table: bases of a window, megabases a second to tensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabases", type=float, default=200, help="how much is read at each length")
    parser.add_argument("--fasta", help="a genome file instead of random bases")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(arguments.fasta) if arguments.fasta else _random_fasta(Path(folder) / "random.fa", 32_000_000)
        start = time.process_time()
        fasta = Fasta(path)
        seconds, bases = time.process_time() - start, sum(fasta.lengths.values())
        print(
            f"{path.name}: {bases / 1e6:.1f} Mb checked and cached in {seconds:.2f} s, {bases / seconds / 1e6:.0f} Mb/s"
        )
        for length in LENGTHS:
            windows = Windows(fasta, tile(whole_records(fasta.lengths), length), length, flip=True)
            print(
                f"{length:>9} bases a window: {rate(windows, length, arguments.megabases):7.0f} Mb/s to int64 tensors"
            )


def rate(windows: Windows, length: int, megabases: float) -> float:
    """Megabases a second of batches of random windows, after one round that fills the page cache."""
    size = max(BATCH_BASES // length, 1)
    batches = np.random.default_rng(0).integers(len(windows), size=(max(int(megabases * 1e6 / length / size), 1), size))
    windows.__getitems__(batches[0].tolist())
    start = time.process_time()
    for indices in batches.tolist():
        windows.__getitems__(indices)
    return batches.size * length / (time.process_time() - start) / 1e6


def _random_fasta(path: Path, bases: int) -> Path:
    letters = np.frombuffer(b"ACGTacgtN", np.uint8)[np.random.default_rng(0).integers(9, size=bases)]
    lines = np.concatenate([letters.reshape(-1, 64), np.full((bases // 64, 1), ord("\n"), np.uint8)], axis=1)
    path.write_bytes(b">random\n" + lines.tobytes())
    return path


if __name__ == "__main__":
    main()
