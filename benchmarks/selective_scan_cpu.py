"""Times the selective scan on the CPU beside the two ways in which it is usually written in PyTorch, in float32.

    python -m benchmarks.selective_scan_cpu [--write] [--threads N] [--case NAME ...]

``torch_loop`` is the algorithm that mamba_ssm falls back to: the decays and inputs of all positions first, then one
Python step a position. ``torch_parallel`` scans these in log2 L rounds, as mamba.py does (Blelloch 1990), with a
backward that scans the gradients in reverse. Both are written here anew. ``floor_ms`` is the time to read the inputs
and write the outputs once (forward_backward: and the same for the gradients) at the copy bandwidth of the same run.

B batch, L tokens, D channels, N state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, floor, time_passes, write
from kernels import selective_scan

CASES = {  # B, D, L, N
    "target/B2_D384_L1024_N16": (2, 384, 1024, 16),
    "vim_tiny/B8_D384_L197_N16": (8, 384, 197, 16),
    "long/B1_D128_L4096_N16": (1, 128, 4096, 16),
    "memory/B1_D32_L131072_N16": (1, 32, 131072, 16),
}


def terms(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and inputs of the recurrence, both ``(B, L, D, N)``."""
    dt = F.softplus(dt + dt_bias)
    return torch.exp(dt[..., None] * A), (dt * x)[..., None] * B  # B has one group: (B, L, 1, N)


def loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """The scan step by step; the arguments are those of ``selective_scan``.

    ``unbind`` is kinder to it than the usual indexing, whose backward fills a whole ``(B, L, D, N)`` at each step.
    """
    decays, inputs = terms(x, dt, A, B, dt_bias)
    h, ys = x.new_zeros(x.shape[0], *A.shape), []
    for decay, step, c in zip(decays.unbind(1), inputs.unbind(1), C[:, :, 0].unbind(1), strict=True):
        h = decay * h + step
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return (torch.stack(ys, 1) + x * D) * F.silu(z)


def states(decays: Tensor, inputs: Tensor) -> Tensor:
    """All h_t = decays_t h_{t-1} + inputs_t, ``(B, L, ...)``: pairs are joined, scanned, and taken apart again."""
    length = decays.shape[1]
    if length == 1:
        return inputs
    even, odd = slice(0, length - 1, 2), slice(1, length, 2)
    joined = torch.addcmul(inputs[:, odd], decays[:, odd], inputs[:, even])
    h = torch.empty_like(inputs)
    h[:, odd] = states(decays[:, odd] * decays[:, even], joined)
    h[:, 0] = inputs[:, 0]
    torch.addcmul(inputs[:, 2::2], decays[:, 2::2], h[:, 1 : length - 1 : 2], out=h[:, 2::2])
    return h


class ParallelScan(torch.autograd.Function):
    """``states`` with the gradient of the recurrence: g_t = dh_t + decays_{t+1} g_{t+1}."""

    @staticmethod
    def forward(ctx: Any, decays: Tensor, inputs: Tensor) -> Tensor:
        h = states(decays, inputs)
        ctx.save_for_backward(decays, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        decays, h = ctx.saved_tensors
        following = torch.cat([torch.zeros_like(decays[:, :1]), decays[:, 1:].flip(1)], 1)
        g = states(following, grads[0].flip(1)).flip(1)
        return torch.cat([torch.zeros_like(g[:, :1]), g[:, 1:] * h[:, :-1]], 1), g


def parallel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """The scan in parallel rounds; the arguments are those of ``selective_scan``."""
    h = ParallelScan.apply(*terms(x, dt, A, B, dt_bias))
    return (torch.einsum("bldn,bln->bld", h, C[:, :, 0]) + x * D) * F.silu(z)


def ours(**tensors: Tensor) -> Tensor:
    """This project's scan."""
    return selective_scan(**tensors, backend="cpu")  # type: ignore[return-value, arg-type]


PROVIDERS: dict[str, Callable[..., Tensor]] = {"triscan": ours, "torch_loop": loop, "torch_parallel": parallel}


def draw(B: int, D: int, L: int, N: int) -> dict[str, Tensor]:
    """Inputs of one case, float32."""
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(B, L, D),
        "dt": torch.randn(B, L, D),
        "A": -torch.arange(1.0, N + 1).expand(D, N).contiguous(),
        "B": torch.randn(B, L, 1, N),
        "C": torch.randn(B, L, 1, N),
        "D": torch.randn(D),
        "z": torch.randn(B, L, D),
        "dt_bias": torch.randn(D) - 4,
    }
    return {n: t.requires_grad_() for n, t in inputs.items()}


def check(function: Callable[..., Tensor]) -> None:
    """Holds a provider to the reference in float64: values and gradients, of an odd length."""
    inputs = {n: t.detach().double().requires_grad_() for n, t in draw(2, 3, 13, 4).items()}
    outputs = [function(**inputs), selective_scan(**inputs, backend="reference")]  # type: ignore[arg-type]
    torch.testing.assert_close(*outputs)
    got, wanted = (torch.autograd.grad(y.square().sum(), list(inputs.values())) for y in outputs)  # type: ignore
    torch.testing.assert_close(got, wanted)


def measurements(case: str) -> list[Row]:
    """The rows of one case: each provider, forward and both passes."""
    inputs, rows = draw(*CASES[case]), []
    moved = sum(t.nbytes for t in inputs.values()) + inputs["x"].nbytes
    floors = {"forward": floor(moved, device="cpu"), "forward_backward": floor(3 * moved, device="cpu")}
    for provider, function in PROVIDERS.items():
        leaves = list(inputs.values())
        rows += time_passes("selective_scan", case, provider, lambda f=function: f(**inputs), leaves, floors, "cpu")
    for mode in floors:
        times = {r.provider: float(r.ms_p50) for r in rows if r.mode == mode}
        print(*(f"{case} {mode}: {ms / times['triscan']:.1f} times as fast as {n}" for n, ms in times.items()
                if n != "triscan"), sep="\n")  # fmt: skip
    return rows


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/selective_scan_cpu.csv")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch and of the kernels (default: 2)")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these shapes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for function in PROVIDERS.values():
        check(function)
    found = [row for case in options.case for row in measurements(case)]
    if options.write:
        print(write("selective_scan_cpu", found))


if __name__ == "__main__":
    main()
