"""The file that keeps a study, one CSV row a run, and its summary."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from core import table
from core.errors import UserError
from core.synthetics.recipe import Recipe, Settings
from core.synthetics.training import Result

ACCURACY = "accuracy@"  # of a column, before the length of the test
VARIED = ("d_model", "n_layer", "mixer", "lr")  # columns that tell runs of one model apart


def row(recipe: Recipe, settings: Settings, result: Result, facts: Mapping[str, str]) -> dict[str, str]:
    """What a table's file keeps of a run, one column a name.

    Args:
        recipe: The study.
        settings: The run.
        result: What it gave.
        facts: Further columns: device, version, date.
    """
    lengths = settings.test_lengths or [recipe.make_task(settings).length]
    accuracy = {f"{ACCURACY}{n}": f"{result.accuracy[n]:.5f}" if n in result.accuracy else "" for n in lengths}
    return {
        "id": recipe.identity(settings),
        "model": settings.model,
        "d_model": str(settings.d_model),
        "n_layer": str(settings.n_layer),
        "mixer": " ".join(f"{key}={value}" for key, value in settings.mixer.items()),
        "lr": f"{settings.lr:g}",
        "seed": str(settings.seed),
        "parameters": str(result.parameters),
        "steps": str(result.steps),
        "stopped": result.stopped,
        "loss": f"{result.loss:.5f}",
        **accuracy,
        "seconds": f"{result.seconds:.0f}",
        **facts,
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table's file, of each run the last one; none if there is no file yet."""
    return list({row["id"]: row for row in table.read_rows(path)}.values())


def check_columns(path: Path, wanted: Iterable[str]) -> None:
    """Raises UserError if a table's file has other columns than the rows that are to come."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != list(wanted):
        raise UserError(
            f"{path} has the columns {', '.join(found)}, wanted {', '.join(wanted)}: it is another table, or "
            "the tests have other lengths; name another --file"
        )


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """One line a model and setting: seeds, steps and time, and the mean accuracy over the seeds in per cent.

    Where seeds differ by more than a tenth of a per cent, the lowest and the highest stand beside the mean.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for one in rows:
        groups.setdefault((one["model"], *(one[name] for name in VARIED)), []).append(one)
    varied = [name for i, name in enumerate(VARIED) if len({key[i + 1] for key in groups}) > 1]
    lines = []
    for runs in groups.values():
        first = runs[0]
        lengths = [name for name in first if name.startswith(ACCURACY)]
        lines.append(
            {
                "model": first["model"],
                **{name: first[name] for name in varied},
                "parameters": f"{int(first['parameters']):,}",
                **{_length(name): _percent([run[name] for run in runs]) for name in lengths},
                "seeds": ", ".join(run["seed"] for run in runs),
                "steps": ", ".join(dict.fromkeys(f"{int(run['steps']):,}" for run in runs)),
                "ended by": ", ".join(dict.fromkeys(run["stopped"] for run in runs)),
                "seconds": f"{mean(float(run['seconds']) for run in runs):.0f}",
            }
        )
    return lines


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown."""
    if not lines:
        return "(no runs yet)"
    columns = list(dict.fromkeys(name for line in lines for name in line))
    head = [columns, ["---"] * len(columns)]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in [*head, *([line.get(c, "") for c in columns] for line in lines)]
    )


def _percent(cells: Sequence[str]) -> str:
    values = [100 * float(cell) for cell in cells if cell]
    if not values:
        return "-"
    spread = f" ({min(values):.1f} to {max(values):.1f})" if max(values) - min(values) > 0.1 else ""
    return f"{_rounded(mean(values))}{spread}"


def _rounded(value: float) -> str:
    """With two decimals where 100 is near, so that nothing is rounded up to it."""
    return f"{math.floor(100 * value) / 100:.2f}" if 99 < value < 100 else f"{value:.1f}"


def _length(name: str) -> str:
    """2^20 for accuracy@1048576."""
    number = int(name.removeprefix(ACCURACY))
    return f"2^{number.bit_length() - 1}" if number & (number - 1) == 0 and number > 1 else str(number)
