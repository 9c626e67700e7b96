"""Labelled data in every layout, folds without relatives across, and a run that learns what is there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from genomics.finetune import finetune
from genomics.inference import Loaded
from genomics.labelled import families, folds, read_labelled
from genomics.models import Pooling, build_lm
from genomics.pretrained import PretrainedClassifier
from genomics.vocabulary import BOS, PAD, decode, encode, reverse_complement


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
    (tmp_path / "short.csv").write_text("sequence,label\nACGT,1\nACGG\n")
    (tmp_path / "empty.csv").write_text("sequence,label\n,1\n")
    (tmp_path / "head.csv").write_text("sequence,label\n")
    (tmp_path / "text.csv").write_text("hello\n")
    (tmp_path / "blank" / "train" / "a").mkdir(parents=True)
    (tmp_path / "blank" / "train" / "a" / "0.txt").write_text("\n")
    for place, message in (
        ("bad.csv", "columns sequence and label, got seq, label"),
        ("text.csv", "got hello"),
        ("none", "no data set"),
        ("short.csv", "row 2 has no label"),
        ("empty.csv", "row 1 has no sequence"),
        ("head.csv", "no rows"),
        ("blank", "0.txt is empty"),
    ):
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


KINDS = {
    "mamba2": {"mixer": "mamba2"},
    "hyena": {"mixer": "hyena"},
    "caduceus_ph": {"objective": "masked"},
    "caduceus_ps": {"objective": "masked", "rcps": True},
}


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_on_any_model(kind: str, pooling: Pooling) -> None:
    """Padding is not seen, strands get one score (of Caduceus-PS in training too), every weight in use is trained."""
    torch.manual_seed(0)
    net = build_lm(d_model=8, n_layer=1, d_state=4, l_max=34, **KINDS[kind]).double()  # type: ignore[arg-type]
    model = PretrainedClassifier(Loaded(net, BOS if kind in ("mamba2", "hyena") else None), 3, pooling).double()
    ids = torch.randint(7, 11, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[1, 13:] = PAD
    for training in (True, False):
        model.train(training)
        scores = model(ids)
        torch.testing.assert_close(scores, torch.cat([model(ids[:1]), model(ids[1:, :13])]))
        same = torch.allclose(scores, model(model.other_strand(ids)))
        assert same == (kind == "caduceus_ps" or not training)
    model.train().loss(ids, torch.tensor([0, 2])).backward()
    unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert unused <= {"net.lm_head.weight"}


def test_a_run_from_a_model_of_another_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"d_model": 8, "n_layer": 1, "mixer": "hyena", "context": 32}
    net = build_lm("hyena", d_model=8, n_layer=1, l_max=34)
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, "hyper_parameters": options}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    lines = [f"{text},{'ab'[i % 2]}" for i, text in enumerate(sequences(12, length=33))]
    (tmp_path / "m.csv").write_text("sequence,label\n" + "\n".join(lines) + "\n")
    finetune(str(tmp_path / "m.csv"), str(tmp_path / "run"), epochs=1, cross_validation=2, device="cpu",
             out=str(tmp_path / "out"))  # fmt: skip
    assert len((tmp_path / "out" / "predictions.tsv").read_text().splitlines()) == 13
    lines[3] = f"{sequences(1, 5, 34)[0]},a"
    (tmp_path / "m.csv").write_text("sequence,label\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"m.csv: the longest sequence has 34 bases, and the model reads at most 33"):
        finetune(str(tmp_path / "m.csv"), str(tmp_path / "run"), device="cpu", out=str(tmp_path / "bad"))
    assert not (tmp_path / "bad").exists()
