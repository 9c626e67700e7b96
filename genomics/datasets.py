"""Windows of a genome for language models, and the data module that splits and serves them.

Legend: B batch, L bases of a window.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
from core.training.rng import ResumableLoader
from genomics import baselines
from genomics.fasta import Fasta
from genomics.intervals import (
    PARTS,
    SPLIT_NAMES,
    Interval,
    check_disjoint,
    check_lengths,
    read_bed,
    split_by_coordinate,
    split_by_records,
    tile,
    whole_records,
)
from genomics.vocabulary import BOS, PAD, N, reverse_complement

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
        window = self.windows[index]
        bases = self.fasta.read(window.record, window.start, window.end)
        if self.flip and torch.rand(()) < 0.5:
            bases = reverse_complement(bases)
        ids = torch.full((self.length + 1,), PAD, dtype=torch.int64)
        ids[0] = BOS
        ids[1 : 1 + len(bases)] = torch.from_numpy(bases.astype(np.int64))
        return ids


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
    """One genome for next-token training: every base of it, or of the intervals given, lies in exactly one window.

    The parts are, in this order of preference: those named in the fourth column of ``bed`` (train, valid, test); the
    records in ``val_records`` and ``test_records``, the others training; or by position, the last ``val_share`` and
    ``test_share`` of the bases. N and other ambiguous bases are read but never predicted.

    Args:
        fasta: FASTA file, perhaps gzipped; None is the excerpt of human chromosome 22 that comes with the package.
        bed: BED file of the intervals to use; None is every whole record.
        window: Bases of a window, L.
        val_records: Records held out for validation, such as chromosomes.
        test_records: Records held out for the test.
        val_share: Share of the bases held out for validation where no records are named.
        test_share: Share of the bases held out for the test where no records are named.
        pad: Pad sequences shorter than the window; otherwise they are an error.
        reverse_complement: Train on either strand at random; validation and test read the strand in the file.
        batch_size: Windows per step and device.
        num_workers: Processes that read windows, per device.

    Raises:
        UserError: If a file or an option does not fit.
    """

    def __init__(
        self,
        fasta: str | None = None,
        bed: str | None = None,
        window: int = 1024,
        val_records: Sequence[str] = (),
        test_records: Sequence[str] = (),
        val_share: float = 0.15,
        test_share: float = 0.15,
        pad: bool = False,
        reverse_complement: bool = True,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if window < 2:
            raise UserError(f"--data.window is {window}; wanted at least 2 bases")
        if batch_size < 1:
            raise UserError(f"--data.batch_size is {batch_size}; wanted at least 1")
        self.fasta = Fasta(EXCERPT / "human.fa.gz" if fasta is None else fasta)
        self.bed, self.window, self.pad = bed, window, pad
        self.val_records, self.test_records = list(val_records), list(test_records)
        self.val_share, self.test_share = val_share, test_share
        self.reverse_complement = reverse_complement
        self.batch_size, self.num_workers = batch_size, num_workers
        self.parts = self._split()
        self.windows = {part: tile(self.parts[part], window) for part in PARTS}
        if len(self.windows["train"]) < batch_size:
            raise UserError(
                f"{self.fasta.path}: got {len(self.windows['train'])} windows of {window:,} bases to train on, wanted "
                f"a batch of {batch_size}; give a shorter --data.window, a smaller --data.batch_size or more sequence"
            )

    def _split(self) -> dict[str, list[Interval]]:
        lengths = self.fasta.lengths
        rows = [(i, "") for i in whole_records(lengths)] if self.bed is None else read_bed(self.bed, lengths)
        intervals = [interval for interval, _ in rows]
        if not self.pad:
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
            parts = split_by_coordinate(intervals, self.val_share, self.test_share)
        check_disjoint(parts)
        return parts

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
        return self._loader("train", self.reverse_complement, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order, on the file's strand."""
        return self._loader("val", False)

    def test_dataloader(self) -> DataLoader:
        """In order, on the file's strand."""
        return self._loader("test", False)

    def _loader(self, part: str, flip: bool, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        return ResumableLoader(
            Windows(self.fasta, self.windows[part], self.window, flip),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            shuffle=shuffle,
            drop_last=drop_last,
        )
