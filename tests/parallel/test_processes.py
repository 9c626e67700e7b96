"""Training commands in two processes: the steps of one process, its files, and what happens when a process dies."""

import csv
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.fabric.utilities.rank_zero import rank_zero_only
from ranks import free_port
from safetensors.torch import load_file

from core.cli import main
from core.parallel.watch import LAUNCHER, Peers, announce_launcher, follow_launcher

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
    # Evaluate as on GPUs: Lightning leaves its inference mode out where it sees gloo.
    monkeypatch.setattr("lightning.pytorch.loops.utilities._distributed_is_initialized", lambda: False)
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


def launch(
    size: int, function: Callable[..., None], *arguments: Any, kill: tuple[int, Path, float] | None = None
) -> list[int]:
    """The exit codes of ``size`` processes, started as torchrun starts them.

    Args:
        size: How many.
        function: What each runs, with ``arguments``.
        kill: A rank to kill, so many seconds after a file is there.
    """
    context, port = mp.get_context("fork"), free_port()
    processes = [context.Process(target=_enter, args=(rank, size, port, function, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    if kill is not None:
        rank, file, seconds = kill
        while not file.exists() and processes[rank].is_alive():
            time.sleep(0.01)
        time.sleep(seconds)
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


@pytest.mark.parametrize("options", [
    ("--trainer.strategy", "ddp", "--data.batch_size", "2"),
    ("--trainer.strategy", "fsdp2", "--data.batch_size", "2"),
    ("--sequence_parallel", "2", "--data.batch_size", "4"),
    ("--sequence_parallel", "2", "--data.batch_size", "4", "--trainer.strategy", "fsdp2"),
], ids=["ddp", "fsdp2", "sequence", "sequence_fsdp2"])  # fmt: skip
def test_two_processes_make_the_steps_of_one(reference: str, options: tuple[str, ...]) -> None:
    assert launch(2, pretrain, "--run_dir", "two", "--trainer.devices", "2", *options) == [0, 0]
    assert_same_run(reference, "two")
    assert sorted(p.name for p in Path("two").iterdir() if p.is_file()) == sorted(
        p.name for p in Path(reference).iterdir() if p.is_file()
    )
    assert json.loads(Path("two/run.json").read_text())["status"] == "finished"


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


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_runs_go_on_with_another_number_of_processes(place: Path, name: str) -> None:
    (place / "text").mkdir()
    (place / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 80)
    pretrain_text("--run_dir", "one")
    assert launch(2, pretrain_text, "--run_dir", "two", "--trainer.devices", "2", *TWO[name]) == [0, 0]
    assert_same_run("one", "two")
    whole, shared = (load_file(f"{run}/model/model.safetensors") for run in ("one", "two"))
    torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-5)
    half = ("--trainer.max_steps", "2", "--test_after_fit", "false")
    pretrain_text("--run_dir", "one_two", *half)
    resumed = ("--trainer.devices", "2", "--ckpt_path", "last", "--run_dir", "one_two", *TWO[name])
    assert launch(2, pretrain_text, *resumed) == [0, 0]
    assert_same_run("one", "one_two")
    assert launch(2, pretrain_text, "--run_dir", "two_one", "--trainer.devices", "2", *half, *TWO[name]) == [0, 0]
    pretrain_text("--ckpt_path", "last", "--run_dir", "two_one")
    assert_same_run("one", "two_one")


@pytest.mark.parametrize(("options", "message"), [
    (("--tensor_parallel", "2", "--sequence_parallel", "2"), "are both given; take one of the two"),
    (("--tensor_parallel", "0"), "--tensor_parallel is 0; wanted at least 1"),
    (("--tensor_parallel", "2", "--trainer.strategy", "fsdp2"), "--trainer.strategy is fsdp2; with --tensor_parallel"),
    (("--trainer.strategy", "fsdp2", "--ema_decay", "0.9"), "--ema_decay keeps a second net"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    place: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "text").mkdir()
    (place / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 80)
    with pytest.raises(SystemExit) as stopped:
        pretrain_text(*options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_models_without_layers_to_share_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain("--tensor_parallel", "2")
    assert "--tensor_parallel is 2; wanted 1: LanguageModel has no layers to share out" in capsys.readouterr().err


LONG = (
    "--run_dir", "long", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2",
    "--trainer.max_steps", "40", "--trainer.max_epochs", "-1", "--trainer.val_check_interval", "4",
    "--model.schedule.name", "constant",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "options"), [
    (0, ()), (1, ()), (0, ("--trainer.strategy", "fsdp2")), (1, ("--trainer.strategy", "fsdp2")),
    (1, ("--sequence_parallel", "2")),
], ids=["ddp_0", "ddp_1", "fsdp2_0", "fsdp2_1", "sequence_1"])  # fmt: skip
def test_a_process_that_dies_ends_the_job_and_the_last_checkpoint_resumes_it(
    victim: int, options: tuple[str, ...], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kill_and_resume(pretrain, (*LONG, *options), victim, place, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_with_its_layers_ends_the_job(
    victim: int, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "text").mkdir()
    (place / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 800)
    options = ("--trainer.devices", "2", "--tensor_parallel", "2", "--run_dir", "long", "--test_after_fit", "false")
    kill_and_resume(pretrain_text, options, victim, place, capfd)


def kill_and_resume(
    command: Callable[..., None],
    options: tuple[str, ...],
    victim: int,
    place: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A run in two processes of which one is killed after its first checkpoint, and the run that goes on from it."""
    seconds = random.uniform(0, 1.5)
    print("killed after", seconds)
    kill = (victim, place / "long/checkpoints/last.ckpt", seconds)
    codes = launch(2, command, *options, "--trainer.max_steps", "4000", kill=kill)  # more than it gets to
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    message = capfd.readouterr().err
    assert f"process {1 - victim} of 2 lost another one" in message
    assert "--ckpt_path last" in message
    steps = checkpoint("long")["global_step"] + 4
    assert launch(2, command, *options, "--trainer.max_steps", str(steps), "--ckpt_path", "last") == [0, 0]
    assert checkpoint("long")["global_step"] == steps
    assert [row["step"] for row in history("long") if "train/loss" in row] == list(range(steps))


def pretrain_interrupted(signum: int, *arguments: str) -> None:
    """A training whose rank 0 gets a signal once there is a checkpoint."""

    def interrupt() -> None:
        while not Path("long/checkpoints/last.ckpt").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    if os.environ["RANK"] == "0":
        threading.Thread(target=interrupt, daemon=True).start()
    pretrain(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "signum", "other"), [
    ("fsdp2", signal.SIGINT, 130), ("fsdp2", signal.SIGTERM, 130),
    ("ddp", signal.SIGTERM, 1),  # which loses rank 0
])  # fmt: skip
def test_signals_stop_all_processes_with_a_checkpoint(
    strategy: str, signum: int, other: int, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--trainer.strategy", strategy, "--trainer.max_steps", "4000")
    assert launch(2, pretrain_interrupted, signum, *LONG, *options) == [130, other]
    assert "go on with" in capfd.readouterr().out
    assert json.loads(Path("long/run.json").read_text())["status"] == "interrupted"
    steps = checkpoint("long")["global_step"]
    assert 0 < steps < 4000
    assert launch(2, pretrain, *LONG, "--trainer.max_steps", str(steps + 2), "--ckpt_path", "last") == [0, 0]


def orphan(seconds: float, child_id: Any) -> None:
    """A process that launches another one, which waits, and dies."""
    announce_launcher()
    context = mp.get_context("fork")
    ready = context.Event()
    child = context.Process(target=wait_for_others, args=(seconds, ready))
    child.start()
    ready.wait()
    child_id.value = child.pid
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_others(seconds: float, ready: Any) -> None:
    """What a process does while the others do not answer."""
    follow_launcher(every=0.1)
    ready.set()
    time.sleep(seconds)
    print("outlived its launcher", flush=True)


def has_ended(process_id: int) -> bool:
    """Whether a process is gone, or waits for its parent to notice."""
    status = Path(f"/proc/{process_id}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_processes_end_with_the_one_that_launched_them(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)  # commands that other tests run in this process set it
    context = mp.get_context("fork")
    child_id = context.Value("i", 0)
    process = context.Process(target=orphan, args=(8.0, child_id))
    process.start()
    process.join()
    for _ in range(60):
        if has_ended(child_id.value):
            break
        time.sleep(0.1)
    found = capfd.readouterr()  # once: what is written between its reading and emptying would be lost
    assert "has died; ending" in found.err
    assert "outlived" not in found.out


def wait_in_vain(orderly: bool) -> None:
    """Rank 1 ends; rank 0 waits without an error, as a GPU would."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    peers = Peers(lambda lost: os._exit(10 + lost), every=0.05, grace=0.3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if orderly:
        time.sleep(0.15)
        peers.stop()
    time.sleep(1.0 if orderly else 20.0)
    os._exit(0)


@pytest.mark.parametrize(("orderly", "code"), [(False, 11), (True, 0)])
def test_a_wait_for_a_dead_process_ends(orderly: bool, code: int) -> None:
    assert launch(2, wait_in_vain, orderly) == [code, -signal.SIGKILL]
