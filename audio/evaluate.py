"""Scores generated clips through a classifier of spoken digits: ``python -m audio.evaluate FOLDER_OF_CLIPS``."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from audio.files import find_audio, read_clip, to_mono
from audio.judge import Judge, Reference, load_judge
from audio.likelihood import clip_bits, recording_bits
from audio.metrics import (
    Thresholds,
    am_score,
    frechet_distance,
    inception_score,
    inception_score_sashimi,
    modified_inception_score,
    tuned_thresholds,
    within,
)
from audio.ranking import draw_classes, ranked_players
from audio.splits import Labels, split_files
from audio.trained import load_trained
from core.cli import run
from core.env import find_device
from core.errors import UserError
from core.training.folder import RunFolder, named, numbered
from core.training.report import Report, write_atomically

RUNS = Path("runs/audio/evaluate")
Reject = Literal["none", "tuned", "published"]


class Judged(NamedTuple):
    """Clips and what was found out about them."""

    names: list[str]
    waves: list[Tensor]  # (any,) at the judge's rate
    features: Tensor  # (S, F)
    shares: Tensor  # (S, K)
    bits: Tensor | None  # (S,) bits per sample under the model

    def chosen(self, index: Tensor) -> "Judged":
        """The clips of an index."""
        kept = index.tolist()
        bits = None if self.bits is None else self.bits[index]
        names, waves = [self.names[i] for i in kept], [self.waves[i] for i in kept]
        return Judged(names, waves, self.features[index], self.shares[index], bits)


def evaluate(
    clips: str,
    reference: str | None = None,
    labels: Labels = "name",
    classifier: str | None = None,
    model: str | None = None,
    reject: Reject = "none",
    published_scores: bool = False,
    players: int = 24,
    out: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> None:
    """Writes scores (metrics.json), what the classifier says of each clip (clips.csv), and a page to listen.

    FID, IS, mIS and AM are those of SaShiMi's appendix C.3 through the classifier given: figures of two classifiers
    cannot be compared. Clips of another rate are resampled; what is longer than the classifier's clips is cut off.

    Args:
        clips: Folder of generated clips, or any recordings.
        reference: Folder of recordings: the clips are compared with its training part, and the test part is scored
            beside them as what is best possible; null compares with what the classifier was trained on.
        labels: What the recordings of ``reference`` are named by; used by ``model`` where it knows classes.
        classifier: File or run of audio.classify; null is the one of spoken digits that comes with the project.
        model: File or run of audio.train: adds bits per sample of each clip under it, and of the reference's test part.
        reject: Which clips are left out by their likelihood under ``model`` before scoring: none; tuned, by thresholds
            that make the FID of one half of the clips smallest, and the other half is scored; published, the 40 % least
            and 5 % most likely of it, which is what the published scorer's faulty search always ends with.
        published_scores: Add the inception score as the published scorer computes it, over the clips instead of the
            classes, to compare with published figures.
        players: Clips to listen to on the page.
        out: Folder to write to instead of the next one in runs/audio/evaluate.
        overwrite: Replace what an earlier evaluation has written to that folder.
        device: Where to run: cpu or cuda; auto is the GPU if there is one.
    """
    if players < 0:
        raise UserError(f"--players is {players}, wanted at least 0")
    if reject != "none" and model is None:
        raise UserError(f"--reject {reject} needs likelihoods; give the model with --model, or --reject none")
    where = find_device(device)
    judge = load_judge(None if classifier is None else Path(classifier).expanduser())
    judge.net.to(where)
    paths = find_audio(Path(clips).expanduser())
    parts = {} if reference is None else split_files(Path(reference).expanduser(), {"val": 0.1, "test": 0.1})
    known = _reference(judge, parts)
    folder = numbered(RUNS) if out is None else named(Path(out), overwrite)
    try:
        folder.mark({"status": "running", "command": f"python -m audio.evaluate {clips}"})
        found = _judged(judge, paths, Path(clips).expanduser())
        bits: dict[str, float] = {}
        if model is not None:
            trained = load_trained(Path(model).expanduser())
            trained.net.to(where)
            found = found._replace(bits=clip_bits(trained, paths))
            if parts:
                bits["test_bits_per_sample"] = recording_bits(trained, parts["test"], labels)
        thresholds, scored = _rejected(found, known, reject)
        metrics = scores(scored, known, published_scores)
        rows: list[dict[str, Any]] = [{"clips": f"{len(scored.names)} scored", **metrics}]
        if parts:
            best = _judged(judge, parts["test"], Path(reference or "").expanduser())
            rows.append({"clips": f"{len(best.names)} recordings, test", **scores(best, known, published_scores)})
        metrics |= bits
        facts = {
            "clips": f"{clips}: {len(paths)}, {len(scored.names)} of them scored",
            "compared with": f"{known.clips} recordings",
            "classifier": classifier or "of the Free Spoken Digit Dataset, which comes with the project",
            "rejection": f"{reject}{'' if thresholds is None else f', {thresholds.lower:g} to {thresholds.upper:g}'}",
        }
        _write(folder, judge, scored, rows, metrics, facts, players)
        folder.mark({"status": "finished", "command": f"python -m audio.evaluate {clips}"})
        folder.start()
    finally:
        folder.discard()
    for name, value in metrics.items():
        print(f"{name} {value:.4g}")
    print(folder.path)


def scores(found: Judged, known: Reference, published: bool = False) -> dict[str, float]:
    """All scores of clips; ``published`` adds the published scorer's inception score."""
    metrics = {
        "fid": frechet_distance(found.features, known.moments),
        "inception_score": inception_score(found.shares),
        "modified_inception_score": modified_inception_score(found.shares),
        "am_score": am_score(found.shares, known.classes[None]),
        "confidence": float(found.shares.amax(1).mean()),
    }
    if published:
        metrics["inception_score_published"] = inception_score_sashimi(found.shares)
    if found.bits is not None:
        metrics["clip_bits_per_sample"] = float(found.bits.mean())
    return metrics


