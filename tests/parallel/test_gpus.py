"""Layers and models over two GPUs against one, by NCCL."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_sequence import CUTS, LENGTH, MIXERS, MODELS, WIDTH, build, gradients, model_loss
from test_tensor import LAYERS, build_model, layer, model_step
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from core.parallel.cuts import cut_of
from core.parallel.group import SequenceGroup, sequence_parallel
from core.parallel.tensor import tensor_parallel
from core.training.graphs import capture, release

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2, "nccl") as ranks:
        yield ranks


def worst(found: Tensor, wanted: Tensor) -> float:
    """The largest error as a share of the largest number."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def mixer_in_parts(rank: int, size: int, name: str) -> dict[str, float]:
    """The worst error of a mixer's output and gradients."""
    group, device = SequenceGroup(dist.group.WORLD, 16), "cuda"
    x, dy = torch.randn(2, 2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    part = slice(CUTS["two"][rank], CUTS["two"][rank + 1])
    whole, mixer = build(name, False).to(device), build(name, False).to(device)
    wanted = whole(x)
    wanted.backward(dy)
    with sequence_parallel(group):
        y = mixer(x[:, part])
        y.backward(dy[:, part])
    found = {"output": worst(y, wanted[:, part])}
    for key, grad in gradients(whole).items():
        found[key] = worst(group.sum(gradients(mixer)[key]), grad)
    return found


def model_in_parts(rank: int, size: int, name: str) -> dict[str, float]:
    """The worst error of a model's loss and gradients."""
    group, device = SequenceGroup(dist.group.WORLD), "cuda"
    ids, wanted = torch.randint(0, 12, (2, 2, 2048), generator=torch.Generator().manual_seed(3)).to(device)
    torch.manual_seed(0)
    whole = MODELS[name]().to(device)
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    loss = model_loss(whole, ids, wanted)
    loss.backward()
    with sequence_parallel(group):
        share = model_loss(model, group.shard(ids, 8), group.shard(wanted, 8))
        share.backward()
    found = {"loss": worst(group.sum(share), loss)}
    for key, grad in gradients(whole).items():
        found[key] = worst(group.sum(gradients(model)[key]), grad)
    return found


def layer_of_some_heads(rank: int, size: int, name: str) -> dict[str, float]:
    """The worst error of a tensor-parallel layer's output and gradients."""
    device = "cuda"
    x, dy = torch.randn(2, 2, 256, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    whole, model = layer(name).to(device), layer(name).to(device)
    tensor_parallel(model, init_device_mesh(device, (size,)))
    wanted, y = whole(x), model(x)
    wanted.backward(dy)
    y.backward(dy)
    found = {"output": worst(y, wanted)}
    for key, p in model.named_parameters():
        assert p.grad is not None
        cut = cut_of(p)
        found[key] = worst(p.grad if cut is None else cut.whole(p.grad), gradients(whole)[key])
    return found


def model_of_some_heads(rank: int, size: int, graph: bool) -> dict[str, float]:
    """The worst error of a tensor-parallel model's losses and of its weights after three steps."""
    device = "cuda"
    ids = torch.randint(0, 12, (2, 257), generator=torch.Generator().manual_seed(2)).to(device)
    whole, model = build_model(1).to(device), build_model(1).to(device)
    tensor_parallel(model, init_device_mesh(device, (size,)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, model)]
    found = {}
    for step in range(3):
        losses = []
        for m, optimizer in zip((whole, model), optimizers, strict=True):
            optimizer.zero_grad()  # a graph's gradients lie where they lay before
            losses.append(model_step(m, ids, optimizer))
        found[f"loss {step}"] = abs(losses[1] / losses[0] - 1)
        if graph and step == 0:
            capture(model.backbone, ids[:, :-1])
    for key, value in model.state_dict().items():
        found[key] = worst(value, whole.state_dict()[key])
    release(model)
    return found


def assert_same(found: list[dict[str, float]]) -> None:
    for errors in found:
        assert len(errors) > 3
        assert {name: error for name, error in errors.items() if not error < 2e-5} == {}


@pytest.mark.parametrize("graph", [False, True])
def test_a_model_of_some_heads_learns_as_the_whole(pair: Ranks, graph: bool) -> None:
    assert_same(pair.run(model_of_some_heads, graph))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_some_heads_equal_the_whole(pair: Ranks, name: str) -> None:
    assert_same(pair.run(layer_of_some_heads, name))


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_in_parts_equal_the_whole(pair: Ranks, name: str) -> None:
    assert_same(pair.run(mixer_in_parts, name))


@pytest.mark.parametrize("name", MODELS)
def test_models_in_parts_equal_the_whole(pair: Ranks, name: str) -> None:
    assert_same(pair.run(model_in_parts, name))
