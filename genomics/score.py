"""Scores variants: ``python -m genomics.score MODEL FASTA VCF``, or every substitution of a region.

Legend: B sequences, L bases of a window, V padded vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from core.cli import run
from core.errors import UserError
from core.training.report import Report
from genomics.fasta import Fasta, open_genome
from genomics.inference import Loaded, load_model, to_tensor
from genomics.intervals import read_lines
from genomics.output import Results, progress
from genomics.vocabulary import BASES, MASK, PAD, A, T, decode, encode, reverse_complement


@dataclass(frozen=True)
class Variant:
    """One alternative allele: bases ``start`` to ``start + len(ref)`` (0-based) become ``alt``."""

    record: str
    start: int
    ref: str
    alt: str


def score(
    model: str,
    fasta: str,
    vcf: str | None = None,
    ism: str | None = None,
    window: int = 1024,
    both_strands: bool = True,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "float32",
    out: str | None = None,
) -> None:
    """Writes log p(alternative) - log p(reference) in nats: below 0, the model finds the alternative less likely.

    A causal model is asked for the whole window with either allele, a masked one for the masked bases of the variant
    (of insertions and deletions it says nothing). With a VCF file scores.vcf has the value of each alternative allele
    as LLR in the INFO column; with a region (in-silico mutagenesis) ism.tsv and ism.png show every substitution.

    Args:
        model: Checkpoint, run folder, folder with config.json, or name on the Hugging Face hub.
        fasta: The reference genome: FASTA, perhaps gzipped, or 2bit; or a folder of such files.
        vcf: Variants, plain or gzipped.
        ism: Region record:start-end (1-based, both ends in it) of which to score every substitution.
        window: Bases that the model sees, the variant in the middle.
        both_strands: Average over the window and its reverse complement.
        batch_size: Windows that go through the model at a time.
        device: cpu, cuda, or auto.
        dtype: float32, bfloat16, or tf32: float32 whose products an NVIDIA GPU rounds to 11 bits.
        out: Folder for the results; null is the next one under runs/genomics/score.
    """
    if (vcf is None) == (ism is None):
        raise UserError("give either --vcf FILE or --ism record:start-end")
    if window < 2 or batch_size < 1:
        raise UserError(f"--window is {window} and --batch_size {batch_size}; wanted at least 2 and 1")
    loaded, genome = load_model(model, device, dtype), open_genome(fasta)
    if loaded.classifier is not None:
        raise UserError("this checkpoint is a classifier, which predicts no bases; give one of genomics.pretrain")
    if loaded.longest is not None and window >= loaded.longest:
        raise UserError(f"--window is {window:,}; the model reads at most {loaded.longest - 1:,} bases")
    scorer = Scorer(loaded, genome, window, both_strands, batch_size)
    with Results("score", out) as results:
        if vcf is not None:
            values = _score_vcf(scorer, Path(vcf), results.path / "scores.vcf")
            report = Report("Variants", f"{len(values):,}", "alternative alleles scored")
        else:
            assert ism is not None
            values, table, figure = _mutate(scorer, ism)
            (results.path / "ism.tsv").write_text(table, encoding="utf-8")
            figure.savefig(results.path / "ism.png", dpi=144)
            report = Report("In-silico mutagenesis", ism, "every substitution")
            report.figure("Log-likelihood ratios", figure, "Blue: less likely than the reference, red: likelier.")
        known = [value for value in values if not np.isnan(value)]
        mean = float(np.mean(known)) if known else float("nan")
        report.facts(
            "Scores", {"model": model, "window": window, "alleles": len(values), "scored": len(known), "mean": mean}
        )
        results.finish({"alleles": len(values), "scored": len(known), "mean_llr": mean}, report)


class Scorer:
    """Log-likelihood ratios of variants in their surroundings.

    Args:
        model: A language model.
        genome: The reference.
        window: L.
        both_strands: Average over both.
        batch_size: Windows at a time.
    """

    def __init__(self, model: Loaded, genome: Fasta, window: int, both_strands: bool, batch_size: int) -> None:
        self.model, self.genome, self.window = model, genome, window
        self.both_strands, self.batch_size = both_strands, batch_size

    def __call__(self, variants: Sequence[Variant]) -> list[float]:
        """Score variants, in batches; NaN where the model has no answer."""
        step = max(self.batch_size // (4 if self.both_strands else 2), 1)
        batches = [variants[i : i + step] for i in range(0, len(variants), step)]
        return [value for batch in progress(batches, "scoring") for value in self._score(batch)]

    @torch.inference_mode()
    def _score(self, variants: Sequence[Variant]) -> list[float]:
        pairs = [self._alleles(variant) for variant in variants]
        if self.model.causal:
            sides = [self._likelihoods([pair[i][0] for pair in pairs]) for i in (0, 1)]
            return (sides[1] - sides[0]).tolist()
        found = []
        for (reference, place), (alternative, _) in pairs:
            same = len(reference) == len(alternative)
            found.append(self._masked(reference, alternative, place) if same else float("nan"))
        return found

    def _alleles(self, variant: Variant) -> tuple[tuple[np.ndarray, slice], tuple[np.ndarray, slice]]:
        """The window with either allele, and where the allele lies in it."""
        end = variant.start + len(variant.ref)
        left = max((self.window - max(len(variant.ref), len(variant.alt))) // 2, 0)
        low, high = max(variant.start - left, 0), min(end + left, self.genome.lengths[variant.record])
        before = self.genome.read(variant.record, low, variant.start)
        after = self.genome.read(variant.record, end, high)
        made = []
        for allele in (variant.ref, variant.alt):
            ids = np.concatenate([before, encode(allele), after])
            made.append((ids, slice(len(before), len(before) + len(allele))))
        return made[0], made[1]

    def _strands(self, ids: np.ndarray) -> list[np.ndarray]:
        return [ids, reverse_complement(ids)] if self.both_strands else [ids]

    def _likelihoods(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Log-likelihood of the bases of each window under a causal model, the mean of its strands."""
        rows = [strand for ids in windows for strand in self._strands(ids)]
        start = [] if self.model.start is None else [self.model.start]
        longest = max(map(len, rows))
        batch = np.full((len(rows), len(start) + longest), PAD, np.uint8)
        for row, ids in zip(batch, rows, strict=True):
            row[: len(start)] = start
            row[len(start) : len(start) + len(ids)] = ids
        ids = to_tensor(batch, self.model.device)
        scores = self.model.net(ids[:, :-1]).float().log_softmax(-1)
        following = ids[:, 1:]  # padding comes last and is no base: nothing of it is counted
        chosen = scores.gather(2, following[:, :, None])[:, :, 0]
        chosen = chosen.double().masked_fill((following < A) | (following > T), 0.0)
        return chosen.sum(1).view(len(windows), -1).mean(1).cpu().numpy()

    def _masked(self, reference: np.ndarray, alternative: np.ndarray, place: slice) -> float:
        rows, wanted = [], []
        changed = np.flatnonzero(reference[place] != alternative[place]) + place.start
        for strand in range(1 + self.both_strands):
            ids = reference.copy()
            ids[changed] = MASK
            rows.append(self._strands(ids)[strand])
            pair = [self._strands(allele)[strand] for allele in (reference, alternative)]
            wanted.append((changed if strand == 0 else len(ids) - 1 - changed, *pair))
        scores = self.model.net(to_tensor(np.stack(rows), self.model.device)).float().log_softmax(-1).cpu()
        return float(np.mean([_ratio(scores[i], *entry) for i, entry in enumerate(wanted)]))


