"""Objectives, windows that grow, memory, and resuming: the parts of pretraining."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from core.cli import main
from core.errors import UserError
from genomics.datasets import GenomeData
from genomics.language import IGNORED, LanguageModel, mask_bases
from genomics.memory import estimate
from genomics.models import build_lm
from genomics.vocabulary import BOS, MASK, PAD, N
from genomics.warmup import LengthWarmup

TINY = [
    "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false", "--model.d_model", "8",
    "--model.n_layer", "1", "--data.window", "64", "--data.batch_size", "4", "--trainer.limit_val_batches", "2",
    "--trainer.limit_test_batches", "2", "--data.test_windows", "8", "--trainer.accelerator", "cpu",
]  # fmt: skip


def pretrain(*argv: str) -> None:
    main(
        "genomics", "genomics.language.LanguageModel", "genomics.datasets.GenomeData", default_recipe="pretrain",
        links={"data.window": "model.context"}, argv=argv,
    )  # fmt: skip


def test_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 12, (50, 1000), generator=generator)
    ids[:, 900:] = PAD
    read, wanted = mask_bases(ids, generator)
    chosen = wanted != IGNORED
    assert torch.equal(wanted[chosen], ids[chosen])
    assert not chosen[ids == N].any()
    assert not chosen[:, 900:].any()
    assert torch.equal(read[~chosen], ids[~chosen])
    assert 0.145 < chosen[(ids >= 7) & (ids <= 10)].double().mean() < 0.155
    assert 0.78 < (read[chosen] == MASK).double().mean() < 0.82
    others = read[chosen & (read != MASK)]
    assert others.min() >= 7
    assert others.max() <= 10
    assert 0.58 < (others == ids[chosen & (read != MASK)]).double().mean() < 0.67  # a tenth stays, a quarter of a tenth


@pytest.mark.parametrize(
    "options", [{"mixer": "hyena", "context": 16}, {"objective": "masked"}, {"objective": "masked", "rcps": True}]
)
def test_losses_of_every_kind(options: dict) -> None:
    torch.manual_seed(0)
    model = LanguageModel(d_model=8, n_layer=1, **options)
    batch = torch.randint(7, 11, (3, 17))
    batch[:, 0] = BOS
    loss = model.loss(batch)
    loss.backward()
    assert 1.0 < loss.item() < 4.0
    assert [n for n, p in model.net.named_parameters() if p.requires_grad and p.grad is None] == []
    empty = torch.full((2, 17), PAD)
    assert model.loss(empty).item() == 0
    fixed = [model._nats(batch, 5)[0] for _ in range(2)]
    assert torch.equal(*fixed)
    model.offload = True
    torch.manual_seed(3)
    kept = model.loss(batch)
    model.offload = False
    torch.manual_seed(3)
    assert torch.equal(kept, model.loss(batch))


@pytest.mark.parametrize("options", [{"mixer": "hyena", "objective": "masked"}, {"rcps": True}])
def test_what_does_not_go_together(options: dict) -> None:
    with pytest.raises(UserError, match="--model"):
        LanguageModel(**options)


def test_stages_of_the_warmup(genome: str) -> None:
    tokens, batch = LengthWarmup(16, 2), LengthWarmup(16, 1, "batch")
    assert [tokens.stage(e, 100, 4) for e in (0, 1, 2, 5, 6, 99)] == [
        (16, 25),
        (16, 25),
        (32, 12),
        (64, 6),
        (100, 4),
        (100, 4),
    ]
    assert [batch.stage(e, 64, 4) for e in range(3)] == [(16, 4), (32, 4), (64, 4)]
    data = GenomeData(genome, window=64, batch_size=4)
    data.stage_of = lambda: tokens.stage(2, data.window, data.batch_size)
    assert next(iter(data.train_dataloader())).shape == (8, 33)
    assert next(iter(data.val_dataloader())).shape == (4, 65)
    with pytest.raises(UserError, match="wanted at least 2 and 1"):
        LengthWarmup(1)


@pytest.mark.slow
def test_warmup_resumes_where_it_was(tmp_path: Path, genome: str) -> None:
    warm = ["--trainer.callbacks+=genomics.warmup.LengthWarmup", "--trainer.callbacks.start=16",
            "--trainer.callbacks.epochs=1", "--data.fasta", genome, "--model.schedule.name", "constant"]  # fmt: skip
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    pretrain("pretrain", *warm, *TINY, "--trainer.max_epochs", "3", "--run_dir", str(straight))
    pretrain("pretrain", *warm, *TINY, "--trainer.max_epochs", "1", "--run_dir", str(resumed))
    last = str(resumed / "checkpoints" / "last.ckpt")
    pretrain("pretrain", *warm, *TINY, "--trainer.max_epochs", "3", "--ckpt_path", last)
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (straight, resumed))
    assert one["global_step"] == two["global_step"]
    for name, tensor in one["state_dict"].items():
        if name.startswith("net."):
            torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-5, atol=1e-6)
    page = (straight / "report.html").read_text()
    assert "Perplexity by position" in page
    assert "32 to 63" in page
    assert json.loads((straight / "metrics.json").read_text())["test/perplexity"] > 3.5


def test_the_recipe_of_a_genome_at_any_context(
    tmp_path: Path, genome: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """``--model.context`` is the data's window, and a step keeps its bases."""
    argv = ["hg38", *TINY[:6], "--data.fasta", genome, "--model.context=64", "--data.batch_tokens", "256",
            "--data.val_records", "[]", "--data.test_records", "[]", "--trainer.max_steps", "1", "--data.num_workers",
            "0", "--trainer.accelerator", "cpu", "--trainer.precision", "32", "--trainer.val_check_interval", "1",
            "--run_dir", str(tmp_path / "run")]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["genomics.pretrain", *argv])
    runpy.run_module("genomics.pretrain", run_name="__main__")
    assert "of 256 tokens" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["genomics.pretrain", "--trainer.callbacks+=genomics.warmup.LengthWarmup",
                                     "--trainer.callbacks.start=1"])  # fmt: skip
    with pytest.raises(SystemExit):
        runpy.run_module("genomics.pretrain", run_name="__main__")
    assert capsys.readouterr().err == "error: LengthWarmup: start is 1 and epochs 2; wanted at least 2 and 1\n"


@pytest.mark.parametrize("options", [["--model.objective", "masked"], ["--model.mixer", "hyena"]])
def test_other_models_by_the_command(
    tmp_path: Path, genome: str, options: list[str], capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    pretrain("pretrain", *TINY, *options, "--data.fasta", genome, "--trainer.max_steps", "2", "--run_dir", str(run))
    assert json.loads((run / "metrics.json").read_text())["test/perplexity"] > 3
    assert "memory a step, estimated" in capsys.readouterr().out


def test_memory_estimate_counts_what_is_kept() -> None:
    net = build_lm(d_model=16, n_layer=4, d_state=4)
    plain, again = estimate(net, 1000, False, False), estimate(net, 1000, True, False)
    assert plain["weights"] == 16 * sum(p.numel() for p in net.parameters())
    assert 4 * 1000 * 16 * 4 * 8 < plain["activations"] < 4 * 1000 * 16 * 4 * 60  # so many channels a token and block
    assert again["activations"] < plain["activations"] / 2
    assert 0.5 < estimate(net, 1000, False, True)["activations"] / plain["activations"] < 0.7  # the stream stays wide
