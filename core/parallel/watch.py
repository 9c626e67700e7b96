"""What a process does when another one of its job dies: it ends, and says so."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

LAUNCHER = "TRISCAN_LAUNCHER"  # the process that starts the others
SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def lost_peer(error: BaseException) -> bool:
    """Whether an error is that other processes do not answer."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def announce_launcher() -> None:
    """Let processes that this one may start know it, unless one started this one."""
    if os.environ.get(LAUNCHER) != str(os.getppid()):
        os.environ[LAUNCHER] = str(os.getpid())


def follow_launcher(go_on: str = "", every: float = 1.0) -> None:
    """End this process once the one that launched it has died: a collective would wait for it for long.

    Does nothing in a process that no launcher started, which may well outlive its shell.

    Args:
        go_on: Said at the end: how to go on.
        every: Seconds between two looks.
    """
    parent = os.getppid()
    if os.environ.get(LAUNCHER) == str(parent) or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(parent, go_on, every), name="follow-launcher", daemon=True).start()


def _follow(parent: int, go_on: str, every: float) -> None:
    while os.getppid() == parent:
        time.sleep(every)
    _end(f"process {parent}, which launched this one, has died; ending{go_on and '; '}{go_on}")


def _end(message: str) -> None:
    """End the process from a thread: the main one may be in a collective, which no exception reaches."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class Peers:
    """Watches the other processes of the job on this machine: GPUs wait for one that has died as for a slow one.

    All processes of the job must make one at the same time.

    Args:
        end: Called, in a thread, with the rank of one that has died, unless the watch is stopped in the meantime.
        every: Seconds between two looks.
        grace: Seconds that an error has to end the main thread, or the watch to be stopped, before ``end`` is called.
    """

    def __init__(self, end: Callable[[int], None], every: float = 1.0, grace: float = 5.0) -> None:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (_machine(), os.getpid(), _begun(os.getpid())))
        own = found[dist.get_rank()]
        self._peers = {rank: peer[1:] for rank, peer in enumerate(found) if peer[0] == own[0] and peer != own}
        self._end, self._every, self._grace = end, every, grace
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watch-peers", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer: the others may end."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._every):
            for rank, (process_id, begun) in self._peers.items():
                if _begun(process_id) != begun:
                    if not self._stopped.wait(self._grace):
                        self._end(rank)
                    return


def _machine() -> tuple[str, int]:
    """What processes have in common that can see each other."""
    space = Path("/proc/self/ns/pid")
    return socket.gethostname(), space.stat().st_ino if space.exists() else 0


def _begun(process_id: int) -> str | None:
    """When a process began, which tells it from a later one of the same number; None: it has ended."""
    try:
        if not Path("/proc/self/stat").exists():  # not Linux
            os.kill(process_id, 0)
            return ""
        state, *fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
