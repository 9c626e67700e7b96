import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from toy_training import RECIPE, train

import core
from core.cli import main

ROOT = Path(core.__file__).resolve().parents[1]
TOY = Path(__file__).with_name("toy_training.py")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe that trains for two epochs, and one with a misspelt key."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/toy").mkdir(parents=True)
    (tmp_path / "configs/toy/points.yaml").write_text(RECIPE.replace("max_epochs: 4", "max_epochs: 2"))
    (tmp_path / "configs/toy/broken.yaml").write_text("model: {widht: 4}\n")
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "extra.yaml").write_text("trainer: {max_epochs: 1}\nmodel: {width: 12}\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    monkeypatch.setattr("core.training.record.curves", lambda rows: None)  # half of a run's time; test_report has it
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake gives; nothing may be left behind."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        train(*arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert sorted(Path().rglob("*")) == before
    return captured.err.strip()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["point"], "unknown recipe 'point' (did you mean points?)"),
        (["--model.width", "4"], "the first argument is the recipe, got --model.width"),
        (["points", "tets"], "unknown stage 'tets' (did you mean test?)"),
        (["points", "fit", "foo"], "unknown option foo"),
        (["points", "--model.widht", "4"], "unknown option --model.widht (did you mean --model.width?)"),
        (["points", "--model.widt", "4"], "unknown option --model.widt (did you mean --model.width"),
        (["points", "--trainer.max_epoch=3"], "--trainer.max_epoch (did you mean --trainer.max_epochs"),
        (["points", "--model.optimizer.lrr", "3"], "did you mean --model.optimizer.lr"),
        (["points", "--model.width", "wide"], "--model.width is 'wide'; wanted int"),
        (["points", "--model.schedule.name", "cosin"], "wanted one of 'cosine', 'linear', 'constant'"),
        (["points", "--model.width"], "--model.width: expected one argument"),
        (["points", "--config", "no.yaml"], "--config: File does not exist"),
        (["broken"], "unknown option --model.widht (did you mean --model.width"),
        (["points", "--trainer.callbacks+=EarlyStoping"], "--trainer.callbacks is 'EarlyStoping'; wanted a class"),
        (["points", "--trainer.accelerator", "tpu"], "the trainer's options do not go together"),
        (["points", "--model.width", "3"], "width is 3; wanted an even number"),
        (["points", "--model.optimizer.name", "adamww"], "did you mean adamw"),
        (["points", "--model.schedule.warmup_steps", "3"], "the warm-up is given twice"),
        (["points", "--trainer.max_epochs", "-1"], "a cosine schedule needs to know where the run ends"),
        (["points", "--ema_decay", "1.5"], "--ema_decay is 1.5; it must lie between 0 and 1"),
        (["points", "--data.fail", "setup"], "no folder points; wanted points/train"),
        (["points", "--data.fail", "item"], "cannot read point"),
        (["points", "--data.fail", "item", "--data.workers", "1"], "error: cannot read point"),
        (["points", "--run_dir", "mine"], "--run_dir mine is not empty; name another folder"),
        (["points", "--run_dir", "mine", "--overwrite", "true"], "holds no run (no run.json in it)"),
        (["points", "--run_dir", "text.ckpt"], "--run_dir text.ckpt is a file"),
        (["points", "test", "--ckpt_path", "no.ckpt"], "no checkpoint at no.ckpt"),
        (["points", "test", "--ckpt_path", "text.ckpt"], "text.ckpt is no checkpoint"),
        (["points", "--ckpt_path", "last"], "no run in runs/toy/points has a last.ckpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gives_one_line_and_leaves_nothing(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, *arguments)


def test_a_run_leaves_its_folder_and_ends_with_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    train("points", "--model.optimizer.lr", "0.02")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "runs/toy/points/1"
    assert any(line.startswith("epoch 2/2 done") and "val/accuracy" in line and "points/s" in line for line in lines)
    run_dir = Path("runs/toy/points/1")
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    wanted = {"config.yaml", "metrics.json", "run.json", "report.html", "logs/metrics.csv"}
    assert wanted | {"checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= names
    assert any("tfevents" in name for name in names)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert {"test/accuracy", "test/loss", "val/accuracy", "train/loss", "best/val/loss", "run/parameters"} <= set(
        metrics
    )
    assert all(isinstance(value, float) for value in metrics.values())
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["optimizer"]["lr"] == 0.02
    page = (run_dir / "report.html").read_text()
    assert f"{100 * metrics['test/accuracy']:.1f} %" in page
    assert "python -m toy.train points --model.optimizer.lr 0.02" in page
    assert "written by &lt;the domain&gt;" in page
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["status"] == "finished"

    train("points", "test", "--ckpt_path", "best", "--seed_everything", "7")
    assert capsys.readouterr().out.splitlines()[-1] == "runs/toy/points/2"
    again = json.loads(Path("runs/toy/points/2/metrics.json").read_text())
    assert again["test/accuracy"] == metrics["test/accuracy"]

    train("points", "predict", "--ckpt_path", "runs/toy/points/1/checkpoints/best.ckpt")
    with Path("runs/toy/points/3/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 44
    assert {row["class"] for row in rows} <= {"0", "1"}


def test_the_saved_config_runs_the_same_again() -> None:
    train("points", "--run_dir", "a", "--model.width", "6")
    train("points", "--config", "a/config.yaml")
    one, two = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("a", "runs/toy/points/1"))
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=0)
    assert one["state_dict"]["net.0.weight"].shape == (6, 4)


def test_config_files_are_layered_over_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train("points", "--config", "extra.yaml", "--model.width", "14", "--print_config")
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["trainer"]["max_epochs"], config["model"]["width"]) == (1, 14)
    assert config["model"]["optimizer"]["lr"] == 0.01
    assert config["checkpoint"]["monitor"] == "val/loss"
    assert not Path("runs").exists()


