"""Labelled data in every layout, folds without relatives across, and a run that learns what is there."""

import json
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from genomics.finetune import finetune
from genomics.labelled import families, folds, read_labelled
from genomics.vocabulary import decode, encode, reverse_complement


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def sequences(count: int, seed: int = 0, length: int = 50) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), length)) for _ in range(count)]


def test_layouts(tmp_path: Path) -> None:
    texts = sequences(4)
    for part in ("train", "test"):
        for i, text in enumerate(texts):
            file = tmp_path / "gb" / part / f"c{i % 2}" / f"{i}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
    (tmp_path / "nt").mkdir()
    (tmp_path / "nt" / "train.fna").write_text("".join(f">s{i}|c{i % 2}\n{t}\n" for i, t in enumerate(texts)))
    (tmp_path / "nt" / "test.fna").write_text(f">x|c0\n{texts[0]}\n")
    (tmp_path / "t.csv").write_text("sequence,label\n" + "".join(f"{t},c{i % 2}\n" for i, t in enumerate(texts)))
    for place, has_test in (("gb", True), ("nt", True), ("t.csv", False)):
        train, test = read_labelled(tmp_path / place)
        assert sorted(map(decode, train.sequences)) == sorted(texts)
        assert {decode(s): label for s, label in zip(*train, strict=True)} == {
            t: f"c{i % 2}" for i, t in enumerate(texts)
        }
        assert (test is not None) == has_test
    (tmp_path / "bad.csv").write_text("seq,label\nA,1\n")
    for place, message in (("bad.csv", "columns sequence and label"), ("none", "no data set")):
        with pytest.raises(UserError, match=message):
            read_labelled(tmp_path / place)


def test_relatives_stay_together() -> None:
    texts = sequences(12, length=60)
    texts[3] = texts[0][20:] + texts[3][:20]  # shares 40 bases
    texts[5] = decode(reverse_complement(encode(texts[3][:35]))) + texts[5][:25]  # and 35 on the other strand
    found = families([encode(text) for text in texts])
    assert found[0] == found[3] == found[5]
    assert len(set(found.tolist())) == 10
    assigned = folds(found, ["a", "b"] * 6, 4, seed=1)
    assert assigned[0] == assigned[3] == assigned[5]
    assert set(assigned.tolist()) == {0, 1, 2, 3}
    with pytest.raises(UserError, match="ask for fewer"):
        folds(found, ["a", "b"] * 6, 11, seed=1)


def test_a_run_learns_what_is_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shares = {"rich": [0.1, 0.4, 0.4, 0.1], "poor": [0.4, 0.1, 0.1, 0.4]}
    lines = [f"{''.join(rng.choice(list('ACGT'), 24, p=p))},{name}" for _ in range(40) for name, p in shares.items()]
    (tmp_path / "m.csv").write_text("sequence,label\n" + "\n".join(lines) + "\n")
    out = tmp_path / "out"
    finetune(str(tmp_path / "m.csv"), d_model=8, n_layer=1, epochs=4, lr=1e-2, batch_size=8, cross_validation=2,
             pooling="mean", kmer=2, homology=False, device="cpu", out=str(out))  # fmt: skip
    found = json.loads((out / "metrics.json").read_text())
    assert found["accuracy"] > 0.85
    assert found["kmer_accuracy"] > 0.85
    assert len((out / "predictions.tsv").read_text().splitlines()) == 81
    assert len((out / "folds.tsv").read_text().splitlines()) == 3
