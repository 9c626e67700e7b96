"""Image classification with any model of timm's registry, ours included.

Dimension letters: B batch, C channels, H W height and width in pixels.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

import vision.models
from core.errors import UserError
from core.training.graphs import capture, check_graphs
from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report
from vision.data import ImageData
from vision.models.loading import read, unwrap
from vision.routes import draw_route

SHOWN = 24  # images in each gallery of the report


@dataclass
class MixupOptions:
    """Mixing of training images and their labels in pairs, per batch; the defaults are DeiT's.

    Args:
        mixup: Alpha of mixup (Zhang et al. 2018); 0 for none.
        cutmix: Alpha of CutMix (Yun et al. 2019); 0 for none.
        probability: Of mixing a batch at all.
        switch: Probability of CutMix where both are on.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5


# Checkpoints hold the options they were trained with, and are read with weights_only.
torch.serialization.add_safe_globals([MixupOptions])


class Classifier(TrainingModule):
    """An image classifier: cross-entropy, with mixed and smoothed labels if asked for.

    Args:
        name: Any name of ``timm.list_models()``.
        num_classes: Number of classes.
        kwargs: Further arguments of the model's constructor, such as ``img_size`` or ``routes``.
        weights: File of weights to start from (``.pth``, ``.ckpt``, ``.safetensors``), official ones included; the
            classifier is kept if it has as many classes.
        label_smoothing: Probability given to all classes alike.
        mixup: Mixing of images; None for none.
        grad_checkpointing: Compute blocks again in the backward pass instead of keeping their activations.
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile the model.
        graph: Replay the model's forward and backward as CUDA graphs, which leaves out the host's time: several times
            as fast for small models. Batches of another size than the first run as they are; workers that pin memory
            get in the way. Without a GPU it has no effect.

    Raises:
        UserError: For unknown models and arguments, and weights of another model.
    """

    headline = "test/accuracy"
    item_name = "images"

    def __init__(
        self,
        name: str = "vim_tiny_patch16_224",
        num_classes: int = 1000,
        kwargs: dict[str, Any] | None = None,
        weights: str | None = None,
        label_smoothing: float = 0.0,
        mixup: MixupOptions | None = None,
        grad_checkpointing: bool = False,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        if graph and compile:
            raise UserError("--model.graph and --model.compile are both on, wanted one of them")
        self.graph_requested = graph
        self.net = build(name, num_classes, kwargs or {}, weights)
        if grad_checkpointing:
            self.net.set_grad_checkpointing()
        self.label_smoothing = label_smoothing
        self.mixup = mixup and Mixup(
            mixup.mixup, mixup.cutmix, prob=mixup.probability, switch_prob=mixup.switch,
            label_smoothing=label_smoothing, num_classes=num_classes,
        )  # fmt: skip
        self.metrics = nn.ModuleDict({"val_": _metrics(num_classes), "test_": _metrics(num_classes)})
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.samples: dict[str, list[tuple[np.ndarray, str, bool]]] = {"right": [], "wrong": []}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what ``vision.predict`` and its kin need besides the weights: class names and preprocessing."""
        if isinstance(data := getattr(self.trainer, "datamodule", None), ImageData):
            checkpoint["classes"] = list(data.class_names)
            checkpoint["preprocessing"] = data.preprocessing()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of images (B, C, H, W) or videos and labels (B,), mixed first if so configured."""
        images, labels = batch
        if self.graph_requested and images.is_cuda and self._steps_seen > 1:  # the first step's FLOPs are counted
            check_graphs(self)
            self.graph_requested = False
            capture(self.net, images)
        if self.mixup is None:
            return F.cross_entropy(self.net(images), labels, label_smoothing=self.label_smoothing)
        even = len(images) // 2 * 2  # images are mixed in pairs, all frames of a video alike
        mixed, targets = self.mixup(images[:even].flatten(1, -3).clone(), labels[:even])
        return F.cross_entropy(self.net(mixed.view_as(images[:even])), targets)

    @torch.no_grad()
    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        """Log loss and accuracies; in the test also keep what the report shows."""
        images, labels = batch
        logits = self.net(images)
        self.log_mean(f"{stage}/loss", F.cross_entropy(logits, labels), batch)
        for name, metric in self.metrics[f"{stage}_"].items():  # type: ignore[operator]
            metric(logits, labels)
            self.log(f"{stage}/{name}", metric, batch_size=len(labels), prog_bar=name == "accuracy")
        if stage == "test":
            self.confusion.update(logits, labels)
            self._keep_samples(images, labels, logits)

    def on_test_start(self) -> None:
        """Start the report's figures afresh."""
        self.confusion.reset()
        self.samples = {"right": [], "wrong": []}

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of simple methods on the same data; count what all processes have seen, for the report."""
        self.confusion.compute()
        for name, accuracy in self._data.baselines().items():
            self.log(f"baseline/{name}", accuracy)

    def add_to_report(self, report: Report) -> None:
        """Add confusion matrix, images with predictions, scan routes and files left out."""
        names = self._data.class_names
        if int(self.confusion.confmat.sum()):  # pyright: ignore
            counts = self.confusion.compute().cpu().numpy()
            report.figure("Confusion matrix", draw_confusion(counts, names), "Test images; rows are the true classes.")
            report.images("Mistakes", self.samples["wrong"], "The first ones of the test, with the true class.")
            report.images("Right", self.samples["right"], "The first ones of the test.")
        if (routes := draw_routes(self.net)) is not None:
            report.figure(
                "Scan routes", routes,
                "The orders in which blocks scan the patches, from dark to bright; the star is the class token.",
            )  # fmt: skip
        if left_out := self._data.left_out:
            rows = [{"file": path, "reason": reason} for path, reason in sorted(left_out.items())]
            report.table("Files left out", rows, f"{len(rows)} files that could not be read.")

    @property
    def _data(self) -> ImageData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageData)
        return data

    def _keep_samples(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        names, (top, guesses) = self._data.class_names, logits.softmax(1).max(1)
        for i, (label, guess) in enumerate(zip(labels.tolist(), guesses.tolist(), strict=True)):
            kept = self.samples["right" if label == guess else "wrong"]
            if len(kept) < SHOWN:
                text = f"{names[guess]} {100 * float(top[i]):.0f} %" + (
                    "" if label == guess else f", is {names[label]}"
                )
                kept.append((self._data.to_pixels(images[i]), text, label == guess))


def _metrics(num_classes: int) -> nn.ModuleDict:
    metrics = {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
    if num_classes > 5:
        metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return nn.ModuleDict(metrics)


def build(
    name: str, num_classes: int | None, kwargs: dict[str, Any], weights: str | None = None, prefix: str = "--model."
) -> nn.Module:
    """A model of timm's registry.

    Args:
        name: Its name.
        num_classes: Number of classes; None is that of the weights, or the model's own.
        kwargs: Further arguments of its constructor.
        weights: File of weights to start from.
        prefix: Of the options that messages name: ``<prefix>name`` and ``<prefix>weights``.

    Raises:
        UserError: For an unknown name or argument, and weights of another model.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"unknown model {name!r}" + (f", did you mean {' or '.join(near)}?" if near else ", wanted a name of timm.")
            + " The models of this project: " + ", ".join(our_models())
        )  # fmt: skip
    overlay = {} if weights is None else _overlay(name, Path(weights), f"{prefix}weights")
    classes = overlay.get("num_classes") if num_classes is None else num_classes
    if classes is not None:
        kwargs = {**kwargs, "num_classes": classes}
    try:
        return timm.create_model(name, pretrained=weights is not None, pretrained_cfg_overlay=overlay, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        of_weights = weights and not isinstance(error, TypeError)
        what = f"{prefix}weights {weights}" if of_weights else f"{prefix}name {name}"
        raise UserError(f"{what}: {str(error).strip()[:600]}") from error


def our_models(pattern: str = "") -> list[str]:
    """Names of this project's models, the micro ones for tests left out; ``pattern`` as of ``timm.list_models``."""
    modules = {getattr(vision.models, name).__module__.rpartition(".")[2] for name in vision.models.__all__}
    return [name for name in timm.list_models(pattern, module=sorted(modules)) if not name.startswith("test_")]


def _overlay(name: str, file: Path, option: str) -> dict[str, Any]:
    """What timm needs to start from the weights in a file, their number of classes included."""
    if not file.is_file():
        raise UserError(f"{option} {file}: no such file, wanted a .pth, .ckpt or .safetensors file of {name}")
    try:
        raw = read(file)
    except Exception as error:  # whatever a foreign file makes the unpickler raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{option} {file}: not a file of weights ({reason}), wanted one of {name}") from error
    weights = unwrap(raw) if isinstance(raw, dict) else {}
    if not weights:
        raise UserError(f"{option} {file}: no tensors in it, wanted the weights of {name}")
    classifier = (timm.get_pretrained_cfg(name).to_dict() if timm.get_pretrained_cfg(name) else {}).get("classifier")
    overlay: dict[str, Any] = {"state_dict": weights}
    if isinstance(classifier, str) and f"{classifier}.weight" in weights:
        overlay["num_classes"] = len(weights[f"{classifier}.weight"])
    return overlay


def draw_confusion(counts: np.ndarray, names: list[str]) -> Figure:
    """A confusion matrix; with few classes the counts are written in.

    Args:
        counts: (classes, classes), rows are the true classes.
        names: The classes.
    """
    side = float(np.clip(0.45 * len(names), 3, 9))
    figure, axes = plt.subplots(figsize=(side, side))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= 25:
        axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 4 else 90)
        axes.set_yticks(range(len(names)), names)
        for i, j in zip(*np.nonzero(counts), strict=True):
            axes.text(
                j, i, str(counts[i, j]), ha="center", va="center", color="w" if shares[i, j] > 0.5 else "k", size=8
            )
    plt.close(figure)
    return figure


def draw_routes(net: nn.Module, size: int = 8) -> Figure | None:
    """The scan routes of a backbone, each once, side by side; None if it has none.

    Args:
        net: A model some of whose modules have ``routes``, names separated by commas.
        size: Sides of the grid, where the model has no patch grid of its own or a larger one.
    """
    found = [routes for m in net.modules() if isinstance(routes := getattr(m, "routes", None), str)]
    names = list(dict.fromkeys(name for routes in found for name in routes.split(",") if name))
    if not names:
        return None
    own = getattr(getattr(net, "patch_embed", None), "grid_size", (size, size))
    height, width = (min(side, max(size, 2)) for side in own[-2:])
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    for name, place in zip(names, places, strict=False):
        draw_route(name, height, width, place, class_token=hasattr(net, "cls_token"))
    for place in places[len(names) :]:
        place.remove()
    return figure
