"""Times collectives between GPUs: what ``benchmarks.scale_model`` takes for their latency and speed.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.scale_links [--write] [--largest MIB]

A row is a collective of so many bytes (what every GPU has afterwards, or had before), one after another on the GPU;
the table adds the speed at which a GPU sends: (N - 1) / N of the bytes, twice that for an all-reduce. ``host`` is the
time that the host takes to launch one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import Timing, row, write

RUNS = 20  # of a collective, one after another
SIZES = [2**10, 2**16, 2**20, 2**24, 48 * 2**20, 2**28]
Collective = Callable[[Tensor, Tensor], object]  # of all bytes and of this rank's share
COLLECTIVES: dict[str, Collective] = {
    "all_reduce": lambda whole, share: dist.all_reduce(whole),
    "all_gather": lambda whole, share: dist.all_gather_into_tensor(whole, share),
    "reduce_scatter": lambda whole, share: dist.reduce_scatter_tensor(share, whole),
}


def milliseconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """What a call takes among others, and what the host takes to launch it."""
    for _ in range(3):
        call()
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(RUNS):
            call()
        taken = 1e3 * (time.perf_counter() - start) / RUNS
        return taken, taken
    torch.cuda.synchronize()
    dist.barrier()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    begin.record()
    for _ in range(RUNS):
        call()
    end.record()
    host = 1e3 * (time.perf_counter() - start) / RUNS
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / RUNS, host


def main() -> None:
    """Runs the benchmark in one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=256.0, help="MiB")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/scale_links.csv")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("wanted several processes; start it with torchrun --nproc_per_node 2 -m benchmarks.scale_links")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    size, rows = dist.get_world_size(), []
    for name, collective in COLLECTIVES.items():
        for count in (count for count in SIZES if count <= options.largest * 2**20):
            whole = torch.zeros(count // 2, dtype=torch.bfloat16, device=device)
            share = torch.zeros(count // 2 // size, dtype=torch.bfloat16, device=device)
            taken, host = milliseconds(lambda: collective(whole, share), device)  # noqa: B023  called at once
            if dist.get_rank() == 0:
                timing = Timing(taken, taken, taken, 0.0)
                rows.append(row("scale_links", f"{name}/{count}/{size}", "nccl", "forward", whole.dtype, timing, 0.0,
                                device.type))  # fmt: skip
                sent = count * (size - 1) / size * (2 if name == "all_reduce" else 1)
                print(
                    f"    {name} {count / 1024:,.0f} KiB: {1e-6 * sent / taken:.1f} GB/s, host {host:.4f} ms",
                    flush=True,
                )
    if rows and options.write:
        write("scale_links", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
