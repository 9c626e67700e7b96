"""Embeds sequences: ``python -m genomics.embed MODEL FASTA`` writes one vector an interval, or one a base."""

from typing import Literal

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from core.cli import run
from core.errors import UserError
from core.training.report import Report
from genomics.fasta import open_genome
from genomics.inference import hidden_pieces, load_model
from genomics.output import Results, intervals, progress


def embed(
    model: str,
    fasta: str,
    bed: str | None = None,
    pooling: Literal["mean", "max", "last", "none"] = "mean",
    format: Literal["safetensors", "parquet"] = "safetensors",
    piece: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    out: str | None = None,
) -> None:
    """Writes the hidden states of a model for each record of a file, or each interval of a BED file.

    embeddings.safetensors holds embeddings (intervals, width) in the order of names.tsv, or with pooling none a tensor
    an interval (bases, width), called by its name. A model that carries its state sees each interval from its start;
    others see pieces.

    Args:
        model: Checkpoint, run folder, folder with config.json, or name on the Hugging Face hub.
        fasta: Sequences: FASTA or FASTQ, perhaps gzipped, or 2bit; or a folder of such files.
        bed: Intervals to embed, named by the fourth column; null is every record.
        pooling: Mean, maximum or last position of each interval; none keeps every base.
        format: safetensors, or parquet (one row an interval; needs pyarrow, and a pooling).
        piece: Bases that go through the model at a time; null is 16,384 where a processor carries a state on,
            262,144 where a GPU does, else 65,536.
        device: cpu, cuda, or auto.
        dtype: float32, bfloat16, or tf32: float32 whose products an NVIDIA GPU rounds to 11 bits.
        out: Folder for the results; null is the next one under runs/genomics/embed.
    """
    if format == "parquet" and pooling == "none":
        raise UserError("--format parquet keeps one row an interval; give --pooling mean, max or last, or safetensors")
    loaded, genome = load_model(model, device, dtype), open_genome(fasta)
    places = intervals(genome, bed)
    names = [name for _, name in places]
    if pooling == "none" and len(set(names)) < len(names):
        raise UserError("two intervals have one name, and each becomes a tensor of that name; name them differently")
    with Results("embed", out) as results:
        found = [
            pooled(hidden_pieces(loaded, genome, place, piece), pooling) for place, _ in progress(places, "embedding")
        ]
        (results.path / "names.tsv").write_text(
            "".join(f"{i.record}\t{i.start}\t{i.end}\t{name}\n" for i, name in places), encoding="utf-8"
        )
        if format == "parquet":
            _write_parquet(str(results.path / "embeddings.parquet"), names, np.stack(found))
        else:
            tensors = dict(zip(names, found, strict=True)) if pooling == "none" else {"embeddings": np.stack(found)}
            save_file(tensors, results.path / "embeddings.safetensors")
        bases = sum(len(place) for place, _ in places)
        report = Report("Embeddings", f"{len(places):,}", f"intervals, {bases:,} bases")
        report.facts(
            "Embeddings", {"model": model, "sequences": fasta, "pooling": pooling, "width": found[0].shape[-1]}
        )
        results.finish({"intervals": len(places), "bases": bases, "width": found[0].shape[-1]}, report)


def pooled(pieces: object, pooling: str) -> np.ndarray:
    """Reduce pieces (T, D) to (D,) as they come, or lay them end to end; float32."""
    total: Tensor | None = None
    count, kept = 0, []
    for piece in pieces:  # type: ignore[attr-defined]
        piece = piece.float()
        count += len(piece)
        if pooling == "none":
            kept.append(piece.cpu())
        elif pooling == "last":
            total = piece[-1]
        elif pooling == "max":
            most = piece.amax(0)
            total = most if total is None else torch.maximum(total, most)
        else:
            part = piece.double().sum(0)
            total = part if total is None else total + part
    if pooling == "none":
        return torch.cat(kept).numpy()
    assert total is not None
    return (total / count if pooling == "mean" else total).float().cpu().numpy()


def _write_parquet(path: str, names: list[str], values: np.ndarray) -> None:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--format parquet needs pyarrow, which is not installed; run `pip install pyarrow`") from None
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), values.shape[1])
    rows = pyarrow.table({"name": names, "embedding": vectors})
    pyarrow.parquet.write_table(rows, path)


if __name__ == "__main__":
    run(embed)
