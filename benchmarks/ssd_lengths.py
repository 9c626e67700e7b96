"""Times state space duality against the selective scan and attention at equal width (Dao & Gu 2024, figure 10).

    python -m benchmarks.ssd_lengths [--write]     on a GPU
    python -m benchmarks.ssd_lengths --plot        draws docs/ssd_lengths.png from the CSV file, on any machine

One sequence of 2,048 to 1,048,576 tokens, 2048 channels, bfloat16, forward. SSD has 32 heads of 64 and a state of 128,
as in Mamba-2, and a state of 16; the selective scan 16, as in Mamba; attention is PyTorch's causal one
(FlashAttention), 32 heads of 64. A line ends where a call takes over a quarter of a second.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from benchmarks import lengths, ssd
from benchmarks.common import RESULTS, Row, measure, require_gpu, row, write

LENGTHS = [2048 << 2 * i for i in range(5)] + [1 << 20]
LINES = {
    ("ssd", "N128"): "SSD, state 128",
    ("ssd", "N16"): "SSD, state 16",
    ("selective_scan", "N16"): "selective scan, state 16",
    ("attention", ""): "FlashAttention (PyTorch)",
}


def timed(op: str, state: str) -> list[Row]:
    """Rows of one line, from the shortest sequence on."""
    found = []
    for length in LENGTHS:
        if op == "ssd":
            case = ssd.Case(1, length, lengths.HEADS, N=int(state[1:]))
            tensors = ssd.tensors(case)
            least, function = ssd.floors(case, tensors)["forward"], ssd.ours(tensors)[0]
        else:
            least = lengths.floor_of(op, length)
            function = lengths.attention(length) if op == "attention" else lengths.scan(length, "triscan")
        with torch.no_grad():
            timing = measure(function, runs=1)
            if timing.ms_p50 < lengths.LIMIT / 10:
                timing = measure(function, runs=15)
        provider = "torch" if op == "attention" else "triscan"
        found.append(
            row(op, f"L{length}{'_' + state if state else ''}", provider, "forward", torch.bfloat16, timing, least)
        )
        torch.cuda.empty_cache()
        if timing.ms_p50 > lengths.LIMIT / 4:
            break
    return found


def plot(source: Path, target: Path) -> None:
    """Draws the lines of a CSV file."""
    with source.open() as file:
        rows = list(csv.DictReader(file))
    lines = {}
    for (op, state), label in LINES.items():
        cases = [(r["case"][1:].partition("_"), float(r["ms_p50"])) for r in rows if r["op"] == op]
        lines[label] = [(int(length), ms) for (length, _, found), ms in cases if found == state]
    lengths.draw(rows, lines, target)


def main() -> None:
    """Runs the benchmark, or draws what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/ssd_lengths.csv")
    parser.add_argument("--plot", action="store_true", help="only draw docs/ssd_lengths.png from that file")
    options = parser.parse_args()
    if options.plot:
        plot(RESULTS / "ssd_lengths.csv", Path(__file__).parents[1] / "docs" / "ssd_lengths.png")
        return
    require_gpu("ssd_lengths")
    found: list[Row] = []
    for op, state in LINES:
        found += timed(op, state)
        if options.write:  # a run that is cut short keeps its lines
            print(write("ssd_lengths", found))


if __name__ == "__main__":
    main()
