"""Measures images per second and memory of any model of timm: ``python -m vision.benchmark MODEL...``."""

import csv
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.cli import run
from core.env import device_name, find_device
from core.errors import UserError
from core.training.report import Report
from vision.command import Precision, autocast, output_folder, steps
from vision.module import build
from vision.trained import count_parameters


def benchmark(
    models: list[str],
    img_size: list[int] = [224],  # noqa: B006  read only
    batch_size: list[int] = [128],  # noqa: B006  read only
    mode: Literal["infer", "train", "both"] = "both",
    precision: Precision = "bf16",
    compile: bool = False,
    seconds: float = 3.0,
    device: str = "auto",
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Prints a table of throughput and memory, and writes it to benchmark.csv and a page, report.html.

    A training step is forward, cross-entropy, backward and an AdamW step, on random images that are on the device
    already. The figure is the median over all steps; memory is the peak that torch has allocated on a GPU.

    Args:
        models: Names of models of timm, ours and others.
        img_size: Sides of the images in pixels, as in [224,512].
        batch_size: Images at a time, as in [1,128]; fewer where memory is short on a CPU.
        mode: infer, train, or both.
        precision: fp32, or autocast in bf16 or fp16.
        compile: Compile the models with torch.compile.
        seconds: How long each measurement lasts at least, after warming up.
        device: cpu, cuda, or auto for the GPU if there is one.
        out: Folder to write to instead of the next one in runs/vision/benchmark.
        overwrite: Replace what an earlier run has written to that folder.
    """
    for option, values in (("img_size", img_size), ("batch_size", batch_size)):
        if not values or min(values) < 1:
            raise UserError(f"--{option} is {values}, wanted positive numbers, as in [224,512]")
    place = find_device(device)
    if unknown := [name for name in models if not timm.is_model(name)]:
        build(unknown[0], None, {}, prefix="--")  # which says what is meant
    modes = ["infer", "train"] if mode == "both" else [mode]
    cases = [(name, size, batch, m) for name in models for size in img_size for batch in batch_size for m in modes]
    rows = []
    with output_folder("benchmark", out, overwrite) as folder:
        for name, size, batch, m in steps(cases, len(cases), "measurements"):
            rows.append(measure(name, size, batch, m, precision, compile, seconds, place))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        write(folder, rows, {"device": device_name(place), "torch": torch.__version__, "precision": precision})


def measure(
    name: str, size: int, batch: int, mode: str, precision: str, compile: bool, seconds: float, device: torch.device
) -> dict[str, Any]:
    """One row of the table: throughput, milliseconds a step, memory, parameters and FLOPs of an image."""
    fixed = {"img_size": size} if _fixed(name) else {}
    net = build(name, None, fixed, prefix="--").to(device)
    net.train(mode == "train")
    row: dict[str, Any] = {
        "model": name, "mode": mode, "img_size": size, "batch_size": batch, "precision": precision,
        "compiled": compile, "images_per_s": "", "ms": "", "peak_mib": "", "note": "",
        "parameters_m": round(count_parameters(net) / 1e6, 3), "gflops": "",
    }  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step = _step(net, size, batch, mode, precision, device)
        if mode == "infer":
            row["gflops"] = round(_flops(step) / batch / 1e9, 3)
        if compile:
            net.compile()
        times = _times(step, seconds, device)
    except torch.cuda.OutOfMemoryError:
        row["note"] = "out of memory"
    except (ValueError, AssertionError, RuntimeError) as error:
        row["note"] = " ".join(str(error).split())[:120]
    else:
        ms = 1000 * statistics.median(times)
        row |= {"images_per_s": round(1000 * batch / ms, 1), "ms": round(ms, 3)}
        if device.type == "cuda":
            row["peak_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return row


def _fixed(name: str) -> bool:
    """Whether a model's size is fixed when it is built."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and bool(cfg.fixed_input_size)


def _step(net: nn.Module, size: int, batch: int, mode: str, precision: str, device: torch.device) -> Any:
    """A function that runs one step."""
    channels = int(getattr(net, "in_chans", 3))
    images = torch.randn(batch, channels, size, size, device=device)
    if mode == "infer":

        def infer() -> None:
            with torch.inference_mode(), autocast(precision, device):
                net(images)

        return infer
    labels = torch.randint(int(net.num_classes), (batch,), device=device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=device.type == "cuda")

    def train() -> None:
        with autocast(precision, device):
            loss = F.cross_entropy(net(images), labels)
        with torch.autograd.set_multithreading_enabled(False):  # as TrainingModule does
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def _flops(step: Any) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def _times(step: Any, seconds: float, device: torch.device) -> list[float]:
    """Seconds of each step; the first ones, which compile and warm up, are left out."""

    def timed() -> float:
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    for _ in range(3):
        timed()
    times, begin = [], time.perf_counter()
    while not times or (time.perf_counter() - begin < seconds and len(times) < 1000):
        times.append(timed())
    return times


def write(folder: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Writes the table."""
    with (folder / "benchmark.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *(f for f in facts if f not in rows[0])])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    best = max(rows, key=lambda row: row["images_per_s"] or 0)
    report = Report("vision benchmark", str(best["images_per_s"]), f"images a second: {best['model']}, {best['mode']}")
    report.table("Throughput and memory", rows, "Medians over all steps.")
    report.facts("Machine", facts)
    report.write(folder / "report.html")


if __name__ == "__main__":
    run(benchmark)
