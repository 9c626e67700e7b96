"""Tensor-parallel layers and models against one process with all heads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from core.block import Block, GatedMLP
from core.lm import MambaConfig, MambaLM
from core.mixers import Mamba, Mamba2
from core.parallel.cuts import cut_of, gradient_norm
from core.parallel.tensor import tensor_parallel

WIDTH = 16
LAYERS: dict[str, dict[str, Any]] = {
    "shared_group": {},
    "shared_group_norm_first": {"norm_before_gate": True, "bias": True},
    "groups": {"ngroups": 4, "D_has_hdim": True},
    "mlp_shared_group": {"d_ssm": 16, "learnable_init_states": True, "bias": True},
    "mlp_groups": {"d_ssm": 16, "headdim": 4, "ngroups": 2, "conv_bias": False},
    "no_norm": {"rmsnorm": False, "reverse": True},
}


def layer(name: str) -> Mamba2:
    torch.manual_seed(0)
    found = Mamba2(WIDTH, **{"d_state": 4, "headdim": 8, **LAYERS[name]})
    for parameter in (found.init_states, found.in_proj.bias, found.out_proj.bias):
        if parameter is not None:
            nn.init.normal_(parameter)
    assert found.norm is None or nn.init.uniform_(found.norm.weight) is not None
    return found


def whole_gradients(model: nn.Module) -> dict[str, Any]:
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        cut = cut_of(p)
        found[name] = (p.grad if cut is None else cut.whole(p.grad)).numpy().copy()
    return found


def run_layer(rank: int, size: int, name: str, x: Tensor, dy: Tensor) -> Any:
    model, x = layer(name), x.clone().requires_grad_()
    tensor_parallel(model, init_device_mesh("cpu", (size,)))
    y = model(x)
    y.backward(dy)
    with torch.no_grad():
        pieces, state = [], model.init_state(x.shape[0])
        for part in x.split(8, dim=1)[:: -1 if model.reverse else 1]:
            piece, state = model.forward_state(part, state)
            pieces.append(piece)
        pieces = pieces[:: -1 if model.reverse else 1]
    state_dict = {key: value.numpy() for key, value in model.state_dict().items()}
    return y.detach().numpy(), x.grad.numpy(), torch.cat(pieces, 1).numpy(), whole_gradients(model), state_dict  # type: ignore[union-attr]


def run_layers(rank: int, size: int, x: Tensor, dy: Tensor) -> Any:
    return {name: run_layer(rank, size, name, x, dy) for name in LAYERS if layer(name).nheads % size == 0}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layers_of_some_heads_equal_the_whole(size: int) -> None:
    x, dy = torch.randn(2, 2, 24, WIDTH, generator=torch.Generator().manual_seed(1))
    ranks = run_ranks(size, run_layers, x, dy)
    x.requires_grad_()
    for name in ranks[0]:
        whole = layer(name)
        x.grad = None
        y = whole(x)
        y.backward(dy)
        for rank in ranks:
            compare(name, whole, x, y, rank[name])


def compare(name: str, whole: Mamba2, x: Tensor, y: Tensor, found: Any) -> None:
    """What a rank found against one process."""
    out, dx, pieces, grads, state = found
    for part in (out, pieces):
        torch.testing.assert_close(torch.from_numpy(part), y.detach(), rtol=1e-5, atol=2e-6, msg=name)
    torch.testing.assert_close(torch.from_numpy(dx), x.grad, rtol=1e-5, atol=5e-6, msg=name)
    for key, parameter in whole.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max()
        assert ((torch.from_numpy(grads[key]) - parameter.grad) / scale).abs().max() < 3e-6, (name, key)
    assert list(state) == list(whole.state_dict())
    for key, value in whole.state_dict().items():
        assert torch.equal(torch.from_numpy(state[key]), value), (name, key)


def build_model(groups: int, checkpointing: bool = False) -> MambaLM:
    torch.manual_seed(0)
    ssm = {"layer": "Mamba2", "headdim": 4, "d_state": 4, "ngroups": groups}
    model = MambaLM(MambaConfig(d_model=WIDTH, n_layer=2, vocab_size=12, ssm_cfg=ssm, d_intermediate=128))
    model.set_gradient_checkpointing(checkpointing)
    return model


def model_step(model: MambaLM, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def run_model(rank: int, size: int, groups: int, ids: Tensor, saved: dict[str, Any]) -> Any:
    model, mesh = build_model(groups, checkpointing=groups == 1), init_device_mesh("cpu", (size,))
    tensor_parallel(model, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model_step(model, ids, optimizer)
    grads, norm = whole_gradients(model), gradient_norm(model.parameters(), mesh).item()
    after = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in saved.items()})
    again = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits, _ = model.forward_state(ids[:, :7], model.init_state(len(ids)))  # of a length that is not shared
    return loss, grads, norm, after, again, logits.numpy()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_of_a_model_is_that_of_one_process(groups: int) -> None:
    ids = torch.randint(0, 12, (3, 17), generator=torch.Generator().manual_seed(2))
    whole = build_model(groups)
    loss = model_step(whole, ids, torch.optim.SGD(whole.parameters(), lr=0.1))
    saved = {key: value.numpy() * 2 for key, value in whole.state_dict().items()}
    norm = nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None]).item()
    other = build_model(groups)
    other.load_state_dict({key: torch.from_numpy(value) for key, value in saved.items()})
    with torch.no_grad():
        logits, _ = other.forward_state(ids[:, :7], other.init_state(len(ids)))
    for found in run_ranks(2, run_model, groups, ids, saved):
        assert found[0] == pytest.approx(loss, rel=1e-6)
        assert found[2] == pytest.approx(norm, rel=1e-5)
        for key, parameter in whole.named_parameters():
            assert parameter.grad is not None
            scale = parameter.grad.abs().max()
            error = (torch.from_numpy(found[1][key]) - parameter.grad) / scale
            assert error.abs().max() < 1e-5, key
            torch.testing.assert_close(torch.from_numpy(found[3][key]), parameter.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(torch.from_numpy(found[4][key]), torch.from_numpy(saved[key])), key
        torch.testing.assert_close(torch.from_numpy(found[5]), logits, rtol=1e-4, atol=1e-5)


def refuse(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    for wrong, message in (
        (lambda: tensor_parallel(Mamba2(12, headdim=8, d_state=4), mesh), "got 3 heads for 2 processes"),
        (lambda: tensor_parallel(Mamba2(24, headdim=8, d_state=4, ngroups=3), mesh), "got 3 groups for 2 processes"),
        (lambda: tensor_parallel(Block(WIDTH, Mamba(WIDTH)), mesh), "got Mamba, wanted Mamba2"),
        (lambda: tensor_parallel(GatedMLP(8, 9, multiple_of=1), mesh), "got 9 hidden channels"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    model = build_model(1)
    tensor_parallel(model, mesh)
    with pytest.raises(ValueError, match=r"got 5 tokens for 2 processes .* pad the sequences"):
        model(torch.zeros(1, 5, dtype=torch.int64))


def test_what_cannot_be_shared_out_is_refused() -> None:
    run_ranks(2, refuse)
