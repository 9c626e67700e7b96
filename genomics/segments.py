"""Segments of whole genomes with their species: what the great-apes task reads (Gu & Dao 2023, section 4.3.2).

Legend: S species, L bases of a segment.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import UserError
from genomics.fasta import Fasta
from genomics.intervals import PARTS, Interval, split_by_coordinate, split_by_records, whole_records
from genomics.reads import mutate
from genomics.vocabulary import A, T, reverse_complement

VAL_SHARE, TEST_SHARE = 0.1, 0.2
ATTEMPTS = 1000  # draws of a place without N


class Segments(Dataset):
    """Segments anywhere in the genomes: ``(ids (L,) int64, species, known)``.

    Segment i is of species i modulo S, so classes are balanced; its record is drawn uniformly among those that are long
    enough, then its start, as in the paper; a place with N is drawn again, since the number of N tells assemblies
    apart. Either strand is read.

    Args:
        genomes: One file a species.
        regions: Where segments of each species may lie.
        part: ``train``, ``val`` or ``test``: training segments are new each time, the others are fixed by the seed.
        count: Number of segments.
        length: L.
        substitutions: Share of the bases that are replaced by another.
        known: What the third item says: the regions are those of the training.
        seed: Of the fixed segments.
        fixed: Fix training segments too.

    Raises:
        UserError: If a species has no interval of ``length`` bases.
    """

    def __init__(
        self,
        genomes: Sequence[Fasta],
        regions: Sequence[Sequence[Interval]],
        part: str,
        count: int,
        length: int,
        substitutions: float,
        known: bool,
        seed: int,
        fixed: bool = False,
    ) -> None:
        self.genomes, self.part, self.count, self.length = genomes, part, count, length
        self.substitutions, self.known, self.seed = substitutions, known, seed
        self.fixed = fixed or part != "train"
        self.regions = [[place for place in region if len(place) >= length] for region in regions]
        for genome, region, long in zip(genomes, regions, self.regions, strict=True):
            if not long:
                raise UserError(
                    f"{genome.path}: the longest stretch of the {part} part has {max(map(len, region)):,} bases, "
                    f"wanted {length:,}; give a shorter --data.read_length or longer records"
                )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        """Draw one segment."""
        species = index % len(self.genomes)
        draw = [self.seed, PARTS.index(self.part), int(self.known), index]
        rng = np.random.default_rng(draw if self.fixed else int(torch.randint(2**62, ())))
        ids = self._clean(species, rng)
        if self.substitutions:
            ids = mutate(ids, self.substitutions, rng)
        if rng.random() < 0.5:
            ids = reverse_complement(ids)
        return torch.from_numpy(ids.astype(np.int64)), species, self.known

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all segments (count, L) uint8 and their species (count,)."""
        ids = np.empty((self.count, self.length), np.uint8)
        for row, i in zip(ids, range(self.count), strict=True):
            row[:] = self[i][0].numpy()
        return ids, np.arange(self.count) % len(self.genomes)

    def _clean(self, species: int, rng: np.random.Generator) -> np.ndarray:
        genome, region = self.genomes[species], self.regions[species]
        for _ in range(ATTEMPTS):
            place = region[int(rng.integers(len(region)))]
            start = int(rng.integers(place.start, place.end - self.length + 1))
            ids = genome.read(place.record, start, start + self.length)
            if ((ids >= A) & (ids <= T)).all():
                return ids
        raise UserError(
            f"{genome.path}: found no {self.length:,} bases without N in {ATTEMPTS:,} draws; give a shorter "
            "--data.read_length or an assembly with fewer gaps"
        )


def split_genomes(
    genomes: Sequence[Fasta], val_records: Sequence[str] = (), test_records: Sequence[str] = ()
) -> dict[str, list[list[Interval]]]:
    """Split genomes into training, validation and test parts, homologous chromosomes on the same side.

    Named records, such as chromosomes, are held out; of those that a species lacks, nothing. Without names: where
    three or more records have one name in all species, these are split in the first file's order, 70, 10 and 20 %, and
    the others are left out; else the bases of each file are.

    Args:
        genomes: One file a species.
        val_records: Records of the validation part.
        test_records: Records of the test part.

    Returns:
        For each part the intervals of every species.

    Raises:
        UserError: If a part stays empty in a species, or a name is no record of any.
    """
    shared = [name for name in genomes[0].lengths if all(name in genome.lengths for genome in genomes)]
    found: dict[str, list[list[Interval]]] = {part: [] for part in PARTS}
    for option, names in (("val_records", val_records), ("test_records", test_records)):
        if unknown := [name for name in names if not any(name in genome.lengths for genome in genomes)]:
            raise UserError(
                f"--data.{option}: no genome has a record {unknown[0]!r}; the first ones of {genomes[0].path} are "
                f"{', '.join(list(genomes[0].lengths)[:5])}"
            )
    if bool(val_records) != bool(test_records):
        raise UserError("got records for one of --data.val_records and --data.test_records; wanted both, or neither")
    for genome in genomes:
        whole = whole_records(genome.lengths)
        if val_records or test_records:
            held = [[name for name in names if name in genome.lengths] for names in (val_records, test_records)]
            parts = split_by_records(whole, *held)
        elif len(shared) > 2:
            first = max(1, min(round((1 - VAL_SHARE - TEST_SHARE) * len(shared)), len(shared) - 2))
            second = max(first + 1, min(round((1 - TEST_SHARE) * len(shared)), len(shared) - 1))
            kept = [Interval(name, 0, genome.lengths[name]) for name in shared]
            parts = {"train": kept[:first], "val": kept[first:second], "test": kept[second:]}
        else:
            parts = split_by_coordinate(whole, VAL_SHARE, TEST_SHARE)
        for part in PARTS:
            found[part].append(parts[part])
    return found
