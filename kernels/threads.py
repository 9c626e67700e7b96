"""Runs a compiled function over many tasks on a few threads: the parallelism of all CPU kernels.

Numba's own parallel mode is not used: its thread pool dies in a process that was forked after a parallel call, which
is what PyTorch's data loader does. Here the pool belongs to one process id and is made anew after a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch.utils.data import get_worker_info

FEW = 1 << 16  # numbers that one thread works on alone

_lock = threading.Lock()
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # process id, threads, executor


@functools.cache
def _c() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None)


def _elsewhere(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` for another thread, which first leaves this thread's processor to it.

    Linux may wake a thread on the processor of the one that woke it and leave both there for milliseconds, while
    another processor is idle.
    """
    if sys.platform != "linux":
        return work
    others = os.sched_getaffinity(0) - {_c().sched_getcpu()}

    def moved() -> None:
        if others and os.sched_getaffinity(0) != others:
            with contextlib.suppress(OSError):  # the processors may have been taken away meanwhile
                os.sched_setaffinity(0, others)
        work()

    return moved


def _submit(count: int, size: int, work: Callable[[], None]) -> list[Future[None]]:
    """Starts ``work`` on ``count`` of the ``size`` threads of this process's pool.

    A pool of another size, or one that a fork left without its threads, is replaced. Submitting under the lock keeps
    another thread from replacing the pool in between.
    """
    global _pool
    with _lock:
        if _pool is None or _pool[:2] != (os.getpid(), size):
            if _pool is not None and _pool[0] == os.getpid():
                _pool[2].shutdown(wait=False)  # what was submitted still runs
            _pool = (os.getpid(), size, ThreadPoolExecutor(size, thread_name_prefix="triscan"))
        return [_pool[2].submit(work) for _ in range(count)]


def _reset_after_fork() -> None:
    """The child's lock: the parent's may have been held by another thread at the moment of the fork."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def run(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> None:
    """Calls ``function(*task)`` for each task, on ``torch.get_num_threads()`` threads, and waits for all of them.

    The tasks may run in any order and at the same time, so each must write its own part of the output. With one
    thread, one task, or inside a data-loader worker they run one after the other in the calling thread.

    Args:
        function: A function that releases the GIL (``numba.njit(nogil=True)``).
        tasks: One tuple of arguments per call. Put long ones first.

    Raises:
        Exception: The first error that a call raised.
    """
    threads = 1 if get_worker_info() is not None else torch.get_num_threads()
    queue = iter(list(tasks))

    def drain() -> None:
        for task in queue:  # a list's iterator hands each task to exactly one thread
            function(*task)

    helpers = min(threads, len(tasks)) - 1
    futures = _submit(helpers, threads - 1, _elsewhere(drain)) if helpers > 0 else []
    try:
        drain()
    finally:
        wait(futures)
    for future in futures:
        future.result()


def parts(jobs: int) -> list[tuple[int, int]]:
    """``range(jobs)`` in contiguous ranges (first, last), a few per thread: tasks for functions that loop over jobs."""
    count = min(jobs, 4 * torch.get_num_threads())
    return [(jobs * i // count, jobs * (i + 1) // count) for i in range(count)]


def over(function: Callable[..., Any], arguments: tuple[Any, ...], jobs: int, numbers: int) -> None:
    """Calls ``function(*arguments, first, last)`` on ranges that make up ``range(jobs)``; see ``run``.

    Args:
        function: As in ``run``.
        arguments: Its others.
        jobs: How many there are.
        numbers: That all of them work on; where these are few, another thread would take longer to wake up.
    """
    if numbers < FEW or jobs == 1 or torch.get_num_threads() == 1:
        function(*arguments, 0, jobs)
    else:
        run(function, [(*arguments, *part) for part in parts(jobs)])
