"""Times the norms on a GPU beside PyTorch's operators and the floor that memory sets.

    python -m benchmarks.norm [--write] [--case NAME ...]

``backward`` is the backward alone. The floor is the bytes that must move over the bandwidth of a copy, measured in the
same run: forward every input and output once; backward what the forward read, the outputs' gradients and the inputs'.
A provider whose result differs from the reference in float64 gets no row.

B batch, L tokens, D channels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, floor, require_gpu, time_passes, write
from kernels import norm

Outputs = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A norm of ``x (B, L, D)``: ``layer`` or ``rms``, with a gate z, or with a residual added and returned."""

    kind: str = "rms"
    gate: bool = False
    residual: bool = False
    B: int = 8
    L: int = 2048
    D: int = 1536


CASES = {
    "rms": Case(),
    "layer": Case("layer"),
    "rms_gate": Case(gate=True),
    "rms_add": Case(residual=True),
    "layer_add": Case("layer", residual=True),
    "rms_add_wide": Case(residual=True, B=2, L=4096, D=5120),
    "rms_long": Case(B=1, L=131072, D=256),
    "rms_wide": Case(B=2, L=4096, D=4096),
    "layer_vision": Case("layer", B=64, L=197, D=384),
    "layer_vision_base": Case("layer", B=64, L=197, D=768),
}
FLOAT32 = ("rms",)  # also timed in float32


def inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The tensors of a case by the names of ``norm``'s arguments; the residual stream is float32."""
    torch.manual_seed(0)
    size = (case.B, case.L, case.D)
    found = {"x": torch.randn(size, device=device, dtype=dtype), "weight": torch.randn(case.D, device=device)}
    if case.kind == "layer":
        found["bias"] = torch.randn(case.D, device=device)
    if case.gate:
        found["z"] = torch.randn(size, device=device, dtype=dtype)
    if case.residual:
        found["residual"] = torch.randn(size, device=device)
    return {n: t.requires_grad_() for n, t in found.items()}


def ours(t: dict[str, Tensor], case: Case, backend: str = "auto") -> Outputs:
    """This project's norm: y, and x + residual where there is one."""
    return norm(**t, kind=case.kind, return_residual=case.residual, backend=backend)  # type: ignore[arg-type]


def eager(t: dict[str, Tensor], case: Case) -> Outputs:
    """The same by PyTorch's operators, in eager mode."""
    x = t["x"] if not case.residual else t["x"] + t["residual"]
    size, weight = (case.D,), t["weight"].to(x.dtype)
    if case.kind == "rms":
        y = F.rms_norm(x, size, weight, 1e-5)
    else:
        y = F.layer_norm(x, size, weight, t["bias"].to(x.dtype), 1e-5)
    y = y.to(t["x"].dtype)
    if case.gate:
        y = y * F.silu(t["z"])
    return (y, x) if case.residual else y


def is_right(function: Callable[[dict[str, Tensor], Case], Outputs], t: dict[str, Tensor], case: Case) -> bool:
    """Whether y agrees with the definition in float64, on the first row of the batch."""
    with torch.no_grad():
        piece = {n: v if v.ndim == 1 else v[:1] for n, v in t.items()}
        y, truth = (f if isinstance(f, Tensor) else f[0] for f in (
            function(piece, case), ours({n: v.double() for n, v in piece.items()}, case, "reference")
        ))  # fmt: skip
        return ((y - truth).norm() / truth.norm()).item() < 4 * torch.finfo(t["x"].dtype).eps + 1e-5


def floors(t: dict[str, Tensor], device: str, modes: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds that each mode takes at least."""
    read, y = sum(v.nbytes for v in t.values()), t["x"].nbytes
    total = t["residual"].nbytes if "residual" in t else 0
    # the backward reads the sum in place of its terms
    kept = read - t["x"].nbytes if total else read
    moved = {"forward": read + y + total, "backward": kept + y + total + read}
    moved["forward_backward"] = moved["forward"] + moved["backward"]
    return {mode: floor(moved[mode], device=device) for mode in modes}


def measurements(name: str, case: Case, dtype: torch.dtype) -> list[Row]:
    """The rows of a case: ours and PyTorch's."""
    t, rows = inputs(case, dtype, "cuda"), []
    least = floors(t, "cuda", ("forward", "backward"))
    for provider, function in (("triscan", ours), ("torch", eager)):
        if not is_right(function, t, case):
            print(f"{name} {provider} {dtype}: differs from the reference, no row", file=sys.stderr)
            continue
        rows += time_passes("norm", name, provider, lambda f=function: f(t, case), list(t.values()), least)
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/norm.csv")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these shapes")
    options = parser.parse_args()
    require_gpu("norm")
    found = [
        row
        for name in options.case
        for dtype in (torch.bfloat16, *([torch.float32] if name in FLOAT32 else []))
        for row in measurements(name, CASES[name], dtype)
    ]
    if options.write:
        print(write("norm", found))


if __name__ == "__main__":
    main()
