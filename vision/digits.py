"""Handwritten digits for image classification, which need no download.

Dimension letters: B batch, C channels, H W height and width in pixels.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from core.training.rng import ResumableLoader
from vision.data import ImageData

__all__ = ["Digits"]


class Digits(ImageData):
    """1797 handwritten digits of 8 x 8 pixels, from scikit-learn (Alpaydin & Kaynak 1998); nothing is downloaded.

    The split is fixed and stratified: 70 % training, 10 % validation, 20 % test (1257, 180 and 360 images).

    Args:
        batch_size: Images per step and device.
        max_shift: Training images are moved by up to so many pixels each way.
        max_rotation: Training images are turned by up to so many degrees.
    """

    def __init__(self, batch_size: int = 64, max_shift: float = 1.0, max_rotation: float = 10.0) -> None:
        super().__init__()
        self.batch_size, self.max_shift, self.max_rotation = batch_size, max_shift, max_rotation
        self.class_names = [str(digit) for digit in range(10)]
        self.mean, self.std = (0.305,), (0.376,)  # of the training part, pixels from 0 to 1

    def preprocessing(self) -> dict[str, Any]:
        """Digits are 8 x 8 pixels."""
        return {"img_size": 8, "crop_pct": 1.0, "interpolation": "bilinear", "mean": self.mean, "std": self.std}

    def setup(self, stage: str) -> None:
        """Splits the digits."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images, labels = digits.images.astype(np.float32) / 16, digits.target.astype(np.int64)
        rest, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
        train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
        self.parts = {
            name: (torch.from_numpy(images[part]).unsqueeze(1), torch.from_numpy(labels[part]))
            for name, part in (("train", train), ("val", val), ("test", test))
        }

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented; the last, smaller batch is left out."""
        return self._loader("train", shuffle=True, drop_last=True, collate_fn=self._augmented)

    def val_dataloader(self) -> DataLoader:
        """In order, as they are."""
        return self._loader("val", collate_fn=self._plain)

    def test_dataloader(self) -> DataLoader:
        """In order, as they are."""
        return self._loader("test", collate_fn=self._plain)

    def baselines(self) -> dict[str, float]:
        """Logistic regression on the pixels."""
        from sklearn.linear_model import LogisticRegression

        (x, labels), (x_test, test_labels) = self.parts["train"], self.parts["test"]
        model = LogisticRegression(max_iter=1000).fit(x.flatten(1).numpy(), labels.numpy())
        return {"logistic_regression": float(model.score(x_test.flatten(1).numpy(), test_labels.numpy()))}

    def _loader(self, part: str, **options: Any) -> DataLoader:
        return ResumableLoader(TensorDataset(*self.parts[part]), batch_size=self.batch_size, **options)

    def _plain(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, labels = default_collate(samples)
        return (images - self.mean[0]) / self.std[0], labels

    def _augmented(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, labels = default_collate(samples)
        return (move(images, self.max_shift, self.max_rotation) - self.mean[0]) / self.std[0], labels


def move(images: Tensor, max_shift: float, max_rotation: float) -> Tensor:
    """Turns and shifts each image at random, bilinear; what comes in from outside is 0.

    Args:
        images: (B, C, H, W).
        max_shift: In pixels, each way.
        max_rotation: In degrees.
    """
    count, _, height, width = images.shape
    angle = torch.deg2rad(max_rotation * (2 * torch.rand(count) - 1))
    shift = max_shift * (2 * torch.rand(count, 2) - 1) * 2 / torch.tensor([width, height])
    rows = torch.stack((angle.cos(), -angle.sin(), shift[:, 0], angle.sin(), angle.cos(), shift[:, 1]), dim=1)
    return F.grid_sample(images, F.affine_grid(rows.view(-1, 2, 3), list(images.shape), False), align_corners=False)
