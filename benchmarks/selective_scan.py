"""Times the selective scan on a GPU, beside the floor and, on request, mamba-ssm's CUDA kernel in the same run.

    python -m benchmarks.selective_scan [--peers] [--write] [--case NAME ...]

``backward`` is the backward alone, ``forward_backward`` both, as in training: its memory is what a step holds at once.
The floor is the larger of the bytes that must move (x, dt, z, y, B, C; backward: x, dt, z, dy and the gradients of the
first three, B, C and theirs) over the bandwidth of a copy, and the N exponentials of each token and channel over the
special-function rate. A provider whose result differs from the reference in float64 gets no row. mamba-ssm's tensors
are laid out as it wants them, untimed; routes (``vmamba``) it gets as inputs already copied four times, while ours read
the map along four routes and merge them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import Row, floor, installed, measure, require_gpu, row, write
from kernels import selective_scan

Function = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A shape: batch B, tokens L, channels D a route, state N, routes K (0: none; else four over a square map)."""

    B: int
    L: int
    D: int
    N: int = 16
    z: bool = True
    K: int = 0
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "lm": Case(8, 2048, 1536),
    "lm_fp32": Case(8, 2048, 1536, dtype=torch.float32),
    "lm_n64": Case(8, 2048, 1536, N=64),
    "n256": Case(2, 2048, 1536, N=256),
    "short": Case(8, 512, 2048),
    "narrow_batch": Case(1, 4096, 2048),
    "long": Case(1, 65536, 2048),
    "audio": Case(4, 131072, 128),
    "dna": Case(1, 1048576, 256),
    "vim_s": Case(64, 197, 768),
    "vmamba_t": Case(64, 3136, 96, N=1, z=False, K=4),
    "vmamba_n16": Case(64, 3136, 192, z=False, K=4),
}
UNSTATED = ("lm_fp32", "n256")  # without a stated target


