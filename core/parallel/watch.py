"""What a process does when another one of its job dies: it ends, and says so."""

import os
import sys
import threading
import time

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


def follow_launcher(every: float = 1.0) -> None:
    """End this process once the one that launched it has died: a collective would wait for it for long.

    Does nothing in a process that no launcher started, which may well outlive its shell.

    Args:
        every: Seconds between two looks.
    """
    parent = os.getppid()
    if os.environ.get(LAUNCHER) == str(parent) or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(parent, every), name="follow-launcher", daemon=True).start()


def _follow(parent: int, every: float) -> None:
    while os.getppid() == parent:
        time.sleep(every)
    print(f"error: process {parent}, which launched this one, has died; ending", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may be in a collective, which no exception reaches
