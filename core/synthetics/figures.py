"""Curves of the synthetic studies.

Needs matplotlib, which a run that only fills a table does not wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from matplotlib.figure import Figure

from core.synthetics.rows import ACCURACY


def lengths_figure(rows: Sequence[Mapping[str, str]]) -> Figure | None:
    """Accuracy over the length of the test, a line a model; None where there is one length only."""
    names = [name for name in (rows[0] if rows else ()) if name.startswith(ACCURACY)]
    if len(names) < 2:
        return None
    lines = {
        model: {int(name.removeprefix(ACCURACY)): _values(runs, name) for name in names}
        for model, runs in _by_model(rows).items()
    }
    return _draw(lines, "test length")


def widths_figure(rows: Sequence[Mapping[str, str]]) -> Figure | None:
    """Accuracy at the last length over the model's width, a line a model; None where there is one width only."""
    widths = sorted({int(one["d_model"]) for one in rows})
    if len(widths) < 2:
        return None
    name = [name for name in rows[0] if name.startswith(ACCURACY)][-1]
    lines = {
        model: {width: _values([run for run in runs if int(run["d_model"]) == width], name) for width in widths}
        for model, runs in _by_model(rows).items()
    }
    return _draw(lines, "model width")


def _draw(lines: Mapping[str, Mapping[int, list[float]]], label: str) -> Figure:
    """A line a name: the mean of the values at each place, over a logarithmic axis."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, places in lines.items():
        points = [(place, mean(values)) for place, values in places.items() if values]
        axis.plot([x for x, _ in points], [y for _, y in points], "o-", markersize=3.5, linewidth=1.4, label=name)
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel(label)
    axis.set_ylabel("accuracy")
    axis.grid(color="#e8e8e8", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _by_model(rows: Iterable[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    groups: dict[str, list[Mapping[str, str]]] = {}
    for one in rows:
        groups.setdefault(one["model"], []).append(one)
    return groups


def _values(rows: Iterable[Mapping[str, str]], name: str) -> list[float]:
    return [float(one[name]) for one in rows if one[name]]
