"""Any data set that timm reads, for training: WebDataset shards, Hugging Face and torchvision data sets, folders.

Dimension letters: B batch, C channels, H W height and width in pixels.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from core.errors import UserError
from core.training.rng import ResumableLoader
from vision.data import Augmentation, ImageData, evaluation_transform, training_transform
from vision.files import RepeatedAugmentation

__all__ = ["TimmImages"]


class TimmImages(ImageData):
    """Images of any data set that ``timm.data.create_dataset`` reads.

    Args:
        name: timm's name of the reader and data set: ``wds/imagenet`` (tar shards with an _info.json beside them),
            ``hfds/timm/mini-imagenet``, ``torch/cifar10``; an empty string for a folder of class folders.
        root: Folder of the shards, of the cache, or of the images.
        num_classes: Number of classes.
        train_split: Name of the training part.
        val_split: Name of the validation part, which is also the test.
        class_names: Names of the classes in the order of their numbers; None numbers them.
        download: Whether the data set may be fetched.
        input_key: Field of the images, where it is not the reader's own.
        target_key: Field of the labels, where it is not the reader's own.
        img_size: Side of the images that the model gets, in pixels.
        batch_size: Images per step and device.
        num_workers: Processes that read images, per device; None is one per CPU core, 8 at most.
        augmentation: Augmentation of the training images; repeats only where images can be read in any order.
        crop_pct: Part of the resized image's side that evaluation's centre crop keeps.
        interpolation: ``bicubic`` or ``bilinear``.
        mean: Per channel, subtracted from pixels between 0 and 1.
        std: Per channel, which they are then divided by.
    """

    def __init__(
        self,
        name: str = "",
        root: str | None = None,
        num_classes: int = 1000,
        train_split: str = "train",
        val_split: str = "validation",
        class_names: Sequence[str] | None = None,
        download: bool = False,
        input_key: str | None = None,
        target_key: str | None = None,
        img_size: int = 224,
        batch_size: int = 128,
        num_workers: int | None = None,
        augmentation: Augmentation = Augmentation(),  # noqa: B008  read only; the recipe's options replace it
        crop_pct: float = 0.875,
        interpolation: str = "bicubic",
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.name, self.root, self.splits = name, root, {"train": train_split, "val": val_split}
        self.class_names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        self.download, self.keys = download, {"input_key": input_key, "target_key": target_key}
        self.img_size, self.batch_size, self.augmentation = img_size, batch_size, augmentation
        self.num_workers = min(os.cpu_count() or 1, 8) if num_workers is None else num_workers
        self.crop_pct, self.interpolation, self.mean, self.std = crop_pct, interpolation, mean, std
        self.sets: dict[str, Any] = {}

    def preprocessing(self) -> dict[str, Any]:
        """That of the validation images."""
        return {
            "img_size": self.img_size, "crop_pct": self.crop_pct, "interpolation": self.interpolation,
            "mean": tuple(self.mean), "std": tuple(self.std),
        }  # fmt: skip

    def setup(self, stage: str) -> None:
        """Opens both parts.

        Raises:
            UserError: If timm cannot read them; the message is its own.
        """
        for part, split in self.splits.items():
            if part in self.sets:
                continue
            try:
                self.sets[part] = create_dataset(
                    self.name, root=self.root, split=split, is_training=part == "train", batch_size=self.batch_size,
                    download=self.download,
                    **{key: value for key, value in self.keys.items() if value is not None},
                )  # fmt: skip
            except Exception as error:  # each reader has exceptions of its own
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise UserError(
                    f"--data.name {self.name!r} --data.root {self.root}: timm cannot read the part {split!r} "
                    f"({reason}); see timm.data.create_dataset for names; wds/ needs webdataset, hfds/ datasets"
                ) from error

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented; the last, smaller batch is left out."""
        data = self.sets["train"]
        data.transform = training_transform(self)
        if isinstance(data, IterableDataset):  # shuffles its shards itself
            return self._loader(data, drop_last=True)
        repeats = self.augmentation.repeats
        order: dict[str, Any] = {"shuffle": True}
        if repeats > 1:
            order = {"sampler": RepeatedAugmentation(len(data), repeats)}
        return self._loader(data, drop_last=True, **order)

    def val_dataloader(self) -> DataLoader:
        """In order, centre crops."""
        data = self.sets["val"]
        data.transform = evaluation_transform(self)
        return self._loader(data)

    def test_dataloader(self) -> DataLoader:
        """The validation images."""
        return self.val_dataloader()

    def _loader(self, data: Any, **options: Any) -> DataLoader:
        return ResumableLoader(
            data, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=stack,
            pin_memory=torch.cuda.is_available(), **options,
        )  # fmt: skip


def stack(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Samples to a batch: (B, C, H, W) float32 and (B,) int64."""
    return torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples])
