"""Folders of recordings as windows of levels, split by file; the spoken digits that come with the project.

Dimension letters: B batch, L samples of a window, Q levels.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from audio.baseline import MarkovModel
from audio.codec import Codec
from audio.files import conversions, read_clip, stretched, to_mono
from audio.splits import ANY, Labels, Layout, class_names, label_of, split_files
from core.errors import UserError
from core.training.rng import ResumableLoader

EMBEDDED = Path(__file__).parent / "data" / "digits"
PADDING = -100  # target of samples that are no part of a recording, which no loss counts


class Batch(NamedTuple):
    """Windows of a batch, padded on the right to the longest."""

    inputs: (
        Tensor  # (B, L) int64 levels: the start level, then the window but for its last sample; c Q added in class c
    )
    targets: Tensor  # (B, L) int64 levels: the window; PADDING behind its end
    samples: int  # of the windows, padding left out; counted here, as no training step should wait for the device


class Windows(Dataset):
    """Recordings as levels, cut into windows; the last window of a recording is as long as what is left.

    Args:
        clips: Levels of each recording, (samples,) each.
        window: Longest window, in samples.
        classes: Class of each recording, 0 without labels.
    """

    def __init__(self, clips: Sequence[Tensor], window: int, classes: Sequence[int]) -> None:
        self.clips = clips
        self.window = window
        self.classes = classes
        self.index = [(i, begin) for i, clip in enumerate(clips) for begin in range(0, len(clip), window)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        clip, begin = self.index[item]
        return self.clips[clip][begin : begin + self.window], self.classes[clip]


class AudioData(LightningDataModule):
    """Recordings of a folder and all folders below it, as levels.

    Every file is read once at the start, mixed to one channel, resampled, normalised as a whole and quantised; the
    levels stay in memory: 1 byte a sample up to 256 levels, 58 MB for an hour at 16 kHz. Files are WAV, FLAC, OGG,
    Opus, MP3 or AIFF, of any rate, number of channels and length. Whole files go to one part.

    Args:
        root: The folder; null is the spoken digits that come with the project.
        sample_rate: In Hz; files of other rates are resampled.
        window: Longest window, in samples. A window is a sequence of its own: nothing is known before it.
        codec: Quantisation.
        batch_size: Windows per step and device.
        layout: How the files are split: ``sc09`` by the lists of Speech Commands, of which only the digits are read;
            ``fsdd`` by the takes of the Free Spoken Digit Dataset; ``ordered`` by name, the last ones to test on, as
            YouTubeMix and Beethoven are; ``random`` by ``split_seed``; ``auto`` is one of the first two where the
            folder is such, otherwise random.
        labels: What a recording is of: ``folder``, the name of its folder (Speech Commands); ``name``, its own name up
            to the first underscore (digits of the Free Spoken Digit Dataset); ``speaker``, up to the last one (its
            digits by speaker, as in 7_theo); ``none``. A model of labelled sound can be asked for a class.
        held_out: Test on the files with this word in their names, such as a speaker's, and on no others.
        val_fraction: Part of the files that is validated on, at least one file; for random and ordered.
        test_fraction: Part of the files that is tested on, at least one file; for random and ordered.
        split_seed: Of the random split.
        pad: What windows are padded to, on the right: ``longest`` is the longest of their batch; ``window`` is the full
            window, in training only: batches of one shape, which CUDA graphs need. Padding counts in no loss.
        ratios: The training part has every recording once for each of these, played slower by it: 1.05 is a deeper and
            slower voice.
        untold: Part of the windows of training whose class is said to be "any". A model that also knows sound of no
            class in particular can be asked for one more clearly: --guidance of audio.generate. For labelled sound.
    """

    def __init__(
        self,
        root: str | None = None,
        sample_rate: int = 16000,
        window: int = 16000,
        codec: Codec = Codec(),  # noqa: B008  frozen
        batch_size: int = 16,
        layout: Layout = "auto",
        labels: Labels = "none",
        held_out: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        pad: Literal["longest", "window"] = "longest",
        ratios: tuple[float, ...] = (1.0,),
        untold: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("sample_rate", sample_rate), ("window", window), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"--data.{name} is {value}, wanted at least 1")
        if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"--data.val_fraction {val_fraction} and --data.test_fraction {test_fraction}: wanted fractions that "
                "leave something to train on"
            )
        if not ratios or not all(0.5 <= ratio <= 2 for ratio in ratios):
            raise UserError(f"--data.ratios is {list(ratios)}, wanted at least one number from 0.5 to 2")
        if not 0 <= untold < 1 or (untold and labels == "none"):
            raise UserError(f"--data.untold is {untold} and --data.labels {labels}, wanted 0 to below 1, and labels")
        self.root = EMBEDDED if root is None else Path(root).expanduser()
        self.sample_rate, self.window, self.codec, self.batch_size = sample_rate, window, codec, batch_size
        self.pad, self.ratios, self.untold = pad, ratios, untold
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split = {"seed": split_seed, "layout": layout, "held_out": held_out}
        self.labels: Labels = labels
        self.files: dict[str, list[Path]] = {}
        self.parts: dict[str, Windows] = {}
        self.notes: list[str] = []

    def setup(self, stage: str) -> None:
        """Reads and quantises every file, and refuses folders that cannot be used."""
        if self.parts:
            return
        self._find()
        names = self.class_names
        found: list[tuple[int, int]] = []
        for part, paths in self.files.items():
            clips, classes = [], []
            for path in paths:
                clip = read_clip(path)
                found.append((clip.sample_rate, clip.channels))
                wave = to_mono(clip, self.sample_rate)
                for ratio in self.ratios if part == "train" else (1.0,):
                    levels = self.codec.encode(stretched(wave, ratio))
                    clips.append(levels.to(torch.uint8 if self.codec.levels <= 256 else torch.int16))
                    classes.append(names.index(label_of(path, self.labels)) if names else 0)
            self.parts[part] = Windows(clips, self.window, classes)
        self.notes = conversions(found, self.sample_rate)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, none without labels; the folder is looked at, but nothing read."""
        if self.labels == "none":
            return ()
        self._find()
        names = class_names([path for paths in self.files.values() for path in paths], self.labels)
        return (*names, ANY) if self.untold else tuple(names)

    def train_dataloader(self) -> DataLoader:
        """All windows, shuffled."""
        return self._loader("train", shortest=self.window if self.pad == "window" else 0, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """All windows, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """All windows, in order."""
        return self._loader("test")

    def baselines(self) -> dict[str, float]:
        """Bits per sample of simple models on the test windows, by name, fitted to the training windows."""
        bits = {}
        levels = {part: [window for window, _ in windows] for part, windows in self.parts.items()}
        for order, name in enumerate(("unigram", "markov1", "markov2")):
            if MarkovModel.fits(order, self.codec.levels):
                model = MarkovModel(order, self.codec.levels, self.codec.start)
                model.fit(levels["train"], levels["val"])
                bits[f"{name}_bits_per_sample"] = model.bits_per_sample(levels["test"])
        return bits

    def facts(self) -> dict[str, str]:
        """What was read, for the report."""
        facts = {"folder": "spoken digits that come with the project" if self.root == EMBEDDED else str(self.root)}
        for part, windows in self.parts.items():
            seconds = sum(len(clip) for clip in windows.clips) / self.sample_rate
            facts[part] = f"{len(self.files[part])} files, {seconds:.1f} s, {len(windows)} windows"
        facts["rate and window"] = f"{self.sample_rate} Hz, up to {self.window} samples"
        facts["codec"] = str(self.codec)
        facts["classes"] = ", ".join(self.class_names) or "none"
        facts["conversions"] = "; ".join(self.notes) or "none"
        return facts

    def _find(self) -> None:
        if not self.files:
            self.files = split_files(self.root, self.fractions, **self.split)

    def _loader(self, part: str, shortest: int = 0, **options: Any) -> DataLoader:
        collate = partial(self._collate, shortest=shortest, untold=self.untold if part == "train" else 0.0)
        return ResumableLoader(self.parts[part], batch_size=self.batch_size, collate_fn=collate, **options)

    def _collate(self, windows: list[tuple[Tensor, int]], shortest: int = 0, untold: float = 0.0) -> Batch:
        longest = max(shortest, *(len(window) for window, _ in windows))
        targets = torch.full((len(windows), longest), PADDING, dtype=torch.int64)
        for row, (window, _) in zip(targets, windows, strict=True):
            row[: len(window)] = window
        inputs = torch.roll(targets, 1, dims=1).masked_fill(targets == PADDING, self.codec.start)
        inputs[:, 0] = self.codec.start
        classes = torch.tensor([number for _, number in windows])
        if untold:
            classes[torch.rand(len(windows)) < untold] = len(self.class_names) - 1
        samples = sum(len(window) for window, _ in windows)
        return Batch(inputs + self.codec.levels * classes[:, None], targets, samples)
