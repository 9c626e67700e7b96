"""Exact likelihoods of recordings under a trained net, in bits per sample.

Dimension letters: L samples, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.files import read_clip, to_mono
from audio.splits import Labels, label_of
from audio.trained import Trained
from core.errors import UserError

PIECE = 1 << 17  # samples run at a time; the net's state is carried over


@torch.no_grad()
def log_likelihood(trained: Trained, levels: Tensor, start: int) -> float:
    """log2 of the probability of a recording.

    Args:
        trained: The net.
        levels: (L,) int64, of any length.
        start: Of ``Trained.start``: the codec's start level, with the class.

    Returns:
        Bits, at most 0.
    """
    device = trained.net.embedding.weight.device
    offset = start - trained.codec.start
    inputs = torch.cat([torch.tensor([start]), levels[:-1] + offset]).to(device)
    state, bits = trained.net.init_state(1), 0.0
    for i in range(0, len(levels), PIECE):
        logits, state = trained.net.forward_state(inputs[None, i : i + PIECE], state)
        nats = F.cross_entropy(logits[0].float(), levels[i : i + PIECE].to(device), reduction="none")
        bits -= float(nats.double().sum()) / math.log(2)
    return bits


def clip_bits(trained: Trained, paths: Sequence[Path]) -> Tensor:
    """Bits per sample (clips,) of generated clips, which are taken as loud as they are.

    Under a model of classes -log2(sum_c p(x | c) / K) / L: the likelihood of a clip of which no class is known.
    """
    codec = replace(trained.codec, normalize="none")
    starts = [trained.start(name) for name in trained.told] or [trained.codec.start]
    found = []
    for path in paths:
        levels = codec.encode(to_mono(read_clip(path), trained.sample_rate))
        each = torch.tensor([log_likelihood(trained, levels, start) for start in starts], dtype=torch.float64)
        total = torch.logsumexp(each * math.log(2), 0) / math.log(2) - math.log2(len(starts))
        found.append(-float(total) / len(levels))
    return torch.tensor(found, dtype=torch.float64)


def recording_bits(trained: Trained, paths: Sequence[Path], labels: Labels) -> float:
    """Bits per sample of recordings, the mean over all their samples; a model of classes is told each one's class.

    Raises:
        UserError: For a recording of a class that the model does not know.
    """
    bits, count = 0.0, 0
    for path in paths:
        levels = trained.codec.encode(to_mono(read_clip(path), trained.sample_rate))
        name = label_of(path, labels) if trained.class_names else None
        if trained.class_names and name not in trained.class_names:
            known = ", ".join(trained.class_names)
            raise UserError(f"{path}: its class is {name!r}, which the model does not know ({known}); see --labels")
        bits -= log_likelihood(trained, levels, trained.start(name))
        count += len(levels)
    return bits / count
