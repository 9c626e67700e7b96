"""Times the causal convolution on a GPU, beside the floor that memory sets and, on request, the published kernels.

    python -m benchmarks.causal_conv1d [--peers] [--output FILE.csv]

Rows have the columns of ``benchmarks/results/*.csv``. ``backward`` is the backward alone. The floor is the bytes that
must move (x, y; backward: x, dy, dx) over the bandwidth of a copy, measured in the same run. A provider whose result
differs from the reference gets no row.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from kernels import causal_conv1d

COLUMNS = (
    "op", "case", "provider", "mode", "dtype", "ms_p20", "ms_p50", "ms_p80", "floor_ms", "peak_mib",
    "gpu", "torch", "triton", "date",
)  # fmt: skip
CASES = {  # B, L, D, W
    "vision": (64, 197, 384, 4),
    "language": (8, 2048, 1536, 4),
    "language_wide": (2, 4096, 5120, 4),
    "genomics": (1, 131072, 512, 4),
    "wide_kernel": (8, 2048, 1536, 15),
}
Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


def _torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = weight.shape[-1]
    y = F.conv1d(x.transpose(1, 2), weight[:, None].to(x.dtype), bias.to(x.dtype), padding=width - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def providers(width: int, peers: bool) -> dict[str, Convolution]:
    """Convolutions of ``x (B, L, D)`` with bias and SiLU by import name; peers only where they take the width."""
    found: dict[str, Convolution] = {
        "triscan": lambda x, w, b: causal_conv1d(x, w, b, activation="silu"),
        "torch": _torch,
    }
    if peers and width <= 4 and importlib.util.find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        found["causal_conv1d"] = lambda x, w, b: causal_conv1d_fn(
            x.transpose(1, 2), w.to(x.dtype), b.to(x.dtype), activation="silu"
        ).transpose(1, 2)
    if peers and width <= 4 and importlib.util.find_spec("fla"):
        from fla.modules.convolution import causal_conv1d as fla_conv

        found["fla"] = lambda x, w, b: fla_conv(x, w.to(x.dtype), b.to(x.dtype), activation="silu")[0]
    return found


def copy_bandwidth() -> float:
    """Bytes per millisecond that a copy of 512 MiB reads and writes."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median")


def measure(run: Callable[[], object]) -> tuple[list[float], float]:
    """Milliseconds at the 20th, 50th and 80th percentile, and the peak of memory in MiB above what was held before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return do_bench(run, warmup=50, rep=300, quantiles=[0.2, 0.5, 0.8]), peak


def rows(peers: bool) -> list[dict[str, object]]:
    """All measurements, one dictionary of ``COLUMNS`` each."""
    bandwidth = copy_bandwidth()
    machine = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    found = []
    for case, (B, L, D, W) in CASES.items():
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            x = torch.randn(B, L, D, device="cuda", dtype=dtype, requires_grad=True)
            weight, bias = (torch.randn(s, device="cuda", requires_grad=True) for s in ((D, W), (D,)))
            dy = torch.randn_like(x)
            truth = causal_conv1d(x[:1].double(), weight.double(), bias.double(), activation="silu", backend="torch")
            for provider, function in providers(W, peers).items():
                error = (function(x, weight, bias)[:1] - truth).abs().max() / truth.abs().max()
                if error > 8 * torch.finfo(dtype).eps + 1e-5:
                    print(f"{case} {provider} {dtype}: error {error:.2g}, no row", file=sys.stderr)
                    continue
                for mode, moved in (("forward", 2), ("backward", 3)):
                    quantiles, peak = _time(mode, function, x, weight, bias, dy)
                    found.append(
                        {
                            "op": "causal_conv1d", "case": case, "provider": provider, "mode": mode,
                            "dtype": str(dtype).removeprefix("torch."),
                            **{f"ms_p{p}": f"{ms:.4f}" for p, ms in zip((20, 50, 80), quantiles, strict=True)},
                            "floor_ms": f"{moved * x.numel() * x.element_size() / bandwidth:.4f}",
                            "peak_mib": f"{peak:.1f}", **machine,
                        }
                    )  # fmt: skip
                    print(*(found[-1][c] for c in COLUMNS[:10]), sep="\t")
    return found


def _time(
    mode: str, function: Convolution, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> tuple[list[float], float]:
    leaves = [x, weight, bias]
    if mode == "forward":
        with torch.no_grad():
            return measure(lambda: function(x, weight, bias))
    y = function(x, weight, bias)
    return measure(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also time causal_conv1d and fla where they are installed")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.causal_conv1d: found no GPU, wanted an NVIDIA GPU; run it on a machine that has one")
        sys.exit(2)
    found = rows(options.peers)
    if options.output is not None:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
