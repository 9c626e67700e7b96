"""Runs, tables and commands of the synthetic tasks."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError
from core.synthetics import __main__ as one_run
from core.synthetics import command, models, recipe, rows, table, training
from core.synthetics.recipe import Recipe, Settings
from core.table import append_row

TINY: dict[str, Any] = {
    "d_model": 16, "n_layer": 1, "steps": 6, "batch_size": 4, "check_every": 3, "test_sequences": 10, "warmup": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"layer": "Mamba", "d_state": 4},
    "rope": {"layer": "Attention", "num_heads": 2, "rotary_emb_dim": 4, "longest": 16},
    "long": {"layer": "Hyena", "l_max": 20, "settings": {"lr": 5e-4}},
    "s4": {"layer": "UngatedBlock", "inner": "s4", "inner_cfg": {"d_state": 4}},
    "s4d": {"layer": "H3", "inner": "s4d", "inner_cfg": {"d_state": 4}},
    "s5": {"layer": "S5", "d_state": 4},
    "retention": {"layer": "Retention", "num_heads": 2},
}


def study(kind: str = "induction_heads", table: list[dict[str, Any]] | None = None, **settings: Any) -> Recipe:
    start = Settings(**{**TINY, "task": {"length": 10, "vocab_size": 5}, **settings})
    return Recipe("study", kind, start, MODELS, table or [{"model": ["mamba", "rope"]}])


def finish(run: training.Run) -> training.Result:
    work = run.process()
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def iter_of(value: float) -> Any:
    """A generator that returns a value at once."""
    return value
    yield


def result(recipe: Recipe, **options: Any) -> training.Result:
    return finish(training.Run(recipe, recipe.run(options), torch.device("cpu")))


def test_a_run_learns_and_stops_when_it_is_right() -> None:
    settings = {"d_model": 32, "steps": 600, "batch_size": 32, "lr": 5e-3, "check_every": 50, "stop_at": 0.99}
    got = result(study(**settings, test_lengths=[10, 30]))
    assert got.stopped == "solved"
    assert got.steps < 600
    assert got.accuracy[10] >= 0.98
    assert set(got.accuracy) == {10, 30}
    assert [record["step"] for record in got.history] == list(range(50, got.steps + 1, 50))
    assert got.history[-1]["train/loss"] < got.history[0]["train/loss"]


def test_a_run_repeats_and_seeds_differ() -> None:
    first, again, other = (result(study(), seed=seed).history for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_lengths_follow_the_models() -> None:
    lengths = {"test_lengths": [8, 16, 32]}
    assert set(result(study(**lengths), model="mamba").accuracy) == {8, 16, 32}
    assert set(result(study(**lengths), model="rope").accuracy) == {8, 16}  # as its entry says
    assert set(result(study(**lengths), model="long").accuracy) == {8, 16}  # as far as its filter reaches


@pytest.mark.parametrize("name", ["mamba", "rope", "s4", "s4d", "s5", "retention"])
def test_pieces_give_the_answers_of_the_whole(name: str) -> None:
    torch.manual_seed(0)
    entry = {key: value for key, value in MODELS[name].items() if key != "longest"}
    model, task = models.build(entry, 16, 2, 8), study("mqar", task={"length": 16, "vocab_size": 20})
    batch = task.make_task(task.settings).batch(0, 0, torch.tensor(0), 3)
    tokens = batch.tokens % 8
    whole = model.answers(tokens, batch.where)
    for piece in (16, 5, 1):
        torch.testing.assert_close(model.answers_in_pieces(tokens, batch.where, piece), whole)
    wrong = batch._replace(tokens=tokens, answers=whole.argmax(-1))
    assert model.count_right(wrong, None) == model.count_right(wrong, 5) == batch.answers.numel()


def test_curriculum_ends_with_the_task() -> None:
    stages = [{"pairs": 1}, {"pairs": 2}, {}]
    run_of = study("mqar", task={"length": 16, "vocab_size": 20}, curriculum=stages, steps=7)
    work = training.Run(run_of, run_of.run({}), torch.device("cpu"))
    counts = []
    work._update, update = (lambda stage: (counts.append(stage.count(16)), update(stage))), work._update  # type: ignore
    finish(work)
    assert counts == [1, 1, 1, 2, 2, 4, 4]
    work = training.Run(run_of, run_of.run({"advance_at": 1e-9, "check_every": 1}), torch.device("cpu"))
    work._check = lambda stage: iter_of(1.0)  # type: ignore[method-assign]
    assert finish(work).steps == 7  # a step of each stage, and the last one, which nothing ends, to the end


def test_rate_warms_up_and_falls() -> None:
    run_of = study(steps=100, warmup=10)
    work = training.Run(run_of, run_of.run({}), torch.device("cpu"))
    rates = []
    for step in range(100):
        work.step.fill_(step)
        rates.append(work._rate().item())
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] > 0.97
    assert rates[99] < 1e-3


def test_marks_are_obeyed() -> None:
    model = models.build({"layer": "S4D", "d_state": 4}, 8, 1, 5)
    groups = list(models.parameter_groups(model, 1e-2, 0.1))
    rate = {p: group["lr"] for group in groups for p in group["params"]}
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    kernel = model.backbone.layers[0].mixer.layer.kernel  # type: ignore[attr-defined]
    assert (rate[kernel.inv_dt], decay[kernel.inv_dt]) == (1e-3, 0.0)
    assert (rate[model.lm_head.weight], decay[model.lm_head.weight]) == (1e-2, 0.1)
    assert len(rate) == len(list(model.parameters()))


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


def test_a_run_that_is_cut_before_its_first_check_has_a_loss() -> None:
    run_of = study(check_every=1000, steps=30)
    work = training.Run(run_of, run_of.run({}), torch.device("cpu"))
    work.out_of_time = True
    cut = finish(work)
    assert (cut.stopped, cut.steps, cut.history) == ("time", training.BURST, [])
    assert cut.loss == pytest.approx(work.losses[: training.BURST].mean().item())
    facts = {"device": "-", "torch": "-", "date": "-"}
    assert rows.row(run_of, work.settings, cut, facts)["loss"] == f"{cut.loss:.5f}"
    assert math.isnan(training.Result().loss)


class Recorder(TorchDispatchMode):
    """Keeps the names of the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_can_be_a_graph(name: str) -> None:
    """Every step calls the same ops, and none of them asks what is in a tensor."""
    run_of = study(steps=9)
    work = training.Run(run_of, run_of.run({"model": name}), torch.device("cpu"))
    work._update(work.task)
    kept = []
    for _ in range(2):
        with Recorder() as recorder:
            work._update(work.task)
        kept.append(recorder.names)
    assert kept[0] == kept[1]
    assert not {op for op in kept[0] if "local_scalar" in op or "nonzero" in op}


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
    assert out[0].startswith("| model | parameters | 2^3 | 2^5 |")
    assert Path(out[-1]).name == "table.html"
    with Path(out[-1]).with_suffix(".csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["mamba", "mamba2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["induction_head"], "unknown recipe 'induction_head' (did you mean induction_heads?)"),
        (["--model", "mamba"], "the first argument is the recipe"),
        (["mqar", "--model", "mamba3x"], "--model is 'mamba3x'"),
        (["mqar", "--step", "3"], "did you mean --steps"),
        (["mqar", "--steps", "0"], "--steps is 0; wanted at least 1"),
        (["mqar", "--steps", "many"], "--steps"),
        (["mqar", "--task", "{lenght: 4}"], "--task: "),
        (["mqar", "--task", "{length: 4, pairs: 5}"], "--task: length: got 4"),
        (["mqar", "--mixer", "{d_stat: 4}"], "--model mamba"),
        (["mqar", "--test_lengths", "[3]"], "--test_lengths: "),
        (["mqar", "--device", "tpu9"], "--device tpu9"),
        (["mqar", "--stop_at", "2"], "--stop_at is 2"),
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


def test_every_recipe_can_be_built() -> None:
    """Each run of each table: task, stages and model; no step."""
    for name in recipe.names():
        found = recipe.read(name)
        for settings in found.rows({}, [], [0]):
            work = training.Run(found, replace(settings, n_layer=1), torch.device("cpu"))
            assert work.result.parameters > 0


def test_recipes_are_checked(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("# bad\ntask: chess\nsettings: {}\nmodels: {}\ntable: []\n")
    with pytest.raises(UserError, match=r"wanted .* a task of"):
        recipe.read("bad", tmp_path)
    (tmp_path / "bad.yaml").write_text("# bad\ntask: mqar\nsettings: {step: 3}\nmodels: {}\ntable: []\n")
    with pytest.raises(UserError, match="settings has no step"):
        recipe.read("bad", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_graph_gives_the_numbers_of_the_steps(name: str) -> None:
    runs_of = study(steps=30, check_every=10)
    works = [training.Run(runs_of, runs_of.run({"model": name}), torch.device("cuda")) for _ in range(2)]
    works[1]._one_step = lambda stage, number: works[1]._update(stage)  # type: ignore[method-assign]
    one, other = (finish(work) for work in works)
    for a, b in zip(one.history, other.history, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)


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
