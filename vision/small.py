"""Small images that fit into memory: read once, cut into batches and augmented where the model runs.

Dimension letters: B batch, N images of a part, C channels, H W height and width in pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
from core.training.rng import ResumableLoader
from vision.augment import erase, random_distortions, shift_and_flip
from vision.data import ImageData
from vision.files import LAYOUT, find_classes, list_images, read_image

__all__ = ["SmallImages"]

Part = tuple[Tensor, Tensor]  # (N, C, H, W) uint8 and (N,) int64


class Rows(Dataset):
    """Images and labels, read a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> Part:
        index = torch.tensor(rows)
        return self.images[index], self.labels[index]


class SmallImages(ImageData):
    """Folders of small images of one size, such as CIFAR-10 as files: ROOT/train/CLASS/*.jpg.

    ROOT/val and ROOT/test are taken where they are. Without val/, ``held_out`` images of train/ are kept for it, the
    same number of each class and always the same ones; without test/ the test runs on the validation images.

    Args:
        root: The folder.
        held_out: Images of train/ that are kept for validation, where there is no val/.
        img_size: Side of the images that the model gets; smaller ones are enlarged, bilinear. None leaves them.
        batch_size: Images per step and device.
        padding: Training images are shifted by up to so many pixels each way, mirrored at the border.
        horizontal_flip: Probability.
        distortions: So many random operations on each training image: turned, sheared, recoloured, posterized, ...
            (``vision.augment.random_distortions``); 1 is TrivialAugment.
        erasing: Side of a square that is cut out of each training image, in pixels; 0 for none.
        mean: Per channel, subtracted from pixels between 0 and 1.
        std: Per channel, which they are then divided by.
    """

    def __init__(
        self,
        root: str | None = None,
        held_out: int = 5000,
        img_size: int | None = None,
        batch_size: int = 512,
        padding: int = 4,
        horizontal_flip: float = 0.5,
        distortions: int = 0,
        erasing: int = 8,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
    ) -> None:
        super().__init__()
        self.root, self.held_out, self.img_size, self.batch_size = root, held_out, img_size, batch_size
        self.padding, self.horizontal_flip, self.distortions, self.erasing = (
            padding, horizontal_flip, distortions, erasing,
        )  # fmt: skip
        self.mean, self.std = tuple(mean), tuple(std)
        self.parts: dict[str, Part] = {}
        self._scale: Tensor | None = None  # mean and std where the batches are

    @property
    def class_names(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names of the class folders, sorted."""
        return find_classes(self._folders())

    def preprocessing(self) -> dict[str, Any]:
        """What a picture goes through before the model, for the commands that use a checkpoint."""
        size = self.img_size or (self.parts["val"][0].shape[-1] if self.parts else 32)
        return {"img_size": size, "crop_pct": 1.0, "interpolation": "bilinear", "mean": self.mean, "std": self.std}

    def setup(self, stage: str) -> None:
        """Reads all images into memory, once."""
        if self.parts:
            return
        names = self.class_names
        self.parts = {name: read_part(folder, names) for name, folder in self._folders().items()}
        if "val" not in self.parts:
            self.parts["train"], self.parts["val"] = hold_out(*self.parts["train"], self.held_out)
        if len(self.parts["train"][1]) < self.batch_size:
            raise UserError(
                f"{self.root}: got {len(self.parts['train'][1])} training images, wanted at least one batch of "
                f"{self.batch_size}; give a smaller --data.batch_size"
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled; the last, smaller batch is left out."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """In order; the validation images if there is no test/."""
        return self._loader("test" if "test" in self.parts else "val")

    def on_after_batch_transfer(self, batch: Part, dataloader_idx: int) -> Part:
        """Augments, enlarges and normalises, on the device: (B, C, H, W) float32."""
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        if training:
            images = shift_and_flip(images, self.padding, self.horizontal_flip)
        x = images.float() / 255
        if training:
            x = random_distortions(x, self.distortions)
        if self._scale is None or self._scale.device != x.device:  # once: each copy makes the host wait for the GPU
            self._scale = torch.tensor([self.mean, self.std], device=x.device).view(2, -1, 1, 1)
        x = (x - self._scale[0]) / self._scale[1]
        if training and self.erasing:
            x = erase(x, self.erasing)
        if self.img_size is not None and self.img_size != x.shape[-1]:
            x = F.interpolate(x, size=(self.img_size, self.img_size), mode="bilinear", align_corners=False)
        return x, labels

    def _folders(self) -> dict[str, Path]:
        if self.root is None:
            raise UserError(f"no folder of images: give one with --data.root ROOT. {LAYOUT}; val/ may be missing")
        root = Path(self.root).expanduser()
        if not (root / "train").is_dir():
            raise UserError(f"--data.root {self.root}: no folder train/ in it. {LAYOUT}; val/ may be missing")
        return {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}

    def _loader(self, part: str, **options: Any) -> DataLoader:
        pinned = torch.cuda.is_available()
        rows = Rows(*self.parts[part])
        return ResumableLoader(rows, batch_size=self.batch_size, collate_fn=lambda b: b, pin_memory=pinned, **options)


def read_part(folder: Path, classes: Sequence[str]) -> Part:
    """All images of a part and their labels.

    Raises:
        UserError: For a file that is no image, or one of another size.
    """
    files = list_images(folder, classes)

    def read(path: Path) -> np.ndarray:
        return np.array(read_image(path))

    with ThreadPoolExecutor(16) as pool:
        pixels = list(pool.map(read, (path for path, _ in files)))
    for (path, _), image in zip(files, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise UserError(
                f"{path}: got {image.shape[1]} x {image.shape[0]} pixels, wanted {pixels[0].shape[1]} x "
                f"{pixels[0].shape[0]} as in {files[0][0]}; use vision.data.ImageFolder for images of several sizes"
            )
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in files])


def hold_out(images: Tensor, labels: Tensor, count: int) -> tuple[Part, Part]:
    """Splits off ``count`` images, the same number of each class, always the same ones.

    Raises:
        UserError: If a class has not enough images.
    """
    classes = labels.unique()
    each = count // len(classes)
    generator, kept = torch.Generator().manual_seed(0), torch.zeros(len(labels), dtype=torch.bool)
    for label in classes:
        rows = (labels == label).nonzero().flatten()
        if not 0 < each < len(rows):
            raise UserError(
                f"--data.held_out {count}: that is {each} of each class, and class {int(label)} has {len(rows)}; "
                "wanted at least one of each class, and fewer than it has"
            )
        kept[rows[torch.randperm(len(rows), generator=generator)[:each]]] = True
    return (images[~kept], labels[~kept]), (images[kept], labels[kept])
