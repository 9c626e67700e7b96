"""Layers and models over two GPUs against one, by NCCL."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_sequence import CUTS, LENGTH, MIXERS, MODELS, WIDTH, build, gradients, model_loss
from test_tensor import LAYERS, build_model, layer, model_step
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from core.parallel.cuts import cut_of
from core.parallel.group import SequenceGroup, sequence_parallel
from core.parallel.tensor import tensor_parallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def worst(found: Tensor, wanted: Tensor) -> float:
    """The largest error as a share of the largest number."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


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


def layers_of_some_heads(rank: int, size: int) -> dict[str, float]:
    """The worst error of each tensor-parallel layer's output and gradients, and of a model's after a step."""
    mesh, found = init_device_mesh("cuda", (size,)), {}
    x, dy = torch.randn(2, 2, 256, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    for name in LAYERS:
        whole, model = layer(name).cuda(), layer(name).cuda()
        tensor_parallel(model, mesh)
        wanted, y = whole(x), model(x)
        wanted.backward(dy)
        y.backward(dy)
        found[name] = worst(y, wanted)
        for key, p in model.named_parameters():
            assert p.grad is not None
            cut = cut_of(p)
            found[f"{name}.{key}"] = worst(p.grad if cut is None else cut.whole(p.grad), gradients(whole)[key])
    ids = torch.randint(0, 12, (2, 257), generator=torch.Generator().manual_seed(2)).cuda()
    whole, model = build_model(1).cuda(), build_model(1).cuda()
    tensor_parallel(model, mesh)
    losses = [model_step(m, ids, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (whole, model)]
    found["loss"] = abs(losses[1] / losses[0] - 1)
    for key, value in model.state_dict().items():
        found[f"model.{key}"] = worst(value, whole.state_dict()[key])
    return found


@pytest.mark.parametrize("function", [layers_of_some_heads, mixers_in_parts, models_in_parts])
def test_shares_of_two_gpus_equal_the_whole_on_one(function: Any) -> None:
    for found in run_ranks(2, function, backend="nccl"):
        assert {name: error for name, error in found.items() if not error < 2e-5} == {}
