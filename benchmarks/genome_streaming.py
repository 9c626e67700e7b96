"""Reading a contig with the state carried: ``python -m benchmarks.genome_streaming [--kilobases 200] [--device cpu]``.

Surprisal of every base under an untrained Mamba of 1.4 M parameters, as ``genomics.predict`` computes it: kilobases a
second, and the peak of memory for a contig and for one four times as long.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import processor
from benchmarks.common import Row, Timing, row, write
from core.memory import keep_freed_memory
from genomics.fasta import Fasta
from genomics.inference import Loaded
from genomics.intervals import Interval
from genomics.models import build_lm
from genomics.predict import values

BIN = 1024
GPU_PIECES = (65536, 262144, 1048576)


def read(model: Loaded, fasta: Fasta, bases: int, piece: int) -> None:
    """The track of the first bases of the contig."""
    for _ in values(model, fasta, Interval("contig", 0, bases), "surprisal", BIN, piece):
        pass


def peak(function: Callable[[], None], device: str) -> float:
    """MiB above what was held before."""
    if device == "cpu":
        return processor.peak_mib(function)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(model: Loaded, fasta: Fasta, bases: int, piece: int, dtype: torch.dtype, products: str) -> Row:
    """The row of one dtype, piece and kind of products; prints its rate."""
    device = model.device.type
    read(model, fasta, min(2 * piece, bases), piece)  # compiles
    short = peak(lambda: read(model, fasta, bases // 4, piece), device)
    start = time.perf_counter()
    whole = peak(lambda: read(model, fasta, bases, piece), device)
    seconds = time.perf_counter() - start
    made = row(
        "genome_streaming", f"target/{bases // 1000}kb_pieces_of_{piece}{products}", "triscan", "forward", dtype,
        Timing(*[1000 * seconds] * 3, whole), 0.0, device,
    )  # fmt: skip
    print(
        f"    {bases / seconds / 1000:.1f} kb/s; peak {short:.0f} MiB, of a contig four times as long {whole:.0f} MiB"
    )
    return made


def main() -> None:
    """Prints a row a dtype and length of a piece, and writes ``results/genome_streaming[_cpu].csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kilobases", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    bases = arguments.kilobases * 1000
    keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = Path(folder) / "contig.fa"
        letters = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(0).integers(4, size=bases)]
        path.write_bytes(b">contig\n" + letters.tobytes() + b"\n")
        fasta = Fasta(path)
        kinds = [(torch.float32, ""), (torch.bfloat16, "")]
        for dtype, products in kinds if arguments.device == "cpu" else [(torch.float32, "_tf32"), *kinds[::-1]]:
            torch.set_float32_matmul_precision("high" if products else "highest")
            model = Loaded(build_lm(d_model=128, n_layer=12).to(arguments.device, dtype).eval())
            for piece in (model.piece,) if arguments.device == "cpu" else GPU_PIECES:
                rows.append(measure(model, fasta, bases, piece, dtype, products))
                write("genome_streaming" + ("_cpu" if arguments.device == "cpu" else ""), rows)


if __name__ == "__main__":
    main()
