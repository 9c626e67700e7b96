"""Runs a function in several processes joined by gloo."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _enter(
    rank: int, size: int, port: int, backend: str, function: Callable[..., Any], arguments: tuple[Any, ...], out: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=size)
    try:
        out.put((rank, function(rank, size, *arguments), None))
    except Exception:
        out.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, backend: str = "gloo") -> list[Any]:
    """What ``function(rank, size, *arguments)`` returned in each of ``size`` processes; tensors come by value."""
    # A fork has no use of a GPU; where there is none, spawn would only import torch once more in each.
    context = mp.get_context("fork" if backend == "gloo" else "spawn")
    out = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_enter, args=(rank, size, port, backend, function, arguments, out))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    for _ in processes:
        rank, value, error = out.get()
        assert error is None, f"rank {rank}:\n{error}"
        found[rank] = value
    for process in processes:
        process.join()
    return [found[rank] for rank in range(size)]
