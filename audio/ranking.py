"""Clips on a page in the order in which a classifier trusts them.

Dimension letters: S clips, K classes.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from audio.judge import Judge
from audio.listen import add_players
from core.training.report import Report


def draw_classes(shares: Tensor, names: Sequence[str]) -> Figure:
    """Draws how often each class is said, and how surely: probabilities (S, K) and the classes' names."""
    confidence, guesses = shares.max(1)
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(len(names)), torch.bincount(guesses, minlength=len(names)).numpy())
    left.set_xticks(range(len(names)), names)
    left.set(xlabel="class", ylabel="clips")
    right.hist(confidence.numpy(), bins=20, range=(0, 1))
    right.set(xlabel="confidence", ylabel="clips")
    return figure


def ranked_players(
    report: Report, waves: Sequence[Tensor], names: Sequence[str], shares: Tensor, judge: Judge, count: int
) -> None:
    """Adds two sections of players: the clips of each class that are trusted most, and those trusted least of all.

    Args:
        report: The page.
        waves: Clips at the judge's rate.
        names: Their names.
        shares: (S, K).
        judge: The classifier.
        count: Clips in all; a third of them are from the end of the list.
    """
    confidence, guesses = shares.max(1)

    def entry(i: int) -> tuple[Tensor, str]:
        said = judge.class_names[int(guesses[i])]
        wave = waves[i] / waves[i].abs().max().clamp(min=1e-6)
        return wave, f"{said}: {100 * float(confidence[i]):.0f} %, {names[i]}"

    best, worst = most_trusted(shares, count - count // 3), confidence.argsort()[: count // 3].tolist()
    for title, chosen, caption in (
        ("Trusted most", best, "By class, the surest first: what the classifier hears, and how surely."),
        ("Trusted least", [i for i in worst if i not in best], "Of all clips, the least sure first."),
    ):
        if chosen:
            add_players(report, title, [entry(i) for i in chosen], judge.sample_rate, caption)


def most_trusted(shares: Tensor, count: int) -> list[int]:
    """Indices of up to ``count`` clips: the surest of each class, then the second of each, sorted by class."""
    confidence, guesses = shares.max(1)
    ranked = confidence.argsort(descending=True).tolist()
    places: dict[int, int] = {}
    turns = []
    for i in ranked:
        said = int(guesses[i])
        turns.append((places.get(said, 0), -float(confidence[i]), said, i))
        places[said] = places.get(said, 0) + 1
    chosen = sorted(turns)[:count]
    return [i for _, _, _, i in sorted(chosen, key=lambda turn: (turn[2], turn[0]))]
