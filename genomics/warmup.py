"""Training on what is easier first: callbacks that start with short windows, or with few loci."""

from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from core.errors import UserError
from genomics.datasets import GenomeData
from genomics.reads import Reads
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


class PanelWarmup(Callback):
    """Trains on ``start`` loci of the panel first, and takes in more whenever the loss has fallen.

    ``--trainer.callbacks+=genomics.warmup.PanelWarmup``. A classifier of many loci begins with a plateau: the few bases
    that tell a locus's species apart are found by chance, each by itself, and every locus is noise to the others. Of
    few loci it finds them soon, and then has features that mean a species, which the next loci need only be tied to
    (curriculum learning, Bengio et al. 2009). Whenever the mean of ``steps`` training losses, smoothed, is below
    ``below``, ``growth`` times as many loci are in use. Validation and test have all of them.

    Args:
        start: Loci at first.
        growth: Factor of their number.
        below: Training loss at which to take in more: nats a read, of generative models nats a base.
        steps: Steps between looks at the loss, which wait for the GPU.

    Raises:
        UserError: If a value does not fit.
    """

    def __init__(self, start: int = 16, growth: float = 1.5, below: float = 0.4, steps: int = 10) -> None:
        if start < 1 or growth <= 1 or steps < 1:
            raise UserError(
                f"PanelWarmup: start is {start}, growth {growth} and steps {steps}; wanted at least 1, more than 1 and "
                "at least 1"
            )
        self.start, self.growth, self.below, self.steps = start, growth, below, steps
        self.smooth = float("inf")
        self.count: int | None = None  # loci in use
        self._losses: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"count": self.count, "smooth": self.smooth}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a resumed run goes on from."""
        self.count, self.smooth = state_dict["count"], state_dict["smooth"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data without loci."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and (not isinstance(data, SpeciesData) or data.loci is None):
            raise UserError("PanelWarmup works with the panels of genomics.classify (--data.source panel)")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the epoch's reads how many loci are in use."""
        reads = _reads(trainer)
        self.count = min(self.start if self.count is None else self.count, len(reads.loci))
        reads.in_use.fill_(self.count)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss every so many steps."""
        reads, loss = _reads(trainer), outputs["loss"] if isinstance(outputs, dict) else outputs
        assert self.count is not None
        if self.count == len(reads.loci):
            return
        self._losses.append(loss.detach())
        if len(self._losses) < self.steps:
            return
        mean, self._losses = float(sum(self._losses)) / self.steps, []
        self.smooth = mean if self.smooth == float("inf") else (self.smooth + mean) / 2
        if self.smooth < self.below:
            self.count = min(max(self.count + 1, int(self.count * self.growth)), len(reads.loci))
            reads.in_use.fill_(self.count)
        pl_module.log("train/loci", float(self.count))


def _reads(trainer: Trainer) -> Reads:
    loader: Any = trainer.train_dataloader
    assert isinstance(loader.dataset, Reads)
    return loader.dataset