def _ratio(scores: Tensor, places: np.ndarray, reference: np.ndarray, alternative: np.ndarray) -> float:
    at = scores[torch.from_numpy(places)]
    old, new = (torch.from_numpy(ids[places].astype(np.int64))[:, None] for ids in (reference, alternative))
    return float((at.gather(1, new) - at.gather(1, old)).sum())


def read_vcf(path: Path, genome: Fasta) -> Iterator[tuple[list[str], list[Variant | None]]]:
    """Yield the columns of each line and its alternative alleles; None for symbolic ones (``<DEL>``, ``*``).

    Raises:
        UserError: Naming the line, if it is no VCF line or its reference allele is not the genome's.
    """
    for number, line in enumerate(read_lines(path, "VCF"), 1):
        if line.startswith("#") or not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) < 5 or not columns[1].isdigit():
            raise UserError(f"{path}, line {number}: wanted CHROM, POS, ID, REF, ALT and more, tabs between")
        record, start, ref = columns[0], int(columns[1]) - 1, columns[3].upper()
        if record not in genome.lengths:
            first = ", ".join(list(genome.lengths)[:3])
            raise UserError(f"{path}, line {number}: the genome has no record {record!r}; it has {first}")
        if not 0 <= start <= start + len(ref) <= genome.lengths[record]:
            raise UserError(f"{path}, line {number}: {record}:{start + 1} lies outside the record")
        there = decode(genome.read(record, start, start + len(ref)))
        if there != ref:
            raise UserError(
                f"{path}, line {number}: REF is {ref}, but the genome has {there} there; is it the same assembly?"
            )
        alleles = [alt.upper() for alt in columns[4].split(",")]
        yield columns, [Variant(record, start, ref, alt) if set(alt) <= set(BASES) else None for alt in alleles]


