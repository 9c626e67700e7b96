"""Tests a model on a folder of images: ``python -m vision.evaluate MODEL FOLDER``."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader

from core.cli import run
from core.env import device_name, find_device
from core.errors import UserError
from core.training.report import Report, write_atomically
from vision.command import Precision, autocast, output_folder, steps
from vision.data import to_pixels
from vision.files import Batch, ImageFiles, Unreadable, collate, list_images, refuse
from vision.module import draw_confusion
from vision.trained import Trained, count_parameters, load_trained

SHOWN = 24  # mistakes in the report


def evaluate(
    model: str,
    folder: str,
    weights: str | None = None,
    img_size: int | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    skip_unreadable: bool = False,
    precision: Precision = "fp32",
    device: str = "auto",
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes accuracies, those of each class, the confusion matrix and every prediction, and a page, report.html.

    Classes are found by the names of their folders: those of the training for a checkpoint; for a model of ImageNet
    its identifiers (n01440764), and also fewer than all; for others as many folders as classes, in sorted order.

    Args:
        model: A run's folder, a checkpoint (.ckpt) of vision.train, or the name of a model of timm.
        folder: Folder of images in class folders; of one with train/ and val/ in it, test/ or else val/ is taken.
        weights: With a name: a file of weights instead of the published ones.
        img_size: Side of the images instead of the model's own, in pixels.
        batch_size: Images at a time.
        num_workers: Processes that read images; None is one per CPU core, 8 at most.
        skip_unreadable: Leave out files that cannot be read; otherwise they are an error.
        precision: What to compute in.
        device: cpu, cuda, or auto for the GPU if there is one.
        out: Folder to write to instead of the next one in runs/vision/evaluate.
        overwrite: Replace what an earlier run has written to that folder.
    """
    place = find_device(device)
    root, names = find_classes(Path(folder).expanduser())
    trained = load_trained(model, weights, img_size)
    numbers = match_classes(names, trained)
    files = [(path, numbers[label]) for path, label in list_images(root, names)]
    workers = min(os.cpu_count() or 1, 8) if num_workers is None else num_workers
    loader = DataLoader(
        ImageFiles(files, trained.transform(), trained.mode), batch_size, num_workers=workers, collate_fn=collate
    )
    with output_folder("evaluate", out, overwrite) as target:
        found = Results(trained, files)
        with torch.inference_mode():
            net = trained.net.to(place)
            for batch in steps(loader, len(loader), "batches"):
                if batch.unreadable and not skip_unreadable:
                    raise refuse(batch.unreadable, "--skip_unreadable true")
                if len(batch.labels):
                    with autocast(precision, place):
                        logits = net(batch.images.to(place))
                    found.add(batch, logits.float().cpu())
        facts = {
            "model": trained.label, "folder": str(root), "parameters": f"{count_parameters(trained.net):,}",
            "pixels": trained.size, "precision": precision, "device": device_name(place),
        }  # fmt: skip
        found.write(target, facts)
        print(f"top-1 {100 * found.accuracy(1):.2f} %  top-5 {100 * found.accuracy(5):.2f} %  of {found.total} images")


