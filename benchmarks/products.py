"""Times products with what surrounds them in one kernel, beside the product of PyTorch and the kernel behind it.

    python -m benchmarks.products [--write] [--case NAME ...]

As layers of 130M parameters read prompts of 64 rows of 2048 tokens, in bfloat16 with a stream in float32. ``out_proj``:
the product, the division by the norm in front of it, the addition to the stream and the next norm. A time is that of
a call among others of its kind, on a GPU that is warm: products of this size are held back by its power. The floor is
that of memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, floor, require_gpu, row, steps_in_a_row, write
from kernels.norm import late_product
from kernels.norm.late import Late, add_norm

ROWS, LENGTH, WIDTH, INNER, HEADS = 64, 2048, 768, 1536, 24
RUNS = 100
LOW = torch.bfloat16
EPS = 1e-5

Pair = tuple[Callable[[], object], Callable[[], object], float]  # ours, PyTorch's product and ours behind it; bytes


def out_proj() -> Pair:
    """A late norm of the inner channels, and the next norm."""
    x = torch.randn(ROWS, LENGTH, INNER, device="cuda").to(LOW)
    matrix = (torch.randn(WIDTH, INNER, device="cuda") / INNER**0.5).to(LOW)
    squares = torch.rand(ROWS, LENGTH, HEADS, device="cuda") * INNER / HEADS
    stream, weight = torch.randn(ROWS, LENGTH, WIDTH, device="cuda"), torch.ones(WIDTH, device="cuda", dtype=LOW)
    late = Late(x, squares, INNER, EPS, matrix)
    assert late_product.fits(x, squares, matrix, stream, weight), "no GPU that the kernel is for"

    def before() -> tuple[Tensor, Tensor]:
        return add_norm(Late(F.linear(x, matrix), squares, INNER, EPS), stream, weight, EPS)

    moved = x.nbytes + squares.nbytes + 2 * stream.nbytes + stream.nbytes // 2
    return lambda: add_norm(late, stream, weight, EPS), before, moved


CASES = {"out_proj": out_proj}


@torch.no_grad()
def time_case(name: str) -> list[Row]:
    """The rows of a case; both take turns, twice, and the second time counts."""
    ours, before, moved = CASES[name]()
    timings = {}
    for _ in range(2):
        for provider, call in (("triscan", ours), ("torch", before)):
            timings[provider] = steps_in_a_row(call, RUNS)
    return [row("products", name, provider, "forward", LOW, t, floor(moved)) for provider, t in timings.items()]


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/products.csv")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    arguments = parser.parse_args()
    require_gpu("products")
    rows = [made for name in arguments.case for made in time_case(name)]
    if arguments.write:
        print(write("products", rows))


if __name__ == "__main__":
    main()
