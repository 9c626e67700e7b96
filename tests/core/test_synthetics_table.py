"""Tables and commands of the synthetic tasks."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_study import TINY, study

from core.errors import UserError
from core.synthetics import __main__ as one_run
from core.synthetics import command, recipe, rows, table, training
from core.table import append_row


def test_rows_of_a_table() -> None:
    groups = [{"model": ["mamba", "long"], "d_model": [8, 16]}, {"model": "rope", "mixer": {"num_heads": 1}}]
    found = study(table=groups).rows({"steps": 9}, [], [0, 1])
    assert [(s.model, s.d_model, s.seed) for s in found[:4]] == [
        ("mamba", 8, 0), ("mamba", 8, 1), ("mamba", 16, 0), ("mamba", 16, 1),
    ]  # fmt: skip
    assert len(found) == 10
    assert {s.steps for s in found} == {9}
    assert {s.lr for s in found if s.model == "long"} == {5e-4}
    assert found[-1].mixer == {"num_heads": 1}
    assert len({study().identity(s) for s in found}) == 10


def test_table_is_filled_once(tmp_path: Path) -> None:
    file, runs_of = tmp_path / "table.csv", study()
    wanted = runs_of.rows({}, [], [0, 1])
    options = command.TableOptions(parallel=3, device="cpu")
    assert table.fill(runs_of, wanted[:3], file, options) == []
    before = file.read_text()
    assert table.fill(runs_of, wanted, file, options) == []
    assert file.read_text().startswith(before)
    found = rows.read_rows(file)
    assert [row["id"] for row in found].count(found[0]["id"]) == 1
    assert {row["id"] for row in found} == {runs_of.identity(settings) for settings in wanted}
    lines = rows.summary(found)
    assert [line["model"] for line in lines] == ["mamba", "rope"]
    with pytest.raises(UserError, match="the tests have other lengths"):
        table.fill(runs_of, [replace(wanted[0], test_lengths=[8])], file, options)
    assert lines[0]["seeds"] == "0, 1"


def test_what_a_crash_left_of_a_row_spoils_no_other(tmp_path: Path) -> None:
    file, runs_of = tmp_path / "table.csv", study()
    wanted, options = runs_of.rows({}, [], [0]), command.TableOptions(device="cpu")
    assert table.fill(runs_of, wanted[:1], file, options) == []
    with file.open("a") as lines:
        lines.write(f"{runs_of.identity(wanted[1])},mamba,8")
    assert table.fill(runs_of, wanted, file, options) == []
    assert {row["id"] for row in rows.read_rows(file)} == {runs_of.identity(settings) for settings in wanted}
    assert len(file.read_text().splitlines()) == 1 + len(wanted) + 1


def test_time_and_failure_leave_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, runs_of = tmp_path / "table.csv", study()
    wanted = runs_of.rows({}, [], [0])
    table.fill(runs_of, wanted, file, command.TableOptions(minutes=0.0, device="cpu"))
    assert not file.exists()

    def fail(self: training.Run, stage: Any) -> None:
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(training.Run, "_update", fail)
    failed = table.fill(runs_of, wanted, file, command.TableOptions(device="cpu"))
    assert len(failed) == 2
    assert failed[0].endswith("no memory")
    assert not file.exists()


def test_unfinished_rows_are_run_again(tmp_path: Path) -> None:
    file, runs_of = tmp_path / "table.csv", study()
    wanted = runs_of.rows({}, ["mamba"], [0])
    cut = training.Result(steps=1, stopped="time", accuracy={10: 0.25})
    append_row(file, rows.row(runs_of, wanted[0], cut, {"device": "-", "torch": "-", "date": "-"}))
    table.fill(runs_of, wanted, file, command.TableOptions(device="cpu"))
    assert [row["stopped"] for row in rows.read_rows(file)] == ["steps"]
    assert len(file.read_text().splitlines()) == 3  # the cut one stands there still; the last one counts


def test_percentages_are_not_rounded_up() -> None:
    assert rows._percent(["0.99999"]) == "99.99"
    assert rows._percent(["1.0"]) == "100.0"
    assert rows._percent(["0.5", "0.6"]) == "55.0 (50.0 to 60.0)"
    assert rows._percent([""]) == "-"


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [f"--{key}={value}" for key, value in TINY.items()]
    tiny += ["--task={length: 8}", "--test_lengths=[8, 32]", "--device=cpu"]
    one_run.main(["induction_heads", "--model=mamba", *tiny])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "history.csv", "metrics.json", "report.html", "run.json"}
    assert "mamba" in (folder / "report.html").read_text()
    table.main(["induction_heads", "--models=[mamba, mamba2]", "--seeds=[3]", "--parallel=2", *tiny])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("| model | mixer | lr | parameters | 2^3 | 2^5 |")  # what differs between the rows
    assert Path(out[-1]).name == "table.html"
    with Path(out[-1]).with_suffix(".csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["mamba", "mamba2"]


def test_what_is_given_wins_though_it_is_the_recipes_value() -> None:
    """Mamba's own settings on induction heads are other than the recipe's."""
    found = recipe.read("induction_heads")
    assert found.run({}, model="mamba").batch_size != found.settings.batch_size
    arguments = ["induction_heads", "--batch-size", str(found.settings.batch_size), f"--warmup={found.settings.warmup}"]
    parsed = command.parse("table", [*arguments, "--task.length=64"], command.TableOptions)
    given = {"batch_size": found.settings.batch_size, "warmup": found.settings.warmup, "task": {"length": 64}}
    assert parsed.changed == given
    settings = parsed.recipe.rows(parsed.changed, ["mamba"], [0])[0]
    assert settings.batch_size == found.settings.batch_size
    assert settings.task == {**found.settings.task, "length": 64}
    assert command.parse("table", ["induction_heads"], command.TableOptions).changed == {}


def test_a_run_that_is_stopped_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def show(lines: command.Lines, name: str, result: training.Result) -> None:
        if result.steps > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Lines, "show", show)
    tiny = [f"--{key}={value}" for key, value in TINY.items()]
    with pytest.raises(SystemExit) as stop:
        one_run.main(["induction_heads", "--model=mamba", *tiny, "--task={length: 8}", "--device=cpu"])
    assert stop.value.code == 130
    out = capsys.readouterr().out.splitlines()
    assert "| interrupted |" in out[2]
    metrics = json.loads((Path(out[-1]) / "metrics.json").read_text())
    assert metrics["run/seconds"] > 0
    assert metrics["run/steps"] == 3


def test_mistakes_in_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n")
    for arguments, message in ((["--parallel=0"], "--parallel is 0"), ([f"--file={other}"], "has the columns a, b")):
        with pytest.raises(SystemExit) as stop:
            table.main(["copying", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert other.read_text() == "a,b\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["induction_head"], "unknown recipe 'induction_head' (did you mean induction_heads?)"),
        (["--model", "mamba"], "the first argument is the recipe"),
        (["mqar", "--model", "mamba3x"], "--model is 'mamba3x'"),
        (["mqar", "--minutes", "-1"], "--minutes is -1; wanted more than 0, or null for no bound"),
        (["mqar", "--step", "3"], "did you mean --steps"),
        (["mqar", "--steps", "0"], "--steps is 0; wanted at least 1"),
        (["mqar", "--steps", "many"], "--steps"),
        (["mqar", "--task", "{lenght: 4}"], "--task: mqar has no lenght; it takes length, "),
        (["mqar", "--task", "{length: 4, pairs: 5}"], "--task: length: got 4"),
        (["mqar", "--mixer", "{d_stat: 4}"], "--model mamba"),
        (["mqar", "--test_lengths", "[3]"], "--test_lengths: "),
        (["mqar", "--device", "tpu9"], "--device tpu9"),
        (["mqar", "--stop_at", "2"], "--stop_at is 2"),
        (["mqar", "--anneal", "4001"], "--anneal is 4001; wanted from 1 to all 4000 steps"),
        (["mqar", "--beta2", "1"], "--beta2 is 1.0"),
        (["mqar", "--eps", "0"], "--eps is 0"),
        (["mqar", "--precision", "float16"], "--precision is 'float16'"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        one_run.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/synthetics"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.csv")), ids=lambda file: file.stem)
def test_documented_tables_are_those_of_the_recipes(file: Path) -> None:
    """Each committed row is of a run that its recipe still describes, and the page shows what the command prints."""
    found, kept = recipe.read(file.stem), rows.read_rows(file)
    seeds = sorted({int(row["seed"]) for row in kept})
    ids = [found.identity(settings) for settings in found.rows({}, [], seeds)]
    assert {row["id"] for row in kept} <= set(ids)
    lines = rows.summary(sorted(kept, key=lambda row: ids.index(row["id"])))
    assert rows.markdown(lines) in (RESULTS.parents[2] / "docs/synthetics.md").read_text()
