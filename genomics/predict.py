"""Predicts along chromosomes: ``python -m genomics.predict MODEL FASTA`` writes a BED or bedGraph track.

Legend: T bases of a piece, D model width, K classes.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.cli import run
from core.errors import UserError
from core.training.report import Report
from genomics.fasta import Fasta, open_genome
from genomics.inference import Loaded, hidden_pieces, load_model, log_probability_pieces, surprisal, to_tensor
from genomics.intervals import Interval
from genomics.output import Results, intervals, progress, write_bedgraph, write_bigwig
from genomics.vocabulary import A, T

Row = tuple[str, int, int, float]


def predict(
    model: str,
    fasta: str,
    bed: str | None = None,
    track: Literal["classes", "surprisal", "entropy", "auto"] = "auto",
    bin: int = 1024,
    piece: int | None = None,
    format: Literal["bedgraph", "bigwig"] = "bedgraph",
    device: str = "auto",
    dtype: str = "float32",
    out: str | None = None,
) -> None:
    """Reads whole contigs once, with the state carried, in memory that their length does not change.

    A classifier gives predictions.bed, a line a bin with the class and its probability times 1,000 as the score; a
    language model gives a track of its surprisal (-log p of each base, nats) or entropy, the mean of each bin.

    Args:
        model: Checkpoint, run folder, folder with config.json, or name on the Hugging Face hub.
        fasta: Sequences: FASTA or FASTQ, perhaps gzipped, or 2bit; or a folder of such files.
        bed: Intervals to read, each from its start on; null is every record.
        track: classes for a classifier, surprisal or entropy for a language model; auto chooses.
        bin: Bases of a line of the track.
        piece: Bases that go through the model at a time; rounded to a multiple of the bin; null is 16,384 where a
            processor carries a state on, 262,144 where a GPU does, else 65,536.
        format: bedgraph, or bigwig (needs pyBigWig), for surprisal and entropy.
        device: cpu, cuda, or auto.
        dtype: float32, bfloat16, or tf32: float32 whose products an NVIDIA GPU rounds to 11 bits.
        out: Folder for the results; null is the next one under runs/genomics/predict.
    """
    if bin < 1:
        raise UserError(f"--bin is {bin}; wanted at least 1 base")
    loaded, genome = load_model(model, device, dtype), open_genome(fasta)
    wanted = track if track != "auto" else ("classes" if loaded.classifier else "surprisal")
    if (wanted == "classes") != (loaded.classifier is not None):
        kind = "a classifier" if loaded.classifier else "a language model"
        raise UserError(f"--track is {wanted}, but the model is {kind}; leave --track out, or give another model")
    piece = max((loaded.piece if piece is None else piece) // bin, 1) * bin
    places = [place for place, _ in intervals(genome, bed)]
    if format == "bigwig":
        places = in_order(places, genome)
    with Results("predict", out) as results:
        if wanted == "classes":
            path = results.path / "predictions.bed"
            counts = _write_classes(path, loaded, genome, places, bin, piece)
        else:
            rows = (
                row
                for place in progress(places, "reading")
                for row in values(loaded, genome, place, wanted, bin, piece)
            )
            counted = _Counted(rows)
            path = results.path / f"{wanted}.{'bw' if format == 'bigwig' else 'bedgraph'}"
            if format == "bigwig":
                write_bigwig(path, counted, genome.lengths)
            else:
                write_bedgraph(path, counted, wanted)
            counts = {f"mean_{wanted}": counted.total / max(counted.bases, 1)}
        bases = sum(map(len, places))
        report = Report("Prediction along sequences", f"{bases:,}", "bases read")
        report.facts("Track", {"file": path.name, "model": model, "sequences": fasta, "bin": bin, **counts})
        results.finish({"bases": bases, **counts}, report)


def in_order(places: list[Interval], genome: Fasta) -> list[Interval]:
    """Sort intervals as the genome's records come, which bigWig files ask for.

    Raises:
        UserError: If two overlap, for a base has one value there.
    """
    order = {record: number for number, record in enumerate(genome.lengths)}
    places = sorted(places, key=lambda place: (order[place.record], place.start))
    for one, two in pairwise(places):
        if one.record == two.record and two.start < one.end:
            raise UserError(
                f"{one} and {two} overlap, and a bigWig file has one value a base; merge them, or give bedgraph"
            )
    return places


class _Counted:
    """Rows handed on, and their mean over bases."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows, self.total, self.bases = rows, 0.0, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            if not np.isnan(row[3]):
                self.total, self.bases = self.total + row[3] * (row[2] - row[1]), self.bases + row[2] - row[1]
                yield row


def values(model: Loaded, fasta: Fasta, place: Interval, track: str, bin: int, piece: int) -> Iterator[Row]:
    """Yield the mean surprisal or entropy of each bin of an interval; NaN where no base is A, C, G or T."""
    start, left = place.start, np.empty(0, np.float32)
    for bases, scores in log_probability_pieces(model, fasta, place, piece):
        if track == "surprisal":
            found = surprisal(bases, scores)
        else:
            chances = scores[:, A : T + 1].log_softmax(1)
            found = -(chances.exp() * chances).sum(1).cpu().numpy()
        left = np.concatenate([left, found])
        while len(left) >= bin or (len(left) and start + len(left) == place.end):
            part, left = left[:bin], left[bin:]
            known = part[~np.isnan(part)]
            yield place.record, start, start + len(part), float(known.mean()) if len(known) else float("nan")
            start += len(part)


@torch.inference_mode()
def class_probabilities(
    model: Loaded, fasta: Fasta, place: Interval, bin: int, piece: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield start, end and class probabilities (K,) of each bin: its hidden states, pooled, through the head."""
    classifier = model.classifier
    assert classifier is not None
    start, before = place.start, None
    for hidden in hidden_pieces(model, fasta, place, piece):
        ids = to_tensor(fasta.read(place.record, start, start + len(hidden)), model.device)
        for states, bases in zip(hidden[None].split(bin, dim=1), ids[None].split(bin, dim=1), strict=True):
            logits = classifier.score_states(states, bases, before)[0]
            yield start, start + bases.shape[1], logits.float().softmax(0)
            start, before = start + bases.shape[1], states[:, -1:]


def _write_classes(
    path: Path, model: Loaded, fasta: Fasta, places: list[Interval], bin: int, piece: int
) -> dict[str, float]:
    assert model.classifier is not None
    names = model.class_names or tuple(f"class{i}" for i in range(model.classifier.num_classes))
    bases = dict.fromkeys(names, 0)
    with path.open("w", encoding="utf-8") as file:
        for place in progress(places, "reading"):
            for start, end, chances in class_probabilities(model, fasta, place, bin, piece):
                best = int(chances.argmax())
                bases[names[best]] += end - start
                file.write(f"{place.record}\t{start}\t{end}\t{names[best]}\t{round(1000 * float(chances[best]))}\t.\n")
    total = max(sum(bases.values()), 1)
    return {f"share_{name}": count / total for name, count in bases.items()}


if __name__ == "__main__":
    run(predict)
