"""Segments of whole genomes: where they lie, what they leave out, and the five-species recipe end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.cli import main
from core.errors import UserError
from genomics.fasta import Fasta
from genomics.segments import Segments, split_genomes
from genomics.vocabulary import reverse_complement

SPECIES = ("human", "chimpanzee", "bonobo", "gorilla", "orangutan")


def genome(path: Path, seed: int, chances: list[float] | None = None, names: str = "123X", length: int = 3000) -> str:
    rng = np.random.default_rng(seed)
    records = {f"chr{name}": "".join(rng.choice(list("ACGT"), length, p=chances)) for name in names}
    path.write_text("".join(f">{name}\n{text}\n" for name, text in records.items()))
    return str(path)


def test_parts_share_no_base_and_homologous_chromosomes_stay_on_one_side(tmp_path: Path) -> None:
    one, two = (Fasta(genome(tmp_path / f"{n}.fa", n, names=names)) for n, names in enumerate(("123X", "12X3Y")))
    parts = split_genomes([one, two])
    assert [[i.record for i in region] for region in parts["train"]] == [["chr1", "chr2"]] * 2
    assert [[i.record for i in region] for region in parts["test"]] == [["chrX"]] * 2
    named = split_genomes([one, two], ["chr3"], ["chr1", "chrY"])
    with pytest.raises(UserError, match=r"--data.test_records: no genome has a record 'chr9'; the first ones"):
        split_genomes([one, two], ["chr3"], ["chr1", "chr9"])
    with pytest.raises(UserError, match=r"records for one of .*; wanted both, or neither"):
        split_genomes([one, two], ["chr3"])
    assert [[i.record for i in region] for region in named["test"]] == [["chr1"], ["chr1", "chrY"]]
    other = Fasta(genome(tmp_path / "o.fa", 5, names="ab"))
    lengths = {
        part: [sum(map(len, region)) for region in regions] for part, regions in split_genomes([one, other]).items()
    }
    assert lengths == {"train": [8400, 4200], "val": [1200, 600], "test": [2400, 1200]}


def test_segments_lie_in_their_region_on_either_strand_without_n(tmp_path: Path) -> None:
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 500))
    path = tmp_path / "n.fa"
    path.write_text(f">a\n{text[:300]}N{text[301:]}\n>short\nACGT\n")
    file = Fasta(path)
    parts = split_genomes([file, file])
    segments = Segments([file, file], parts["train"], "test", 60, 40, 0.0, True, 0)
    forward, found = text[:353], set()
    for i in range(60):
        ids, species, known = segments[i]
        assert (species, known) == (i % 2, True)
        assert torch.equal(ids, segments[i][0])
        back = reverse_complement(ids.numpy().astype(np.uint8))
        hits = [forward.find("".join("ACGT"[b - 7] for b in strand)) for strand in (ids.tolist(), back.tolist())]
        assert max(hits) >= 0
        assert not max(hits) <= 300 < max(hits) + 40
        found.add(int(np.argmax(hits)))
    assert found == {0, 1}
    new = Segments([file, file], parts["train"], "train", 2, 40, 0.0, True, 0)
    assert not torch.equal(new[0][0], new[0][0])
    with pytest.raises(
        UserError, match=r"longest stretch of the test part has 97 bases, wanted 400.*--data.read_length"
    ):
        Segments([file, file], parts["test"], "test", 2, 400, 0.0, False, 0)
    (tmp_path / "all.fa").write_text(">a\n" + "ACGTN" * 100 + "\n")
    gaps = Fasta(tmp_path / "all.fa")
    with pytest.raises(UserError, match="no 40 bases without N in 1,000 draws"):
        Segments([gaps], split_genomes([gaps])["train"], "train", 2, 40, 0.0, True, 0)[0]


def test_five_species_by_the_recipe_with_lengths_that_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Species that differ in composition are told apart on chromosomes never seen, at the last position."""
    files = []
    for seed, (name, gc) in enumerate(zip(SPECIES, (0.02, 0.26, 0.5, 0.74, 0.98), strict=True)):
        chances = [(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2]  # which strand is read makes no difference
        files += [f"--data.fasta.{name}", genome(tmp_path / f"{name}.fa", seed, chances)]
    main(
        "genomics", "genomics.classifier.SpeciesClassifier", "genomics.species.SpeciesData", command="classify",
        links={"data.num_classes": "model.num_classes"},
        argv=[
            "great_apes_genomes", *files, "--data.val_records", "[chr3]", "--data.test_records", "[chr1]",
            "--data.read_length", "64", "--data.train_reads", "160", "--data.val_reads", "20",
            "--data.test_reads", "100", "--data.batch_size", "16", "--data.num_workers", "0",
            "--trainer.max_epochs", "12",
            "--trainer.callbacks+=genomics.warmup.LengthWarmup", "--trainer.callbacks.start", "16",
            "--trainer.callbacks.epochs", "1", "--trainer.callbacks.constant", "batch",
            "--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
            "--trainer.log_every_n_steps", "1", "--model.d_model", "8", "--model.n_layer", "1", "--model.d_state", "4",
            "--model.optimizer.lr", "3e-2", "--model.schedule.warmup_epochs", "1",
            "--model.gradient_checkpointing", "true", "--run_dir", str(tmp_path / "run"),
        ],
    )  # fmt: skip
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["baseline/chance_accuracy"] == pytest.approx(0.2)
    assert found["test/unseen_loci_accuracy"] > 0.8
    assert "baseline/vote_accuracy" not in found
    out = capsys.readouterr().out
    assert "segments of chromosomes never seen" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "orangutan" in page
    assert "<h2>The panel</h2>" not in page
