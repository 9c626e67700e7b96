"""Which species is a read from? The data module: genomes in, simulated reads with labels out."""

from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from core.errors import UserError
from core.training.rng import ResumableLoader
from genomics import baselines
from genomics.datasets import EXCERPT
from genomics.fasta import Fasta
from genomics.reads import Reads, choose_loci

BASELINE_READS = 20_000  # that the k-mer regression learns from, at most
APES = ("human", "chimpanzee", "gorilla", "orangutan")


class SpeciesData(LightningDataModule):
    """Reads of two or more species, in two protocols.

    *Known loci*: training and test reads come from the same panel of loci, those of the test from individuals that
    were never seen. *Unseen loci*: test reads from a part of the genome that no training read came from. How loci are
    chosen and reads simulated is in ``genomics.reads``.

    Args:
        fasta: FASTA file of each species by name, ``--data.fasta.human a.fa --data.fasta.chimp b.fa``; None is the
            excerpt of four great apes that comes with the package.
        panel: Loci of the panel.
        unseen: Loci of the second protocol, at most.
        locus_length: Bases of a locus.
        read_length: Bases of a read.
        individuals: Individuals of each species that training reads come from.
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
        fasta: dict[str, str] | None = None,
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
        files = {name: str(EXCERPT / f"{name}.fa.gz") for name in APES} if fasta is None else fasta
        _check_files(files)
        positive = {"panel": panel, "unseen": unseen, "individuals": individuals, "test_individuals": test_individuals}
        sizes = {"train_reads": train_reads, "val_reads": val_reads, "test_reads": test_reads, "batch_size": batch_size}
        for name, value in {**positive, **sizes, "read_length": read_length}.items():
            if value < 1:
                raise UserError(f"--data.{name} is {value}; wanted at least 1")
        if read_length > locus_length:
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
        genomes = [Fasta(path) for path in files.values()]
        self.panel, self.rest, self.homologous = choose_loci(genomes, panel, unseen, locus_length, seed)
        self.individuals = {"train": individuals, "val": test_individuals, "test": test_individuals}
        self.read_length, self.mutation_rate, self.error_rate = read_length, mutation_rate, error_rate
        self.counts = {"train": train_reads, "val": val_reads, "test": test_reads}
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.kmer_length = 0  # of the baseline, once it was trained

    @property
    def num_classes(self) -> int:
        """Number of species."""
        return len(self.class_names)

    def reads(self, part: str, known: bool = True, count: int | None = None, fixed: bool = False) -> Reads:
        """Return the reads of a part.

        Args:
            part: ``train``, ``val`` or ``test``.
            known: From the panel; otherwise from the loci held out.
            count: Number of reads instead of the part's own.
            fixed: Training reads that stay the same.
        """
        return Reads(
            self.panel if known else self.rest,
            part,
            self.counts[part] if count is None else count,
            self.individuals[part],
            self.read_length,
            self.mutation_rate,
            self.error_rate,
            known,
            self.seed,
            fixed,
        )

    def baselines(self) -> dict[str, float]:
        """Return the accuracies of chance, an exact 31-mer vote and a k-mer logistic regression on the same test reads.

        The vote knows the panel's loci of every species without errors, and nothing else of the genomes.

        The regression is trained on eight epochs' worth of reads from the same individuals, at most 20,000.
        """
        train = self.reads("train", count=min(8 * self.counts["train"], BASELINE_READS), fixed=True).arrays()
        tests = [self.reads("test", known).arrays() for known in (True, False)]
        self.kmer_length, (known, unseen) = baselines.kmer_accuracies(train, self.reads("val").arrays(), tests)
        votes = baselines.vote_accuracies(self.panel.bases, tests)
        chance = 1 / self.num_classes
        return {
            "vote_accuracy": votes[0],
            "vote_unseen_loci_accuracy": votes[1],
            "kmer_accuracy": known,
            "chance_accuracy": chance,
            "kmer_unseen_loci_accuracy": unseen,
            "chance_unseen_loci_accuracy": chance,
        }

    def train_dataloader(self) -> DataLoader:
        """New reads every epoch; the last, smaller batch is left out."""
        return self._loader(self.reads("train"), shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Fixed reads of known loci, from individuals of their own."""
        return self._loader(self.reads("val"))

    def test_dataloader(self) -> DataLoader:
        """Fixed reads of known loci, then of unseen ones."""
        return self._loader(ConcatDataset([self.reads("test", known) for known in (True, False)]))

    def predict_dataloader(self) -> DataLoader:
        """The test's reads."""
        return self.test_dataloader()

    def _loader(self, data: Dataset, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        return ResumableLoader(
            data,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            shuffle=shuffle,
            drop_last=drop_last,
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
