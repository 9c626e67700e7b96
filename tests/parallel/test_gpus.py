"""Layers and models over two GPUs against one, by NCCL."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_sequence import CUTS, LENGTH, MIXERS, MODELS, WIDTH, build, gradients, model_loss
from torch import Tensor

from core.parallel.group import SequenceGroup, sequence_parallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def worst(found: Tensor, wanted: Tensor) -> float:
    """The largest error as a share of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def mixers_in_parts(rank: int, size: int) -> dict[str, float]:
    """The worst error of each mixer's output and gradients."""
    group, found = SequenceGroup(dist.group.WORLD, 16), {}
    x, dy = torch.randn(2, 2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    part = slice(CUTS["two"][rank], CUTS["two"][rank + 1])
    for name in MIXERS:
        whole, mixer = build(name, False).cuda(), build(name, False).cuda()
        wanted = whole(x)
        wanted.backward(dy)
        with sequence_parallel(group):
            y = mixer(x[:, part])
            y.backward(dy[:, part])
        found[name] = worst(y, wanted[:, part])
        for key, grad in gradients(whole).items():
            found[f"{name}.{key}"] = worst(group.sum(gradients(mixer)[key]), grad)
    return found


def models_in_parts(rank: int, size: int) -> dict[str, float]:
    """The worst error of each model's loss and gradients."""
    group, found = SequenceGroup(dist.group.WORLD), {}
    ids, wanted = torch.randint(0, 12, (2, 2, 2048), generator=torch.Generator().manual_seed(3)).cuda()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        whole = make().cuda()
        torch.manual_seed(0)
        model = make().cuda()
        loss = model_loss(whole, ids, wanted)
        loss.backward()
        with sequence_parallel(group):
            share = model_loss(model, group.shard(ids, 8), group.shard(wanted, 8))
            share.backward()
        found[name] = worst(group.sum(share), loss)
        for key, grad in gradients(whole).items():
            found[f"{name}.{key}"] = worst(group.sum(gradients(model)[key]), grad)
    return found


@pytest.mark.parametrize("function", [mixers_in_parts, models_in_parts])
def test_parts_on_two_gpus_equal_the_whole_on_one(function: Any) -> None:
    for found in run_ranks(2, function, backend="nccl"):
        assert {name: error for name, error in found.items() if not error < 2e-5} == {}
