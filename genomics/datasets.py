"""Windows of a genome for language models, and the data module that splits and serves them.

Legend: B batch, L bases of a window.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
from core.training.rng import ResumableLoader
from genomics import baselines
from genomics.fasta import Fasta, Genomes, Lower, open_genome
from genomics.intervals import (
    PARTS,
    SPLIT_NAMES,
    Interval,
    check_lengths,
    read_bed,
    split_by_coordinate,
    split_by_records,
    tile,
    whole_records,
)
from genomics.vocabulary import BOS, PAD, N, reverse_complement
from genomics.windows import Strategy, check_parts_disjoint, make_windows, merge, without_leaks

EXCERPT = Path(__file__).parent / "data"
BASELINE_BASES = 20_000_000  # what the Markov chains count and score in memory
IGNORED = -100  # target that no loss counts


class Windows(Dataset):
    """Windows of a FASTA file as token ids: [BOS], L bases, [PAD] up to L where the window is shorter.

    Args:
        fasta: The file.
        windows: The windows, of at most ``length`` bases.
        length: L.
        flip: Return the reverse complement of every second window at random (by torch's generator).
    """

    def __init__(self, fasta: Fasta, windows: Sequence[Interval], length: int, flip: bool = False) -> None:
        self.fasta, self.windows, self.length, self.flip = fasta, windows, length, flip

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        """Return (L + 1,) int64."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Return the windows of a batch, (B, L + 1) int64; what does not depend on the window is done once for all."""
        ids = np.full((len(indices), self.length + 1), PAD, np.uint8)
        ids[:, 0] = BOS
        for row, index in zip(ids, indices, strict=True):
            window = self.windows[index]
            row[1 : 1 + len(window)] = self.fasta.read_padded(window.record, window.start, window.end)
        if self.flip:
            turned = (torch.rand(len(indices)) < 0.5).numpy()
            whole = np.array([len(self.windows[index]) == self.length for index in indices])
            ids[turned & whole, 1:] = reverse_complement(ids[turned & whole, 1:])
            for row in np.flatnonzero(turned & ~whole).tolist():  # padding stays at the right
                size = len(self.windows[indices[row]])
                ids[row, 1 : 1 + size] = reverse_complement(ids[row, 1 : 1 + size])
        return torch.from_numpy(ids).long()


def collate(batch: Tensor) -> Tensor:
    """What ``Windows`` gives is a batch already."""
    return batch


def targets(ids: Tensor) -> Tensor:
    """Return what the model is to predict at each position: the next token, where that is A, C, G or T.

    Args:
        ids: (B, L + 1) as ``Windows`` gives them.

    Returns:
        (B, L) int64; ``IGNORED`` for N and padding.
    """
    following = ids[:, 1:]
    return following.masked_fill((following == N) | (following == PAD), IGNORED)


class GenomeData(LightningDataModule):
    """Genomes for language models: windows of them or of the intervals given, split into parts that share no base.

    The parts are, in this order of preference: those named in the fourth column of ``bed`` (train, valid, test); the
    records in ``val_records`` and ``test_records``, the others training; or by position, the last ``val_share`` and
    ``test_share`` of the bases. N and other ambiguous bases are read but never predicted.

    Args:
        fasta: Genome file, or several: FASTA or FASTQ, perhaps gzipped, or 2bit, or a folder of such files; null is
            the excerpt of human chromosome 22 that comes with the package. Of several, a record is called file:record.
        bed: BED file of the intervals to use; null is every whole record.
        window: Bases of a window, L.
        strategy: How windows come from the intervals: tile (every base once), rows (HyenaDNA), ends (Mamba) or widen
            (Caduceus); see genomics.windows. Windows that reach into another part are left out, of training first.
        lower: Lower case, which marks repeats: keep reads it as upper case, mask as N, which is never predicted.
        val_records: Records held out for validation, such as chromosomes.
        test_records: Records held out for the test.
        val_share: Share of the bases held out for validation where no records are named.
        test_share: Share of the bases held out for the test where no records are named.
        val_windows: Validate on this many windows, chosen by the seed; null is all.
        test_windows: Test on this many windows, chosen by the seed; null is all.
        seed: Of that choice.
        pad: Pad sequences shorter than the window; otherwise they are an error.
        reverse_complement: Train on either strand at random; validation and test read the strand in the file.
        batch_size: Windows per step and device; null is what batch_tokens makes.
        batch_tokens: Bases per step and device where batch_size is null: as many windows as that makes, at least one
            and at most all.
        num_workers: Processes that read windows, per device.

    Raises:
        UserError: If a file or an option does not fit.
    """

    def __init__(
        self,
        fasta: str | list[str] | None = None,
        bed: str | None = None,
        window: int = 1024,
        strategy: Strategy = "tile",
        lower: Lower = "keep",
        val_records: Sequence[str] = (),
        test_records: Sequence[str] = (),
        val_share: float = 0.15,
        test_share: float = 0.15,
        val_windows: int | None = None,
        test_windows: int | None = None,
        seed: int = 0,
        pad: bool = False,
        reverse_complement: bool = True,
        batch_size: int | None = None,
        batch_tokens: int = 16_384,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("window", window, 2), ("batch_size", 1 if batch_size is None else batch_size, 1)):
            if value < least:
                raise UserError(f"--data.{name} is {value}; wanted at least {least}")
        for name, value in (("val_windows", val_windows), ("test_windows", test_windows)):
            if value is not None and value < 1:
                raise UserError(f"--data.{name} is {value}; wanted at least 1, or null for all")
        if isinstance(fasta, list):
            self.fasta: Fasta = Genomes(fasta, lower)
        else:
            self.fasta = open_genome(EXCERPT / "human.fa.gz" if fasta is None else fasta, lower)
        self.excerpt = fasta is None
        self.bed, self.window, self.pad = bed, window, pad
        self.strategy: Strategy = strategy
        self.val_records, self.test_records = list(val_records), list(test_records)
        self.val_share, self.test_share = val_share, test_share
        self.reverse_complement = reverse_complement
        self.num_workers = num_workers
        self.parts = self._split()
        self.windows, self.left_out = self._windows(window)
        for part, count in (("val", val_windows), ("test", test_windows)):
            self.windows[part] = choose(self.windows[part], count, seed)
        # Bases of a window and windows of a batch in the epoch at hand, while lengths warm up (genomics.warmup).
        self.stage_of: Callable[[], tuple[int, int]] | None = None
        count = len(self.windows["train"])
        self.batch_size = batch_size or max(min(batch_tokens // window, count), 1)
        if count < self.batch_size:
            raise UserError(
                f"{self.fasta.path}: got {count} windows of {window:,} bases to train on, wanted a batch of "
                f"{self.batch_size}; give a shorter --data.window, a smaller --data.batch_size or more sequence"
            )

    def _windows(self, length: int) -> tuple[dict[str, list[Interval]], dict[str, int]]:
        made = {p: make_windows(self.parts[p], self.fasta.lengths, length, self.strategy) for p in PARTS}
        return without_leaks(made)

    def _split(self) -> dict[str, list[Interval]]:
        lengths = self.fasta.lengths
        named = [*self.val_records, *self.test_records]
        if self.excerpt and named and not set(named) <= set(lengths):
            raise UserError(
                f"the excerpt that comes with the package has no records {', '.join(named)} to hold out; give a genome "
                "that has: --data.fasta hg38.fa.gz (python -m genomics.download says where they are)"
            )
        rows = [(i, "") for i in whole_records(lengths)] if self.bed is None else read_bed(self.bed, lengths)
        intervals = [interval for interval, _ in rows]
        if not self.pad and self.strategy == "tile":
            check_lengths(intervals, self.window)
        if all(name in SPLIT_NAMES for _, name in rows):
            parts: dict[str, list[Interval]] = {part: [] for part in PARTS}
            for interval, name in rows:
                parts[SPLIT_NAMES[name]].append(interval)
            for part, found in parts.items():
                if not found:
                    raise UserError(f"{self.bed} names no interval for the {part} part in its fourth column")
        elif self.val_records or self.test_records:
            parts = split_by_records(intervals, self.val_records, self.test_records)
        else:
            parts = split_by_coordinate(merge(intervals), self.val_share, self.test_share)
        check_parts_disjoint(parts)
        for part, found in parts.items():
            if not any(self._has_bases(interval) for interval in found):
                raise UserError(
                    f"{self.fasta.path}: the {part} part holds no A, C, G or T"
                    + (", for lower case is read as N; give --data.lower keep" if self.fasta.lower == "mask" else "")
                )
        return parts

    def _has_bases(self, interval: Interval) -> bool:
        """Whether there is anything to predict; N at its start is passed over a million at a time."""
        pieces = tile([interval], 1 << 20)
        return any((self.fasta.read(piece.record, piece.start, piece.end) < N).any() for piece in pieces)

    def sequences(self, part: str, most: int) -> list[np.ndarray]:
        """Return the sequences of a part, uint8 token ids, one an interval, as far as ``most`` bases reach."""
        found: list[np.ndarray] = []
        for interval in self.parts[part]:
            end = min(interval.end, interval.start + most)
            if end > interval.start:
                found.append(self.fasta.read(interval.record, interval.start, end))
                most -= len(found[-1])
        return found

    def baselines(self) -> dict[str, float]:
        """Return perplexities of Markov chains by name, on the first 20 Mb of the training and of the test part."""
        train, test = (self.sequences(part, BASELINE_BASES) for part in ("train", "test"))
        return baselines.markov_perplexities(train, test, self.reverse_complement)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, on either strand; the last, smaller batch is left out."""
        if self.stage_of is not None:
            length, size = self.stage_of()
            windows = self._windows(length)[0]["train"]
            return self._loader(windows, length, size, self.reverse_complement, shuffle=True, drop_last=True)
        windows = self.windows["train"]
        return self._loader(
            windows, self.window, self.batch_size, self.reverse_complement, shuffle=True, drop_last=True
        )

    def val_dataloader(self) -> DataLoader:
        """In order, on the file's strand."""
        return self._loader(self.windows["val"], self.window, self.batch_size, False)

    def test_dataloader(self) -> DataLoader:
        """In order, on the file's strand."""
        return self._loader(self.windows["test"], self.window, self.batch_size, False)

    def _loader(
        self, windows: Sequence[Interval], length: int, size: int, flip: bool, shuffle: bool = False,
        drop_last: bool = False,
    ) -> DataLoader:  # fmt: skip
        return ResumableLoader(
            Windows(self.fasta, windows, length, flip),
            batch_size=size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            shuffle=shuffle,
            drop_last=drop_last,
        )


def choose(windows: Sequence[Interval], count: int | None, seed: int) -> list[Interval]:
    """Return that many windows, in their order, the same ones for the same seed; None is all."""
    if count is None or count >= len(windows):
        return list(windows)
    chosen = np.random.default_rng(seed).choice(len(windows), count, replace=False)
    return [windows[i] for i in sorted(chosen.tolist())]