def _reference(judge: Judge, parts: dict[str, list[Path]]) -> Reference:
    if parts:
        return judge.refer([to_mono(read_clip(path), judge.sample_rate) for path in parts["train"]])
    if judge.reference is None:
        raise UserError("the classifier holds no figures of recordings to compare with; give them with --reference")
    return judge.reference


def _judged(judge: Judge, paths: Sequence[Path], root: Path) -> Judged:
    waves = [to_mono(read_clip(path), judge.sample_rate) for path in paths]
    if len(waves) < 2:
        raise UserError(f"{root}: got {len(waves)} clip, wanted at least 2, better a thousand: scores are of a set")
    features, shares = judge(waves)
    return Judged([path.relative_to(root).as_posix() for path in paths], waves, features, shares, None)


def _rejected(found: Judged, known: Reference, reject: Reject) -> tuple[Thresholds | None, Judged]:
    """Leaves out clips by their likelihood: thresholds from every second clip, the others are kept."""
    if reject == "none":
        return None, found
    assert found.bits is not None
    if len(found.names) < 8:
        raise UserError(f"--reject {reject}: got {len(found.names)} clips, wanted at least 8: half of them tune it")
    tuning, rest = torch.arange(0, len(found.names), 2), torch.arange(1, len(found.names), 2)
    thresholds = tuned_thresholds(
        found.features[tuning], -found.bits[tuning], known.moments, compat=reject == "published"
    )
    return thresholds, found.chosen(rest[within(-found.bits[rest], thresholds)])


def _write(
    folder: RunFolder,
    judge: Judge,
    found: Judged,
    rows: list[dict[str, Any]],
    metrics: dict[str, float],
    facts: dict[str, str],
    players: int,
) -> None:
    """Writes the figures, a row for each clip, and the page."""
    confidence, guesses = found.shares.max(1)
    with (folder.path / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "predicted", "confidence", "bits_per_sample"])
        for i, name in enumerate(found.names):
            bits = "" if found.bits is None else f"{float(found.bits[i]):.4f}"
            table.writerow([name, judge.class_names[int(guesses[i])], f"{float(confidence[i]):.4f}", bits])
    report = Report("audio evaluate", f"{metrics['fid']:.3f}", "Frechet distance (FID) to the recordings")
    report.table(
        "Scores", rows,
        "FID and AM: lower is better. Inception scores and confidence: higher is better; the inception score is at "
        f"most {len(judge.class_names)}, the number of classes, and low for a sampler that says one thing only.",
    )  # fmt: skip
    report.figure("What is said", draw_classes(found.shares, judge.class_names), "By the classifier's first choice.")
    ranked_players(report, found.waves, found.names, found.shares, judge, players)
    report.facts("Evaluation", facts)
    report.write(folder.path / "report.html")
    write_atomically(folder.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    run(evaluate)
