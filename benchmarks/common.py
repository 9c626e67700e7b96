"""What every benchmark shares: timing, the floors that memory and special functions set, and the rows of the CSV files.

A row says what was timed (op, case, provider, mode, dtype), how long it took (20th, 50th and 80th percentile), the
floor, the peak of memory, and on what (GPU or processor, versions, date). The provider is an import name.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import processor

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
    """One line of ``results/<op>.csv``; ``gpu`` holds the processor's name where no GPU was used."""

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
    """Ends the program where there is no GPU, with one message that names the benchmark."""
    if not torch.cuda.is_available():
        message = f"benchmarks.{name}: found no GPU, wanted an NVIDIA GPU; run it on a machine that has one"
        print(message, file=sys.stderr)
        sys.exit(2)


def installed(module: str) -> bool:
    """Whether a peer can be imported; does not import it."""
    return importlib.util.find_spec(module) is not None


def measure(function: Callable[[], object], device: str = "cuda", runs: int = 30) -> Timing:
    """Times ``function``: on the GPU by ``device_milliseconds`` in so many runs, by the clock on the CPU."""
    function()
    if device == "cpu":
        peak = processor.peak_mib(function)
        return Timing(*processor.milliseconds(function), peak)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return Timing(*device_milliseconds(function, runs), peak)


def device_milliseconds(function: Callable[[], object], runs: int = 30) -> list[float]:
    """20th, 50th and 80th percentile of the GPU's time for ``function``, each time with a cleared L2 cache.

    The GPU sleeps first, so that the host has launched everything by the time it starts: the host's own time, which
    short calls are bound by, is left out for every provider alike.
    """
    cache, times = torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), []
    for _ in range(runs):
        cache.zero_()
        torch.cuda._sleep(4_000_000)  # cycles, about 2 ms
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def steps_in_a_row(step: Callable[[], object], runs: int) -> Timing:
    """Times a step among others on the GPU, the host's time included where it limits, and all memory at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = torch.tensor([a.elapsed_time(b) for a, b in itertools.pairwise(events)])
    return Timing(*times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist(), torch.cuda.max_memory_allocated() / 2**20)


@functools.cache
def copy_bandwidth(device: str = "cuda") -> float:
    """Bytes a millisecond that a copy of 1 GiB (256 MiB on the CPU) reads and writes, measured."""
    source = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source), device).ms_p50


@functools.cache
def exponential_rate() -> float:
    """Exponentials a millisecond of the GPU at its highest clock."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return EXPONENTIALS * properties.multi_processor_count * properties.clock_rate


def floor(moved: float, exponentials: float = 0, device: str = "cuda") -> float:
    """The larger of the times that memory and the special functions need at least, in milliseconds.

    Args:
        moved: Bytes that must be read and written.
        exponentials: How many there are; counted on a GPU only.
        device: ``cuda`` or ``cpu``.
    """
    memory = moved / copy_bandwidth(device)
    return memory if device == "cpu" else max(memory, exponentials / exponential_rate())


def _machine(device: str) -> dict[str, str]:
    """The columns that say on what a row was measured."""
    if device == "cpu":
        name, triton = f"{processor.name()}, {torch.get_num_threads()} threads", ""
    else:
        import triton as package

        name, triton = torch.cuda.get_device_name(), package.__version__
    return {"gpu": name, "torch": torch.__version__, "triton": triton, "date": datetime.date.today().isoformat()}


def row(
    op: str, case: str, provider: str, mode: str, dtype: torch.dtype, timing: Timing, floor_ms: float,
    device: str = "cuda",
) -> Row:  # fmt: skip
    """A row of this machine, today; also printed.

    Args:
        op: The op, which names the file.
        case: The shape; ``target/...`` for one with a stated target.
        provider: Import name.
        mode: ``forward``, ``backward`` (alone) or ``forward_backward`` (both, as in training).
        dtype: Dtype of the inputs.
        timing: What ``measure`` returned.
        floor_ms: What ``floor`` returned.
        device: ``cuda`` or ``cpu``.
    """
    numbers = {name: f"{value:.4f}" for name, value in asdict(timing).items()}
    made = Row(
        op=op, case=case, provider=provider, mode=mode, dtype=str(dtype).removeprefix("torch."), **numbers,
        floor_ms=f"{floor_ms:.4f}", **_machine(device),
    )  # fmt: skip
    print(*list(asdict(made).values())[:10], sep="\t", flush=True)
    return made


def time_passes(
    op: str, case: str, provider: str, function: Callable[[], Tensor | tuple[Tensor, ...]], leaves: list[Tensor],
    floors: dict[str, float],
) -> list[Row]:  # fmt: skip
    """Rows of one provider on a GPU, one a mode.

    Args:
        op: As in ``row``, like case and provider.
        case: See op.
        provider: See op.
        function: The forward.
        leaves: What gets gradients; the first one's dtype is the row's.
        floors: Milliseconds by mode, forward or backward: these are timed.
    """

    def forward() -> tuple[Tensor, ...]:
        found = function()
        return found if isinstance(found, tuple) else (found,)

    with torch.set_grad_enabled("backward" in floors):  # else no graph stays in memory
        outputs = forward()
    grads = [torch.randn_like(t) for t in outputs]
    made = []
    for mode, floor_ms in floors.items():
        with torch.set_grad_enabled(mode != "forward"):
            if mode == "forward":
                timing = measure(forward)
            else:
                timing = measure(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True))
        made.append(row(op, case, provider, mode, leaves[0].dtype, timing, floor_ms))
    return made


def time_in_turns(
    op: str, case: str, mode: str, forwards: dict[str, tuple[Callable[[], Tensor | tuple[Tensor, ...]], list[Tensor]]],
    floor_ms: float, seconds: float = processor.SECONDS, clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Row], dict[str, list[float]]]:  # fmt: skip
    """Rows of several providers on the CPU, which take turns, and all their times in milliseconds.

    Args:
        op: As in ``row``, like case and floor_ms.
        case: See op.
        mode: ``forward`` or ``forward_backward``.
        forwards: By provider the forward, and what gets gradients; the first one's dtype is the row's.
        floor_ms: See op.
        seconds: As in ``processor.in_turns``, like clock.
        clock: See seconds.
    """

    def call(function: Callable[[], Tensor | tuple[Tensor, ...]], leaves: list[Tensor]) -> Callable[[], object]:
        if mode == "forward":
            return torch.no_grad()(function)
        outputs = function()
        grads = [torch.randn_like(t) for t in (outputs if isinstance(outputs, tuple) else (outputs,))]
        return lambda: torch.autograd.grad(function(), leaves, grads)

    calls = {name: call(*given) for name, given in forwards.items()}
    peaks = {name: processor.peak_mib(c) for name, c in calls.items()}
    times, made = processor.in_turns(calls, seconds, clock), []
    for name, found in times.items():
        timing = Timing(*torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist(), peaks[name])
        made.append(row(op, case, name, mode, forwards[name][1][0].dtype, timing, floor_ms, "cpu"))
    return made, times


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
