"""Times a forward pass against the length of the sequence: scan, attention and loop (Gu & Dao 2023, figure 8).

    python -m benchmarks.lengths [--peers] [--write]     on a GPU
    python -m benchmarks.lengths --plot                  draws docs/lengths.png from the CSV file, on any machine

One sequence of 512 to 1,048,576 tokens, bfloat16. The scan has 2048 channels of 16 states, z, D, dt bias and softplus;
attention is PyTorch's causal one (FlashAttention) with 32 heads of 64; the loop is the scan a step a token, in
PyTorch. A line ends where a call takes over a second. The host's time counts where the GPU waits for it: in the loop.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import RESULTS, Row, floor, installed, measure, require_gpu, row, write
from benchmarks.selective_scan import Case, floors, mamba_ssm, ours, tensors

LENGTHS = [512 << 2 * i for i in range(5)] + [1 << 19, 1 << 20]
CHANNELS, HEADS = 2048, 32
LIMIT = 1000.0  # milliseconds
LINES = {
    ("selective_scan", "triscan"): "selective scan, triscan",
    ("selective_scan", "mamba_ssm"): "selective scan, mamba-ssm (CUDA)",
    ("attention", "torch"): "FlashAttention (PyTorch)",
    ("loop", "torch"): "scan as a PyTorch loop",
}


def attention(length: int) -> Callable[[], Tensor]:
    """Causal attention over as many channels."""
    q, k, v = torch.randn(3, 1, HEADS, length, CHANNELS // HEADS, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def scan(length: int, provider: str) -> Callable[[], Tensor]:
    """The scan of ``triscan``, of ``mamba_ssm`` or as a loop (``torch``)."""
    case = Case(1, length, CHANNELS)
    t = {n: v if v is None else v.detach() for n, v in tensors(case).items()}
    if provider == "mamba_ssm":
        return mamba_ssm(t, case)[0]
    return ours(t, case, "reference" if provider == "torch" else "auto")


def floor_of(op: str, length: int) -> float:
    """Milliseconds that memory and exponentials need; attention's exponentials are those of its scores."""
    if op != "attention":
        return floors(Case(1, length, CHANNELS))[0]
    return floor(4 * 2 * length * CHANNELS, HEADS * length * (length + 1) / 2)


def timed(op: str, provider: str) -> list[Row]:
    """Rows of one line, from the shortest sequence on."""
    found = []
    for length in LENGTHS:
        function = attention(length) if op == "attention" else scan(length, provider)
        with torch.no_grad():
            timing = measure(function, runs=1)
            if timing.ms_p50 < LIMIT / 10:
                timing = measure(function, runs=15)
        found.append(row(op, f"L{length}", provider, "forward", torch.bfloat16, timing, floor_of(op, length)))
        torch.cuda.empty_cache()
        if timing.ms_p50 > LIMIT / 4:  # the next one takes at least four times as long, but for the last length
            break
    return found


def draw(rows: list[dict[str, str]], lines: dict[str, list[tuple[int, float]]], target: Path) -> None:
    """Draws times against lengths.

    Args:
        rows: Of a CSV file; they name the GPU.
        lines: Tokens and milliseconds by label; one without points is left out.
        target: The picture's file.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("forward, ms")
    axes.set_title(f"One sequence, {CHANNELS} channels, bfloat16, {rows[0]['gpu']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=120)
    print(target)


def plot(source: Path, target: Path) -> None:
    """Draws the lines of a CSV file."""
    with source.open() as file:
        rows = list(csv.DictReader(file))
    lines = {
        label: [(int(r["case"][1:]), float(r["ms_p50"])) for r in rows if (r["op"], r["provider"]) == (op, provider)]
        for (op, provider), label in LINES.items()
    }
    draw(rows, lines, target)


def main() -> None:
    """Runs the benchmark, or draws what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also time mamba_ssm where it is installed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/lengths.csv")
    parser.add_argument("--plot", action="store_true", help="only draw docs/lengths.png from that file")
    options = parser.parse_args()
    if options.plot:
        plot(RESULTS / "lengths.csv", Path(__file__).parents[1] / "docs" / "lengths.png")
        return
    require_gpu("lengths")
    peers = options.peers and installed("mamba_ssm")
    found = [r for op, provider in LINES if peers or provider != "mamba_ssm" for r in timed(op, provider)]
    if options.write:
        print(write("lengths", found))


if __name__ == "__main__":
    main()
