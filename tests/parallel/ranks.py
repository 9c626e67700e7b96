"""Runs functions in several processes that are joined, each call within a time."""

import faulthandler
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRACE = 3.0  # seconds before the time is up at which a process says where it is


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, size: int, port: int, backend: str, calls: Any) -> None:
    """What a process does: it answers one call after another, until there is none."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    joined = False
    while (call := pickle.loads(calls.recv_bytes())) is not None:
        function, arguments, seconds = call
        faulthandler.dump_traceback_later(max(0.1, seconds - GRACE))
        try:
            if not joined:
                if backend == "nccl":
                    torch.cuda.set_device(rank)
                dist.init_process_group(backend, rank=rank, world_size=size)
                joined = True
            answer = function(rank, size, *arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        calls.send_bytes(pickle.dumps(answer))  # plain pickle takes tensors by value
    if joined:
        dist.destroy_process_group()


class Ranks:
    """Processes joined by a backend. They start at the first call, and again after one that failed.

    Args:
        size: Their number.
        backend: gloo, or nccl, by which each has a GPU of its own.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self.backend = size, backend
        self._processes: list[Any] = []
        self._calls: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for calls in self._calls:
            calls.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(20)
        self._end()

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 240.0) -> list[Any]:
        """What ``function(rank, size, *arguments)`` returns in each process.

        Raises:
            AssertionError: If a process raises, dies or takes longer than ``seconds``, which ends all of them; those
                that take longer say where they are.
        """
        if not self._processes:
            self._start()
        until, found = time.monotonic() + seconds, {}
        for calls in self._calls:
            calls.send_bytes(pickle.dumps((function, arguments, seconds)))
        try:
            while len(found) < self.size:
                waiting = {calls: rank for rank, calls in enumerate(self._calls) if rank not in found}
                ready = connection.wait(list(waiting), max(0.0, until - time.monotonic()))
                assert ready, f"ranks {list(waiting.values())} took longer than {seconds} s"
                for calls in ready:
                    rank = waiting[calls]
                    found[rank] = self._answer(rank, calls)
        except BaseException:
            self._end()
            raise
        return [found[rank] for rank in range(self.size)]

    def _answer(self, rank: int, calls: Any) -> Any:
        try:
            value, error = pickle.loads(calls.recv_bytes())
        except EOFError:
            self._processes[rank].join(5)
            raise AssertionError(f"rank {rank} died, exit code {self._processes[rank].exitcode}") from None
        assert error is None, f"rank {rank}:\n{error}"
        return value

    def _start(self) -> None:
        # A fork has no use of a GPU; where there is none, spawn would only import torch once more in each.
        context, port = mp.get_context("fork" if self.backend == "gloo" else "spawn"), free_port()
        for rank in range(self.size):
            own, calls = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, self.backend, calls))
            process.start()
            calls.close()  # so that the end of the process is the end of the pipe
            self._processes.append(process)
            self._calls.append(own)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._calls = [], []


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, size, *arguments)`` returns in each of ``size`` processes that gloo joins."""
    with Ranks(size) as ranks:
        return ranks.run(function, *arguments)
