"""Recipes of the synthetic studies: what a run is, and where it is written down."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from core.cli import CONFIGS
from core.errors import UserError
from core.synthetics.tasks import TASKS, Task

FOLDER = CONFIGS / "synthetics"
OWN = ("longest", "settings")  # of a model's entry: not the mixer's business


@dataclass(frozen=True)
class Settings:
    """One run.

    Args:
        model: A name of the recipe's ``models``.
        seed: Of the data and of the initial weights.
        d_model: Width of the model.
        n_layer: Number of blocks.
        d_intermediate: Hidden width of a gated MLP in each block; 0 is without.
        mixer: Arguments of the mixer beside those of the model's entry, as JSON or YAML.
        task: Arguments of the task, as JSON or YAML.
        curriculum: Arguments of the task for each stage of the training; the last stage should be the task itself. A
            stage has an even share of the steps that are left when it begins.
        advance_at: Accuracy of a check, on the stage's own task, that ends a stage before its time; null is none.
        steps: Optimizer steps.
        batch_size: Sequences of a step.
        lr: Peak learning rate of AdamW.
        beta2: AdamW's decay of the mean of squared gradients; that of gradients is 0.9.
        eps: AdamW's addend to their root. Parameters whose gradients are below it hardly move.
        warmup: Steps of the linear warm-up.
        cosine: Whether the rate falls to zero over the run by half a cosine, else it is constant.
        weight_decay: Not applied to vectors and to parameters that carry ``_no_weight_decay``.
        clip: Largest norm of the gradient.
        precision: float32, or bfloat16 where autocast allows it.
        check_every: Steps between checks on held-out sequences.
        stop_at: Accuracy of a check that ends the training; null trains all steps.
        anneal: Steps over which the rate falls, the last ones: those after the check that reached ``stop_at``, else of
            ``steps``. Until then it is constant. Null is all steps, and training ends at that check.
        test_lengths: Lengths of the tests; empty is the task's own.
        test_sequences: Sequences of each test.
        test_tokens: Tokens of each test, about: the longest tests have fewer sequences.
    """

    model: str = "mamba"
    seed: int = 0
    d_model: int = 64
    n_layer: int = 2
    d_intermediate: int = 0
    mixer: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    curriculum: list[dict[str, Any]] = field(default_factory=list)
    advance_at: float | None = None
    steps: int = 10_000
    batch_size: int = 64
    lr: float = 1e-3
    beta2: float = 0.98
    eps: float = 1e-8
    warmup: int = 500
    cosine: bool = True
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    check_every: int = 500
    stop_at: float | None = None
    anneal: int | None = None
    test_lengths: list[int] = field(default_factory=list)
    test_sequences: int = 1024
    test_tokens: int = 1 << 28


@dataclass(frozen=True)
class Recipe:
    """A study: a task, models to try on it, and a table of runs.

    Args:
        name: Of the file.
        task: A name of ``TASKS``.
        settings: Where every run starts from.
        models: Name -> ``layer`` and arguments of the mixer; ``settings`` of that model, and ``longest``, the longest
            test that it takes part in.
        table: Groups of runs, each a dictionary of settings; a list of values stands for one run each.
    """

    name: str
    task: str
    settings: Settings
    models: dict[str, dict[str, Any]]
    table: list[dict[str, Any]]

    def run(self, options: Mapping[str, Any], **chosen: Any) -> Settings:
        """Settings of one run: the recipe's, then the model's, then those of a row, then the user's ``options``.

        Raises:
            UserError: For a name that does not exist.
        """
        name = {**chosen, **options}.get("model", self.settings.model)
        if name not in self.models:
            raise UserError(f"--model is {name!r}{_near(name, self.models)}; wanted one of {', '.join(self.models)}")
        merged = {**self.models[name].get("settings", {}), **chosen, **options}
        for key in ("mixer", "task"):  # these add up
            parts = (self.models[name].get("settings", {}), chosen, options)
            merged[key] = {
                **getattr(self.settings, key),
                **{k: v for part in parts for k, v in part.get(key, {}).items()},
            }
        return check(replace(self.settings, **merged))

    def rows(self, options: Mapping[str, Any], models: Sequence[str], seeds: Sequence[int]) -> list[Settings]:
        """The runs of the table, in its order, every seed of a row after the other.

        Args:
            options: The user's, over those of the rows.
            models: Names of the models that are wanted; empty is all.
            seeds: Of each row.
        """
        for name in models:
            if name not in self.models:
                raise UserError(
                    f"--models: {name!r}{_near(name, self.models)}; wanted some of {', '.join(self.models)}"
                )
        runs = []
        for group in self.table:
            names = [key for key, value in group.items() if isinstance(value, list)]
            for values in itertools.product(*(group[key] for key in names)):
                row = {**group, **dict(zip(names, values, strict=True))}
                if not models or row["model"] in models:
                    runs += [self.run(options, **row, seed=seed) for seed in seeds]
        return runs

    def make_task(self, settings: Settings, stage: Mapping[str, Any] | None = None) -> Task:
        """The task of a run, or of one stage of its training.

        Raises:
            UserError: For arguments that do not fit.
        """
        task, given = TASKS[self.task], {**settings.task, **(stage or {})}
        known = [entry.name for entry in fields(task)]
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"--task: {self.task} has no {', '.join(unknown)}; it takes {', '.join(known)}")
        try:
            return task(**given)
        except (TypeError, ValueError) as error:
            raise UserError(f"--task: {error}") from error

    def entry(self, settings: Settings) -> dict[str, Any]:
        """Layer and arguments of a run's mixer."""
        entry = {key: value for key, value in self.models[settings.model].items() if key not in OWN}
        return {**entry, **settings.mixer}

    def identity(self, settings: Settings) -> str:
        """A hash of everything that a run's result follows from.

        Settings at their defaults are left out, so that runs keep their identity when a setting is added.
        """
        start = asdict(Settings())
        chosen = {name: value for name, value in asdict(settings).items() if value != start[name]}
        facts = [self.task, self.entry(settings), chosen]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def read(name: str, folder: Path = FOLDER) -> Recipe:
    """Reads ``configs/synthetics/NAME.yaml``.

    Raises:
        UserError: If there is none, or it holds what it should not.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise UserError(f"unknown recipe {name!r}{_near(name, known)}; recipes: {', '.join(known)}")
    content = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    parts = {"task", "settings", "models", "table"}
    if set(content) != parts or content["task"] not in TASKS:
        raise UserError(f"{known[name]}: got {sorted(content)}, wanted {sorted(parts)} and a task of {sorted(TASKS)}")
    wrong = set(content["settings"]) - {entry.name for entry in fields(Settings)}
    if wrong:
        raise UserError(f"{known[name]}: settings has no {', '.join(sorted(wrong))}")
    return Recipe(name, content["task"], Settings(**content["settings"]), content["models"], content["table"])


def names(folder: Path = FOLDER) -> dict[str, str]:
    """The recipes there are, and what the first line of each says."""
    return {
        path.stem: path.read_text("utf-8").partition("\n")[0].lstrip("# ") for path in sorted(folder.glob("*.yaml"))
    }


def check(settings: Settings) -> Settings:
    """Returns settings whose numbers fit.

    Raises:
        UserError: Where one does not.
    """
    for name in ("steps", "batch_size", "check_every", "test_sequences", "test_tokens", "n_layer", "d_model"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} is {getattr(settings, name)}; wanted at least 1")
    for name in ("lr", "clip", "eps"):
        if not getattr(settings, name) > 0:
            raise UserError(f"--{name} is {getattr(settings, name)}; wanted a positive number")
    if not 0 <= settings.beta2 < 1:
        raise UserError(f"--beta2 is {settings.beta2}; wanted a number from 0 up to, not including, 1")
    if settings.anneal is not None and not 1 <= settings.anneal <= settings.steps:
        raise UserError(f"--anneal is {settings.anneal}; wanted from 1 to all {settings.steps} steps, or null")
    for name in ("advance_at", "stop_at"):
        value = getattr(settings, name)
        if value is not None and not 0 < value <= 1:
            raise UserError(f"--{name} is {value}; wanted an accuracy above 0 and up to 1, or null")
    return settings


def _near(word: str, known: Mapping[str, Any]) -> str:
    hits = difflib.get_close_matches(word, list(known), n=2)
    return f" (did you mean {' or '.join(hits)}?)" if hits else ""
