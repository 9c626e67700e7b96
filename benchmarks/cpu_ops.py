"""Times the convolution and the norms on the CPU beside PyTorch's operators in eager mode, in turns.

    python -m benchmarks.cpu_ops [--write] [--threads N] [--dtype float32 bfloat16] [--size NAME ...]

Inputs, floors and checks are those of ``benchmarks.causal_conv1d`` and ``benchmarks.norm``; ``forward_backward``, a
training step's part, takes the place of the backward alone. Small sizes show what a call costs beside its work, odd
ones what rows cost that fill no whole vectors. The last lines are the cases in which PyTorch was faster.

B batch, L tokens, D channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import causal_conv1d, norm
from benchmarks.common import Row, time_in_turns, write

MODES = ("forward", "forward_backward")
SIZES = {
    "B8_L197_D384": (8, 197, 384),
    "B2_L1024_D384": (2, 1024, 384),
    "B1_L131072_D64": (1, 131072, 64),
    "B1_L1_D384": (1, 1, 384),
    "B1_L64_D100": (1, 64, 100),
    "B3_L333_D77": (3, 333, 77),
}
NORMS = ("rms", "layer", "rms_gate", "rms_add")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def in_both_modes(
    op: str, case: str, forwards: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]], leaves: list[Tensor],
    floors: dict[str, float],
) -> list[Row]:  # fmt: skip
    """The rows of a case, one a provider and mode."""
    given = {name: (forward, leaves) for name, forward in forwards.items()}
    return [made for mode, least in floors.items() for made in time_in_turns(op, case, mode, given, least)[0]]


def convolution(case: str, size: tuple[int, int, int], dtype: torch.dtype) -> list[Row]:
    """The rows of a convolution of four taps."""
    leaves = causal_conv1d.inputs((*size, 4), dtype, "cpu")
    functions = causal_conv1d.providers(4, False)
    right = {n: (lambda f=f: f(*leaves)) for n, f in functions.items() if causal_conv1d.is_right(f, leaves)}
    report(case, functions.keys() - right.keys())
    return in_both_modes("causal_conv1d", case, right, leaves, causal_conv1d.floors(leaves[0], "cpu", MODES))


def normalisation(name: str, kind: str, size: tuple[int, int, int], dtype: torch.dtype) -> list[Row]:
    """The rows of a norm."""
    B, L, D = size
    case = dataclasses.replace(norm.CASES[kind], B=B, L=L, D=D)
    t = norm.inputs(case, dtype, "cpu")
    functions = {"triscan": norm.ours, "torch": norm.eager}
    right = {n: (lambda f=f: f(t, case)) for n, f in functions.items() if norm.is_right(f, t, case)}
    report(name, functions.keys() - right.keys())
    return in_both_modes("norm", name, right, list(t.values()), norm.floors(t, "cpu", MODES))


def report(case: str, wrong: set[str]) -> None:
    """Names providers without a row."""
    for name in wrong:
        print(f"{case} {name}: differs from the reference, no row", file=sys.stderr)


def slower(rows: list[Row]) -> list[str]:
    """The cases in which PyTorch was faster, and how many times."""
    times = {(r.op, r.case, r.dtype, r.mode, r.provider): float(r.ms_p50) for r in rows}
    ratios = {key[:4]: times[*key[:4], "torch"] / ms for key, ms in times.items() if key[4] == "triscan"}
    return [f"{' '.join(key)}: {ratio:.2f} times as fast as torch" for key, ratio in ratios.items() if ratio < 1]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cpu_ops.csv")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch and of the kernels (default: 2)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="only these dtypes")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="only these sizes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for dtype in (DTYPES[name] for name in options.dtype):
        for size in options.size:
            found += convolution(size, SIZES[size], dtype)
            for kind in NORMS:
                found += normalisation(f"{kind}/{size}", kind, SIZES[size], dtype)
    print(*slower(found), sep="\n")
    if options.write:
        print(write("cpu_ops", found))


if __name__ == "__main__":
    main()
