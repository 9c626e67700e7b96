"""Semantic segmentation with a light feature-pyramid head on any backbone of timm that gives maps.

Dimension letters: B batch, C channels, D width of the head, H W height and width in pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report
from vision.data import to_pixels
from vision.masks import IGNORED
from vision.module import build

__all__ = ["Pyramid", "Segmenter"]

SHOWN = 8  # images in the report


class Pyramid(nn.Module):
    """A backbone's maps, brought to one width, enlarged to the finest and added; one convolution, then the classes.

    (The lateral and the final path of Feature Pyramid Networks, Lin et al. 2017; one merge as in Kirillov et al. 2019.)

    Args:
        backbone: Made with ``features_only=True``.
        num_classes: Number of classes.
        dim: D.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        channels = backbone.feature_info.channels()  # type: ignore[union-attr, operator]
        self.lateral = nn.ModuleList(nn.Sequential(nn.Conv2d(c, dim, 1), nn.GroupNorm(1, dim)) for c in channels)
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(1, dim), nn.GELU())
        self.head = nn.Conv2d(dim, num_classes, 1)

    def no_weight_decay(self) -> set[str]:
        """Positions, tokens and decay rates of the backbone; timm's wrappers of features do not hand their names on."""
        special = ("A_log", "pos_embed", "cls_token", "direction_Bs")
        return {name for name, _ in self.named_parameters() if any(part in name for part in special)}

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes, H, W)."""
        maps = [lateral(level) for lateral, level in zip(self.lateral, self.backbone(image), strict=True)]
        total = maps[0]
        for level in maps[1:]:
            total = total + F.interpolate(level, total.shape[-2:], mode="bilinear", align_corners=False)
        logits = self.head(self.smooth(total))
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)


class Segmenter(TrainingModule):
    """A segmentation net: cross-entropy of each pixel.

    Args:
        name: Name of a backbone of timm.
        num_classes: Number of classes.
        kwargs: Further arguments of the backbone's constructor.
        weights: File of weights that the backbone starts from.
        out_indices: Its maps that are used, from the finest; None takes all of a hierarchy, the last four blocks of a
            plain backbone.
        head_dim: Width D of the head.
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile the net.

    Raises:
        UserError: For unknown models and arguments, and weights of another model.
    """

    headline = "test/mean_iou"
    item_name = "images"

    def __init__(
        self,
        name: str = "vmamba_tiny_s1l8",
        num_classes: int = 2,
        kwargs: dict[str, Any] | None = None,
        weights: str | None = None,
        out_indices: Sequence[int] | None = None,
        head_dim: int = 128,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        maps = {} if out_indices is None else {"out_indices": tuple(out_indices)}
        backbone = build(name, None, {"features_only": True, **maps, **(kwargs or {})}, weights)
        self.net = Pyramid(backbone, num_classes, head_dim)
        self.metrics = nn.ModuleDict({"val_": _metrics(num_classes), "test_": _metrics(num_classes)})
        self.samples: list[tuple[np.ndarray, str]] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy over the pixels of images (B, C, H, W) and masks (B, H, W)."""
        images, masks = batch
        return F.cross_entropy(self.net(images), masks, ignore_index=IGNORED)

    @torch.no_grad()
    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        """Log loss, mean intersection over union and the share of right pixels; keep what the report shows."""
        images, masks = batch
        logits = self.net(images)
        self.log_mean(f"{stage}/loss", F.cross_entropy(logits, masks, ignore_index=IGNORED), batch)
        for name, metric in self.metrics[f"{stage}_"].items():  # type: ignore[operator]
            metric(logits.argmax(1), masks)
            self.log(f"{stage}/{name}", metric, batch_size=len(masks), prog_bar=name == "mean_iou")
        if stage == "test":
            for image, mask, guess in zip(images, masks, logits.argmax(1), strict=True):
                if len(self.samples) < SHOWN:
                    self._keep(image, mask, guess, logits.shape[1])

    def on_test_start(self) -> None:
        """Start the report's pictures afresh."""
        self.samples = []

    def add_to_report(self, report: Report) -> None:
        """Add pictures beside their masks and predictions."""
        report.images("Test images", self.samples, "Image, mask and prediction.")

    def _keep(self, image: Tensor, mask: Tensor, guess: Tensor, num_classes: int) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        palette = (255 * colormaps["turbo"](np.linspace(0.05, 0.95, num_classes))[:, :3]).astype(np.uint8)
        palette = np.concatenate((palette, np.full((256 - num_classes, 3), 128, np.uint8)))
        parts = [to_pixels(image, data.mean, data.std), *(palette[m.cpu().numpy()] for m in (mask, guess))]
        valid = mask != IGNORED
        right = float((guess == mask)[valid].float().mean()) if valid.any() else float("nan")
        self.samples.append((np.concatenate(parts, axis=1), f"{100 * right:.0f} % of pixels right"))


def _metrics(num_classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "mean_iou": MulticlassJaccardIndex(num_classes, ignore_index=IGNORED),
            "pixel_accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED),
        }
    )
