"""Going on from a checkpoint: whether it fits, and the history it continues."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from core.errors import UserError
from core.training.module import TrainingModule
from core.training.record import read_history


class History(CSVLogger):
    """The CSV log, which a resumed run goes on writing: records up to the checkpoint's step are kept.

    Args:
        folder: Where ``metrics.csv`` stands.
        resumed_from: Checkpoint that the run goes on from, or None.
    """

    def __init__(self, folder: Path, resumed_from: Path | None) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=50)
        self._kept: list[dict[str, float]] = []
        if resumed_from is not None:
            step = torch.load(resumed_from, map_location="cpu", weights_only=True, mmap=True)["global_step"]
            self._kept = [{**row, "step": int(row["step"])} for row in read_history(folder) if row["step"] < step]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file; it removes an earlier one, so that what is kept is written at once."""
        writer = super().experiment
        if self._kept:
            writer.metrics.extend(self._kept)
            self._kept = []
            writer.save()
        return writer


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that appear under their names when they are complete: a process may die while it writes one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the file, then move it there."""
        part = Path(path).with_name(f".{Path(path).name}.part")
        super().save_checkpoint(checkpoint, part, storage_options)
        part.replace(path)


def check_checkpoint(path: Path, model: TrainingModule, resume: bool) -> None:
    """Refuse a file that is no checkpoint, or one of another model, before anything starts.

    Args:
        path: The checkpoint.
        model: The module it is to be loaded into.
        resume: Training goes on from it, which needs more than weights.

    Raises:
        UserError: With the differences.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no checkpoint: it is not a file that torch wrote, or it is cut off")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored = checkpoint["state_dict"]
    except Exception as error:  # torch raises half a dozen kinds for files that are something else
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is no checkpoint of a training run ({first[:120]}); give a .ckpt file of one"
        ) from error
    own = model.state_dict()
    missing = [name for name in own if name not in stored]
    unknown = [name for name in stored if name not in own]
    shapes = [
        f"{name} {tuple(stored[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    differing = _differing_options(checkpoint.get("hyper_parameters", {}), dict(model.hparams))
    if missing or unknown or shapes:
        parts = [
            f"{len(names)} {what} (such as {names[0]})"
            for names, what in ((missing, "parameters missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if names
        ]
        hint = f"; its options differ: {', '.join(differing)}" if differing else ""
        raise UserError(
            f"{path} is a checkpoint of another model: {', '.join(parts)}{hint}; give a checkpoint of this model, or "
            "the options and the recipe it was made with"
        )
    if resume and "optimizer_states" not in checkpoint:
        raise UserError(f"{path} holds weights only, and training cannot go on from it; give a whole checkpoint")


def _differing_options(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    plain = (str, int, float, bool)
    return [
        f"{key}={stored[key]!r} there, {own[key]!r} here"
        for key in stored
        if key in own and isinstance(stored[key], plain) and stored[key] != own[key] and not key.startswith("_")
    ]
