"""Folders of images: their layout checked before anything runs, and a data set that names a file it cannot read."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from core.errors import UserError
from core.parallel.data import shared_seed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
HEADERS_CHECKED = 50_000  # folders up to this size have every file's header read first: some seconds
LAYOUT = (
    "Wanted one folder per class, the same classes in both parts: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, "
    "and if there is one a test set ROOT/test/CLASS/*.jpg"
)


@dataclass
class Unreadable:
    """An image file that could not be decoded, in the place of the image."""

    path: str
    reason: str


class Batch(NamedTuple):
    """What a loader's worker hands over."""

    images: Tensor  # (B, C, H, W) float32, normalised
    labels: Tensor  # (B,) int64
    unreadable: list[Unreadable]  # files that are missing from the batch


def find_parts(root: str | None) -> dict[str, Path]:
    """The parts of a data set by name, ``train``, ``val`` and perhaps ``test``.

    Raises:
        UserError: If there is no folder, or not the two that a training needs.
    """
    if root is None:
        raise UserError(f"no folder of images: give one with --data.root ROOT. {LAYOUT}")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        got = "a file" if folder.is_file() else "nothing"
        raise UserError(f"--data.root {root}: got {got} there, wanted a folder of images. {LAYOUT}")
    missing = [name for name in ("train", "val") if not (folder / name).is_dir()]
    if missing:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"--data.root {root}: no folder {' and '.join(f'{name}/' for name in missing)} in it, got {there}. {LAYOUT}"
            ". Move a tenth of each class from train/ to val/ where there is no val/ yet"
        )
    return {name: folder / name for name in ("train", "val", "test") if (folder / name).is_dir()}


def find_classes(parts: dict[str, Path]) -> list[str]:
    """The class names, sorted: the folders in train/, which the other parts must have too.

    Raises:
        UserError: If there are no class folders, or others in val/ or test/ than in train/.
    """
    classes = {
        name: {f.name for f in path.iterdir() if f.is_dir() and f.name[0] != "."} for name, path in parts.items()
    }
    if not classes["train"]:
        raise UserError(f"{parts['train']}: no class folders in it. {LAYOUT}")
    for name, found in classes.items():
        if differing := sorted(found ^ classes["train"]):
            where = [f"{c} only in {name}/" if c in found else f"{c} only in train/" for c in differing[:6]]
            raise UserError(
                f"{parts[name]}: not the classes of train/: {', '.join(where)}{', ...' if len(differing) > 6 else ''}. "
                "Rename or remove these folders, so that both parts have the same classes"
            )
    return sorted(classes["train"])


def list_images(part: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """All images of a part with their class numbers, sorted.

    Raises:
        UserError: If a class has no image.
    """
    found = []
    for number, name in enumerate(classes):
        paths = sorted(p for p in (part / name).rglob("*") if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")
        if not paths:
            raise UserError(
                f"{part / name}: no image in it, wanted at least one file ending in {', '.join(EXTENSIONS)}; "
                "add images or remove this class from all parts"
            )
        found += [(path, number) for path in paths]
    return found


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Decodes an image file.

    Raises:
        UserError: Naming the file, if it isn't an image or is damaged.
    """
    try:
        with warnings.catch_warnings():  # palettes with transparency and such: decoded all the same
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: {_reason(error, path)}") from error


def _reason(error: BaseException, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file has gone"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image, though its name ends in {path.suffix}"
    return f"a damaged image ({error})"


def check_headers(images: Sequence[tuple[Path, int]]) -> list[Unreadable]:
    """Files that aren't images at all, found by their first bytes; sets above HEADERS_CHECKED are not looked at."""

    def check(path: Path) -> Unreadable | None:
        try:
            with Image.open(path):
                return None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return Unreadable(str(path), _reason(error, path))

    if len(images) > HEADERS_CHECKED:
        return []
    with ThreadPoolExecutor(8) as pool:
        return [fault for fault in pool.map(check, (path for path, _ in images)) if fault is not None]


def refuse(faults: Sequence[Unreadable], option: str = "--data.skip_unreadable true") -> UserError:
    """The error for files that cannot be read; ``option`` is the one that leaves them out."""
    first = faults[0]
    more = len({fault.path for fault in faults}) - 1
    others = f" ({more} more like it)" if more else ""
    return UserError(
        f"{first.path}: {first.reason}{others}, wanted a readable image; "
        f"replace or remove it, or leave such files out with {option}"
    )


class ImageFiles(Dataset):
    """Images read from files; one that cannot be read comes out as ``Unreadable``.

    Args:
        images: Paths and class numbers.
        transform: From a PIL image to a tensor (C, H, W).
        mode: What images are read as, in PIL's words.
    """

    def __init__(
        self, images: Sequence[tuple[Path, int]], transform: Callable[[Image.Image], Tensor], mode: str = "RGB"
    ) -> None:
        self.images, self.transform, self.mode = images, transform, mode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        path, label = self.images[index]
        try:
            image = read_image(path, self.mode)
        except UserError as error:
            return Unreadable(str(path), str(error).removeprefix(f"{path}: "))
        return self.transform(image), label


def collate(samples: Sequence[tuple[Tensor, int] | Unreadable]) -> Batch:
    """Puts samples into a batch. Faults are handed on: raised in a worker, they would carry its traceback along."""
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    faults = [sample for sample in samples if isinstance(sample, Unreadable)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return Batch(images, torch.tensor([label for _, label in good], dtype=torch.int64), faults)


class RepeatedAugmentation(Sampler[int]):
    """Each image several times in a row, differently augmented each time, in epochs of the usual length.

    (Hoffer et al. 2020, "Augment your batch"; DeiT.) With several processes, which take the indices in turns, the
    copies of an image go to different ones.

    Args:
        length: Number of images.
        repeats: Copies of an image.
    """

    def __init__(self, length: int, repeats: int) -> None:
        self.length, self.repeats = length, repeats

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(shared_seed()))
        return iter(order.repeat_interleave(self.repeats)[: self.length].tolist())
