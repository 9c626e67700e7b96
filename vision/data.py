"""Data modules for image classification: what they share, and folders of images.

Dimension letters: B batch, C channels, H W height and width in pixels.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
from core.training.rng import ResumableLoader
from vision.files import (
    Batch,
    ImageFiles,
    RepeatedAugmentation,
    Unreadable,
    check_headers,
    collate,
    find_classes,
    find_parts,
    list_images,
    refuse,
)


class ImageData(LightningDataModule):
    """Images with class labels: what a classifier and its report ask of a data module.

    Batches are ``(images, labels)``: (B, C, H, W) float32, normalised, and (B,) int64.
    """

    class_names: list[str]
    mean: Sequence[float]
    std: Sequence[float]

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[str, str] = {}  # unreadable files that were skipped, and why

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def preprocessing(self) -> dict[str, Any]:
        """What a picture goes through before the model: ``img_size``, and arguments of timm's ``create_transform``.

        It is kept in checkpoints; where it is empty, ``vision.predict`` and its kin refuse them.
        """
        return {}

    def to_pixels(self, image: Tensor) -> np.ndarray:
        """A normalised image (C, H, W) as uint8 pixels, (H, W) or (H, W, 3)."""
        return to_pixels(image, self.mean, self.std)

    def baselines(self) -> dict[str, float]:
        """Test accuracies of simple methods on the same data, by name; for comparison in the run's figures."""
        return {}


def to_pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """An image (C, H, W) that was normalised by ``mean`` and ``std`` as uint8 pixels, (H, W) or (H, W, 3)."""
    scale, shift = torch.tensor(tuple(std)).view(-1, 1, 1), torch.tensor(tuple(mean)).view(-1, 1, 1)
    pixels = (image.float().cpu() * scale + shift).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).squeeze(2).numpy()


@dataclass
class Augmentation:
    """Augmentation of training images; the defaults are DeiT's.

    Args:
        scale: Smallest and largest part of the area that a random crop takes.
        horizontal_flip: Probability.
        color_jitter: Strength; only without ``policy``, as in timm.
        policy: timm's name of a policy, such as rand-augment ``rand-m9-mstd0.5-inc1``; None for none.
        random_erasing: Probability of a rectangle of noise.
        repeats: Times an image comes in a row, augmented differently (repeated augmentation); 1 for once.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    horizontal_flip: float = 0.5
    color_jitter: float = 0.3
    policy: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    repeats: int = 3


class ImageFolder(ImageData):
    """Images in folders: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, perhaps ROOT/test/CLASS/*.jpg.

    Without a test part the test runs on val/, as is usual for ImageNet.

    Args:
        root: The folder.
        img_size: Side of the images that the model gets, in pixels.
        batch_size: Images per step and device.
        num_workers: Processes that read images, per device; None is one per CPU core, 8 at most.
        augmentation: Augmentation of the training images.
        crop_pct: Part of the resized image's side that evaluation's centre crop keeps.
        interpolation: ``bicubic`` or ``bilinear``.
        skip_unreadable: Leave out files that cannot be read, and list them in the report; otherwise they are an error.
        mean: Per channel, subtracted from pixels between 0 and 1.
        std: Per channel, which they are then divided by.

    """

    def __init__(
        self,
        root: str | None = None,
        img_size: int = 224,
        batch_size: int = 128,
        num_workers: int | None = None,
        augmentation: Augmentation = Augmentation(),  # noqa: B008  read only; the recipe's options replace it
        crop_pct: float = 0.875,
        interpolation: str = "bicubic",
        skip_unreadable: bool = False,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__()
        self.root = root
        self.img_size, self.batch_size, self.augmentation = img_size, batch_size, augmentation
        self.num_workers = min(os.cpu_count() or 1, 8) if num_workers is None else num_workers
        self.crop_pct, self.interpolation, self.skip_unreadable = crop_pct, interpolation, skip_unreadable
        self.mean, self.std = mean, std
        self.images: dict[str, list] = {}

    def preprocessing(self) -> dict[str, Any]:
        """That of the validation images."""
        return {
            "img_size": self.img_size, "crop_pct": self.crop_pct, "interpolation": self.interpolation,
            "mean": tuple(self.mean), "std": tuple(self.std),
        }  # fmt: skip

    # The folder is looked at when it is first asked for, not in the constructor: the command line's library would take
    # an error there for an option of the wrong type.

    @functools.cached_property
    def folders(self) -> dict[str, Path]:
        """The folders of the parts ``train``, ``val`` and perhaps ``test``."""
        return find_parts(self.root)

    @functools.cached_property
    def class_names(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names of the class folders, sorted."""
        return find_classes(self.folders)

    def setup(self, stage: str) -> None:
        """Lists the files, and refuses or leaves out those that are no images."""
        for name, folder in self.folders.items():
            if name in self.images:
                continue
            images = list_images(folder, self.class_names)
            faults = check_headers(images)
            self._note(faults)
            bad = {fault.path for fault in faults}
            self.images[name] = [(path, label) for path, label in images if str(path) not in bad]
        if len(self.images["train"]) < self.batch_size:
            raise UserError(
                f"{self.folders['train']}: got {len(self.images['train'])} images, wanted at least one batch of "
                f"{self.batch_size}; give a smaller --data.batch_size"
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented; the last, smaller batch is left out."""
        images = self.images["train"]
        repeats = self.augmentation.repeats
        order = {"sampler": RepeatedAugmentation(len(images), repeats)} if repeats > 1 else {"shuffle": True}
        return self._loader(ImageFiles(images, training_transform(self)), drop_last=True, **order)

    def val_dataloader(self) -> DataLoader:
        """In order, centre crops."""
        return self._loader(ImageFiles(self.images["val"], evaluation_transform(self)))

    def test_dataloader(self) -> DataLoader:
        """In order, centre crops; of val/ if there is no test/."""
        images = self.images.get("test", self.images["val"])
        return self._loader(ImageFiles(images, evaluation_transform(self)))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Takes note of files that a worker could not read; raised here, the error comes without the worker's."""
        self._note(batch.unreadable)
        if not len(batch.labels):
            raise UserError(f"{batch.unreadable[0].path}: no image of a whole batch could be read, this one among them")
        return batch.images, batch.labels

    def _note(self, faults: Sequence[Unreadable]) -> None:
        if faults and not self.skip_unreadable:
            raise refuse(faults)
        self.left_out.update({fault.path: fault.reason for fault in faults})

    def _loader(self, data: Dataset, **options: Any) -> DataLoader:
        return ResumableLoader(
            data,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class Preprocessed(Protocol):
    """What the two transforms below read of a data module."""

    img_size: int
    crop_pct: float
    interpolation: str
    mean: Any
    std: Any
    augmentation: Augmentation


def evaluation_transform(data: Preprocessed) -> Callable[[Any], Tensor]:
    """From a picture to the normalised centre crop (C, H, W)."""
    common = {"interpolation": data.interpolation, "mean": data.mean, "std": data.std}
    return create_transform(data.img_size, crop_pct=data.crop_pct, **common)


def training_transform(data: Preprocessed) -> Callable[[Any], Tensor]:
    """From a picture to an augmented, normalised crop (C, H, W)."""
    options = data.augmentation
    return create_transform(
        data.img_size,
        is_training=True,
        scale=options.scale,
        hflip=options.horizontal_flip,
        color_jitter=options.color_jitter,
        auto_augment=options.policy,
        re_prob=options.random_erasing,
        re_mode="pixel",
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
    )
