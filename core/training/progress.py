"""How a run shows itself: one live line in a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


def progress_bar() -> Callback:
    """Return the live line if the output is a terminal, else the plain lines."""
    return LiveLine() if sys.stdout.isatty() else PlainLines()


def shown(metrics: dict[str, Any]) -> dict[str, str]:
    """Format metrics for a line: short names, few digits, MFU in percent; ``train/`` goes without saying."""
    out = {}
    for name, value in metrics.items():
        if name == "v_num" or isinstance(value, str):
            continue
        name = name.removeprefix("train/")
        if name == "mfu":
            out["MFU"] = f"{100 * value:.1f}%"
        elif name.endswith("_per_s"):
            label = {"gflops": "GFLOP"}.get(name.removesuffix("_per_s"), name.removesuffix("_per_s"))
            out[f"{label}/s"] = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        elif name == "lr":
            out[name] = f"{value:.2e}"
        else:
            out[name] = f"{value:.4f}"
    return out


class LiveLine(RichProgressBar):
    """Lightning's rich bar, short enough for our figures to stand beside it on one line."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4, theme=RichProgressBarTheme(metrics="", metrics_text_delimiter="  "))

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Return stage, a short bar, batches and the time left."""
        whole = Column(no_wrap=True)  # where the terminal is narrow, the figures give way
        return [
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=12, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(compact=True, table_column=whole),
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # pyright: ignore
        """Return the figures, formatted."""
        return shown(dict(super().get_metrics(trainer, pl_module)))

    def _init_progress(self, trainer: Trainer) -> None:
        """Cut the figures off at the terminal's edge instead of wrapping them."""
        super()._init_progress(trainer)
        if (column := self._metric_component) is not None:
            render = column.render

            def on_one_line(task: Task) -> Text:
                text = render(task)
                text.no_wrap, text.overflow = True, "ellipsis"
                return text

            column.render = on_one_line

    def _get_train_description(self, current_epoch: int) -> str:
        """Count epochs from one, as the plain lines do."""
        total = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}" + (f"/{total}" if total and total > 0 else "")


class PlainLines(ProgressBar):
    """One line every few seconds and at the end of each epoch, for logs and pipes.

    Args:
        every_s: Seconds between lines.
    """

    def __init__(self, every_s: float = 10.0) -> None:
        super().__init__()
        self._every_s = every_s
        self._next = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Say nothing: processes other than rank 0."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._next = time.monotonic() + self._every_s

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
        if time.monotonic() >= self._next:
            self._line(trainer, pl_module, f"step {batch_idx + 1}/{self.total_train_batches}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line."""
        self._line(trainer, pl_module, "done")

    def _line(self, trainer: Trainer, pl_module: LightningModule, where: str) -> None:
        self._next = time.monotonic() + self._every_s
        if self._enabled:
            epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
            figures = shown(dict(self.get_metrics(trainer, pl_module)))
            line = "  ".join(f"{name} {value}" for name, value in figures.items())
            print(f"epoch {trainer.current_epoch + 1}{epochs} {where}  {line}", flush=True)
