"""S4D over long sequences, time and memory beside the naive way: ``python -m benchmarks.s4d --lengths 131072 1048576``.

``triscan`` is ``kernels.diagonal_ssm``; ``convolution`` its kernel by ``vandermonde`` and a convolution by FFT;
``naive`` forms the Vandermonde matrix, as published implementations without a custom kernel do, and convolves by FFT.
``mib`` is the most memory beyond inputs, outputs and gradients.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from core.mixers.hyena_filter import long_convolution
from kernels import diagonal_ssm
from kernels.diagonal_ssm import vandermonde


def naive(u: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The Vandermonde matrix in full, then FFTs."""
    length = u.shape[1]
    K = 2 * torch.einsum("hm,hml->hl", B * C, torch.exp(log_a[..., None] * torch.arange(length, device=u.device))).real
    return torch.fft.irfft(torch.fft.rfft(u.mT, 2 * length) * torch.fft.rfft(K, 2 * length), 2 * length)[
        ..., :length
    ].mT


def convolution(u: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The kernel by products of small Vandermonde matrices, then FFTs."""
    return long_convolution(u, vandermonde(log_a, B * C, u.shape[1]).t(), u.shape[1])


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "triscan": lambda *t: diagonal_ssm(*t)[0],
    "convolution": convolution,
    "naive": naive,
}


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[len(times) // 2]


def case(provider: str, batch: int, length: int, channels: int, states: int, repeats: int) -> list[object]:
    """Milliseconds of forward, and of forward and backward, and MiB of both beyond inputs, outputs and gradients."""
    run = PROVIDERS[provider]
    torch.manual_seed(0)
    half = states // 2
    dt = torch.exp(torch.empty(channels, 1, device="cuda").uniform_(-6.9, -2.3))
    log_a = torch.complex(-0.5 * dt.expand(-1, half), dt * torch.arange(half, device="cuda") * 3.14159)
    B, C = (torch.randn(channels, half, dtype=torch.complex64, device="cuda") for _ in range(2))
    u = torch.randn(batch, length, channels, device="cuda")
    given = [t.requires_grad_() for t in (u, log_a, B, C)]
    dy = torch.randn_like(u)

    def both() -> None:
        torch.autograd.backward(run(*given), dy)
        for t in given:
            t.grad = None

    with torch.no_grad():
        forward = timed(lambda: run(*given), repeats)
    total = timed(both, repeats)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before - 2 * u.numel() * u.element_size()  # y and the gradient of u
    return [f"{forward:.3f}", f"{total:.3f}", f"{peak / 2**20:.0f}"]


def main() -> None:
    """Prints one row of CSV for each case, as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1 << 14, 1 << 16, 1 << 17, 1 << 20])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    a = parser.parse_args()
    writer = csv.writer(sys.stdout)
    writer.writerow(["batch", "length", "channels", "states", "provider", "forward_ms", "both_ms", "mib", "gpu"])
    for length in a.lengths:
        for provider in a.providers:
            try:
                row = case(provider, a.batch, length, a.channels, a.states, a.repeats)
            except torch.OutOfMemoryError:
                row = ["out of memory"] * 3
            name = torch.cuda.get_device_name()
            writer.writerow([a.batch, length, a.channels, a.states, provider, *row, name])
            sys.stdout.flush()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
