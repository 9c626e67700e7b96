"""Windows for language models and the data module that serves them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from genomics.datasets import IGNORED, GenomeData, Windows, targets
from genomics.fasta import Fasta
from genomics.intervals import Interval, tile, whole_records
from genomics.vocabulary import decode, encode, reverse_complement


@pytest.fixture
def genome(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    rng = np.random.default_rng(0)
    records = {f"chr{i}": "".join(rng.choice(list("ACGTn"), 100 + 37 * i)) for i in range(6)}
    path = tmp_path / "genome.fa"
    path.write_text("".join(f">{name}\n{bases}\n" for name, bases in records.items()))
    return path, records


def options(path: Path) -> dict:
    return {"fasta": str(path), "window": 32, "batch_size": 4}


def test_windows_hold_every_base_once(genome: tuple[Path, dict[str, str]]) -> None:
    path, records = genome
    fasta = Fasta(path)
    data = Windows(fasta, tile(whole_records(fasta.lengths), 32), 32)
    texts: dict[str, str] = dict.fromkeys(records, "")
    for window, ids in zip(data.windows, (data[i] for i in range(len(data))), strict=True):
        assert ids.shape == (33,)
        text = decode(ids.tolist())
        assert text.startswith("[BOS]")
        texts[window.record] += text.removeprefix("[BOS]").replace("[PAD]", "")
    assert texts == {name: bases.upper() for name, bases in records.items()}


def test_targets_are_the_following_bases_alone() -> None:
    ids = torch.tensor([[2, 7, 11, 10, 4]])
    assert targets(ids).tolist() == [[7, IGNORED, 10, IGNORED]]


def test_flipped_windows_are_reverse_complements_and_pads_stay_right(genome: tuple[Path, dict[str, str]]) -> None:
    fasta = Fasta(genome[0])
    data = Windows(fasta, [Interval("chr0", 0, 20)], 32, flip=True)
    forward = fasta.read("chr0", 0, 20)
    torch.manual_seed(0)
    seen = {tuple(data[0].tolist()) for _ in range(40)}
    pads = (4,) * 12
    assert seen == {(2, *forward.tolist(), *pads), (2, *reverse_complement(forward).tolist(), *pads)}


def test_parts_are_disjoint_and_served_whole(genome: tuple[Path, dict[str, str]]) -> None:
    path, records = genome
    data = GenomeData(**options(path), reverse_complement=False)
    total = sum(map(len, records.values()))
    assert sum(len(i) for part in data.parts.values() for i in part) == total
    served = sum(int((batch[:, 1:] != 4).sum()) for batch in data.test_dataloader())
    assert served == sum(map(len, data.parts["test"]))
    assert abs(served / total - 0.15) < 0.01


def test_split_by_chromosome_and_by_bed(genome: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    path, _ = genome
    data = GenomeData(**options(path), val_records=["chr1"], test_records=["chr4", "chr5"])
    assert {i.record for i in data.parts["test"]} == {"chr4", "chr5"}
    bed = tmp_path / "split.bed"
    bed.write_text("chr5\t0\t200\ttrain\nchr2\t0\t40\tvalid\nchr2\t50\t90\ttest\n")
    data = GenomeData(**options(path), bed=str(bed))
    assert data.parts["val"] == [Interval("chr2", 0, 40)]
    assert data.parts["test"] == [Interval("chr2", 50, 90)]
    bed.write_text("chr5\t0\t200\ttrain\nchr2\t0\t60\tvalid\nchr2\t50\t90\ttest\n")
    with pytest.raises(UserError, match="overlap"):
        GenomeData(**options(path), bed=str(bed))
    bed.write_text("chr5\t0\t200\ttrain\nchr2\t50\t90\ttest\n")
    with pytest.raises(UserError, match="no interval for the val part"):
        GenomeData(**options(path), bed=str(bed))


def test_short_sequences_are_an_error_or_padded(genome: tuple[Path, dict[str, str]]) -> None:
    path, records = genome
    wide = {**options(path), "window": 120, "batch_size": 1}
    with pytest.raises(UserError, match="chr0:0-100 has 100 bases, shorter than the window of 120"):
        GenomeData(**wide)
    data = GenomeData(**wide, pad=True, val_records=["chr1"], test_records=["chr0"])
    (ids,) = data.test_dataloader()
    assert ids.shape == (1, 121)
    assert ids[0, 1:101].tolist() == encode(records["chr0"]).tolist()
    assert (ids[0, 101:] == 4).all()


def test_too_little_for_a_batch(genome: tuple[Path, dict[str, str]]) -> None:
    with pytest.raises(UserError, match="wanted a batch of 1000"):
        GenomeData(**{**options(genome[0]), "batch_size": 1000})


def test_bases_of_a_step() -> None:
    """As many windows as the bases make, one at least and all at most; a number of windows counts for more."""
    assert GenomeData(window=512).batch_size == 32
    assert GenomeData(window=500, batch_tokens=1100).batch_size == 2
    assert GenomeData(window=500, batch_tokens=100).batch_size == 1
    data = GenomeData(window=500, batch_tokens=10**9)
    assert data.batch_size == len(data.windows["train"])
    assert GenomeData(window=500, batch_size=3, batch_tokens=1100).batch_size == 3


def test_nothing_to_predict(tmp_path: Path) -> None:
    path = tmp_path / "n.fa"
    path.write_text(">a\n" + 700 * "A" + 300 * "N" + "\n")
    with pytest.raises(UserError, match="the val part holds no A, C, G or T"):
        GenomeData(**options(path))
    path.write_text(">a\n" + 1000 * "a" + "\n")
    assert GenomeData(**options(path)).windows["test"]
    with pytest.raises(UserError, match=r"the train part holds no .*--data.lower keep"):
        GenomeData(**options(path), lower="mask")


def test_the_excerpt_has_no_chromosomes() -> None:
    with pytest.raises(UserError, match=r"the excerpt .* has no records chr13, chr14 to hold out; give a genome"):
        GenomeData(val_records=["chr13"], test_records=["chr14"])


def test_forked_workers_serve_the_same(genome: tuple[Path, dict[str, str]]) -> None:
    path, _ = genome
    alone = torch.cat(list(GenomeData(**options(path)).test_dataloader()))
    workers = torch.cat(list(GenomeData(**options(path), num_workers=2).test_dataloader()))
    assert torch.equal(alone, workers)
