"""Training on short windows first: a callback that doubles the windows' length as epochs pass."""

from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from core.errors import UserError
from genomics.datasets import GenomeData
from genomics.species import SpeciesData


class LengthWarmup(Callback):
    """Trains ``epochs`` epochs at each length ``start``, 2 ``start``, ... and the rest at the data's own window.

    ``--trainer.callbacks+=genomics.warmup.LengthWarmup``. With ``tokens`` constant the batch shrinks as the windows
    grow (Gu & Dao 2023, appendix E.3.2); with ``batch`` constant it doesn't (Nguyen et al. 2023, section 3.2; Gu & Dao
    2023, appendix E.3.3, for species). Windows are ``--data.window`` of pretraining, ``--data.read_length`` of reads.
    Validation and test keep the final length. The stage follows from the epoch alone, so a resumed run is where it was.

    Args:
        start: Bases of the first windows.
        epochs: Epochs at each length.
        constant: What stays: the tokens of a step, or the windows of a batch.

    Raises:
        UserError: If a value does not fit.
    """

    def __init__(self, start: int = 1024, epochs: int = 2, constant: Literal["tokens", "batch"] = "tokens") -> None:
        if start < 2 or epochs < 1:
            raise UserError(f"LengthWarmup: start is {start} and epochs {epochs}; wanted at least 2 and 1")
        self.start, self.epochs, self.constant = start, epochs, constant

    def stage(self, epoch: int, window: int, batch_size: int) -> tuple[int, int]:
        """Bases of a window and windows of a batch in an epoch."""
        length = self.start << min(epoch // self.epochs, 62)
        if length >= window:
            return window, batch_size
        return length, batch_size * window // length if self.constant == "tokens" else batch_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the training data loaded anew each epoch; Lightning asks before the epoch starts."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage != "fit":
            return
        if not isinstance(data, GenomeData | SpeciesData):
            raise UserError("LengthWarmup works with the data of genomics.pretrain and genomics.classify")
        if self.start >= data.window:
            option = "window" if isinstance(data, GenomeData) else "read_length"
            raise UserError(f"LengthWarmup starts at {self.start:,} bases, but --data.{option} is {data.window:,}")
        if self.constant == "batch" and trainer.max_steps == -1 and isinstance(data, GenomeData):
            raise UserError("LengthWarmup with constant batch: epochs differ in steps; give --trainer.max_steps")
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        data.stage_of = lambda: self.stage(trainer.current_epoch, data.window, data.batch_size)
