"""Models for the commands: of a training run, of a file of weights, or of timm's registry by name.

Dimension letters: C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn

from core.errors import UserError
from vision.models.loading import read
from vision.module import build

__all__ = ["Trained", "load_trained"]


@dataclass
class Trained:
    """A model in eval mode with what belongs to it.

    Attributes:
        net: The model.
        label: What it is, for reports.
        classes: Names of the classes, or None where they are not known.
        preprocessing: ``img_size``, and the arguments of ``timm.data.create_transform``.
        in_chans: C.
    """

    net: nn.Module
    label: str
    classes: list[str] | None
    preprocessing: dict[str, Any]
    in_chans: int

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(getattr(self.net, "num_classes", 0))

    @property
    def mode(self) -> str:
        """PIL's name for pictures of C channels."""
        return "L" if self.in_chans == 1 else "RGB"

    @property
    def size(self) -> int:
        """Side of the images that the model gets."""
        return int(self.preprocessing["img_size"])

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From a picture to a normalised tensor (C, size, size)."""
        options = {name: value for name, value in self.preprocessing.items() if name != "img_size"}
        return create_transform((self.in_chans, self.size, self.size), **options)

    def describe(self, number: int) -> str:
        """A class in words."""
        if self.classes is not None:
            return self.classes[number]
        return ImageNetInfo().index_to_description(number) if self.num_classes == 1000 else f"class {number}"


def load_trained(model: str, weights: str | None = None, img_size: int | None = None, random: bool = False) -> Trained:
    """A model by what a user names it.

    Args:
        model: A run's folder, a checkpoint (.ckpt) of ``vision.train``, or a name of timm's registry.
        weights: With a name: a file of weights instead of the published ones.
        img_size: Side of the images instead of the model's own.
        random: With a name and no file: leave the model as it is built instead of fetching published weights.

    Raises:
        UserError: If there is no such model, or its weights cannot be had.
    """
    place = Path(model).expanduser()
    if place.is_dir() or place.suffix == ".ckpt":
        if weights is not None:
            raise UserError(
                f"--weights {weights}: {model} has weights of its own; give a model's name, or no --weights"
            )
        found = _restored(_checkpoint_of(place))
    else:
        if place.suffix in (".pth", ".safetensors", ".pt"):
            raise UserError(f"{model}: a file of weights; give the model's name, and the file with --weights {model}")
        found = _named(model, weights, img_size, random)
    if img_size is not None:
        found.preprocessing["img_size"] = img_size
    found.net.eval()
    return found


def _checkpoint_of(place: Path) -> Path:
    """The best checkpoint in a run's folder, else the last; a file itself."""
    if not place.is_dir():
        if not place.is_file():
            raise UserError(
                f"{place}: no such file, wanted a .ckpt file of vision.train, its run folder, or a model name"
            )
        return place
    for pattern in ("best*.ckpt", "last.ckpt", "*.ckpt"):
        if files := sorted((place / "checkpoints").glob(pattern), key=lambda path: path.stat().st_mtime):
            return files[-1]
    raise UserError(f"{place}: no checkpoint in it, wanted the folder of a run of vision.train, or a .ckpt file")


def _restored(path: Path) -> Trained:
    try:
        checkpoint = read(path)
        options = checkpoint["hyper_parameters"]
        classes, preprocessing = checkpoint["classes"], dict(checkpoint["preprocessing"])
        name, kwargs = options["name"], options.get("kwargs") or {}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of vision.train, {error} is missing in it") from error
    except Exception as error:  # whatever a foreign file makes the unpickler raise
        raise UserError(f"{path}: not a checkpoint of vision.train ({str(error).strip().splitlines()[0]})") from error
    if not preprocessing:
        raise UserError(f"{path}: says nothing of preprocessing, as its data module has no preprocessing() of its own")
    net = build(name, len(classes), kwargs)
    state = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: weights that {name} doesn't take: {' '.join(str(error).split())[:400]}") from error
    return Trained(net, f"{name} of {path}", list(classes), preprocessing, len(preprocessing["mean"]))


def _named(name: str, weights: str | None, img_size: int | None, random: bool) -> Trained:
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    published = cfg is not None and (cfg.has_weights if hasattr(cfg, "has_weights") else bool(cfg.url or cfg.hf_hub_id))
    kwargs = {"img_size": img_size} if img_size is not None and cfg is not None and cfg.fixed_input_size else {}
    if weights is not None or random or cfg is None:
        net = build(name, None, kwargs, weights, prefix="--")
    elif not published:
        raise UserError(f"{name}: no published weights are known; give a file with --weights FILE")
    else:
        try:
            net = timm.create_model(name, pretrained=True, **kwargs)
        except Exception as error:  # the network's and the hub's own exceptions
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{name}: its published weights could not be fetched ({reason}); get {cfg.url or cfg.hf_hub_id} "
                "some other way, and give the file with --weights FILE"
            ) from error
    data = resolve_model_data_config(net)
    channels, _, size = data["input_size"]
    options = {key: data[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    label = name + (f" with {weights}" if weights else " (random weights)" if random else "")
    return Trained(net, label, None, {"img_size": size, **options}, channels)


def count_parameters(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())
