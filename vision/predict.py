"""Names what is on pictures: ``python -m vision.predict IMAGE... --model MODEL``."""

import csv
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from core.cli import run
from core.env import device_name, find_device
from core.errors import UserError
from core.training.report import Report
from vision.command import Precision, autocast, output_folder, steps
from vision.files import EXTENSIONS, read_image
from vision.trained import Trained, load_trained

THUMBNAIL = 256  # pixels


def predict(
    images: list[str],
    model: str = "vim_tiny_patch16_224",
    weights: str | None = None,
    img_size: int | None = None,
    top_k: int = 5,
    precision: Precision = "fp32",
    device: str = "auto",
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Prints the most likely classes of each picture, and writes predictions.csv and a page with them, report.html.

    Args:
        images: Image files, or folders of them.
        model: A run's folder, a checkpoint (.ckpt) of vision.train, or the name of a model of timm.
        weights: With a name: a file of weights instead of the published ones.
        img_size: Side of the images that the model gets instead of its own, in pixels.
        top_k: Number of classes.
        precision: What to compute in.
        device: cpu, cuda, or auto for the GPU if there is one.
        out: Folder to write to instead of the next one in runs/vision/predict.
        overwrite: Replace what an earlier run has written to that folder.
    """
    if top_k < 1:
        raise UserError(f"--top_k is {top_k}, wanted at least 1")
    place = find_device(device)
    paths = find_images(images)
    pictures = [read_image(path) for path in paths]
    trained = load_trained(model, weights, img_size)
    transform, net = trained.transform(), trained.net.to(place)
    rows: list[dict[str, Any]] = []
    with output_folder("predict", out, overwrite) as folder:
        report = Report("vision predict", str(len(paths)), "pictures")
        gallery = []
        for path, picture in steps(zip(paths, pictures, strict=True), len(paths), "pictures"):
            with torch.inference_mode(), autocast(precision, place):
                logits = net(transform(picture.convert(trained.mode)).unsqueeze(0).to(place)).float().cpu()
            best = best_classes(logits[0], trained, top_k)
            rows += [{"image": str(path), "rank": i + 1, **row} for i, row in enumerate(best)]
            lines = [f"{100 * row['probability']:.1f} %  {row['class']}" for row in best]
            print("\n".join([str(path), *(f"  {line}" for line in lines)]))
            gallery.append((thumbnail(picture), f"{path.name}: {'; '.join(lines)}"))
        report.images("Pictures", gallery)
        report.table("Predictions", rows)
        report.facts("Model", {"model": trained.label, "pixels": trained.size, "device": device_name(place)})
        report.write(folder / "report.html")
        with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def find_images(names: list[str]) -> list[Path]:
    """The files that are meant: files themselves, and the images in folders, sorted.

    Raises:
        UserError: If there is no such file, or a folder has no image.
    """
    found = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")
            if not inside:
                raise UserError(f"{path}: no image in this folder, wanted files ending in {', '.join(EXTENSIONS)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file, wanted an image or a folder of images")
    return found


def best_classes(logits: torch.Tensor, trained: Trained, count: int) -> list[dict[str, Any]]:
    """The ``count`` most likely classes of a picture, best first, from its logits (classes,)."""
    top, numbers = logits.softmax(0).topk(min(count, len(logits)))
    return [
        {"class": trained.describe(number), "probability": p}
        for p, number in zip(top.tolist(), numbers.tolist(), strict=True)
    ]


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy of a picture that fits on the page."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


if __name__ == "__main__":
    run(predict)
