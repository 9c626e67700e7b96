"""Training commands in processes that a test launches, and what they leave behind."""

import csv
import functools
import os
import random
import signal
import time
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


def launch(
    size: int,
    function: Callable[..., None],
    *arguments: Any,
    kill: tuple[int, Path, float] | None = None,
    method: str = "fork",
) -> list[int]:
    """The exit codes of ``size`` processes, started as torchrun starts them.

    Args:
        size: How many.
        function: What each runs, with ``arguments``.
        kill: A rank to kill, so many seconds after a file is there.
        method: How processes start; those with a GPU cannot be forked.
    """
    context, port = mp.get_context(method), free_port()
    processes: list[Any] = [
        context.Process(target=_enter, args=(rank, size, port, function, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    if kill is not None:
        rank, file, seconds = kill
        while not file.exists() and processes[rank].is_alive():
            time.sleep(0.01)
        processes[rank].join(seconds)
        processes[rank].kill()
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
    return torch.load(f"{run}/checkpoints/last.ckpt", map_location="cpu", weights_only=True)


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


def write_text(place: Path, lines: int) -> None:
    """What ``pretrain_text`` reads."""
    (place / "text").mkdir()
    (place / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * lines)


def pretrain_text(*arguments: str) -> None:
    """``python -m core.pretrain`` in this process, a Mamba-2 of four heads."""
    links = {"data.vocab_size": "model.vocab_size"}
    main("core", "core.language.TextModel", "core.text.TextData", command="pretrain", links=links, argv=[
        "text", "--data.root", "text", "--data.window", "32", "--data.batch_size", "4", "--trainer.accelerator", "cpu",
        "--model.d_model", "16", "--model.n_layer", "2", "--model.layer", "Mamba2", "--model.d_intermediate", "32",
        "--model.ssm_cfg", '{"headdim": 8, "d_state": 4}', "--model.sample_tokens", "4", "--threads", "1",
        "--trainer.max_epochs", "-1", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2",
        "--trainer.num_sanity_val_steps", "0", "--trainer.gradient_clip_val", "0.5", "--seed_everything", "1",
        "--trainer.enable_progress_bar", "false", "--trainer.precision", "32-true", "--trainer.log_every_n_steps", "1",
        "--model.schedule.name", "constant", "--model.schedule.warmup_epochs", "0", "--model.optimizer.eps", "1e-3",
        "--trainer.check_val_every_n_epoch", "null", *arguments,
    ])  # fmt: skip


TWO = {
    "ddp": ("--data.batch_size", "2", "--trainer.strategy", "ddp"),
    "fsdp2": ("--data.batch_size", "2", "--trainer.strategy", "fsdp2"),
    "tensor": ("--tensor_parallel", "2"),
}


def kill_and_resume(
    command: Callable[..., None],
    options: tuple[str, ...],
    victim: int,
    place: Path,
    capfd: pytest.CaptureFixture[str],
    method: str = "fork",
) -> None:
    """A run in two processes of which one is killed after its first checkpoint, and the run that goes on from it."""
    seconds = random.uniform(0, 1.5)
    print("killed after", seconds)
    kill = (victim, place / "long/checkpoints/last.ckpt", seconds)
    run = functools.partial(launch, 2, command, *options, method=method)
    codes = run("--trainer.max_steps", "4000", kill=kill)  # more than it gets to
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    message = capfd.readouterr().err
    assert f"process {1 - victim} of 2 lost another one" in message
    assert message.count("--ckpt_path last") == 1
    steps = checkpoint("long")["global_step"] + 4
    assert run("--trainer.max_steps", str(steps), "--ckpt_path", "last") == [0, 0]
    assert checkpoint("long")["global_step"] == steps
    assert [row["step"] for row in history("long") if "train/loss" in row] == list(range(steps))
