"""Runs and recipes of the synthetic tasks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_study import MODELS, finish, result, study
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError
from core.synthetics import models, recipe, rows, training


def iter_of(value: float) -> Any:
    """A generator that returns a value at once."""
    return value
    yield


def test_a_run_learns_and_stops_when_it_is_right() -> None:
    settings = {"d_model": 32, "steps": 600, "batch_size": 32, "lr": 5e-3, "check_every": 50, "stop_at": 0.99}
    got = result(study(**settings, test_lengths=[10, 30]))
    assert got.stopped == "solved"
    assert got.steps < 600
    assert got.accuracy[10] >= 0.98
    assert set(got.accuracy) == {10, 30}
    assert [record["step"] for record in got.history] == list(range(50, got.steps + 1, 50))
    assert got.history[-1]["train/loss"] < got.history[0]["train/loss"]


def test_precision_beta2_and_eps_reach_the_step() -> None:
    run_of = study(precision="bfloat16", beta2=0.9, eps=1e-9)
    work = training.Run(run_of, run_of.run({}), torch.device("cpu"))
    dtypes = []
    work.model.lm_head.register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
    got = finish(work)
    assert set(dtypes) == {torch.bfloat16}
    assert {(group["betas"], group["eps"]) for group in work.optimizer.param_groups} == {((0.9, 0.9), 1e-9)}
    assert got.loss == pytest.approx(result(study(beta2=0.9)).loss, rel=1e-2)
    assert got.loss != result(study(beta2=0.9)).loss


def test_identity_follows_what_is_not_default() -> None:
    one, other = study(), study(precision="bfloat16")
    assert one.identity(one.run({})) != other.identity(other.run({}))
    assert one.identity(one.run({"beta2": 0.98})) == one.identity(one.run({}))


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


@pytest.mark.parametrize(("learnt", "steps", "stopped"), [(25, 33, "solved"), (None, 40, "steps"), (35, 40, "solved")])
def test_rate_falls_once_the_task_is_learnt(learnt: int | None, steps: int, stopped: str) -> None:
    run_of = study(steps=40, warmup=2, check_every=5, stop_at=0.9, curriculum=[{"length": 4}, {}], anneal=8)
    work = training.Run(run_of, run_of.run({}), torch.device("cpu"))
    work._check = lambda stage: iter_of(float(work.result.steps == learnt))  # type: ignore[method-assign]
    rates, update = [], work._update
    work._update = lambda stage: (rates.append(work._rate().item()), update(stage))  # type: ignore
    got = finish(work)
    assert (got.steps, got.stopped) == (steps, stopped)
    assert rates[0] == 0.5
    assert set(rates[1 : steps - 8]) == {1.0}
    assert rates[steps - 8 :] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])


def test_marks_are_obeyed() -> None:
    model = models.build({"layer": "S4D", "d_state": 4}, 8, 1, 5)
    groups = list(models.parameter_groups(model, 1e-2, 0.1))
    rate = {p: group["lr"] for group in groups for p in group["params"]}
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    kernel = model.backbone.layers[0].mixer.layer.kernel  # type: ignore[attr-defined]
    assert (rate[kernel.inv_dt], decay[kernel.inv_dt]) == (1e-3, 0.0)
    assert (rate[model.lm_head.weight], decay[model.lm_head.weight]) == (1e-2, 0.1)
    assert len(rate) == len(list(model.parameters()))


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


def test_every_recipe_can_be_built() -> None:
    """Each run of each table: task, stages and model; no step."""
    for name in recipe.names():
        found = recipe.read(name)
        for settings in found.rows({}, [], [0]):
            work = training.Run(found, replace(settings, n_layer=1), torch.device("cpu"))
            assert work.result.parameters > 0


def test_memory_of_induction_heads_begins_at_all_magnitudes() -> None:
    """The steps that channels take without an input are those of the recipe, however small, in float32 too."""
    found = recipe.read("induction_heads")
    work = training.Run(found, found.run({"model": "mamba"}), torch.device("cpu"))
    biases = [bias for name, bias in work.model.named_parameters() if name.endswith("dt_proj.bias")]
    steps = torch.nn.functional.softplus(torch.stack(biases).detach())
    assert steps.shape == (2, 128)
    assert 0.1001 / 10 < steps.max() <= 0.1001
    assert 0.999e-12 <= steps.min() < 1e-11


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


def test_the_embedding_of_few_tokens_has_the_gradient_of_torch() -> None:
    few, many = (models.build({"layer": "S4D"}, 8, 1, vocab).backbone.embedding for vocab in (16, 512))
    assert isinstance(few, models.FewTokens)
    assert type(many) is torch.nn.Embedding
    weight = torch.randn(16, 8, dtype=torch.float64)
    ours, theirs = (
        kind.from_pretrained(weight.clone(), freeze=False) for kind in (models.FewTokens, torch.nn.Embedding)
    )
    tokens, grad = torch.randint(0, 5, (3, 40)), torch.randn(3, 40, 8, dtype=torch.float64)
    for table in (ours, theirs):
        found = table(tokens)
        assert torch.equal(found, weight[tokens])
        found.backward(grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-12, atol=1e-12)