def test_callbacks_are_added_with_plus(capsys: pytest.CaptureFixture[str]) -> None:
    stop = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"
    train("points", stop, "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.stopping_threshold=1e9")
    assert "epoch 1/2 done" in (out := capsys.readouterr().out)
    assert "epoch 2/2" not in out


def test_no_test_where_none_is_wanted() -> None:
    train("points", "--run_dir", "a", "--test_after_fit", "false", "--trainer.max_epochs", "1")
    assert not [name for name in json.loads(Path("a/metrics.json").read_text()) if name.startswith("test/")]
    train("points", "--trainer.fast_dev_run", "true")
    assert not Path("runs").exists()
    assert not Path("checkpoints").exists()


def test_overwrite_replaces_a_run_once_the_new_one_trains(capsys: pytest.CaptureFixture[str]) -> None:
    train("points", "--run_dir", "demo", "--trainer.max_epochs", "1")
    Path("demo/note.txt").write_text("of the first run")
    assert "replace the run in it with --overwrite true" in refused_after(capsys, "points", "--run_dir", "demo")
    # A run that fails before its first step leaves the old one where it was.
    refused_after(capsys, "points", "--run_dir", "demo", "--overwrite", "true", "--data.fail", "item")
    assert Path("demo/note.txt").exists()
    assert not Path(".demo.replaced").exists()
    train("points", "--run_dir", "demo", "--overwrite", "true", "--trainer.max_epochs", "1")
    assert not Path("demo/note.txt").exists()
    assert Path("demo/metrics.json").exists()
    assert not Path(".demo.replaced").exists()


def test_overwrite_spares_a_run_that_is_going_on(capsys: pytest.CaptureFixture[str]) -> None:
    train("points", "--run_dir", "demo", "--trainer.max_epochs", "1")
    facts = json.loads(Path("demo/run.json").read_text())
    Path("demo/run.json").write_text(json.dumps({**facts, "status": "running", "pid": os.getppid()}))
    message = refused_after(capsys, "points", "--run_dir", "demo", "--overwrite", "true")
    assert "the run in demo is still going on" in message


