"""Draws the studies of nets of sound from their CSV files: ``python -m benchmarks.sound_figures``."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

from core.cli import run

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"
FEW = 2**16  # windows so long are so few in the test that a position in them is a place in the music
Row = dict[str, str]


def main(results: str = str(RESULTS), docs: str = str(DOCS)) -> None:
    """Writes audio_layers.png, and audio_context.png where the context study has been run.

    Args:
        results: Folder of sound_layers.csv, sound_context.csv and the others of benchmarks.sound_context.
        docs: Folder to write to.
    """
    source, target = Path(results), Path(docs)
    layers = [row for row in _rows(source / "sound_layers.csv") if row["clips"]]
    draw_layers(layers, target / "audio_layers.png")
    windows, crossed, positions = (
        _longest(_rows(source / f"sound_context{part}.csv")) for part in ("", "_crossed", "_positions")
    )
    if windows and crossed and positions:
        draw_context(windows, crossed, positions, target / "audio_context.png")


def draw_layers(rows: list[Row], target: Path) -> None:
    """Draws bits, FID and inception score of the nets, a point for each seed."""
    figures = {"test_bits": "bits a sample", "fid": "FID", "inception_score": "inception score"}
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = _subplots(len(figures), (9, 2.6))
    for axis, (key, label) in zip(axes, figures.items(), strict=True):
        for i, name in enumerate(names):
            values = [float(row[key]) for row in rows if row["name"] == name]
            axis.plot(values, [i] * len(values), "o", markersize=5, alpha=0.7)
        axis.set_xlabel(label)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), [_short(name) for name in names] if axis is axes[0] else [])
        axis.grid(alpha=0.3)
    _save(figure, target)


def draw_context(windows: list[Row], crossed: list[Row], positions: list[Row], target: Path) -> None:
    """Draws bits against the window, against other windows in the test, and by the samples before the one predicted."""
    figure, axes = _subplots(3, (12, 3.6))
    for (name, seed), points in _lines(windows, ("name", "seed"), "window").items():
        axes[0].plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{name}, seed {seed}")
    first = [row for row in crossed if (row["name"], row["seed"]) == (crossed[0]["name"], crossed[0]["seed"])]
    for (window,), points in sorted(_lines(first, ("window",), "tested").items(), key=lambda line: int(line[0][0])):
        axes[1].plot(
            *zip(*points, strict=True), marker="o", markersize=4, label=f"trained in windows of {int(window):,}"
        )
    for (name, window, seed), points in _lines(positions, ("name", "window", "seed"), "from").items():
        if int(window) < FEW:
            xs, ys = zip(*((max(x, 16), y) for x, y in points), strict=True)
            axes[2].plot(xs, ys, marker="o", markersize=3, label=f"{name}, {int(window):,}, seed {seed}")
    labels = "window of training and test", "window of the test", "samples before the one predicted, from"
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=6.5)
    axes[0].set_ylabel("bits a sample, test")
    _save(figure, target)


def _longest(rows: list[Row]) -> list[Row]:
    """The rows after the longest common beginning: those of the study as it is now."""
    most = max((int(row["warm"]) for row in rows), default=0)
    return [row for row in rows if int(row["warm"]) == most]


def _lines(rows: list[Row], by: tuple[str, ...], x: str) -> dict[tuple[str, ...], list[tuple[int, float]]]:
    """Points in the order of ``x`` of each line."""
    found: dict[tuple[str, ...], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in by)].append((int(row[x]), float(row["test_bits"])))
    return {key: sorted(points) for key, points in found.items()}


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _short(name: str) -> str:
    """Outer stages / centre."""
    outer, _, centre = name.partition(" outside, ")
    return f"{outer} / {centre.removesuffix(' in the centre') or outer}"


def _subplots(count: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(1, count, figsize=size, layout="constrained")


def _save(figure: Any, target: Path) -> None:
    figure.savefig(target, dpi=110)
    print(target)


if __name__ == "__main__":
    run(main)
