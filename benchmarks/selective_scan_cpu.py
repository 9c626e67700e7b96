"""Times the selective scan on the CPU against the Python loop that mamba_ssm falls back to there.

    python -m benchmarks.selective_scan_cpu            # prints
    python -m benchmarks.selective_scan_cpu --write    # and appends to benchmarks/results/selective_scan_cpu.csv

The loop is the published algorithm as it is usually written in PyTorch: all decays and inputs of all positions first,
then one Python step per position. Backward means the backward alone. ``floor_ms`` is the time to read the inputs and
write the outputs once, at the copy bandwidth measured in the same run.

B batch, L tokens, D channels, N state.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import selective_scan

CASES = {
    "target/B2_D384_L1024_N16": (2, 384, 1024, 16),
    "vim_tiny/B8_D384_L197_N16": (8, 384, 197, 16),
    "long/B1_D128_L4096_N16": (1, 128, 4096, 16),
}
COLUMNS = (
    "op", "case", "provider", "mode", "dtype", "ms_p20", "ms_p50", "ms_p80", "floor_ms", "peak_mib",
    "gpu", "torch", "triton", "date",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "selective_scan_cpu.csv"


def python_loop(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """The scan as a loop over materialised ``(B, L, D, N)`` decays and inputs; arguments as ``selective_scan``.

    ``unbind`` is kinder to it than the usual indexing, whose backward fills a whole ``(B, L, D, N)`` at each step.
    """
    dt = F.softplus(dt + dt_bias)
    decays = torch.exp(torch.einsum("bld,dn->bldn", dt, A))
    inputs = torch.einsum("bld,bln,bld->bldn", dt, B.squeeze(2), x)
    h = x.new_zeros(x.shape[0], *A.shape)
    ys = []
    for decay, step, c in zip(decays.unbind(1), inputs.unbind(1), C[:, :, 0].unbind(1), strict=True):
        h = decay * h + step
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return (torch.stack(ys, 1) + x * D) * F.silu(z)


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """This project's scan."""
    return selective_scan(x, dt, A, B, C, D, z, dt_bias, backend="cpu")  # type: ignore[return-value]


def draw(B: int, D: int, L: int, N: int) -> dict[str, Tensor]:
    """Inputs of one case, float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "x": normal(B, L, D),
        "dt": normal(B, L, D),
        "A": -torch.arange(1.0, N + 1).expand(D, N).contiguous(),
        "B": normal(B, L, 1, N),
        "C": normal(B, L, 1, N),
        "D": normal(D),
        "z": normal(B, L, D),
        "dt_bias": normal(D) - 4,
    }
    return {n: t.requires_grad_() for n, t in inputs.items()}


def times(function: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call: after one to warm up, at least 3 and as many as fit in ``seconds``."""
    function()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        found.append((time.perf_counter() - start) * 1e3)
    return sorted(found)


def resident() -> int:
    """Bytes of memory that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def peak(function: Callable[[], object]) -> float:
    """MiB by which the process grew at most during one call, looked at every millisecond."""
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(0, highest - before) / 2**20


def bandwidth() -> float:
    """Bytes a millisecond that a copy reads and writes."""
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    return 2 * source.nbytes / times(lambda: target.copy_(source), 0.5)[0]


def measure(case: str, seconds: float, rate: float) -> list[dict[str, str | float]]:
    """The rows of one case: both providers, forward and backward."""
    inputs = draw(*CASES[case])
    leaves = list(inputs.values())
    bytes_in = sum(t.nbytes for t in leaves)
    rows: list[dict[str, str | float]] = []
    torch.testing.assert_close(scan(**inputs), python_loop(**inputs), rtol=1e-3, atol=1e-3)
    for provider, function in (("triscan", scan), ("torch", python_loop)):

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            with torch.no_grad():
                return function(**inputs)

        y = function(**inputs)
        dy = torch.ones_like(y)

        def backward(y: Tensor = y, dy: Tensor = dy) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, leaves, dy, retain_graph=True)

        floors = {"forward": (bytes_in + y.nbytes) / rate, "backward": (2 * bytes_in + y.nbytes) / rate}
        for mode, call in (("forward", forward), ("backward", backward)):
            found = times(call, seconds)
            p20, p50, p80 = (found[int(len(found) * q)] for q in (0.2, 0.5, 0.8))
            rows.append(
                {
                    "op": "selective_scan", "case": case, "provider": provider, "mode": mode, "dtype": "float32",
                    "ms_p20": round(p20, 3), "ms_p50": round(p50, 3), "ms_p80": round(p80, 3),
                    "floor_ms": round(floors[mode], 3), "peak_mib": round(peak(call), 1),
                    "gpu": f"none ({platform.machine()}, {torch.get_num_threads()} threads)",
                    "torch": torch.__version__, "triton": "",
                    "date": datetime.date.today().isoformat(),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Runs the cases; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Times the selective scan on the CPU.")
    parser.add_argument(
        "--write", action="store_true", help="append the rows to benchmarks/results/selective_scan_cpu.csv"
    )
    parser.add_argument("--case", choices=list(CASES), help="one case only")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each measurement (default: 3)")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, numba {importlib.metadata.version('numba')}, {torch.get_num_threads()} threads")
    rate = bandwidth()
    rows = []
    for case in [arguments.case] if arguments.case else CASES:
        found = measure(case, arguments.seconds, rate)
        rows += found
        for row in found:
            print(f"{case:28} {row['provider']:8} {row['mode']:9} {row['ms_p50']:10.2f} ms {row['peak_mib']:8.1f} MiB")
        for mode in ("forward", "backward"):
            ours, loop = (row["ms_p50"] for row in found if row["mode"] == mode)
            print(f"{case:28} {mode}: {float(loop) / float(ours):.1f} times the loop's speed")
    if arguments.write:
        RESULTS.parent.mkdir(exist_ok=True)
        fresh = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
