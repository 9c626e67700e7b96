"""Labelled recordings of one length, for classifiers: waveforms instead of levels.

Dimension letters: B clips, L samples of a clip.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from audio.files import conversions, read_clip, to_mono
from audio.splits import Labels, Layout, class_names, label_of, split_files
from core.errors import UserError
from core.training.rng import ResumableLoader

SCALE = 32767  # of the 16 bit numbers that clips are kept in


def fitted(wave: Tensor, length: int) -> Tensor:
    """Brings a recording to a peak of 1 and to one length: what is longer is cut off, what is shorter ends in silence.

    Args:
        wave: (any,) samples.
        length: L.

    Returns:
        (L,) float32.
    """
    wave = wave[:length].float()
    peak = wave.abs().max() if len(wave) else wave.new_zeros(())
    return F.pad(wave / peak if peak > 0 else wave, (0, length - len(wave)))


class LabelledClips(LightningDataModule):
    """Recordings of a folder as waveforms (B, L) float32 with labels (B,) int64; see ``audio.datasets`` for layouts.

    Args:
        root: The folder.
        sample_rate: In Hz; files of other rates are resampled.
        seconds: Length of a clip: longer recordings are cut off, shorter ones end in silence.
        batch_size: Clips per step and device.
        layout: How the files are split.
        labels: What a recording is of: the name of its folder (Speech Commands), or its own name up to the first
            underscore (the Free Spoken Digit Dataset).
        held_out: Test on the files with this word in their names, such as a speaker's, and on no others.
        val_fraction: Part of the files that is validated on; for the layouts random and ordered.
        test_fraction: Part of the files that is tested on; for the layouts random and ordered.
        split_seed: Of the random split.
    """

    def __init__(
        self,
        root: str,
        sample_rate: int = 8000,
        seconds: float = 1.0,
        batch_size: int = 64,
        layout: Layout = "auto",
        labels: Labels = "name",
        held_out: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if sample_rate < 1 or batch_size < 1 or not seconds > 0:
            raise UserError(
                f"--data.sample_rate is {sample_rate}, --data.batch_size {batch_size} and --data.seconds {seconds}; "
                "wanted numbers above 0"
            )
        if labels == "none":
            raise UserError("--data.labels is none: a classifier needs labels; wanted folder, name or speaker")
        self.root = Path(root).expanduser()
        self.sample_rate, self.length, self.batch_size = sample_rate, round(seconds * sample_rate), batch_size
        self.files = split_files(self.root, {"val": val_fraction, "test": test_fraction}, split_seed, layout, held_out)
        self.labels: Labels = labels
        self.class_names = tuple(class_names([path for paths in self.files.values() for path in paths], labels))
        if len(self.class_names) == 1:
            raise UserError(
                f"{self.root}: all files are of one class, {self.class_names[0]!r}; wanted folders named by class with "
                "--data.labels folder, or files such as 7_jackson_32.wav with --data.labels name"
            )
        self.parts: dict[str, TensorDataset] = {}
        self.notes: list[str] = []

    def setup(self, stage: str) -> None:
        """Reads every file."""
        if self.parts:
            return
        found = []
        for part, paths in self.files.items():
            clips = torch.zeros(len(paths), self.length, dtype=torch.int16)
            for row, path in zip(clips, paths, strict=True):
                clip = read_clip(path)
                found.append((clip.sample_rate, clip.channels))
                row.copy_((fitted(to_mono(clip, self.sample_rate), self.length) * SCALE).round())
            classes = torch.tensor([self.class_names.index(label_of(path, self.labels)) for path in paths])
            self.parts[part] = TensorDataset(clips, classes)
        self.notes = conversions(found, self.sample_rate)

    def train_dataloader(self) -> DataLoader:
        """All clips, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """All clips, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """All clips, in order."""
        return self._loader("test")

    def facts(self) -> dict[str, str]:
        """What was read, for the report."""
        facts = {"folder": str(self.root)}
        facts |= {part: f"{len(paths)} files" for part, paths in self.files.items()}
        facts["clips"] = f"{self.length} samples of {self.sample_rate} Hz"
        facts["classes"] = ", ".join(self.class_names)
        facts["conversions"] = "; ".join(self.notes) or "none"
        return facts

    def _loader(self, part: str, **options: Any) -> DataLoader:
        return ResumableLoader(self.parts[part], batch_size=self.batch_size, collate_fn=_collate, **options)


def _collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    waves, classes = zip(*items, strict=True)
    return torch.stack(waves).float() / SCALE, torch.stack(classes)
