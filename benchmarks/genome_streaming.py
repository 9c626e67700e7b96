"""Reading a contig with the state carried: ``python -m benchmarks.genome_streaming [--kilobases 200] [--device cpu]``.

Surprisal of every base under an untrained Mamba of 1.4 M parameters, as ``genomics.predict`` computes it: kilobases a
second, and the peak of memory for a contig and for one four times as long.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import processor
from genomics.fasta import Fasta
from genomics.inference import Loaded, log_probability_pieces, surprisal
from genomics.intervals import Interval
from genomics.models import build_lm

PIECE = 16384


def read(model: Loaded, fasta: Fasta, bases: int) -> None:
    """Surprisal of the first bases of the contig."""
    for ids, scores in log_probability_pieces(model, fasta, Interval("contig", 0, bases), PIECE):
        surprisal(ids, scores)


def main() -> None:
    """Prints a line a dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kilobases", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    bases = arguments.kilobases * 1000
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(folder) / "contig.fa"
        letters = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(0).integers(4, size=bases)]
        path.write_bytes(b">contig\n" + letters.tobytes() + b"\n")
        fasta = Fasta(path)
        for dtype in (torch.float32, torch.bfloat16):
            model = Loaded(build_lm(d_model=128, n_layer=12).to(arguments.device, dtype).eval())
            read(model, fasta, min(PIECE, bases))  # compiles
            start = time.perf_counter()
            read(model, fasta, bases)
            seconds = time.perf_counter() - start
            line = f"{dtype}: {bases / seconds / 1000:.1f} kb/s on {arguments.device}"
            if arguments.device == "cpu":
                peaks = [processor.peak_mib(lambda n=n, m=model: read(m, fasta, n)) for n in (bases // 4, bases)]
                threads = f"{torch.get_num_threads()} threads"
                line += f", {threads}; peak {peaks[0]:.0f} MiB, of a contig four times as long {peaks[1]:.0f} MiB"
            print(line, flush=True)


if __name__ == "__main__":
    main()
