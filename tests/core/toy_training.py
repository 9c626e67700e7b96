"""A training module and data small enough to run a whole recipe in a second; used by the tests of training."""

import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from core.cli import main
from core.errors import UserError
from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report
from core.training.rng import ResumableLoader

RECIPE = """# Points in the plane.
seed_everything: 0
model:
  optimizer: {lr: 1e-2}
  schedule: {warmup_epochs: 0.5}
trainer: {max_epochs: 4, accelerator: cpu, devices: 1, log_every_n_steps: 1}
ema_decay: 0.9
"""


OPTIMIZER = OptimizerOptions()
SCHEDULE = ScheduleOptions()


class Points(LightningDataModule):
    """Random points, labelled by the sign of their first coordinate.

    Args:
        n: Number of points.
        fail: Where to fail: in ``setup``, or at an item of the training set.
        workers: Processes that load training batches.
    """

    def __init__(self, n: int = 44, fail: str | None = None, workers: int = 0) -> None:
        super().__init__()
        self.n, self.fail, self.workers = n, fail, workers

    def setup(self, stage: str) -> None:
        if self.fail == "setup":
            raise UserError("no folder points; wanted points/train")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.n, 4, generator=generator)
        self.points = TensorDataset(x, (x[:, 0] > 0).long())

    def train_dataloader(self) -> DataLoader:
        return ResumableLoader(Noisy(self.points, self.fail), batch_size=8, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.points, batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


class Noisy(torch.utils.data.Dataset):
    """Adds noise from the global generator, as augmentation does."""

    def __init__(self, points: TensorDataset, fail: str | None) -> None:
        self.points, self.fail = points, fail

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.fail == "item":
            raise UserError(f"cannot read point {index}")
        x, label = self.points[index]
        return x + 0.1 * torch.randn(4), label


class Toy(TrainingModule):
    """A small classifier.

    Args:
        width: Hidden channels.
        stop_at: Send this process Ctrl-C during that training step.
        optimizer: The optimizer.
        schedule: The schedule.
        compile: Compile the net.
    """

    headline = "test/accuracy"
    item_name = "points"

    def __init__(
        self,
        width: int = 8,
        stop_at: int | None = None,
        optimizer: OptimizerOptions = OPTIMIZER,
        schedule: ScheduleOptions = SCHEDULE,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        if width % 2:
            raise ValueError(f"width is {width}; wanted an even number")
        self.stop_at = stop_at
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 2))

    def loss(self, batch: list[Tensor]) -> Tensor:
        if self.training and self.global_step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def evaluate(self, batch: list[Tensor], stage: str) -> None:
        logits = self.net(batch[0])
        self.log_mean(f"{stage}/loss", F.cross_entropy(logits, batch[1]), batch)
        self.log_mean(f"{stage}/accuracy", (logits.argmax(-1) == batch[1]).float().mean(), batch)

    def predict(self, batch: list[Tensor]) -> list[dict[str, object]]:
        return [{"class": int(label)} for label in self.net(batch[0]).argmax(-1)]

    def add_to_report(self, report: Report) -> None:
        report.text("Toy section", "written by <the domain>")


def train(*arguments: str) -> None:
    """Run ``python -m toy.train`` in this process and this folder, which must hold ``configs/toy``."""
    main("toy", Toy, Points, argv=arguments, configs=Path("configs"))


if __name__ == "__main__":
    main("toy", Toy, Points, configs=Path("configs"))
