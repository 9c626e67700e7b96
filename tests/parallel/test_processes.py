"""Training commands in two processes: the steps of one process, its files, and what happens when a process dies."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from launched import (
    TWO,
    assert_same_run,
    checkpoint,
    kill_and_resume,
    launch,
    pretrain,
    pretrain_text,
    write_text,
)
from safetensors.torch import load_file

from core.parallel.watch import LAUNCHER, Peers, announce_launcher, follow_launcher

pytestmark = pytest.mark.usefixtures("place")


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


@pytest.mark.slow
def test_four_processes_share_batches_beside_sequences_and_layers(reference: str, place: Path) -> None:
    shared = ("--data.batch_size", "2", "--trainer.devices", "4", "--run_dir")
    assert launch(4, pretrain, "--sequence_parallel", "2", *shared, "four") == [0] * 4
    assert_same_run(reference, "four")
    write_text(place, 80)
    pretrain_text("--run_dir", "text_one")
    assert launch(4, pretrain_text, "--tensor_parallel", "2", *shared, "text_four") == [0] * 4
    assert_same_run("text_one", "text_four")


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_runs_go_on_with_another_number_of_processes(place: Path, name: str) -> None:
    write_text(place, 80)
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
    (("--trainer.strategy", "fsdp22"), "is 'fsdp22' (did you mean fsdp2?); wanted auto, ddp, fsdp2, or another of"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    place: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(place, 80)
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
    write_text(place, 800)
    options = ("--trainer.devices", "2", "--tensor_parallel", "2", "--run_dir", "long", "--test_after_fit", "false")
    kill_and_resume(pretrain_text, options, victim, place, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("--trainer.strategy", "ddp", "--data.batch_size", "2"),
    ("--trainer.strategy", "fsdp2", "--data.batch_size", "2"),
    ("--sequence_parallel", "2", "--data.batch_size", "4"),
], ids=["ddp", "fsdp2", "sequence"])  # fmt: skip
def test_runs_that_are_killed_anywhere_end_as_if_they_had_not(
    place: Path, options: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    common = (
        *options, "--trainer.devices", "2", "--trainer.max_epochs", "-1", "--trainer.max_steps", "60",
        "--trainer.val_check_interval", "5", "--trainer.check_val_every_n_epoch", "null", "--model.schedule.name",
        "constant", "--data.reverse_complement", "true", "--run_dir",
    )  # fmt: skip
    begun = time.monotonic()
    assert launch(2, pretrain, *common, "whole") == [0, 0]
    whole = time.monotonic() - begun
    done = 0
    for _ in range(3):
        seconds, victim = random.uniform(0, whole), random.randrange(2)
        print("rank", victim, "killed after", seconds, "of", whole, "seconds")
        last = place / "cut/checkpoints/last.ckpt"
        resume = ("--ckpt_path", "last") if last.exists() else ("--overwrite", "true")
        capfd.readouterr()
        codes = launch(2, pretrain, *common, "cut", *resume, kill=(victim, place, seconds))
        if codes == [0, 0]:
            break
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] != 0
        step = checkpoint("cut")["global_step"] if last.exists() else 0
        assert step >= done
        done = step
    resume = ("--ckpt_path", "last") if done else ("--overwrite", "true")
    assert launch(2, pretrain, *common, "cut", *resume) == [0, 0]
    assert_same_run("whole", "cut")


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