def _score_vcf(scorer: Scorer, path: Path, out: Path) -> list[float]:
    lines = list(read_vcf(path, scorer.genome))
    if not lines:
        raise UserError(f"{path} holds no variants; wanted lines of CHROM, POS, ID, REF, ALT and more")
    variants = [variant for _, alleles in lines for variant in alleles if variant is not None]
    found = iter(scorer(variants))
    every: list[float] = []
    with out.open("w", encoding="utf-8") as file:
        file.write("##fileformat=VCFv4.2\n")
        file.write(
            '##INFO=<ID=LLR,Number=A,Type=Float,Description="log p(ALT) - log p(REF) of a DNA language model">\n'
        )
        file.write("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
        for columns, alleles in lines:
            values = [next(found) if variant is not None else float("nan") for variant in alleles]
            every += values
            text = "LLR=" + ",".join("." if np.isnan(value) else f"{value:.5f}" for value in values)
            columns = [*columns, *["."] * (8 - len(columns))][:8]
            columns[7] = text if columns[7] in (".", "") else f"{columns[7]};{text}"
            file.write("\t".join(columns) + "\n")
    return every


def parse_region(text: str, genome: Fasta) -> tuple[str, int, int]:
    """Turn record:start-end (1-based, both in it) into record, start and end (0-based, half-open).

    Raises:
        UserError: If it is no such text, or lies outside the record.
    """
    record, _, span = text.rpartition(":")
    first, _, last = span.replace(",", "").partition("-")
    if not (record in genome.lengths and first.isdigit() and last.isdigit()):
        raise UserError(
            f"--ism is {text!r}; wanted record:start-end, with a record such as {next(iter(genome.lengths))}"
        )
    start, end = int(first) - 1, int(last)
    if not 0 <= start < end <= genome.lengths[record]:
        raise UserError(f"--ism {text} is empty or lies outside the record, which has {genome.lengths[record]:,} bases")
    return record, start, end


def _mutate(scorer: Scorer, region: str) -> tuple[list[float], str, Figure]:
    record, start, end = parse_region(region, scorer.genome)
    reference = decode(scorer.genome.read(record, start, end))
    variants = [
        Variant(record, start + i, base, alt)
        for i, base in enumerate(reference)
        if base in BASES
        for alt in BASES
        if alt != base
    ]
    values = scorer(variants)
    grid = np.full((4, end - start), np.nan)
    lines = ["record\tposition\tref\talt\tllr"]
    for variant, value in zip(variants, values, strict=True):
        grid[BASES.index(variant.alt), variant.start - start] = value
        lines.append(f"{record}\t{variant.start + 1}\t{variant.ref}\t{variant.alt}\t{value:.5f}")
    return values, "\n".join(lines) + "\n", draw(grid, record, start, reference)


def draw(grid: np.ndarray, record: str, start: int, reference: str) -> Figure:
    """Draw log-likelihood ratios (4, bases) as a heat map, the reference's bases left white."""
    figure = Figure(figsize=(min(max(grid.shape[1] * 0.12, 5), 40), 2.2), layout="constrained")
    axis = figure.add_subplot()
    most = float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 1.0
    image = axis.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(4), list(BASES))
    if len(reference) <= 120:
        axis.set_xticks(range(len(reference)), list(reference), fontsize=6)
    else:
        ticks = np.linspace(0, len(reference) - 1, 8).astype(int)
        axis.set_xticks(ticks, [f"{start + 1 + i:,}" for i in ticks], fontsize=7)
    axis.set_xlabel(f"{record}, from {start + 1:,}")
    figure.colorbar(image, ax=axis, label="log-likelihood ratio")
    return figure


if __name__ == "__main__":
    run(score)
