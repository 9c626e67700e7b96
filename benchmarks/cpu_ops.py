"""Times the convolution and the norms on the CPU beside PyTorch's operators in eager mode, in turns.

    python -m benchmarks.cpu_ops [--write] [--threads N] [--dtype float32 bfloat16] [--size NAME ...] [--op NAME ...]

Inputs, floors and checks are those of ``benchmarks.causal_conv1d`` and ``benchmarks.norm``; ``forward_backward``, a
training step's part, takes the place of the backward alone. Small sizes show what a call costs beside its work, odd
ones what rows cost that fill no whole vectors. With one thread, times are that thread's on the processor, which others
on the machine disturb less than the clock's; with more they are the clock's. The last lines are all cases with how many
times as fast as PyTorch they are, in the median and at the 20th percentile, the worst one last.

B batch, L tokens, D channels, W conv width.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import causal_conv1d, norm
from benchmarks.common import Row, time_in_turns, write
from kernels import causal_conv1d as convolve

MODES = ("forward", "forward_backward")
SIZES = {
    "B8_L197_D384": (8, 197, 384),
    "B2_L1024_D384": (2, 1024, 384),
    "B1_L131072_D64": (1, 131072, 64),
    "B1_L1_D384": (1, 1, 384),
    "B4_L1_D768": (4, 1, 768),
    "B1_L64_D100": (1, 64, 100),
    "B3_L333_D77": (3, 333, 77),
}
CONVOLUTIONS = {"conv": (4, False), "conv_W2": (2, False), "conv_state": (4, True)}  # W, whether with states
NORMS = {n: norm.CASES[n] for n in ("rms", "layer", "rms_gate", "rms_add", "layer_add")}
OPS = (*CONVOLUTIONS, *NORMS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Outputs = Tensor | tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Timed:
    """The rows of a case and mode, and how many times as fast as PyTorch's ours is: in the median, undisturbed."""

    rows: list[Row]
    median: float
    undisturbed: float  # at the 20th percentile

    def __str__(self) -> str:
        r = self.rows[0]
        return f"{self.median:6.2f} {self.undisturbed:6.2f}  {r.op} {r.case} {r.dtype} {r.mode}"


def in_both_modes(
    op: str, case: str, forwards: dict[str, Callable[[], Outputs]], leaves: list[Tensor], floors: dict[str, float],
    seconds: float,
) -> list[Timed]:  # fmt: skip
    """The case in one mode each."""
    found, clock = [], time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for mode, least in floors.items():
        given = {name: (forward, leaves) for name, forward in forwards.items()}
        rows, times = time_in_turns(op, case, mode, given, least, seconds, clock)
        if times.keys() >= {"triscan", "torch"}:
            ours, eager = (sorted(times[n]) for n in ("triscan", "torch"))
            ratios = [eager[len(eager) // n] / ours[len(ours) // n] for n in (2, 5)]
            found.append(Timed(rows, *ratios))
    return found


def ours_with_states(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Outputs:
    """A piece of a sequence by this project: y and the state behind it."""
    return convolve(x, weight, bias, activation="silu", initial_state=state, return_final_state=True)


def eager_with_states(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Outputs:
    """The same by PyTorch's operators."""
    past, dtype = state.shape[1], x.dtype
    x = torch.cat((state.to(dtype), x), 1)
    y = F.conv1d(x.transpose(1, 2), weight[:, None].to(dtype), bias.to(dtype), groups=x.shape[2])
    return F.silu(y).transpose(1, 2), x[:, x.shape[1] - past :].clone()


def convolution(kind: str, size: str, dtype: torch.dtype, seconds: float) -> list[Timed]:
    """A convolution in both modes."""
    case, (width, states) = f"{kind}/{size}", CONVOLUTIONS[kind]
    leaves = causal_conv1d.inputs((*SIZES[size], width), dtype, "cpu")
    functions: dict[str, Callable[..., Outputs]] = {**causal_conv1d.providers(width, False)}
    wrong = {n for n, f in functions.items() if not causal_conv1d.is_right(f, leaves)}
    if states:
        batch, _, channels = SIZES[size]
        leaves.append(torch.randn(batch, width - 1, channels, dtype=dtype).requires_grad_())
        functions, wrong = {"triscan": ours_with_states, "torch": eager_with_states}, set()
        y, wanted = (f(*leaves)[0] for f in functions.values())
        if ((y - wanted).norm() / wanted.norm()).item() > 8 * torch.finfo(dtype).eps + 1e-5:
            wrong = {"triscan"}
    report(case, wrong)
    right = {n: functools.partial(f, *leaves) for n, f in functions.items() if n not in wrong}
    floors = causal_conv1d.floors(leaves[0], "cpu", MODES)
    return in_both_modes("causal_conv1d", case, right, leaves, floors, seconds)


def normalisation(kind: str, size: str, dtype: torch.dtype, seconds: float) -> list[Timed]:
    """A norm in both modes."""
    name, (B, L, D) = f"{kind}/{size}", SIZES[size]
    case = dataclasses.replace(NORMS[kind], B=B, L=L, D=D)
    t = norm.inputs(case, dtype, "cpu")
    functions = {"triscan": norm.ours, "torch": norm.eager}
    right = {n: functools.partial(f, t, case) for n, f in functions.items() if norm.is_right(f, t, case)}
    report(name, functions.keys() - right.keys())
    return in_both_modes("norm", name, right, list(t.values()), norm.floors(t, "cpu", MODES), seconds)


def report(case: str, wrong: set[str]) -> None:
    """Names providers without a row."""
    for name in wrong:
        print(f"{case} {name}: differs from the reference, no row", file=sys.stderr)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cpu_ops.csv")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch and of the kernels (default: 1)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="only these dtypes")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="only these sizes")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="only these ops")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each op, case and mode (default: 0.5)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[Timed] = []
    for dtype in (DTYPES[name] for name in options.dtype):
        for size in options.size:
            for op in options.op:
                function = convolution if op in CONVOLUTIONS else normalisation
                found += function(op, size, dtype, options.seconds)
    print("times as fast as torch: median, 20th percentile")
    print(*sorted(found, key=lambda t: t.median, reverse=True), sep="\n")
    if options.write:
        print(write("cpu_ops", [row for timed in found for row in timed.rows]))


if __name__ == "__main__":
    main()