def tensors(case: Case) -> dict[str, Tensor | None]:
    """Random inputs of ``selective_scan`` on the GPU, those that get a gradient marked."""
    torch.manual_seed(0)
    B, L, D, N, lead = case.B, case.L, case.D, case.N, (case.K,) if case.K else ()

    def normal(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(size, device="cuda", dtype=dtype)

    found: dict[str, Tensor | None] = {
        "x": normal(B, L, D),
        "dt": normal(B, L, *lead, D),
        "A": -torch.arange(1, N + 1, device="cuda", dtype=torch.float32).expand(*lead, D, N).contiguous(),
        "B": normal(B, L, *lead, 1, N),
        "C": normal(B, L, *lead, 1, N),
        "D": normal(*lead, D, dtype=torch.float32),
        "z": normal(B, L, D) if case.z else None,
        "dt_bias": torch.full((*lead, D), -4.0, device="cuda"),
    }
    return {n: t if t is None else t.requires_grad_() for n, t in found.items()}


def routes(length: int) -> Tensor:
    """Rows and columns of a square map, and both reversed, ``(4, L)``."""
    side = int(length**0.5)
    rows = torch.arange(length, device="cuda", dtype=torch.int32).view(side, side)
    paths = torch.stack([rows.flatten(), rows.t().flatten()])
    return torch.cat([paths, paths.flip(-1)])


def ours(t: dict[str, Tensor | None], case: Case, backend: str = "auto") -> Function:
    """The scan of this project."""
    route = routes(t["x"].shape[1]) if case.K else None
    return lambda: selective_scan(**t, route=route, backend=backend)


def mamba_ssm(t: dict[str, Tensor | None], case: Case) -> tuple[Function, list[Tensor]]:
    """mamba-ssm's scan of the same numbers, and its leaves: channels before tokens, routes as groups of channels."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    K, route = max(case.K, 1), routes(case.L) if case.K else None

    def channels(x: Tensor) -> Tensor:  # (B, L, K, M) to (B, K * M, L), tokens in the order of their route
        if route is not None:
            place = torch.arange(K, device="cuda")
            x = x.expand(-1, -1, K, -1)[:, route.long().t(), place]
        return x.flatten(2).mT.contiguous()

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    shape = (case.B, case.L, K, -1)
    u = leaf(channels(t["x"].detach().unsqueeze(2)))
    dt = leaf(channels(t["dt"].detach().reshape(shape)))
    B, C = (leaf(channels(t[n].detach().reshape(shape)).unflatten(1, (K, case.N))) for n in ("B", "C"))
    A, D, bias = leaf(t["A"].flatten(0, -2)), leaf(t["D"].flatten()), leaf(t["dt_bias"].flatten())
    z = None if t["z"] is None else leaf(t["z"].mT.contiguous())
    leaves = [v for v in (u, dt, A, B, C, D, z, bias) if v is not None]
    return lambda: selective_scan_fn(u, dt, A, B, C, D, z, bias, delta_softplus=True), leaves


def is_right(case: Case) -> bool:
    """Whether the kernels agree with the reference in float64 on a short piece of the case."""
    piece = Case(1, 196, min(case.D, 64), case.N, case.z, case.K, case.dtype)
    t = tensors(piece)
    truth = ours({n: v if v is None else v.double() for n, v in t.items()}, piece, "reference")()
    error = (ours(t, piece)() - truth).norm() / truth.norm()
    return error.item() < 4 * torch.finfo(case.dtype).eps + 1e-5


def peer_is_right(case: Case) -> bool:
    """Whether mamba-ssm computes what the reference does on a short piece of the case."""
    piece = Case(1, 196, min(case.D, 64), case.N, case.z, case.K, case.dtype)
    t = tensors(piece)
    y = mamba_ssm(t, piece)[0]()
    if piece.K:
        parts = zip(y.chunk(4, 1), routes(196), strict=True)
        y = sum(part.mT[:, order.long().argsort()] for part, order in parts)
    else:
        y = y.mT
    truth = ours({n: v if v is None else v.double() for n, v in t.items()}, piece, "reference")()
    return ((y - truth).norm() / truth.norm()).item() < 16 * torch.finfo(case.dtype).eps + 1e-5


def floors(case: Case) -> tuple[float, float]:
    """Milliseconds that forward and backward take at least."""
    bytes_each, routes_ = torch.finfo(case.dtype).bits // 8, max(case.K, 1)
    maps, scans = case.B * case.L * case.D, case.B * case.L * case.D * routes_
    parameters = 2 * case.B * case.L * case.N * routes_
    gate = maps if case.z else 0
    exponentials = scans * case.N
    forward = 2 * maps + gate + scans + parameters  # x, y; z; dt; B and C
    backward = 3 * maps + 2 * gate + 2 * scans + 2 * parameters
    return floor(forward * bytes_each, exponentials), floor(backward * bytes_each, exponentials)


def timed(name: str, case: Case, provider: str, function: Function, leaves: list[Tensor]) -> list[Row]:
    """Rows of forward, of backward and of both."""
    found = []
    name = name if name in UNSTATED else f"target/{name}"
    forward_floor, backward_floor = floors(case)
    with torch.no_grad():
        found.append(row("selective_scan", name, provider, "forward", case.dtype, measure(function), forward_floor))
    y = function()
    dy = torch.randn_like(y)
    timing = measure(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
    found.append(row("selective_scan", name, provider, "backward", case.dtype, timing, backward_floor))
    timing = measure(lambda: torch.autograd.grad(function(), leaves, dy))
    both = forward_floor + backward_floor
    return [*found, row("selective_scan", name, provider, "forward_backward", case.dtype, timing, both)]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also time mamba_ssm where it is installed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/selective_scan.csv")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these shapes")
    options = parser.parse_args()
    require_gpu("selective_scan")
    if options.peers and not installed("mamba_ssm"):
        print("benchmarks.selective_scan: mamba_ssm is not installed, its rows are left out", file=sys.stderr)
    found: list[Row] = []
    for name in options.case:
        case = CASES[name]
        if is_right(case):
            t = tensors(case)
            found += timed(name, case, "triscan", ours(t, case), [v for v in t.values() if v is not None])
        else:
            print(f"{name} triscan: differs from the reference, no row", file=sys.stderr)
        if options.peers and installed("mamba_ssm"):
            if peer_is_right(case):
                function, leaves = mamba_ssm(tensors(case), case)
                found += timed(name, case, "mamba_ssm", function, leaves)
            else:
                print(f"{name} mamba_ssm: differs from the reference, no row", file=sys.stderr)
    if options.write:
        print(write("selective_scan", found))


if __name__ == "__main__":
    main()
