"""Times the causal convolution on a GPU, beside the floor that memory sets and, on request, the published kernels.

    python -m benchmarks.causal_conv1d [--peers] [--write] [--case NAME ...]

``backward`` is the backward alone. The floor is the bytes that must move (x, y; backward: x, dy, dx) over the bandwidth
of a copy, measured in the same run. causal_conv1d is timed in both of its layouts, channels last and tokens last; its
row is the faster one's. A provider whose result differs from the reference in float64 gets no row.

B batch, L tokens, D channels, W conv width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, floor, installed, require_gpu, time_passes, write
from kernels import causal_conv1d

Size = tuple[int, int, int, int]  # B, L, D, W
CASES: dict[str, Size] = {
    "target/B8_L2048_D1536": (8, 2048, 1536, 4),
    "target/B1_L1048576_D256": (1, 1048576, 256, 4),
    "vision": (64, 197, 384, 4),
    "language_wide": (2, 4096, 5120, 4),
    "genomics": (1, 131072, 512, 4),
    "wide_kernel": (8, 2048, 1536, 15),
}
FLOAT32 = ("target/B8_L2048_D1536",)  # also timed in float32
PEERS = ("causal_conv1d", "fla")
CHECKED = 4096  # tokens of the first row that are compared with the reference
Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, L, D), weight, bias


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's own convolution, with the transposes that it needs."""
    width = weight.shape[-1]
    y = F.conv1d(x.transpose(1, 2), weight[:, None].to(x.dtype), bias.to(x.dtype), padding=width - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """This project's convolution."""
    return causal_conv1d(x, weight, bias, activation="silu")  # type: ignore[return-value]


def causal_conv1d_peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """causal_conv1d's kernels; the layout is x's: whichever axis is contiguous."""
    from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]

    return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


def fla_peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """fla's Triton kernels."""
    from fla.modules.convolution import causal_conv1d as convolution  # type: ignore[import-not-found]

    return convolution(x, weight.to(x.dtype), bias.to(x.dtype), activation="silu")[0]


def providers(width: int, peers: bool) -> dict[str, Convolution]:
    """Convolutions with bias and SiLU by import name; peers only where they are installed and take the width."""
    found: dict[str, Convolution] = {"triscan": ours, "torch": eager}
    published = {"causal_conv1d": causal_conv1d_peer, "fla": fla_peer}
    return found | {n: f for n, f in published.items() if peers and width <= 4 and installed(n)}


def inputs(size: Size, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, weight and bias, channels last."""
    B, L, D, W = size
    torch.manual_seed(0)
    x = torch.randn(B, L, D, device=device, dtype=dtype)
    return [t.requires_grad_() for t in (x, torch.randn(D, W, device=device), torch.randn(D, device=device))]


def is_right(function: Convolution, leaves: list[Tensor]) -> bool:
    """Whether the convolution agrees with the definition in float64."""
    with torch.no_grad():
        x, weight, bias = (t.detach() for t in leaves)
        x = x[:1, :CHECKED]
        truth = causal_conv1d(x.double(), weight.double(), bias.double(), activation="silu", backend="torch")
        assert isinstance(truth, Tensor)
        error = (function(x, weight, bias) - truth).norm() / truth.norm()
    return error.item() < 4 * torch.finfo(x.dtype).eps + 1e-5


def floors(x: Tensor, device: str, modes: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds that each mode takes at least."""
    moved = {"forward": 2, "backward": 3, "forward_backward": 5}
    return {mode: floor(moved[mode] * x.nbytes, device=device) for mode in modes}


def layouts(provider: str, leaves: list[Tensor]) -> list[list[Tensor]]:
    """The leaves with channels last, for causal_conv1d also with tokens last."""
    if provider != "causal_conv1d":
        return [leaves]
    x, *parameters = leaves
    tokens_last = x.detach().mT.contiguous().mT.requires_grad_()
    return [leaves, [tokens_last, *parameters]]


def measurements(case: str, size: Size, dtype: torch.dtype, peers: bool) -> list[Row]:
    """The rows of a case: the faster layout of each provider and mode."""
    leaves, rows = inputs(size, dtype, "cuda"), []
    least = floors(leaves[0], "cuda", ("forward", "backward"))
    for provider, function in providers(size[-1], peers).items():
        if not is_right(function, leaves):
            print(f"{case} {provider} {dtype}: differs from the reference, no row", file=sys.stderr)
            continue
        found = [
            time_passes("causal_conv1d", case, provider, lambda t=t, f=function: f(*t), t, least)
            for t in layouts(provider, leaves)
        ]
        rows += [min(same_mode, key=lambda r: float(r.ms_p50)) for same_mode in zip(*found, strict=True)]
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help=f"also time {' and '.join(PEERS)} where installed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/causal_conv1d.csv")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these shapes")
    options = parser.parse_args()
    require_gpu("causal_conv1d")
    for name in PEERS if options.peers else ():
        if not installed(name):
            print(f"benchmarks.causal_conv1d: {name} is not installed, its rows are left out", file=sys.stderr)
    found = [
        row
        for case in options.case
        for dtype in (torch.bfloat16, *([torch.float32] if case in FLOAT32 else []))
        for row in measurements(case, CASES[case], dtype, options.peers)
    ]
    if options.write:
        print(write("causal_conv1d", found))


if __name__ == "__main__":
    main()
