"""Times ``ssd`` on a GPU, beside the floor and, on request, the published kernels in the same run.

    python -m benchmarks.ssd [--peers [NAME ...]] [--write] [--case NAME ...] [--mode NAME ...]

``backward`` is the backward alone. The floor is the larger of the bytes that must move (x, dt, y, B, C; backward: x,
dt, dy, B, C and the gradients of all but dy; with a gate, z and its gradient too) over the bandwidth of a copy, and the
operations of the chunked algorithm (as PyTorch's counter has them) over the rate of a large product in bfloat16, both
measured in the same run. mamba_ssm runs at chunk 256, its default; fla's ``simple_gla`` gets log decays and values
scaled by dt, computed untimed, no gate and no skip connection: it does less. A provider whose result differs from the
reference in float64 gets no row.

B batch, L tokens, H heads, P head dim, N state.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Row, floor, installed, measure, require_gpu, time_passes, write
from kernels import ssd

PEERS = ("mamba_ssm", "fla")
MODES = ("forward", "backward")
Call = tuple[Callable[[], Tensor], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """A shape, with one group, D, dt bias and softplus; ``gated``, with z."""

    B: int
    L: int
    H: int
    P: int = 64
    N: int = 128
    dtype: torch.dtype = torch.bfloat16
    gated: bool = False


CASES = {
    "target/B8_L2048_H80_P64_N128": Case(8, 2048, 80),
    "target/B8_L2048_H24_P64_N128": Case(8, 2048, 24),
    "target/B1_L131072_H24_P64_N128": Case(1, 131072, 24),
    "target/B1_L1048576_H8_P64_N64": Case(1, 1048576, 8, N=64),
    "B8_L2048_H24_P64_N128_float32": Case(8, 2048, 24, dtype=torch.float32),
    "B8_L2048_H24_P64_N16": Case(8, 2048, 24, N=16),
    "B1_L4096_H32_P128_N256": Case(1, 4096, 32, P=128, N=256),
    "gated/B32_L2048_H24_P64_N128": Case(32, 2048, 24, gated=True),
    "gated/B32_L2048_H24_P64_N64": Case(32, 2048, 24, N=64, gated=True),
    "gated/B32_L2048_H24_P64_N32": Case(32, 2048, 24, N=32, gated=True),
    "gated/B32_L2048_H12_P128_N128": Case(32, 2048, 12, P=128, gated=True),
    "gated/B8_L2048_H80_P64_N128": Case(8, 2048, 80, gated=True),
}


def tensors(case: Case, device: str = "cuda") -> dict[str, Tensor]:
    """Random inputs of ``ssd``, marked to get gradients."""
    torch.manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    found = {
        "x": normal(case.B, case.L, case.H, case.P),
        "dt": normal(case.B, case.L, case.H) * 0.5,
        "A": -torch.linspace(1, 16, case.H, device=device),
        "B": normal(case.B, case.L, 1, case.N),
        "C": normal(case.B, case.L, 1, case.N),
        "D": normal(case.H, dtype=torch.float32),
        "dt_bias": torch.full((case.H,), -3.0, device=device),
    }
    if case.gated:
        found["z"] = normal(case.B, case.L, case.H, case.P)
    return {n: t.requires_grad_() for n, t in found.items()}


def ours(t: dict[str, Tensor]) -> Call:
    """The op of this project."""
    return functools.partial(ssd, **t), list(t.values())  # type: ignore[arg-type]


def mamba_ssm(t: dict[str, Tensor]) -> Call:
    """mamba_ssm's Triton kernels, on the same tensors."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    return functools.partial(mamba_chunk_scan_combined, **t, chunk_size=256, dt_softplus=True), list(t.values())


