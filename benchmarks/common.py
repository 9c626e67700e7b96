"""What every benchmark shares: timing, the floors that memory and special functions set, and the rows of the CSV files.

A row says what was timed (op, case, provider, mode, dtype), how long it took (20th, 50th and 80th percentile), the
floor, the peak of memory, and on what (GPU, versions, date). The provider is an import name.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

RESULTS = Path(__file__).parent / "results"
EXPONENTIALS = 16  # a clock and multiprocessor, on every NVIDIA GPU since Volta


@dataclass(frozen=True)
class Timing:
    """Milliseconds at three percentiles, and the peak of memory above what was held before, in MiB."""

    ms_p20: float
    ms_p50: float
    ms_p80: float
    peak_mib: float


@dataclass(frozen=True)
class Row:
    """One line of ``results/<op>.csv``."""

    op: str
    case: str
    provider: str
    mode: str
    dtype: str
    ms_p20: str
    ms_p50: str
    ms_p80: str
    floor_ms: str
    peak_mib: str
    gpu: str
    torch: str
    triton: str
    date: str


def require_gpu(name: str) -> None:
    """Ends the program with one message where there is no GPU.

    Args:
        name: The benchmark, for the message.
    """
    if not torch.cuda.is_available():
        message = f"benchmarks.{name}: found no GPU, wanted an NVIDIA GPU; run it on a machine that has one"
        print(message, file=sys.stderr)
        sys.exit(2)


def installed(module: str) -> bool:
    """Whether a peer can be imported; does not import it."""
    return importlib.util.find_spec(module) is not None


def measure(function: Callable[[], object]) -> Timing:
    """Times ``function`` with CUDA events between clearings of the L2 cache."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    low, middle, high = do_bench(function, warmup=50, rep=300, quantiles=[0.2, 0.5, 0.8])
    return Timing(low, middle, high, peak)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a millisecond that a copy of 1 GiB reads and writes, measured."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median")


@functools.cache
def exponential_rate() -> float:
    """Exponentials a millisecond at the highest clock."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return EXPONENTIALS * properties.multi_processor_count * properties.clock_rate


def floor(moved: float, exponentials: float = 0) -> float:
    """The larger of the times that memory and the special functions need at least, in milliseconds.

    Args:
        moved: Bytes that must be read and written.
        exponentials: How many there are.
    """
    return max(moved / copy_bandwidth(), exponentials / exponential_rate())


def row(op: str, case: str, provider: str, mode: str, dtype: torch.dtype, timing: Timing, floor_ms: float) -> Row:
    """A row of this machine, today; also printed.

    Args:
        op: The op, which names the file.
        case: The shape; ``target/...`` for one with a stated target.
        provider: Import name.
        mode: ``forward`` or ``backward`` (alone).
        dtype: Dtype of the inputs.
        timing: What ``measure`` returned.
        floor_ms: What ``floor`` returned.
    """
    numbers = {name: f"{value:.4f}" for name, value in asdict(timing).items()}
    made = Row(
        op=op, case=case, provider=provider, mode=mode, dtype=str(dtype).removeprefix("torch."), **numbers,
        floor_ms=f"{floor_ms:.4f}", gpu=torch.cuda.get_device_name(), torch=torch.__version__,
        triton=triton.__version__, date=datetime.date.today().isoformat(),
    )  # fmt: skip
    print(*list(asdict(made).values())[:10], sep="\t", flush=True)
    return made


def write(op: str, rows: Iterable[Row]) -> Path:
    """Writes ``results/<op>.csv`` anew and returns its path.

    Args:
        op: Name of the file.
        rows: Its lines.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{op}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)
    return path
