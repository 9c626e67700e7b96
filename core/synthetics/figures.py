"""Curves of the synthetic studies.

Needs matplotlib, which a run that only fills a table does not wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from core.synthetics.rows import ACCURACY


def lengths_figure(rows: Sequence[Mapping[str, str]]) -> Figure | None:
    """Accuracy over the length of the test, a line a model; None where there is one length only."""
    names = [name for name in (rows[0] if rows else ()) if name.startswith(ACCURACY)]
    if len(names) < 2:
        return None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for line in _by_model(rows).items():
        model, runs = line
        points = [(int(name.removeprefix(ACCURACY)), mean(found)) for name in names if (found := _values(runs, name))]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.4, label=model)
    axis.set_xscale("log", base=2)
    _finish(axis, "test length")
    return figure


def widths_figure(rows: Sequence[Mapping[str, str]]) -> Figure | None:
    """Accuracy at the last length over the model's width, a line a model; None where there is one width only."""
    if len({one["d_model"] for one in rows}) < 2:
        return None
    name = [name for name in rows[0] if name.startswith(ACCURACY)][-1]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for model, runs in _by_model(rows).items():
        widths = sorted({int(run["d_model"]) for run in runs})
        found = {w: _values([run for run in runs if int(run["d_model"]) == w], name) for w in widths}
        points = [(w, max(values)) for w, values in found.items() if values]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.4, label=model)
    axis.set_xscale("log", base=2)
    _finish(axis, "model width")
    return figure


def _finish(axis: Any, label: str) -> None:
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel(label)
    axis.set_ylabel("accuracy")
    axis.grid(color="#e8e8e8", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _by_model(rows: Iterable[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    groups: dict[str, list[Mapping[str, str]]] = {}
    for one in rows:
        groups.setdefault(one["model"], []).append(one)
    return groups


def _values(rows: Iterable[Mapping[str, str]], name: str) -> list[float]:
    return [float(one[name]) for one in rows if one[name]]
