"""The classifier at work: features and probabilities of clips, with the recordings that it compares them with.

Dimension letters: B clips, L samples, F features, K classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from audio.classifier import DigitNet
from audio.clips import fitted
from audio.metrics import Moments, moments
from core.checkpoints import load_into
from core.errors import UserError

RECORD = "audio_classifier"
SHIPPED = Path(__file__).parent / "weights" / "digit_classifier.safetensors"
BATCH = 64


class Reference(NamedTuple):
    """What the judge says about recordings, without the recordings."""

    moments: Moments  # of their features
    classes: Tensor  # (K,) mean of their probabilities
    clips: int


class Judge(NamedTuple):
    """A trained classifier."""

    net: DigitNet
    sample_rate: int  # Hz
    length: int  # samples of a clip
    class_names: tuple[str, ...]
    reference: Reference | None = None  # of the recordings it was trained on

    @torch.no_grad()
    def __call__(self, waves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Judges clips.

        Args:
            waves: Clips (any,) at the judge's rate, of any length and gain.

        Returns:
            Features (B, F) and probabilities (B, K), float32. A clip in which nothing sounds is of all classes alike:
            the net has heard none in training, and would name one.
        """
        device = self.net.head.weight.device
        features, shares = [], []
        for i in range(0, len(waves), BATCH):
            batch = torch.stack([fitted(wave, self.length) for wave in waves[i : i + BATCH]]).to(device)
            found = self.net.features(batch)
            scores = self.net.head(found)
            silent = torch.tensor([not len(wave) or bool(wave.min() == wave.max()) for wave in waves[i : i + BATCH]])
            features.append(found.cpu())
            shares.append(scores.masked_fill(silent.to(device)[:, None], 0.0).softmax(1).cpu())
        if not features:
            raise ValueError("got no clips, wanted at least one")
        return torch.cat(features), torch.cat(shares)

    def refer(self, waves: Sequence[Tensor]) -> Reference:
        """What the judge says about recordings."""
        features, shares = self(waves)
        return Reference(moments(features), shares.double().mean(0), len(waves))


def load_judge(path: Path | None = None) -> Judge:
    """Reads a classifier.

    Args:
        path: A .safetensors file of ``save_judge``, a .ckpt file of ``audio.classify`` or the folder of its run; None
            is the classifier of the Free Spoken Digit Dataset that comes with the project.

    Raises:
        UserError: If there is none, or it is something else.
    """
    path = SHIPPED if path is None else path
    if path.is_dir():
        path = next((p for n in ("best", "last") if (p := path / "checkpoints" / f"{n}.ckpt").is_file()), path)
    if not path.is_file():
        raise UserError(f"no classifier at {path}; give a file of audio.classify, or the folder of its run")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)


def save_judge(judge: Judge, path: Path) -> None:
    """Writes a classifier: float16 weights, float32 moments of its reference, and as JSON what they mean."""
    about = {"sample_rate": judge.sample_rate, "length": judge.length, "class_names": list(judge.class_names)}
    kept = {f"net.{name}": value.half().contiguous() for name, value in judge.net.state_dict().items()}
    if judge.reference is not None:
        about["clips"] = judge.reference.clips
        kept["mean"] = judge.reference.moments.mean.float()
        kept["covariance"] = judge.reference.moments.covariance.float()
        kept["classes"] = judge.reference.classes.float()
    save_file(kept, path, metadata={RECORD: json.dumps(about)})


def _read_safetensors(path: Path) -> Judge:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(RECORD, "null"))
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no file of weights ({error}); give a file of audio.classify") from error
    if about is None:
        raise UserError(f"{path} holds the weights of another model; give a file of audio.classify")
    reference = None
    if "mean" in kept:
        known = Moments(kept["mean"].double(), kept["covariance"].double())
        reference = Reference(known, kept["classes"].double(), int(about["clips"]))
    weights = {name.removeprefix("net."): value for name, value in kept.items() if name.startswith("net.")}
    return _judge(about["sample_rate"], about["length"], about["class_names"], weights, path)._replace(
        reference=reference
    )


def _read_checkpoint(path: Path) -> Judge:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        about = checkpoint["hyper_parameters"]
        weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
        return _judge(about["sample_rate"], about["length"], about["class_names"], weights, path)
    except UserError:
        raise
    except Exception as error:  # torch raises half a dozen kinds for files that are something else
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is no checkpoint of audio.classify ({reason})") from error


def _judge(sample_rate: int, length: int, names: Sequence[str], weights: dict[str, Tensor], path: Path) -> Judge:
    width = len(weights["convolutions.0.weight"])
    net = DigitNet(sample_rate, len(names), width)
    load_into(net, {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, str(path))
    return Judge(net.eval(), sample_rate, length, tuple(names))
