"""Folders of recordings as windows of levels, split by file; the spoken digits that come with the project.

Dimension letters: B batch, L samples of a window, Q levels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from audio.baseline import MarkovModel
from audio.codec import Codec
from audio.files import conversions, find_audio, read_clip, to_mono
from core.errors import UserError
from core.training.rng import ResumableLoader

EMBEDDED = Path(__file__).parent / "data" / "digits"
PADDING = -100  # target of samples that are no part of a recording, which no loss counts
PARTS = ("train", "val", "test")
SC09_LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
SC09_FOLDERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Batch(NamedTuple):
    """Windows of a batch, padded on the right to the longest."""

    inputs: Tensor  # (B, L) int64 levels: the start level, then the window but for its last sample
    targets: Tensor  # (B, L) int64 levels: the window; PADDING behind its end


class Windows(Dataset):
    """Recordings as levels, cut into windows; the last window of a recording is as long as what is left.

    Args:
        clips: Levels of each recording, (samples,) each.
        window: Longest window, in samples.
    """

    def __init__(self, clips: Sequence[Tensor], window: int) -> None:
        self.clips = clips
        self.window = window
        self.index = [(i, begin) for i, clip in enumerate(clips) for begin in range(0, len(clip), window)]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Tensor:
        clip, begin = self.index[item]
        return self.clips[clip][begin : begin + self.window]


class AudioData(LightningDataModule):
    """Recordings of a folder and all folders below it, as levels.

    Every file is read once at the start, mixed to one channel, resampled, normalised as a whole and quantised; the
    levels stay in memory: 1 byte a sample up to 256 levels, 58 MB for an hour at 16 kHz. Files are WAV, FLAC, OGG, Opus
    or AIFF, of any rate, number of channels and length.

    Whole files go to one part. A folder with Speech Commands' ``validation_list.txt`` and ``testing_list.txt`` is split
    by these, and only its ten digits are read (SC09); any other at random by ``split_seed``.

    Args:
        root: The folder; null is the spoken digits that come with the project.
        sample_rate: In Hz; files of other rates are resampled.
        window: Longest window, in samples. A window is a sequence of its own: nothing is known before it.
        codec: Quantisation.
        batch_size: Windows per step and device.
        val_fraction: Part of the files that is validated on, at least one file; not for SC09.
        test_fraction: Part of the files that is tested on, at least one file; not for SC09.
        split_seed: Of the random split.
    """

    def __init__(
        self,
        root: str | None = None,
        sample_rate: int = 16000,
        window: int = 16000,
        codec: Codec = Codec(),  # noqa: B008  frozen
        batch_size: int = 16,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
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
        self.root = EMBEDDED if root is None else Path(root).expanduser()
        self.sample_rate, self.window, self.codec, self.batch_size = sample_rate, window, codec, batch_size
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split_seed = split_seed
        self.files: dict[str, list[Path]] = {}
        self.parts: dict[str, Windows] = {}
        self.notes: list[str] = []

    def setup(self, stage: str) -> None:
        """Reads and quantises every file, and refuses folders that cannot be used."""
        if self.parts:
            return
        self.files = split_files(self.root, self.fractions, self.split_seed)
        found: list[tuple[int, int]] = []
        for part, paths in self.files.items():
            clips = []
            for path in paths:
                clip = read_clip(path)
                found.append((clip.sample_rate, clip.channels))
                levels = self.codec.encode(to_mono(clip, self.sample_rate))
                clips.append(levels.to(torch.uint8 if self.codec.levels <= 256 else torch.int16))
            self.parts[part] = Windows(clips, self.window)
        self.notes = conversions(found, self.sample_rate)

    def train_dataloader(self) -> DataLoader:
        """All windows, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """All windows, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """All windows, in order."""
        return self._loader("test")

    def baselines(self) -> dict[str, float]:
        """Bits per sample of simple models on the test windows, by name, fitted to the training windows."""
        bits = {}
        for order, name in enumerate(("unigram", "markov1", "markov2")):
            if MarkovModel.fits(order, self.codec.levels):
                model = MarkovModel(order, self.codec.levels, self.codec.start)
                model.fit(self.parts["train"], self.parts["val"])
                bits[f"{name}_bits_per_sample"] = model.bits_per_sample(self.parts["test"])
        return bits

    def facts(self) -> dict[str, str]:
        """What was read, for the report."""
        facts = {"folder": "spoken digits that come with the project" if self.root == EMBEDDED else str(self.root)}
        for part, windows in self.parts.items():
            seconds = sum(len(clip) for clip in windows.clips) / self.sample_rate
            facts[part] = f"{len(self.files[part])} files, {seconds:.1f} s, {len(windows)} windows"
        facts["rate and window"] = f"{self.sample_rate} Hz, up to {self.window} samples"
        facts["codec"] = str(self.codec)
        facts["conversions"] = "; ".join(self.notes) or "none"
        return facts

    def _loader(self, part: str, **options: Any) -> DataLoader:
        return ResumableLoader(self.parts[part], batch_size=self.batch_size, collate_fn=self._collate, **options)

    def _collate(self, windows: list[Tensor]) -> Batch:
        longest = max(len(window) for window in windows)
        targets = torch.full((len(windows), longest), PADDING, dtype=torch.int64)
        for row, window in zip(targets, windows, strict=True):
            row[: len(window)] = window
        inputs = torch.roll(targets, 1, dims=1).masked_fill(targets == PADDING, self.codec.start)
        inputs[:, 0] = self.codec.start
        return Batch(inputs, targets)


def split_files(root: Path, fractions: dict[str, float], seed: int) -> dict[str, list[Path]]:
    """Divides the audio files of a folder into train, val and test.

    Args:
        root: The folder.
        fractions: Of the files, for val and test.
        seed: Of the random split.

    Raises:
        UserError: If there are no files, or fewer than one for each part.
    """
    if all((root / name).is_file() for name in SC09_LISTS.values()):
        return _split_sc09(root)
    paths = find_audio(root)
    if len(paths) < len(PARTS):
        raise UserError(
            f"{root}: got {len(paths)} audio files, wanted at least 3: parts are split by file, one each for train, "
            "val and test; cut the recording into several files"
        )
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    counts = {part: max(1, round(fraction * len(paths))) for part, fraction in fractions.items()}
    first, second = counts["test"], counts["test"] + counts["val"]
    if second >= len(paths):
        raise UserError(f"{root}: {len(paths)} files less {counts} leave none to train on; give smaller fractions")
    chosen = {"train": order[second:], "val": order[first:second], "test": order[:first]}
    return {part: [paths[i] for i in sorted(indices)] for part, indices in chosen.items()}


def _split_sc09(root: Path) -> dict[str, list[Path]]:
    """The ten digits of Speech Commands (Warden 2018), split by its official lists."""
    listed = {}
    for part, name in SC09_LISTS.items():
        lines = (root / name).read_text(encoding="utf-8").split("\n")
        listed.update({line.strip(): part for line in lines if line.strip()})
    files: dict[str, list[Path]] = {part: [] for part in PARTS}
    for folder in SC09_FOLDERS:
        if not (root / folder).is_dir():
            raise UserError(
                f"{root}: no folder {folder}/, though the lists of Speech Commands are there; wanted the ten digits "
                f"{', '.join(SC09_FOLDERS)}"
            )
        for path in find_audio(root / folder):
            files[listed.get(path.relative_to(root).as_posix(), "train")].append(path)
    for part, paths in files.items():
        if not paths:
            name = SC09_LISTS.get(part, "neither list")
            raise UserError(f"{root}: no file for {part} ({name}); wanted lines such as zero/0a2b400e_nohash_0.wav")
    return files
