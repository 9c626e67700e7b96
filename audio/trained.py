"""Trained nets on disk, with what their levels mean: checkpoints of a training, and small files to pass on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from audio.codec import Codec
from audio.net import SoundNet
from audio.sashimi import SashimiConfig
from audio.splits import ANY
from audio.steppers import Guidance
from core.checkpoints import load_into
from core.errors import UserError

RECORD = "audio"  # the entry of a checkpoint that says what the net's weights mean
SHIPPED = Path(__file__).parent / "weights" / "spoken_digits.safetensors"


class Trained(NamedTuple):
    """A trained net, and what its levels mean."""

    net: SoundNet
    codec: Codec
    sample_rate: int  # Hz
    class_names: tuple[str, ...] = ()  # of its classes, none for a model that cannot be asked for one
    guidance: float = 0.0  # strength that is meant for it, see ``guide``

    @property
    def told(self) -> tuple[str, ...]:
        """The classes without the one that stands for any of them."""
        return tuple(name for name in self.class_names if name != ANY)

    def guide(self, strength: float | None = None) -> Guidance | None:
        """How classes are said more clearly; by default as strongly as is meant for the model. 0 is not at all.

        Raises:
            UserError: For a model that always was told the class in training.
        """
        strength = self.guidance if strength is None else strength
        if not strength:
            return None
        if ANY not in self.class_names:
            raise UserError(
                f"--guidance is {strength}, and the model knows no class {ANY!r}: train one with --data.untold 0.1"
            )
        return Guidance(strength, self.start(ANY))

    def start(self, name: str | None = None) -> int:
        """The first level that goes into the net in a sequence of a class, or for None of no class.

        Raises:
            UserError: For a class that the model does not know, and for a model of classes without one.
        """
        if name is None and not self.class_names:
            return self.codec.start
        if name not in self.class_names:
            known = ", ".join(self.class_names) or "none: it was trained without labels"
            raise UserError(f"the class is {name!r}, wanted one of the model's ({known})")
        return self.codec.start + self.codec.levels * self.class_names.index(name)

    def starts(self, count: int, names: Sequence[str] = ()) -> list[int]:
        """What ``count`` clips begin with: classes take turns, in an order that is mixed up but always the same.

        Args:
            count: Number of clips.
            names: Classes, or words that classes begin with, such as 7 for all of 7_theo, 7_lucas, ...; a turn has one
                class of each. Without any, all classes take turns but for the one that stands for any.
        """
        if not names:
            return self._turns(self.told, count) if self.told else [self.codec.start] * count
        groups = []
        for name in names:
            named = [known for known in self.class_names if name in (known, known.partition("_")[0])]
            groups.append(self._turns(named, count) if named else [self.start(name)])  # which says what is wrong
        return [groups[i % len(groups)][i // len(groups)] for i in range(count)]

    def _turns(self, names: Sequence[str], count: int) -> list[int]:
        order: list[int] = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
        return [self.start(names[order[i % len(order)]]) for i in range(count)]


def record(
    config: SashimiConfig, codec: Codec, sample_rate: int, class_names: Sequence[str], guidance: float = 0.0
) -> dict[str, Any]:
    """What is kept beside the weights, in plain types."""
    return {
        "config": asdict(config),
        "codec": asdict(codec),
        "sample_rate": sample_rate,
        "class_names": list(class_names),
        "guidance": guidance,
    }


def load_trained(path: Path | None = None) -> Trained:
    """Reads a net that ``audio.train`` or ``save_trained`` wrote; it is on the CPU, in float32, ready to generate.

    Args:
        path: A .ckpt or .safetensors file, or the folder of a run, whose best checkpoint is then taken; None is the
            model of spoken digits that comes with the project.

    Raises:
        UserError: If there is none, or it is one of another model.
    """
    path = SHIPPED if path is None else path
    if path.is_dir():
        path = next(
            (p for p in (path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")) if p.is_file()), path
        )
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; give a .ckpt file of audio.train, or the folder of its run")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_checkpoint
    about, weights = read(path)
    try:
        config = SashimiConfig(**{**about["config"], "pool": tuple(about["config"]["pool"])})
        codec, names = Codec(**about["codec"]), tuple(about.get("class_names", ()))
        net = SoundNet(config, codec.levels, len(names))
        rate, guidance = int(about["sample_rate"]), float(about.get("guidance", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is of a net that is not known here ({error}); is it of another version?") from error
    load_into(net, weights, str(path))
    return Trained(net.eval(), codec, rate, names, guidance)


def save_trained(trained: Trained, path: Path) -> None:
    """Writes a net to a safetensors file, and beside its weights, as JSON, what they mean.

    What linear layers and embeddings multiply by is rounded to float16. The few numbers of the state spaces stay as
    they are: an error in the part of a period that a step is counts thousands of times over.
    """
    about = record(trained.net.config, trained.codec, trained.sample_rate, trained.class_names, trained.guidance)
    factors = {id(m.weight) for m in trained.net.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    weights = {
        name: (p.detach().half() if id(p) in factors else p.detach()).cpu().contiguous()
        for name, p in trained.net.state_dict(keep_vars=True).items()
    }
    save_file(weights, path, metadata={RECORD: json.dumps(about)})


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(RECORD, "null"))
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is no file of weights ({error}); give one of audio.train, or its run's folder"
        ) from error
    if about is None:
        raise UserError(f"{path} holds the weights of another model; give a file of audio.train")
    return about, weights


def _read_checkpoint(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for files that are something else
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(
            f"{path} is no checkpoint of a training run ({reason}); give a .ckpt file of audio.train"
        ) from error
    about = checkpoint.get(RECORD) if isinstance(checkpoint, Mapping) else None
    if not isinstance(about, Mapping) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is a checkpoint of another model; give a .ckpt file of audio.train")
    return about, {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
