"""Which species is a read from? The data module: genomes in, reads or segments with labels out."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from core.errors import UserError
from core.training.rng import ResumableLoader
from genomics import baselines
from genomics.datasets import EXCERPT
from genomics.fasta import Fasta, open_genome
from genomics.reads import Loci, Reads, choose_loci
from genomics.segments import Segments, split_genomes

BASELINE_READS = 20_000  # that the k-mer regression learns from, at most
BASELINE_BASES = 1 << 28  # the same in bases
SAME = 1 << 20  # bases of each record that two genomes are compared by
APES = ("human", "chimpanzee", "gorilla", "orangutan")


class SpeciesData(LightningDataModule):
    """Reads of two or more species.

    Of a panel: *known loci* are those that training and test reads come from, the latter from individuals that were
    never seen; *unseen loci* are from a part of the genome that no training read came from. How loci are chosen and
    reads simulated is in ``genomics.reads``. Of whole genomes: segments from anywhere, as in the published task;
    *known* ones lie in the part that trains, *unseen* ones in the part held out (``genomics.segments``).

    Args:
        source: Reads of a panel of loci, or segments of whole genomes.
        fasta: FASTA file, or folder of such files, of each species by name, ``--data.fasta.human a.fa
            --data.fasta.chimp b.fa``; None is the excerpt of four great apes that comes with the package.
        val_records: Of whole genomes: records, such as chromosomes, for validation; without names 10 % are.
        test_records: The same for the test; without names 20 % are.
        panel: Loci of the panel.
        unseen: Of a panel: loci held out, at most.
        locus_length: Of a panel: bases of a locus.
        read_length: Bases of a read.
        individuals: Of a panel: individuals of each species that training reads come from.
        test_individuals: The same for validation, and again for the test.
        mutation_rate: Share of an individual's bases that differ from its species' reference.
        error_rate: Share of a read's bases that are wrong.
        train_reads: Training reads an epoch; every epoch has new ones.
        val_reads: Reads of the validation.
        test_reads: Reads of each protocol's test.
        batch_size: Reads per step and device.
        num_workers: Processes that simulate reads, per device.
        seed: Of the simulation.

    Raises:
        UserError: If a file or an option does not fit.
    """

    def __init__(
        self,
        source: Literal["panel", "genomes"] = "panel",
        fasta: dict[str, str] | None = None,
        val_records: Sequence[str] = (),
        test_records: Sequence[str] = (),
        panel: int = 16,
        unseen: int = 200,
        locus_length: int = 640,
        read_length: int = 512,
        individuals: int = 32,
        test_individuals: int = 16,
        mutation_rate: float = 0.005,
        error_rate: float = 0.005,
        train_reads: int = 640,
        val_reads: int = 256,
        test_reads: int = 1000,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if source == "genomes" and fasta is None:
            raise UserError(
                "--data.source genomes: the excerpt that comes with the package holds loci; give a genome a species: "
                "--data.fasta.human a.fa --data.fasta.chimp b.fa (python -m genomics.download says where some are)"
            )
        files = {name: str(EXCERPT / f"{name}.fa.gz") for name in APES} if fasta is None else fasta
        _check_files(files)
        positive = {"panel": panel, "unseen": unseen, "individuals": individuals, "test_individuals": test_individuals}
        sizes = {"train_reads": train_reads, "val_reads": val_reads, "test_reads": test_reads, "batch_size": batch_size}
        for name, value in {**positive, **sizes, "read_length": read_length}.items():
            if value < 1:
                raise UserError(f"--data.{name} is {value}; wanted at least 1")
        if source == "panel" and read_length > locus_length:
            raise UserError(
                f"--data.read_length is {read_length}, longer than --data.locus_length {locus_length}; reads lie "
                "within a locus, so give a longer locus or shorter reads"
            )
        if train_reads < batch_size:
            raise UserError(f"--data.train_reads is {train_reads}, less than one batch of {batch_size}")
        for name, rate in {"mutation_rate": mutation_rate, "error_rate": error_rate}.items():
            if not 0 <= rate < 1:
                raise UserError(f"--data.{name} is {rate}; wanted a share from 0 to 1")
        self.class_names = list(files)
        self.excerpt = fasta is None
        self.genomes = [open_genome(path) for path in files.values()]
        _check_different(self.class_names, self.genomes)
        self.loci: tuple[Loci, Loci] | None = None  # of the panel, and held out
        self.homologous = False
        if source == "panel":
            *loci, self.homologous = choose_loci(self.genomes, panel, unseen, locus_length, seed)
            self.loci = loci[0], loci[1]
        else:
            self.parts = split_genomes(self.genomes, val_records, test_records)
        self.individuals = {"train": individuals, "val": test_individuals, "test": test_individuals}
        self.read_length, self.mutation_rate, self.error_rate = read_length, mutation_rate, error_rate
        self.counts = {"train": train_reads, "val": val_reads, "test": test_reads}
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.kmer_length = 0  # of the baseline, once it was trained
        # Bases of a read and reads of a batch in the epoch at hand, while lengths warm up (genomics.warmup).
        self.stage_of: Callable[[], tuple[int, int]] | None = None

    @property
    def num_classes(self) -> int:
        """Number of species."""
        return len(self.class_names)

    @property
    def window(self) -> int:
        """Bases of a read, by the name that length warm-up knows."""
        return self.read_length

    def reads(
        self,
        part: str,
        known: bool = True,
        count: int | None = None,
        fixed: bool = False,
        length: int | None = None,
    ) -> Reads | Segments:
        """Return the reads of a part.

        Args:
            part: ``train``, ``val`` or ``test``.
            known: From the panel, or of whole genomes from where training reads are; otherwise from what is held out.
            count: Number of reads instead of the part's own.
            fixed: Training reads that stay the same.
            length: Bases of a read instead of ``read_length``.
        """
        count = self.counts[part] if count is None else count
        length = self.read_length if length is None else length
        if self.loci is None:
            regions = self.parts["train" if known and part != "val" else part]
            rate = self.mutation_rate + self.error_rate
            return Segments(self.genomes, regions, part, count, length, rate, known, self.seed, fixed)
        return Reads(
            self.loci[0 if known else 1], part, count, self.individuals[part], length, self.mutation_rate,
            self.error_rate, known, self.seed, fixed,
        )  # fmt: skip

    def baselines(self) -> dict[str, float]:
        """Return the accuracies of chance, a k-mer logistic regression and, of a panel, an exact 31-mer vote.

        The vote knows the panel's loci of every species without errors, and nothing else of the genomes.

        The regression is trained on eight epochs' worth of reads from the same individuals, at most 20,000; of
        long segments there are fewer, in the test too.
        """
        fit = max(BASELINE_BASES // self.read_length, 64)
        train = self.reads("train", count=min(8 * self.counts["train"], BASELINE_READS, fit), fixed=True).arrays()
        count = min(self.counts["test"], fit)
        tests = [self.reads("test", known, count).arrays() for known in (True, False)]
        self.kmer_length, kmers = baselines.kmer_accuracies(train, self.reads("val").arrays(), tests)
        found = {"kmer": kmers, "chance": [1 / self.num_classes] * 2}
        if self.loci is not None:
            found["vote"] = baselines.vote_accuracies(self.loci[0].bases, tests)
        known = {f"{name}_accuracy": both[0] for name, both in found.items()}
        return known | {f"{name}_unseen_loci_accuracy": both[1] for name, both in found.items()}

    def train_dataloader(self) -> DataLoader:
        """New reads every epoch; the last, smaller batch is left out."""
        length, size = self.stage_of() if self.stage_of is not None else (self.read_length, self.batch_size)
        return self._loader(self.reads("train", length=length), size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Fixed reads: of known loci, from individuals of their own; of whole genomes, from their validation part."""
        return self._loader(self.reads("val"), self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Fixed reads of known loci, then of unseen ones."""
        return self._loader(ConcatDataset([self.reads("test", known) for known in (True, False)]), self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        """The test's reads."""
        return self.test_dataloader()

    def _loader(self, data: Dataset, size: int, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        return ResumableLoader(
            data,
            batch_size=size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            shuffle=shuffle,
            drop_last=drop_last,
        )


def _check_different(names: Sequence[str], genomes: Sequence[Fasta]) -> None:
    """Refuse two species with the same bases, in files of any kind; a million of each record are compared."""
    for i, j in itertools.combinations(range(len(genomes)), 2):
        one, two = genomes[i], genomes[j]
        if list(one.lengths.values()) != list(two.lengths.values()):
            continue
        pairs = [(a, b, min(size, SAME)) for (a, size), b in zip(one.lengths.items(), two.lengths, strict=True)]
        if all(np.array_equal(one.read(a, 0, size), two.read(b, 0, size)) for a, b, size in pairs):
            raise UserError(
                f"species {names[i]!r} and {names[j]!r} have the same bases, in {one.path} and {two.path}; give each "
                "its own genome"
            )


def _check_files(files: dict[str, str]) -> None:
    if len(files) < 2:
        raise UserError(
            f"got {len(files)} species ({', '.join(files)}), wanted two or more: --data.fasta.human a.fa "
            "--data.fasta.chimp b.fa"
        )
    seen: dict[Path, str] = {}
    for name, path in files.items():
        place = Path(path).resolve()
        if place in seen:
            raise UserError(
                f"species {seen[place]!r} and {name!r} have one and the same file, {path}; give each its own"
            )
        seen[place] = name
