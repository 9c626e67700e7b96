"""Times what the host does for one call of an op on a GPU: Python, PyTorch's dispatcher, autograd and launches.

    python -m benchmarks.host [--peers] [--write] [--case NAME ...]

Shapes are so small that the GPU waits for the host; ``mamba`` is a whole layer. ``forward`` builds no graph;
``forward_backward`` is a training step's share: the op with a graph, and its gradients. Numbers are of the host's
clock, over calls in a row.

B batch, L tokens, D channels, N state, H heads, P head dim, W conv width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Row, Timing, installed, require_gpu, row, write
from core.mixers.mamba import Mamba
from kernels import causal_conv1d, norm, selective_scan, ssd

CALLS, BATCHES = 20, 30  # calls in a row, after each of which the GPU catches up
Case = tuple[Callable[..., object], list[Tensor]]  # an op, its tensors


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Random leaves on the GPU."""
    return [torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in shapes]


def _layer(module: torch.nn.Module, x: Tensor) -> Case:
    """A layer of its input and parameters, which get gradients beside it."""
    return (lambda x, *_: module(x)), [x, *module.parameters()]


def ours(case: str) -> Case:
    """This project's op."""
    B, L, D, N = 2, 64, 256, 16
    parameters = drawn((D,), (D,), dtype=torch.float32)
    if case == "selective_scan":
        x, dt, z, b, c = drawn((B, L, D), (B, L, D), (B, L, D), (B, L, 1, N), (B, L, 1, N))
        A = (-torch.rand(D, N, device="cuda")).requires_grad_()
        return selective_scan, [x, dt, A, b, c, parameters[0], z, parameters[1]]
    if case == "ssd":
        x, dt, b, c = drawn((B, L, 4, 64), (B, L, 4), (B, L, 1, 64), (B, L, 1, 64))
        A = (-torch.rand(4, device="cuda")).requires_grad_()
        return ssd, [x, dt, A, b, c, *drawn((4,), dtype=torch.float32)]
    (x,) = drawn((B, L, D))
    if case == "causal_conv1d":
        weight, bias = drawn((D, 4), (D,), dtype=torch.float32)
        return (lambda *t: causal_conv1d(*t, activation="silu")), [x, weight, bias]
    if case == "norm":
        return norm, [x, parameters[0]]
    if case == "mamba":
        return _layer(Mamba(D, device="cuda", dtype=torch.bfloat16), x)
    residual = drawn((B, L, D), dtype=torch.float32)[0]
    return (lambda x, w, r: norm(x, w, residual=r, return_residual=True)), [x, parameters[0], residual]


def published(case: str) -> dict[str, Case]:
    """The same work by installed peers, in their layouts."""
    tensors = ours(case)[1]
    found: dict[str, Case] = {}

    def turned(t: Tensor) -> Tensor:
        return t.detach().transpose(1, 2).contiguous().requires_grad_()

    if case == "selective_scan" and installed("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore[import-not-found]

        x, dt, A, b, c, D, z, bias = tensors
        b, c = (turned(t.squeeze(2)) for t in (b, c))
        found["mamba_ssm"] = (
            lambda *t: selective_scan_fn(*t, delta_softplus=True), [turned(x), turned(dt), A, b, c, D, turned(z), bias]
        )  # fmt: skip
    if case == "ssd" and installed("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

        x, dt, A, b, c, D = tensors
        found["mamba_ssm"] = (
            lambda x, dt, A, b, c, D: mamba_chunk_scan_combined(x, dt, A, b, c, 64, D=D, dt_softplus=True), tensors
        )  # fmt: skip
    if case == "causal_conv1d" and installed("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]

        x, *parameters = tensors
        found["causal_conv1d"] = (lambda *t: causal_conv1d_fn(*t, activation="silu"), [turned(x), *parameters])
    if case == "mamba" and installed("mamba_ssm"):
        from mamba_ssm.modules.mamba_simple import Mamba as Published  # type: ignore[import-not-found]

        x = tensors[0]
        found["mamba_ssm"] = _layer(Published(x.shape[-1], device="cuda", dtype=x.dtype), x)
    if case.startswith("norm"):
        if installed("mamba_ssm"):
            from mamba_ssm.ops.triton.layer_norm import rms_norm_fn  # type: ignore[import-not-found]

            add = {"prenorm": True, "residual_in_fp32": True}
            found["mamba_ssm"] = (
                lambda x, w, r=None: rms_norm_fn(x, w, None, residual=r, **(add if r is not None else {})), tensors
            )  # fmt: skip
        if case == "norm":
            found["torch"] = (lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w.to(x.dtype)), tensors)
    return found


CASES = ("selective_scan", "ssd", "causal_conv1d", "norm", "norm_add", "mamba")


def milliseconds(function: Callable[[], object]) -> Timing:
    """The host's time for a call, 20th, 50th and 80th percentile over batches of calls."""
    for _ in range(CALLS):
        function()
    times = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        times.append((time.perf_counter() - start) / CALLS * 1e3)
    torch.cuda.synchronize()
    return Timing(*torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist(), peak_mib=0.0)


def measurements(case: str, provider: str, made: Case) -> list[Row]:
    """The rows of a provider."""
    function, tensors = made

    def forward() -> tuple[Tensor, ...]:
        found = function(*tensors)
        return found if isinstance(found, tuple) else (found,)  # type: ignore[return-value]

    outputs = forward()
    grads = [torch.randn_like(t) for t in outputs]
    with torch.no_grad():
        rows = [row("host", case, provider, "forward", tensors[0].dtype, milliseconds(forward), 0.0)]

    def both() -> object:
        return torch.autograd.grad(forward(), tensors, grads)

    return [*rows, row("host", case, provider, "forward_backward", tensors[0].dtype, milliseconds(both), 0.0)]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also time mamba_ssm and causal_conv1d where installed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/host.csv")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these ops")
    options = parser.parse_args()
    require_gpu("host")
    rows = []
    for case in options.case:
        for provider, made in {"triscan": ours(case), **(published(case) if options.peers else {})}.items():
            rows += measurements(case, provider, made)
    if options.write:
        print(write("host", rows))


if __name__ == "__main__":
    main()