def fla(t: dict[str, Tensor]) -> Call:
    """The same recurrence in fla: queries C, keys B, values dt x, log decays dt A; without D."""
    from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]

    heads = t["x"].shape[2]
    with torch.no_grad():
        dt = F.softplus(t["dt"].float() + t["dt_bias"])
        values = (t["x"] * dt[..., None]).to(t["x"].dtype)
        queries, keys = (t[n].expand(-1, -1, heads, -1).contiguous() for n in ("C", "B"))
    leaves = [v.requires_grad_() for v in (queries, keys, values, dt * t["A"].detach())]
    return lambda: chunk_simple_gla(*leaves[:3], g=leaves[3], scale=1.0)[0], leaves


def is_right(provider: str, case: Case) -> bool:
    """Whether a provider agrees with the reference in float64 on a short piece of the case."""
    t = tensors(replace(case, B=1, L=300, H=min(case.H, 4)))
    wide = {n: v.detach().double() for n, v in t.items()}
    if provider == "fla":
        del wide["D"]
    truth = ssd(**wide, mode="recurrent")
    with torch.no_grad():
        error = (PROVIDERS[provider](t)[0]() - truth).norm() / truth.norm()
    return error.item() < (4 if provider == "triscan" else 16) * torch.finfo(case.dtype).eps + 1e-5


PROVIDERS: dict[str, Callable[[dict[str, Tensor]], Call]] = {"triscan": ours, "mamba_ssm": mamba_ssm, "fla": fla}


@functools.cache
def product_rate() -> float:
    """Operations a millisecond of a large bfloat16 product, measured."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / measure(lambda: a @ b).ms_p50


def floors(case: Case, t: dict[str, Tensor]) -> dict[str, float]:
    """Milliseconds that forward and backward take at least."""
    maps, steps, shared = (t[n].nbytes for n in ("x", "dt", "B"))
    gates = maps if "z" in t else 0
    forward, backward = 2 * maps + gates + steps + 2 * shared, 3 * maps + 2 * gates + 2 * steps + 4 * shared
    moved = {"forward": forward, "backward": backward}
    meta = {n: v.detach().to("meta").requires_grad_() for n, v in t.items()}
    with FlopCounterMode(display=False) as counter:
        y = ssd(**meta)
        done = counter.get_total_flops()
        torch.autograd.grad(y.sum(), list(meta.values()))  # type: ignore[union-attr]
    operations = {"forward": done, "backward": counter.get_total_flops() - done}
    return {mode: max(floor(moved[mode]), operations[mode] / product_rate()) for mode in moved}


def timed(name: str, provider: str, t: dict[str, Tensor], least: dict[str, float]) -> list[Row]:
    """The rows of a provider; a peer that refuses a pass has none of it."""
    function, leaves = PROVIDERS[provider](t)
    rows: list[Row] = []
    for mode, floor_ms in least.items():
        try:
            rows += time_passes("ssd", name, provider, function, leaves, {mode: floor_ms})
        except (RuntimeError, AssertionError, ValueError) as error:
            if provider == "triscan":
                raise
            print(f"{name} {provider} {mode}: {error}", file=sys.stderr)
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="also time these where installed, by default all")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/ssd.csv")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these shapes")
    parser.add_argument(
        "--mode", nargs="+", choices=MODES, default=MODES, help="only these; tuning mamba_ssm takes long"
    )
    options = parser.parse_args()
    require_gpu("ssd")
    peers = () if options.peers is None else options.peers or PEERS
    for name in peers:
        if not installed(name):
            print(f"benchmarks.ssd: {name} is not installed, its rows are left out", file=sys.stderr)
    providers = ["triscan", *(n for n in peers if installed(n))]
    found: list[Row] = []
    for name in options.case:
        case = CASES[name]
        t = tensors(case)
        least = {mode: ms for mode, ms in floors(case, t).items() if mode in options.mode}
        for provider in providers:
            rows = timed(name, provider, t, least)  # first: peers tune themselves once
            if is_right(provider, case):
                found += rows
            else:
                print(f"{name} {provider}: differs from the reference, no row", file=sys.stderr)
        if options.write:  # a run that is cut short keeps its rows
            print(write("ssd", found))


if __name__ == "__main__":
    main()
