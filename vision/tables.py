"""Tables that models keep on a GPU from step to step."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["build_apart"]


def build_apart(build: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What ``build`` makes on a device, in memory that no CUDA graph owns.

    ``torch.compile(mode="reduce-overhead")`` lends its graphs' memory to whatever the thread allocates that runs the
    model, and refuses what is kept there: so a thread of its own builds. During a capture, when other threads may not
    allocate, the table is the graph's own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return build()

    def work() -> Tensor:
        with torch.cuda.device(device):
            table = build()
            torch.cuda.current_stream().synchronize()
        return table

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