def find_classes(folder: Path) -> tuple[Path, list[str]]:
    """The folder that holds class folders, and their names, sorted.

    Raises:
        UserError: If there are none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, wanted one of images: FOLDER/CLASS/*.jpg")
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        folder = folder / "test" if (folder / "test").is_dir() else folder / "val"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not names:
        raise UserError(f"{folder}: no class folders in it, wanted FOLDER/CLASS/*.jpg")
    return folder, names


def match_classes(names: list[str], trained: Trained) -> list[int]:
    """The model's class number of each folder.

    Raises:
        UserError: If a folder is none of the model's classes.
    """
    known = trained.classes
    if known is None and trained.num_classes == 1000:
        identifiers = ImageNetInfo().label_names()
        if set(names) & set(identifiers):
            known = identifiers
    if known is None:
        if len(names) != trained.num_classes:
            raise UserError(
                f"got {len(names)} class folders ({', '.join(names[:4])}, ...), wanted {trained.num_classes}, as the "
                "model has classes, or folders named by ImageNet's identifiers; add empty classes' folders or rename"
            )
        return list(range(len(names)))
    if unknown := [name for name in names if name not in known]:
        more = ", ..." if len(unknown) > 5 else ""
        raise UserError(
            f"class folders that the model doesn't know: {', '.join(unknown[:5])}{more}; "
            f"wanted names of its classes: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
        )
    return [known.index(name) for name in names]


class Results:
    """Predictions on a folder, counted.

    Args:
        trained: The model.
        files: Paths and class numbers, in the order of the batches.
    """

    def __init__(self, trained: Trained, files: list[tuple[Path, int]]) -> None:
        self.trained, self.files = trained, files
        self.confusion = np.zeros((trained.num_classes, trained.num_classes), dtype=np.int64)
        self.ranks: list[int] = []  # place of the true class among the model's guesses
        self.rows: list[dict[str, Any]] = []
        self.mistakes: list[tuple[np.ndarray, str, bool]] = []
        self.left_out: list[Unreadable] = []
        self._next = 0

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.ranks)

    def accuracy(self, k: int) -> float:
        """Share of images whose class is among the k best guesses."""
        return float(np.mean(np.array(self.ranks) < k)) if self.ranks else float("nan")

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Counts a batch."""
        self.left_out += batch.unreadable
        missing = {fault.path for fault in batch.unreadable}
        count = len(batch.labels) + len(batch.unreadable)
        paths = [path for path, _ in self.files[self._next : self._next + count] if str(path) not in missing]
        self._next += count
        own = logits.gather(1, batch.labels[:, None])
        self.ranks += (logits > own).sum(1).tolist()
        top, guesses = logits.softmax(1).max(1)
        for i, (path, label, guess) in enumerate(zip(paths, batch.labels.tolist(), guesses.tolist(), strict=True)):
            self.confusion[label, guess] += 1
            words = self.trained.describe(guess)
            truth = self.trained.describe(label)
            self.rows.append({"image": str(path), "class": truth, "prediction": words, "probability": float(top[i])})
            if guess != label and len(self.mistakes) < SHOWN:
                options = self.trained.preprocessing
                pixels = to_pixels(batch.images[i], options["mean"], options["std"])
                self.mistakes.append((pixels, f"{words} {100 * float(top[i]):.0f} %, is {truth}", False))

    def classes(self) -> list[dict[str, Any]]:
        """One row for each class that occurs, the worst first."""
        rows = []
        for label in np.nonzero(self.confusion.sum(1))[0]:
            counts = self.confusion[label].copy()
            right, total = int(counts[label]), int(counts.sum())
            counts[label] = 0
            other = int(counts.argmax())
            most = f"{self.trained.describe(other)} ({counts[other]})" if counts[other] else ""
            rows.append(
                {"class": self.trained.describe(int(label)), "images": total, "accuracy": right / total,
                 "most often taken for": most}
            )  # fmt: skip
        return sorted(rows, key=lambda row: row["accuracy"])

    def write(self, folder: Path, facts: dict[str, Any]) -> None:
        """Writes figures, tables and the page."""
        if not self.total:
            raise UserError("no image could be read; wanted at least one")
        metrics = {"images": self.total, "top1": self.accuracy(1), "top5": self.accuracy(5)}
        classes = self.classes()
        for name, rows in (("predictions", self.rows), ("classes", classes)):
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        report = Report("vision evaluate", f"{100 * metrics['top1']:.2f} %", "top-1 accuracy")
        report.facts("Figures", {**metrics, **facts})
        seen = np.nonzero(self.confusion.sum(0) + self.confusion.sum(1))[0]
        if len(seen) <= 100:
            names = [self.trained.describe(int(i)).split(",")[0] for i in seen]
            figure = draw_confusion(self.confusion[np.ix_(seen, seen)], names)
            figure.savefig(folder / "confusion.png", dpi=144, bbox_inches="tight")
            report.figure("Confusion matrix", figure, "Rows are the true classes.")
        report.table("Classes", classes[:100], "The worst first; classes.csv has all.")
        if self.mistakes:
            report.images("Mistakes", self.mistakes, "The first ones.")
        if self.left_out:
            report.table("Files left out", [{"file": f.path, "reason": f.reason} for f in self.left_out])
        report.write(folder / "report.html")
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    run(evaluate)
