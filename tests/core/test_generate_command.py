"""The command that generates: text, files of prompts, token ids, tokenizers, and one message for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from core.cli import run
from core.generate import Sampling, generate
from core.generate_command import main
from core.lm import MambaConfig, MambaLM
from core.tokens import ByteTokenizer, load_tokenizer, save_byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = MambaConfig(d_model=12, n_layer=1, vocab_size=257, ssm_cfg={"d_state": 3})
    MambaLM(config, initializer_range=1.0).save_pretrained(path)
    save_byte_tokenizer(path)
    return path


def command(folder: Path, *options: str) -> None:
    run(main, ["--checkpoint", str(folder), "--device", "cpu", "--max_new_tokens", "6", *options])


def expected(folder: Path, prompt: str, **options: float) -> list[int]:
    model = MambaLM.from_pretrained(folder)
    ids = torch.tensor([ByteTokenizer().encode(prompt)])
    return generate(model, ids, 6, Sampling(**options), seed=3, eos_token_id=256).tokens[0].tolist()


def test_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(folder, "--prompt", "Hé", "--seed", "3", "--top_p", "0.9")
    assert capsys.readouterr().out == ByteTokenizer().decode(expected(folder, "Hé", top_p=0.9)) + "\n"


def test_file_of_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("One\nTwo words\n")
    command(folder, "--prompts", str(prompts), "--temperature", "0", "--output", str(output))
    found = json.loads(output.read_text())
    assert [row["prompt"] for row in found] == ["One", "Two words"]
    for row in found:
        assert row["ids"] == expected(folder, row["prompt"], temperature=0)
        assert row["text"] in capsys.readouterr().out or row["prompt"] != "One"


def test_token_ids_need_no_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MambaLM.from_pretrained(folder).save_pretrained(tmp_path)
    command(tmp_path, "--token_ids", "[72, 105]", "--temperature", "0", "--stop", "[]")
    assert [int(word) for word in capsys.readouterr().out.split()] == expected(folder, "Hi", temperature=0)


def test_score(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "scores.json"
    command(folder, "--prompt", "Hello", "--score", "true", "--output", str(output))
    (found,) = json.loads(output.read_text())
    assert f"{found['log_likelihood']:.4f} nats, 4 tokens scored" in capsys.readouterr().out
    ids = torch.tensor([found["prompt_ids"]])
    log_probs = MambaLM.from_pretrained(folder)(ids)[0, :4, :257].log_softmax(-1)
    assert found["log_likelihood"] == pytest.approx(log_probs.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-5)


def test_stop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = expected(folder, "Hi", temperature=0)[0]
    command(folder, "--token_ids", "[72, 105]", "--temperature", "0", "--stop", f"[{first}]", "--max_new_tokens", "9")
    assert capsys.readouterr().out.strip() == ByteTokenizer().decode([first]).strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "wanted one of --prompt TEXT, --prompts FILE and --token_ids"),
        (["--prompt", "x", "--token_ids", "[1]"], "got --prompt and --token_ids"),
        (["--prompt", "x", "--top_p", "2"], "top_p: got 2.0"),
        (["--prompt", "x", "--tokenizer", "/nowhere.json"], "tokenizer: no file /nowhere.json; give one with"),
        (["--token_ids", "[300]"], "got tokens from 300 to 300, wanted 0 to 256"),
        (["--prompt", "x", "--checkpoint", "/nowhere"], "model: no folder /nowhere"),
        (["--prompts", "/nowhere"], "--prompts: cannot read /nowhere"),
        (["--prompt", ""], "prompts: got an empty one, wanted at least one token each"),
        (["--token_ids", "[]"], "prompts: got an empty one, wanted at least one token each"),
        (
            ["--prompt", "x", "--output", "/dev/null/out.json"],
            "--output: cannot write /dev/null/out.json: ",
        ),
        (["--prompt", "x", "--output", "/"], "--output: / is a folder"),
        (["--prompt", "x", "--seed", str(2**64)], "seed: got 18446744073709551616, wanted a number of 64 bits"),
        (["--prompt", "x", "--dtype", "int8"], "--dtype is 'int8'; wanted one of float32"),
        (["--prompt", "x", "--device", "abacus"], "abacus"),
        (["--prompt", "x", "--temprature", "1"], "did you mean --temperature"),
    ],
)
def test_mistakes(folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(folder, *options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_output_replaces_nothing_unasked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.json"
    output.write_text("mine")
    with pytest.raises(SystemExit):
        command(folder, "--prompt", "x", "--output", str(output))
    assert "config.json exists; name another file, or replace it with --overwrite true" in capsys.readouterr().err
    assert output.read_text() == "mine"
    command(folder, "--prompt", "x", "--output", str(output), "--overwrite", "true")
    assert json.loads(output.read_text())[0]["prompt"] == "x"


@pytest.mark.parametrize("ends", ["x", 257, [1, -1], [1, None]])
def test_end_tokens_of_no_vocabulary(
    ends: object, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MambaLM.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(SystemExit):
        command(tmp_path, "--token_ids", "[1]")
    error = capsys.readouterr().err
    assert f"generation_config.json: eos_token_id is {ends!r}; wanted tokens from 0 to 256; else give --stop" in error
    command(tmp_path, "--token_ids", "[1]", "--stop", "[]")


def test_tokenizers_library_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Exception, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve ☃")) == "naïve ☃"
    assert tokenizer.decode([104, 256, 0xC3]) == "h\ufffd"
