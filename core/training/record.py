"""What a run leaves in its folder: config.yaml, metrics.json, run.json and report.html."""

import csv
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from core import env
from core.training.folder import RunFolder
from core.training.module import TrainingModule
from core.training.report import Report, curves, write_atomically
from core.training.throughput import Throughput


class Record(Callback):
    """Keeps a run's figures, tells its folder that something ran, and writes what it leaves.

    Args:
        folder: The run's folder; None on processes other than rank 0.
        title: Title of the report, such as ``vision digits``.
        command: The command line.
        write_config: Writes the resolved configuration to a file.
        history: Folder of the CSV log.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        title: str,
        command: str,
        write_config: Callable[[Path], None],
        history: Path | None,
    ) -> None:
        self.folder = folder
        self.title = title
        self.command = command
        self.metrics: dict[str, float | None] = {}
        self._write_config = write_config
        self._history = history
        self._begin = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration before anything runs."""
        if self.folder is not None and not (self.folder.path / "config.yaml").exists():
            self._write_config(self.folder.path / "config.yaml")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Something ran: the folder stays."""
        self._start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the figures; the sanity check before training gives none."""
        if not trainer.sanity_checking:
            self._start()
            self._keep(trainer)
            self.write_metrics()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the figures."""
        self._keep(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the figures."""
        self._start()
        self._keep(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Something ran: the folder stays."""
        self._start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what there is."""
        self._keep(trainer)

    def _start(self) -> None:
        if self.folder is not None and not self.folder.started:
            self.folder.start()

    def _keep(self, trainer: Trainer) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.metrics.update({name: value if math.isfinite(value) else None for name, value in found.items()})

    def write_metrics(self) -> None:
        """Write ``metrics.json``: one flat dictionary of name and number; what is not finite is null."""
        if self.folder is not None:
            text = json.dumps(dict(sorted(self.metrics.items())), indent=2) + "\n"
            write_atomically(self.folder.path / "metrics.json", text)

    def finish(self, status: str, trainer: Trainer, module: TrainingModule, seed: Any) -> None:
        """Write metrics, report and the run's end.

        Args:
            status: ``finished``, ``interrupted`` or ``failed``.
            trainer: The trainer that ran.
            module: The module, with the weights that were tested last.
            seed: The run's seed.
        """
        if self.folder is None:
            return
        seconds = time.monotonic() - self._begin
        self._add_run_figures(trainer, module, seconds)
        self.write_metrics()
        report = self._report(status, trainer, module, seconds, seed)
        report.write(self.folder.path / "report.html")
        self.folder.mark({"status": status, "command": self.command, "seconds": round(seconds, 1)})

    def _add_run_figures(self, trainer: Trainer, module: TrainingModule, seconds: float) -> None:
        self.metrics["run/seconds"] = round(seconds, 2)
        self.metrics["run/parameters"] = float(sum(p.numel() for p in module.net.parameters()))
        if trainer.global_step:
            self.metrics["run/steps"] = float(trainer.global_step)
            self.metrics["run/epochs"] = float(trainer.current_epoch)
        for callback in trainer.callbacks:  # pyright: ignore
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
                self.metrics[f"best/{callback.monitor}"] = float(callback.best_model_score)
            if isinstance(callback, Throughput) and callback.flops_per_item:
                self.metrics["run/flops_per_item"] = callback.flops_per_item

    def _report(self, status: str, trainer: Trainer, module: TrainingModule, seconds: float, seed: Any) -> Report:
        name = module.headline
        value = self.metrics.get(name) if name else None
        headline = "" if value is None else f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.4g}"
        report = Report(self.title, headline, name.replace("/", " ") if name and headline else "")
        if status != "finished":
            report.text("State", f"This run was {status}: the figures are those up to that point.")
        report.facts("Run", self._facts(trainer, module, seconds, seed))
        rows = read_history(self._history) if self._history is not None else []
        if (figure := curves(rows)) is not None:
            report.figure("Curves", figure)
        if status == "finished":
            module.add_to_report(report)
        figures = [{"name": key, "value": "-" if v is None else v} for key, v in sorted(self.metrics.items())]
        report.table("All figures", figures)
        return report

    def _facts(self, trainer: Trainer, module: TrainingModule, seconds: float, seed: Any) -> Mapping[str, Any]:
        parameters = sum(p.numel() for p in module.net.parameters())
        data = type(trainer.datamodule).__name__ if trainer.datamodule is not None else "-"  # pyright: ignore
        root = trainer.strategy.root_device
        device = torch.cuda.get_device_name(root) if root.type == "cuda" else f"{env.cpu_name()} (CPU)"
        name = module.hparams.get("name")
        return {
            "model": f"{name or type(module.net).__name__}, {parameters:,} parameters",
            "data": data,
            "trained for": f"{trainer.current_epoch} epochs, {trainer.global_step} steps",
            "duration": f"{int(seconds // 60)} min {seconds % 60:.0f} s",
            "device": f"{trainer.world_size} x {device}, precision {trainer.precision}",
            "seed": seed,
            "versions": ", ".join(f"{package} {version}" for package, version in env.versions().items()),
            "revision": env.git_revision() or "-",
            "command": self.command,
        }


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the CSV log of a run: records with ``step`` and the metrics logged at it."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
