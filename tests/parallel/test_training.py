"""Training commands in two processes: the steps of one process, its files, and what happens when a process dies."""

import csv
import json
import os
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.fabric.utilities.rank_zero import rank_zero_only
from ranks import free_port

from core.cli import main

GENOME = [
    "pretrain", "--model.d_model", "16", "--model.n_layer", "2", "--data.window", "96", "--trainer.max_steps", "4",
    "--trainer.val_check_interval", "2", "--data.reverse_complement", "false", "--data.val_windows", "5",
    "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.precision", "32-true", "--threads", "1", "--seed_everything", "1", "--test_after_fit", "false",
    "--trainer.num_sanity_val_steps", "0", "--model.schedule.warmup_epochs", "0", "--model.optimizer.lr", "0.05",
    "--model.optimizer.name", "sgd",  # Adam makes much of gradients that are near zero
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("core.training.record.curves", lambda rows: None)
    return tmp_path


def pretrain(*arguments: str) -> None:
    """``python -m genomics.pretrain`` in this process."""
    data, module = "genomics.datasets.GenomeData", "genomics.language.LanguageModel"
    links = {"data.window": "model.context"}
    main("genomics", module, data, command="pretrain", argv=[*GENOME, *arguments], links=links)


def _enter(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {  # what torchrun sets
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    rank_zero_only.rank = rank  # was read from the environment at import
    function(*arguments)


def launch(size: int, function: Callable[..., None], *arguments: Any) -> list[int]:
    """The exit codes of ``size`` processes, started as torchrun starts them."""
    context, port = mp.get_context("fork"), free_port()
    processes = [context.Process(target=_enter, args=(rank, size, port, function, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    connection.wait([process.sentinel for process in processes], 100)
    for process in processes:
        process.join(20)
        if process.is_alive():  # as torchrun ends a job of which a process failed
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]


def history(run: str) -> list[dict[str, float]]:
    with Path(run, "logs/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: float(row[key]) for key in ("step", "train/loss", "val/loss") if row.get(key)}
        for row in rows
        if row.get("train/loss") or row.get("val/loss")
    ]


def checkpoint(run: str) -> dict[str, Any]:
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)


def assert_same_run(one: str, other: str) -> None:
    """Losses, weights and moments agree to rounding, and the files hold the same entries."""
    first, second = history(one), history(other)
    assert len(first) == len(second) > 4
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    a, b = checkpoint(one), checkpoint(other)
    assert a.keys() == b.keys()
    assert a["optimizer_states"][0]["param_groups"] == b["optimizer_states"][0]["param_groups"]
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=1e-4, atol=1e-5)
    moments = [c["optimizer_states"][0]["state"] for c in (a, b)]
    for index, state in moments[0].items():
        torch.testing.assert_close(moments[1][index], state, rtol=1e-3, atol=1e-5)
    names = [sorted(p.name for p in Path(run, "checkpoints").iterdir()) for run in (one, other)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run of a single process with batches of four."""
    run = str(tmp_path_factory.mktemp("reference") / "run")
    pretrain("--data.batch_size", "4", "--run_dir", run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("--trainer.strategy", "ddp", "--data.batch_size", "2"),
    ("--sequence_parallel", "2", "--data.batch_size", "4"),
], ids=["ddp", "sequence"])  # fmt: skip
def test_two_processes_make_the_steps_of_one(reference: str, options: tuple[str, ...]) -> None:
    assert launch(2, pretrain, "--run_dir", "two", "--trainer.devices", "2", *options) == [0, 0]
    assert_same_run(reference, "two")
    assert sorted(p.name for p in Path("two").iterdir() if p.is_file()) == sorted(
        p.name for p in Path(reference).iterdir() if p.is_file()
    )
    assert json.loads(Path("two/run.json").read_text())["status"] == "finished"
