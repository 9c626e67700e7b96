"""Timing on the CPU: wall-clock percentiles, the peak of resident memory, the processor's name."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SECONDS = 2.0
ROUNDS = 6  # of `in_turns`


def in_turns(
    functions: dict[str, Callable[[], object]], seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """The times of all functions by name, in milliseconds, taken in turns: others on the machine disturb all alike.

    Each turn calls a function once untimed, which fills the caches for it, and then for a sixth of ``seconds``. One
    that takes longer than ``seconds`` is called once.

    Args:
        functions: What is timed.
        seconds: For each function.
        clock: ``time.thread_time`` counts the processor's time of this thread alone, where others disturb.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}

    def call(name: str) -> float:
        start = clock()
        functions[name]()
        return clock() - start

    for _ in range(ROUNDS):
        for name in functions:
            if found[name] and found[name][0] > seconds * 1e3:
                continue
            total, first = 0.0, call(name)
            if first > seconds:
                found[name] = [first * 1e3]
                continue
            while total < seconds / ROUNDS:
                total += (taken := call(name))
                found[name].append(taken * 1e3)
    return found


def milliseconds(function: Callable[[], object]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile of the calls that fit in ``SECONDS``; of 3 if slow, of 1 if very slow."""
    found: list[float] = []
    while (total := sum(found) / 1e3) < SECONDS or (len(found) < 3 and total < 5 * SECONDS):
        start = time.perf_counter()
        function()
        found.append((time.perf_counter() - start) * 1e3)
    low, middle, high = np.percentile(found, [20, 50, 80])
    return float(low), float(middle), float(high)


def peak_mib(function: Callable[[], object]) -> float:
    """MiB by which resident memory grew at most during one call; not a number where the kernel isn't Linux."""
    if sys.platform != "linux":
        return float("nan")

    def status(field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])

    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = status("VmRSS")
    function()
    return max(0, status("VmHWM") - before) / 2**10


def name() -> str:
    """The processor's name as the system gives it."""
    information = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", information.read_text() if information.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()