def refused_after(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """``refused`` after other output."""
    capsys.readouterr()
    return refused(capsys, *arguments)


def test_a_checkpoint_of_another_model_is_named_with_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    train("points", "--run_dir", "a", "--trainer.max_epochs", "1")
    for stage in ("test", "fit"):
        message = refused_after(
            capsys, "points", stage, "--ckpt_path", "a/checkpoints/best.ckpt", "--model.width", "10"
        )
        assert "a/checkpoints/best.ckpt is a checkpoint of another model" in message
        assert "net.0.weight (8, 4) instead of (10, 4)" in message
        assert "width=8 there, 10 here" in message
    weights = torch.load("a/checkpoints/best.ckpt", weights_only=True)
    torch.save({"state_dict": weights["state_dict"]}, "weights.ckpt")
    assert "holds weights only" in refused_after(capsys, "points", "--ckpt_path", "weights.ckpt")
    torch.save({"state_dict": {"other.weight": torch.zeros(2)}}, "other.ckpt")
    message = refused_after(capsys, "points", "test", "--ckpt_path", "other.ckpt")
    assert "4 parameters missing (such as net.0.weight), 1 unknown (such as other.weight)" in message


def test_a_failure_in_the_middle_keeps_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train("points", "--run_dir", "a", "--checkpoint.monitor", "val/acc")
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "val/accuracy" in err
    assert json.loads(Path("a/run.json").read_text())["status"] == "failed"
    assert "val/accuracy" in json.loads(Path("a/metrics.json").read_text())


def test_two_runs_that_start_together_get_two_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from core.training import folder

    first = folder.numbered(tmp_path / "r")
    monkeypatch.setattr(folder, "_numbers", lambda root: [])  # the second has looked before the first was there
    second = folder.numbered(tmp_path / "r")
    assert [first.path.name, second.path.name] == ["1", "2"]
    second.discard()
    assert not second.path.exists()
    first.discard()
    assert not (tmp_path / "r").exists()


def test_the_overview_lists_recipes_without_importing_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    main("toy", "toy_training.Toy", "toy_training.Points", argv=["--help"], configs=Path("configs"))
    out = capsys.readouterr().out
    assert "points  Points in the plane." in out
    code = (
        "import sys, core.cli; core.cli.main('toy', 'a.B', 'a.C', argv=['--help']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment())


def test_classes_may_be_named_and_a_recipe_be_default(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("toy_training.Toy", "toy_training.Points")
    options = ["--trainer.fast_dev_run", "true"]
    main("toy", *names, default_recipe="points", argv=options, configs=Path("configs"))
    assert "epoch 1/1 done" in capsys.readouterr().out


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TOY.parent}", "OMP_NUM_THREADS": "1"}


def test_ctrl_c_on_the_command_line_saves_and_says_how_to_go_on(place: Path) -> None:
    command = [
        sys.executable,
        str(TOY),
        "points",
        "--trainer.max_epochs",
        "100000",
        "--trainer.log_every_n_steps",
        "50",
    ]
    process = subprocess.Popen(command, cwd=place, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("epoch 1/100000 done")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().splitlines()
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert rest[-1] == "runs/toy/points/1"
    assert rest[-2].endswith("--ckpt_path runs/toy/points/1/checkpoints/last.ckpt")
    run_dir = place / "runs/toy/points/1"
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"
    assert torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["global_step"] > 6
    assert "interrupted" in (run_dir / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_share_one_run(place: Path) -> None:
    command = [sys.executable, str(TOY), "points", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "runs/toy/points/1"
    assert [path.name for path in (place / "runs/toy/points").iterdir()] == ["1"]
    run_dir = place / "runs/toy/points/1"
    assert (run_dir / "checkpoints/best.ckpt").is_file()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["run/steps"] == 2 * 3  # 22 points each, in batches of 8
    assert "test/accuracy" in metrics
