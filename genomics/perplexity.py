"""Perplexity of each record: ``python -m genomics.perplexity MODEL FASTA`` writes a table."""

import numpy as np

from core.cli import run
from core.training.report import Report
from genomics.fasta import open_genome
from genomics.inference import load_model, log_probability_pieces, surprisal
from genomics.output import Results, intervals, progress


def perplexity(
    model: str,
    fasta: str,
    bed: str | None = None,
    piece: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    out: str | None = None,
) -> None:
    """Writes perplexity.tsv: record, start, end, name, scored bases, nats a base and perplexity a base.

    A causal model predicts each base from those before it, from the start of the record or interval on where it
    carries its state; a masked model from both sides, in eight passes that mask every eighth base each.

    Args:
        model: Checkpoint, run folder, folder with config.json, or name on the Hugging Face hub.
        fasta: Sequences: FASTA or FASTQ, perhaps gzipped, or 2bit; or a folder of such files.
        bed: Intervals to score, named by the fourth column; null is every record.
        piece: Bases that go through the model at a time; null is 16,384 where a processor carries a state on,
            262,144 where a GPU does, else 65,536.
        device: cpu, cuda, or auto.
        dtype: float32, bfloat16, or tf32: float32 whose products an NVIDIA GPU rounds to 11 bits.
        out: Folder for the results; null is the next one under runs/genomics/perplexity.
    """
    loaded, genome = load_model(model, device, dtype), open_genome(fasta)
    places = intervals(genome, bed)
    with Results("perplexity", out) as results:
        rows, total, count = [], 0.0, 0
        for place, name in progress(places, "scoring"):
            nats, bases = 0.0, 0
            for ids, scores in log_probability_pieces(loaded, genome, place, piece):
                found = surprisal(ids, scores)
                known = ~np.isnan(found)
                nats, bases = nats + float(found[known].sum(dtype=np.float64)), bases + int(known.sum())
            mean = nats / bases if bases else float("nan")
            rows.append({"record": place.record, "start": place.start, "end": place.end, "name": name, "bases": bases,
                         "nats_per_base": mean, "perplexity": float(np.exp(mean))})  # fmt: skip
            total, count = total + nats, count + bases
        lines = ["\t".join(rows[0]), *("\t".join(_cell(value) for value in row.values()) for row in rows)]
        (results.path / "perplexity.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        overall = float(np.exp(total / count)) if count else float("nan")
        report = Report("Perplexity", f"{overall:.4f}", "a base, over all records")
        report.table("Records", rows[:200], "The first 200; perplexity.tsv has all. A uniform guess has 4.")
        results.finish({"perplexity": overall, "bases": count, "records": len(rows)}, report)


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(perplexity)
