"""Folders of images and masks for semantic segmentation.

Dimension letters: B batch, C channels, H W height and width in pixels.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from core.errors import UserError
from core.training.rng import ResumableLoader
from vision.files import EXTENSIONS, read_image

__all__ = ["IGNORED", "MaskFolder"]

IGNORED = 255  # pixel value of a mask that counts for nothing
LAYOUT = (
    "Wanted ROOT/train/images/NAME.jpg with ROOT/train/masks/NAME.png, and the same in ROOT/val; a mask's pixel values "
    "are class numbers, 255 is left out"
)


class Pairs(Dataset):
    """Images and masks, transformed together: (C, H, W) float32 and (H, W) int64."""

    def __init__(self, files: Sequence[tuple[Path, Path]], transform: v2.Transform, num_classes: int) -> None:
        self.files, self.transform, self.num_classes = files, transform, num_classes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.files[index]
        picture = read_image(image)
        numbers = read_mask(mask)
        if numbers.shape != picture.size[::-1]:
            raise UserError(
                f"{mask}: got {numbers.shape[1]} x {numbers.shape[0]} pixels, wanted {picture.size[0]} x "
                f"{picture.size[1]}, as {image} has"
            )
        if unknown := sorted({int(n) for n in np.unique(numbers)} - {*range(self.num_classes), IGNORED}):
            raise UserError(f"{mask}: got class {unknown[0]}, wanted 0 to {self.num_classes - 1}, or 255 for none")
        x, y = self.transform(tv_tensors.Image(picture), tv_tensors.Mask(torch.from_numpy(numbers).long()))
        return x.as_subclass(Tensor), y.as_subclass(Tensor)


class MaskFolder(LightningDataModule):
    """Images with masks of one class number a pixel.

    Batches are (B, C, H, W) float32, normalised, and (B, H, W) int64.

    Args:
        root: The folder, with ROOT/train/images/NAME.jpg, ROOT/train/masks/NAME.png and the same in ROOT/val.
        num_classes: Number of classes; None finds it in the training masks, which are all read for it.
        img_size: Side of the squares that the model gets, in pixels.
        batch_size: Images per step and device.
        num_workers: Processes that read images, per device; None is one per CPU core, 8 at most.
        scale: Smallest and largest part of the area that a random crop takes in training.
        horizontal_flip: Probability, in training.
    """

    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD

    def __init__(
        self,
        root: str | None = None,
        num_classes: int | None = None,
        img_size: int = 256,
        batch_size: int = 16,
        num_workers: int | None = None,
        scale: tuple[float, float] = (0.25, 1.0),
        horizontal_flip: float = 0.5,
    ) -> None:
        super().__init__()
        self.root, self.img_size, self.batch_size = root, img_size, batch_size
        self.scale, self.horizontal_flip = scale, horizontal_flip
        self.num_workers = min(os.cpu_count() or 1, 8) if num_workers is None else num_workers
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int:
        """Number of classes, one more than the largest number in the training masks if it was not given."""
        if self._num_classes is None:
            seen = (read_mask(mask) for _, mask in find_pairs(self.root, "train"))
            self._num_classes = 1 + max(int(mask[mask != IGNORED].max(initial=0)) for mask in seen)
        return self._num_classes

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented; the last, smaller batch is left out."""
        crop = v2.RandomResizedCrop(self.img_size, self.scale, antialias=True)
        return self._loader(
            "train", [crop, v2.RandomHorizontalFlip(self.horizontal_flip)], shuffle=True, drop_last=True
        )

    def val_dataloader(self) -> DataLoader:
        """In order, resized to squares."""
        return self._loader("val", [v2.Resize((self.img_size, self.img_size), antialias=True)])

    def test_dataloader(self) -> DataLoader:
        """The validation images."""
        return self.val_dataloader()

    def _loader(
        self, part: str, steps: list[v2.Transform], shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader:
        finish = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
        normal = v2.Normalize(list(self.mean), list(self.std))
        files = find_pairs(self.root, part)
        if drop_last and len(files) < self.batch_size:
            raise UserError(
                f"{self.root}/{part}: got {len(files)} images, wanted at least one batch of {self.batch_size}; "
                "give a smaller --data.batch_size"
            )
        pairs = Pairs(files, v2.Compose([*steps, *finish, normal]), self.num_classes)
        return ResumableLoader(
            pairs, batch_size=self.batch_size, num_workers=self.num_workers, shuffle=shuffle, drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip


def find_pairs(root: str | None, part: str) -> list[tuple[Path, Path]]:
    """The images of a part and their masks, sorted.

    Raises:
        UserError: If a folder or a mask is missing.
    """
    if root is None:
        raise UserError(f"no folder of images and masks: give one with --data.root ROOT. {LAYOUT}")
    folder = Path(root).expanduser() / part
    if not (folder / "images").is_dir() or not (folder / "masks").is_dir():
        raise UserError(f"--data.root {root}: no {part}/images and {part}/masks in it. {LAYOUT}")
    images = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")
    pairs = [(path, folder / "masks" / f"{path.stem}.png") for path in images]
    if missing := [mask for _, mask in pairs if not mask.is_file()]:
        raise UserError(f"{missing[0]}: no such mask ({len(missing)} of {len(pairs)} are missing). {LAYOUT}")
    if not pairs:
        raise UserError(f"{folder / 'images'}: no image in it. {LAYOUT}")
    return pairs


def read_mask(path: Path) -> np.ndarray:
    """The class numbers in a mask, (H, W) uint8: the indices of a palette, or grey values.

    Raises:
        UserError: If it is no image, or one of colours.
    """
    try:
        with Image.open(path) as mask:
            if mask.mode not in ("L", "P", "1"):
                raise UserError(f"{path}: a mask in mode {mask.mode}, wanted one number a pixel: grey or a palette")
            return np.array(mask, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"{path}: not a readable mask ({error})") from error
