"""How fast a run is: items and tokens per second, FLOP/s, and the share of the device's peak (MFU)."""

import time
from collections import deque
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.flop_counter import FlopCounterMode

from core.parallel.group import data_ranks
from core.training.module import TrainingModule

# Dense peaks in FLOP/s from the makers' data sheets: (part of the device's name, {dtype: peak}); first match counts.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1120e12, "fp32": 75e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51e12}),
    ("H100 NVL", {"bf16": 835e12, "fp16": 835e12, "tf32": 417e12, "fp32": 60e12}),
    ("H100", {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    ("H200", {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    ("GH200", {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    ("A100", {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
    ("A10G", {"bf16": 70e12, "fp16": 70e12, "tf32": 35e12, "fp32": 31e12}),
    ("L40S", {"bf16": 362e12, "fp16": 362e12, "tf32": 183e12, "fp32": 91e12}),
    ("L4", {"bf16": 121e12, "fp16": 121e12, "tf32": 60e12, "fp32": 30e12}),
    ("RTX 4090", {"bf16": 165e12, "fp16": 165e12, "tf32": 82e12, "fp32": 82e12}),
    ("RTX 3090", {"bf16": 71e12, "fp16": 71e12, "tf32": 35e12, "fp32": 35e12}),
    ("V100", {"fp16": 125e12, "fp32": 15.7e12}),
    ("T4", {"fp16": 65e12, "fp32": 8.1e12}),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return a GPU's dense peak in FLOP/s, or None where it is not known.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it.
        precision: The trainer's precision, such as ``bf16-mixed`` or ``32-true``.
    """
    if precision.startswith("bf16"):
        dtype = "bf16"
    elif precision.startswith("16"):
        dtype = "fp16"
    elif precision.startswith("32"):
        dtype = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    else:
        return None
    for part, peaks in PEAKS:
        if part in device_name.replace("-", " "):
            return peaks.get(dtype)
    return None


class Throughput(Callback):
    """Logs ``train/<items>_per_s``, ``train/tokens_per_s`` and ``train/mfu`` (``train/gflops_per_s`` without a peak).

    The FLOPs are counted once, during the first step of the run, forward, backward and all; the first steps, which
    compile, are left out of the rates. Rates are over all processes, MFU is per device.

    Args:
        window: Steps over which the rates are averaged.
    """

    def __init__(self, window: int = 50) -> None:
        self.flops_per_item: float | None = None
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=window)
        self._counter: FlopCounterMode | None = None
        self._seen = 0
        self._last: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:  # pyright: ignore
        """Look up what the device can do."""
        cuda = pl_module.device.type == "cuda"
        name = torch.cuda.get_device_name(pl_module.device) if cuda else ""
        self._peak = peak_flops(name, str(trainer.precision))
        self._seen, self._last = 0, None
        self._steps.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: TrainingModule, batch: Any, batch_idx: int) -> None:  # pyright: ignore
        """Start counting FLOPs at the first batch, and the clock after a pause."""
        if self._seen == 0 and self.flops_per_item is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        if self._last is None:
            self._last = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: TrainingModule,  # pyright: ignore
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take the time of the step and log the rates."""
        self._seen += 1
        items, tokens = pl_module.batch_items(batch), pl_module.batch_tokens(batch) or 0
        if self._counter is not None:
            flops = self._counter.get_total_flops()
            self._stop_counting()
            self.flops_per_item = flops / items
        now = time.perf_counter()
        if self._seen > 2 and self._last is not None:
            self._steps.append((now - self._last, items, tokens))
        self._last = now
        if self._steps:
            for name, value in self._rates(trainer, pl_module).items():
                # A tensor on the CPU: a number would be copied to the GPU, for which the host waits.
                pl_module.log(f"train/{name}", torch.tensor(value), prog_bar=True, batch_size=items)

    def _rates(self, trainer: Trainer, pl_module: TrainingModule) -> dict[str, float]:
        seconds = sum(step[0] for step in self._steps)
        items = sum(step[1] for step in self._steps) / seconds
        tokens = sum(step[2] for step in self._steps) / seconds
        rates = {f"{pl_module.item_name}_per_s": items * data_ranks()[1]}
        if tokens:
            rates["tokens_per_s"] = tokens * data_ranks()[1]
        flops = items * (self.flops_per_item or 0.0)
        if flops and self._peak:
            rates["mfu"] = flops / self._peak
        elif flops:
            rates["gflops_per_s"] = flops / 1e9
        return rates

    def on_validation_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:  # pyright: ignore
        """Stop the clock: validation is no training."""
        self._last = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainingModule) -> None:  # pyright: ignore
        """Stop the clock between epochs."""
        self._last = None

    def on_exception(self, trainer: Trainer, pl_module: TrainingModule, exception: BaseException) -> None:  # pyright: ignore
        """Leave the counting mode, which would otherwise stay on for the whole process."""
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
