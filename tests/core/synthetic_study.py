"""A small study for the tests of the synthetic tasks."""

from typing import Any

import torch

from core.synthetics import training
from core.synthetics.recipe import Recipe, Settings

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


def result(recipe: Recipe, **options: Any) -> training.Result:
    return finish(training.Run(recipe, recipe.run(options), torch.device("cpu")))
