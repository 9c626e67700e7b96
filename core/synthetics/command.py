"""What the two commands of the synthetic tasks share: their arguments and how a run shows itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from core import cli
from core.errors import UserError
from core.synthetics import recipe
from core.synthetics.recipe import Recipe, Settings
from core.synthetics.training import Result


@dataclass(frozen=True)
class RunOptions:
    """Beside the settings of a run.

    Args:
        device: Where; a GPU where there is one.
        minutes: Train no longer than this; the tests come after. Null trains all steps.
        run_dir: Folder of the run; null numbers one in runs/synthetics/RECIPE.
        overwrite: Replace the run in ``run_dir``.
    """

    device: str | None = None
    minutes: float | None = None
    run_dir: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class TableOptions:
    """Beside the settings, which go over those of every row.

    Args:
        models: Names of the models whose rows are wanted; empty is all.
        seeds: Seeds of every row.
        file: CSV file of the table, one row a run; null is runs/synthetics/RECIPE/table.csv. Finished runs that it
            holds are not run again.
        parallel: Runs side by side, one CUDA stream each.
        minutes: Start no run after so long, and send those that still train to their tests. Null is no bound.
        keep_unfinished: Whether runs that ran out of time are rows too, until they are run again the next time.
        device: Where; a GPU where there is one.
        show: Only print the table and write the page.
        page: HTML page of the table, with its curves as PNG beside it; null is beside the file.
    """

    models: list[str] | None = None
    seeds: list[int] | None = None
    file: str | None = None
    parallel: int = 1
    minutes: float | None = None
    keep_unfinished: bool = False
    device: str | None = None
    show: bool = False
    page: str | None = None


@dataclass(frozen=True)
class Parsed:
    """A command line, read.

    Args:
        recipe: The study.
        changed: The settings that the user gives.
        options: An instance of the command's options.
        line: The command line, for the record.
    """

    recipe: Recipe
    changed: dict[str, Any]
    options: Any
    line: str


def start(
    program: str,
    arguments: Sequence[str],
    options: type[RunOptions] | type[TableOptions],
    work: Callable[[Parsed], None],
) -> None:
    """Runs a command, or shows which recipes there are.

    Args:
        program: The command's module.
        arguments: A recipe's name and options.
        options: Those beside the settings.
        work: What the command does.

    Raises:
        UserError: For a user's mistake.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(program))
        return
    work(parse(program, arguments, options))


def overview(program: str) -> str:
    """The help of a command without a recipe."""
    known = recipe.names()
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {text}" for name, text in known.items()]
    return "\n".join(
        [
            f"usage: python -m {program} RECIPE [options]", "", "recipes:", *lines, "",
            f"python -m {program} RECIPE --help lists every option with the recipe's values.",
        ]
    )  # fmt: skip


def parse(program: str, arguments: Sequence[str], options: type[RunOptions] | type[TableOptions]) -> Parsed:
    """Reads a recipe's name and the options after it.

    Raises:
        UserError: For a mistake in either.
    """
    from jsonargparse import ArgumentParser

    if arguments[0].startswith("-"):
        known = ", ".join(recipe.names())
        raise UserError(f"the first argument is the recipe, got {arguments[0]}; recipes: {known}")
    found = recipe.read(arguments[0])
    parser = ArgumentParser(prog=f"python -m {program} {found.name}", exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Settings, fail_untyped=True)
    parser.add_class_arguments(options, fail_untyped=True)
    defaults = asdict(found.settings)
    parser.set_defaults(defaults)
    values = cli.parse(parser, arguments[1:]).as_dict()
    said = cli.parse(parser, arguments[1:], defaults=False).as_dict()
    # What is given counts though it is the recipe's value: the model's own may be another.
    changed = {name: value for name, value in said.items() if name in defaults}
    given = options(**{entry.name: values[entry.name] for entry in fields(options)})
    if given.minutes is not None and given.minutes <= 0:
        raise UserError(f"--minutes is {given.minutes:g}; wanted more than 0, or null for no bound")
    return Parsed(found, changed, given, shlex.join(["python", "-m", program, *arguments]))


def device(name: str | None) -> torch.device:
    """The device of that name; a GPU where there is one by default.

    Raises:
        UserError: If there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name}: {reason}; wanted cpu, cuda or cuda:N") from error


def device_name(where: torch.device) -> str:
    """As it stands in tables."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    from core.env import cpu_name

    return f"{cpu_name()} (CPU)"


def label(settings: Settings) -> str:
    """A run in a line of progress."""
    mixer = f" {json.dumps(settings.mixer)}" if settings.mixer else ""
    return f"{settings.model} d={settings.d_model}{mixer} lr={settings.lr:g} seed={settings.seed}"


class Lines:
    """Shows runs as they go: a bar in a terminal, and a line each time that a run is checked.

    Args:
        bar: Of rich, over the steps of all runs.
        steps: Of all runs together.
    """

    def __init__(self, bar: Progress, steps: int) -> None:
        self.bar, self.task = bar, bar.add_task("steps", total=steps)
        self.done: dict[str, int] = {}
        self.lines: dict[str, int] = {}

    def show(self, name: str, result: Result) -> None:
        """Brings a run up to date."""
        self.bar.advance(self.task, result.steps - self.done.get(name, 0))
        self.done[name] = result.steps
        for record in result.history[self.lines.get(name, 0) :]:
            text = f"loss {record['train/loss']:.4f}  accuracy {record['val/accuracy']:.4f}"
            self.bar.console.print(f"{name}  step {record['step']:,}  {text}", highlight=False, soft_wrap=True)
        self.lines[name] = len(result.history)


@contextmanager
def progress(steps: int) -> Iterator[Lines]:
    """Shows runs of so many steps together, on the standard error."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield Lines(bar, steps)
