"""Simulated sequencing reads: loci of several species, individuals that differ from their reference, errors, strands.

Legend: S species, P loci, L bases of a locus, R bases of a read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import UserError
from genomics.fasta import Fasta
from genomics.intervals import Interval, split_by_coordinate, whole_records
from genomics.vocabulary import A, T, reverse_complement

KNOWN_SHARE = 0.7  # of the records or bases, in the genome's order; loci beyond are never trained on
FEWEST_LOCI = 10  # records with one name in all species from which on these are taken for homologous loci
LONGEST_LOCUS = 200_000  # bases; a longer record is a chromosome, of which a locus is a part
CANDIDATES = 1000  # loci that are compared for a panel, at most
MARKER = 16  # bases of the k-mers that tell species apart
PARTS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Loci:
    """Stretches of a genome, the same number in every species.

    Args:
        places: For each locus its interval in every species.
        bases: (S, P, L) uint8 token ids, A, C, G and T only.
    """

    places: list[tuple[Interval, ...]]
    bases: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Loci":
        """Return some of the loci."""
        return Loci([self.places[i] for i in indices], self.bases[:, indices])


def choose_loci(genomes: Sequence[Fasta], panel: int, unseen: int, length: int, seed: int) -> tuple[Loci, Loci, bool]:
    """Choose the loci that reads come from: a panel in the first 70 % of the genome, and others in the rest.

    Records that have one name in all species, ten or more of them and of at most 200 kb, are homologous loci: the
    first ``length`` bases stand for each, and the panel is made of those in which the most alike two species differ
    most, as an assay's markers are chosen. Otherwise loci are random windows of each species by itself, and a locus is
    another place in every species: then reads are told apart by place as well as by species. Where names are shared,
    the 70 % are of these records, in the first file's order, so that a record is on the same side in all species; else
    they are of each file's bases.

    Loci with N or other ambiguous bases in any species are left out, since their number differs between assemblies.

    Args:
        genomes: One file a species.
        panel: Loci of the panel.
        unseen: Loci that are never trained on, at most.
        length: Bases of a locus.
        seed: For the random windows.

    Returns:
        Panel, unseen loci, and whether they are homologous.

    Raises:
        UserError: If there are not enough loci, or two species have the same bases.
    """
    shared = [name for name in genomes[0].lengths if all(name in genome.lengths for genome in genomes)]
    lengths = [genome.lengths[name] for genome in genomes for name in shared]
    homologous = len(shared) >= FEWEST_LOCI and max(lengths) <= LONGEST_LOCUS
    cut = round(KNOWN_SHARE * len(shared))
    if homologous:
        known = _homologous(genomes, shared[:cut], CANDIDATES, length)
        rest = _homologous(genomes, shared[cut:], unseen, length)
    else:
        known = _windows(genomes, shared[:cut], panel, length, seed, known=True)
        rest = _windows(genomes, shared[cut:], unseen, length, seed, known=False)
    for found, wanted, where in ((known, panel, "for the panel"), (rest, 1, "beyond the panel's part to hold out")):
        if len(found) < wanted:
            raise UserError(
                f"the genomes have {len(found)} loci of {length:,} bases without N {where}, wanted {wanted}; give a "
                "smaller --data.panel or --data.locus_length (and --data.read_length), or more sequence"
            )
    _check_different(known)
    if homologous:
        known = known.take(np.sort(np.argsort(-distinctness(known), kind="stable")[:panel]))
    return known, rest, homologous


def distinctness(loci: Loci) -> np.ndarray:
    """Return how different the most alike two species are: the share of a locus's 16-mers that they do not share.

    Returns:
        (P,) float64 from 0 to 1.
    """
    species, count, length = loci.bases.shape
    out = np.empty(count)
    for locus in range(count):
        texts = [loci.bases[s, locus].tobytes() for s in range(species)]
        kmers = [{text[i : i + MARKER] for i in range(length - MARKER + 1)} for text in texts]
        pairs = [(kmers[i], kmers[j]) for i in range(species) for j in range(i)]
        out[locus] = min(1 - len(a & b) / max(len(a), len(b), 1) for a, b in pairs)
    return out


def _homologous(genomes: Sequence[Fasta], names: Sequence[str], most: int, length: int) -> Loci:
    """Return the starts of records, evenly spaced among those that are long enough."""
    names = [name for name in names if all(genome.lengths[name] >= length for genome in genomes)]
    if len(names) > 2 * most:
        names = [names[i * len(names) // (2 * most)] for i in range(2 * most)]
    return _clean(genomes, [tuple(Interval(name, 0, length) for _ in genomes) for name in names], most)


def _clean(genomes: Sequence[Fasta], places: Sequence[tuple[Interval, ...]], most: int) -> Loci:
    """Return the first loci without ambiguous bases, with their bases."""
    kept, bases = [], []
    for place in places:
        if len(kept) == most:
            break
        rows = [genome.read(i.record, i.start, i.end) for genome, i in zip(genomes, place, strict=True)]
        if all(((row >= A) & (row <= T)).all() for row in rows):
            kept.append(place)
            bases.append(np.stack(rows))
    return Loci(kept, np.stack(bases, axis=1) if bases else np.empty((len(genomes), 0, 1), np.uint8))


def _windows(genomes: Sequence[Fasta], names: Sequence[str], count: int, length: int, seed: int, known: bool) -> Loci:
    """Return random windows without ambiguous bases, each species' by itself, on the records named or on all."""
    found = []
    for number, genome in enumerate(genomes):
        if names:
            region = [Interval(name, 0, genome.lengths[name]) for name in names]
        else:
            parts = split_by_coordinate(whole_records(genome.lengths), 0.01, 0.99 - KNOWN_SHARE)
            region = parts["train" if known else "test"]
        slots = np.array([len(interval) // length for interval in region])
        ends = np.cumsum(slots)
        places = []
        for slot in np.random.default_rng([seed, number, known]).permutation(int(ends[-1]))[: 4 * count + 100]:
            which = int(np.searchsorted(ends, slot, side="right"))
            start = region[which].start + int(slot - ends[which] + slots[which]) * length
            places.append((Interval(region[which].record, start, start + length),))
        found.append(_clean([genome], places, count))
    enough = min(map(len, found))
    places = [tuple(loci.places[i][0] for loci in found) for i in range(enough)]
    empty = np.empty((len(genomes), 0, length), np.uint8)
    return Loci(places, np.concatenate([loci.bases[:, :enough] for loci in found]) if enough else empty)


def _check_different(loci: Loci) -> None:
    species = len(loci.bases)
    for i in range(species):
        for j in range(i):
            if np.array_equal(loci.bases[i], loci.bases[j]):
                raise UserError(
                    f"species {j + 1} and {i + 1} have the same bases in all {len(loci)} loci of the panel, so nothing "
                    "tells them apart; give each species its own genome"
                )


def mutate(ids: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Replace each base by one of the three others with probability ``rate``.

    Args:
        ids: Token ids of A, C, G and T.
        rate: Probability.
        rng: Source of randomness.

    Returns:
        A new array of the same shape, uint8.
    """
    out = ids.copy()
    hit = np.flatnonzero(rng.random(ids.size) < rate)
    out.flat[hit] = A + (out.flat[hit] - A + rng.integers(1, 4, len(hit), dtype=np.uint8)) % 4
    return out


class Reads(Dataset):
    """Reads of individuals: ``(ids (R,) int64, species, known)``.

    An individual is its species' reference with each base mutated at ``mutation_rate``, the same for all its reads. A
    read starts anywhere in a locus, comes from either strand, and has sequencing errors. The parts have individuals of
    their own. Read i is of species i modulo S, so classes are balanced.

    Args:
        loci: Where reads come from.
        part: ``train``, ``val`` or ``test``: training reads are new each time, the others are fixed by the seed.
        count: Number of reads.
        individuals: Individuals of each species.
        read_length: R.
        mutation_rate: Share of an individual's bases that differ from the reference.
        error_rate: Share of a read's bases that are wrong.
        known: What the third item says: the loci are those of the training.
        seed: Of individuals and fixed reads.
        fixed: Fix training reads too.

    Attributes:
        in_use: (1,) int64 in shared memory: how many loci reads come from, the first of them in an order that the seed
            gives. All of them, until somebody writes there (``genomics.warmup.PanelWarmup``), for loader processes too.
    """

    def __init__(
        self,
        loci: Loci,
        part: str,
        count: int,
        individuals: int,
        read_length: int,
        mutation_rate: float,
        error_rate: float,
        known: bool,
        seed: int,
        fixed: bool = False,
    ) -> None:
        self.loci, self.part, self.count, self.individuals = loci, part, count, individuals
        self.read_length, self.mutation_rate, self.error_rate = read_length, mutation_rate, error_rate
        self.known, self.seed, self.fixed = known, seed, fixed or part != "train"
        self.in_use = torch.tensor([len(loci)]).share_memory_()
        self.order = np.random.default_rng([seed, len(loci)]).permutation(len(loci))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        """Simulate one read."""
        species = index % len(self.loci.bases)
        draw = [self.seed, PARTS[self.part], int(self.known), index] if self.fixed else int(torch.randint(2**62, ()))
        rng = np.random.default_rng(draw)
        individual, locus = int(rng.integers(self.individuals)), int(rng.integers(int(self.in_use)))
        if int(self.in_use) < len(self.loci):
            locus = int(self.order[locus])
        haplotype = self.haplotype(species, individual, locus)
        start = int(rng.integers(len(haplotype) - self.read_length + 1))
        read = mutate(haplotype[start : start + self.read_length], self.error_rate, rng)
        if rng.random() < 0.5:
            read = reverse_complement(read)
        return torch.from_numpy(read.astype(np.int64)), species, self.known

    def haplotype(self, species: int, individual: int, locus: int) -> np.ndarray:
        """Return a locus of an individual, (L,) uint8."""
        key = [self.seed, PARTS[self.part], int(self.known), species, individual, locus, 1]
        return mutate(self.loci.bases[species, locus], self.mutation_rate, np.random.default_rng(key))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all reads (count, R) uint8 and their species (count,)."""
        reads, species, _ = zip(*(self[i] for i in range(self.count)), strict=True)
        return torch.stack(reads).numpy().astype(np.uint8), np.array(species)
