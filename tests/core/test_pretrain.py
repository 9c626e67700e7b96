"""Training on text: packing, splits, the command, its figures, and the model that it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from core.cli import main
from core.errors import UserError
from core.generate import generate
from core.lm import MambaLM
from core.text import TextData
from core.tokens import ByteTokenizer, load_tokenizer

TINY = [
    "--trainer.enable_progress_bar", "false", "--model.d_model", "8", "--model.n_layer", "1",
    "--data.window", "32", "--data.batch_size", "4", "--model.sample_tokens", "4",
]  # fmt: skip


def pretrain(*argv: str) -> None:
    main(
        "core", "core.language.TextModel", "core.text.TextData", command="pretrain", default_recipe="text",
        links={"data.vocab_size": "model.vocab_size"}, argv=argv,
    )  # fmt: skip


def corpus(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("The quick brown fox. " * 60)
    (folder / "sub" / "b.md").write_text("Über den Zaun. " * 60)
    (folder / "c.bin").write_bytes(b"\xff\xfe")
    return folder


def test_windows_hold_every_token_once(tmp_path: Path) -> None:
    data = TextData(str(corpus(tmp_path)), window=7, batch_size=2)
    for part, texts in data.texts.items():
        want = [token for text in texts for token in [*text.encode(), 256]]
        windows = data.windows[part]
        found = [int(windows[0][0])]
        for i in range(len(windows)):
            window = windows[i]
            assert window.shape == (8,)
            assert int(window[0]) == found[-1]  # each window begins with the last token of the one before
            found += [token for token in window[1:].tolist() if token != -1]
        assert found == want
    whole = "".join(text for part in ("train", "val", "test") for text in data.texts[part][:1])
    assert whole == (tmp_path / "a.txt").read_text()


def test_folders_are_the_split(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name * 40)
    data = TextData(str(tmp_path), window=8, batch_size=2)
    assert {part: texts[0][:4] for part, texts in data.texts.items()} == {
        "train": "trai",
        "val": "vali",
        "test": "test",
    }


def test_the_mark_at_the_start_of_a_file_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The end. " * 9, encoding="utf-8-sig")
    data = TextData(str(tmp_path), window=8, batch_size=2)
    assert data.texts["train"][0].startswith("The")
    assert bytes(data.windows["train"][0].tolist()) == b"The end. "


def two_folders(root: Path) -> None:
    for name in ("train", "val"):
        (root / name).mkdir(parents=True)
        (root / name / "a.txt").write_text("word " * 99)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (two_folders, {}, "has a folder train and one to hold out, but no folder test; add test, or give --data.root"),
        (lambda p: None, {}, "no .*/missing; wanted a text file or a folder"),
        (lambda p: p.mkdir(), {}, "no text files, wanted some that end in .txt"),
        (lambda p: p.write_bytes(b"\xff\xfe\xfa"), {}, "not UTF-8 text"),
        (lambda p: p.write_text("short"), {}, "windows of 2,048 tokens to train on"),
        (lambda p: p.write_text("x" * 99), {"window": 0}, "--data.window is 0"),
        (lambda p: None, {"tokenizer": "/nowhere.json"}, "no file /nowhere.json; give one with --data.tokenizer FILE"),
        (lambda p: p.write_text("x" * 99), {"val_share": 1.0}, "--data.val_share, test_share are 1.0"),
    ],
)
def test_bad_data(tmp_path: Path, make, options: dict, message: str) -> None:
    make(tmp_path / "missing")
    with pytest.raises(UserError, match=message):
        TextData(str(tmp_path / "missing"), **options)


def test_smoke_recipe_leaves_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, root = tmp_path / "run", corpus(tmp_path / "text")
    options = ["--data.root", str(root), "--trainer.limit_test_batches", "null", *TINY]
    pretrain("smoke", "--run_dir", str(run), *options)
    assert capsys.readouterr().out.splitlines()[-1] == str(run)
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["test/perplexity"] == pytest.approx(math.exp(figures["test/loss"]))
    # What the command reports is what its model says of the same text.
    model, data = MambaLM.from_pretrained(run / "model"), TextData(str(root), window=32)
    nats = tokens = 0
    for i in range(len(data.windows["test"])):
        window = data.windows["test"][i]
        wanted = window[1:]
        logits = model(window[None, :-1].clamp(min=0))[0]
        nats += F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum").item()
        tokens += int((wanted != -1).sum())
    assert figures["test/loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert figures["test/bits_per_byte"] == pytest.approx(nats / math.log(2) / data.bytes["test"], rel=1e-4)
    assert "A sample" in (run / "report.html").read_text()
    assert isinstance(load_tokenizer(run / "model"), ByteTokenizer)
    assert generate(model, torch.tensor([[72]]), 3, seed=0).tokens.shape == (1, 3)


@pytest.mark.slow
def test_resumed_training_is_unbroken_training(tmp_path: Path) -> None:
    options = [
        "--data.root", str(corpus(tmp_path / "text")), *TINY, "--model.layer", "Mamba2", "--trainer.max_epochs", "2",
        "--model.ssm_cfg", '{"d_state": 4, "headdim": 8}', "--checkpoint.save_top_k", "-1",
    ]  # fmt: skip
    whole, half = tmp_path / "whole", tmp_path / "half"
    pretrain("smoke", "--run_dir", str(whole), *options)
    (middle,) = (whole / "checkpoints").glob("epoch0-*.ckpt")
    pretrain("smoke", "--run_dir", str(half), *options, "--ckpt_path", str(middle))
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, half)]
    start = torch.load(middle, weights_only=True)["state_dict"]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    assert any(not torch.equal(tensor, start[name]) for name, tensor in ends[0].items())
