"""Muon by batches of matrices is timm's Muon."""

import copy

import pytest
import torch
from timm.optim import muon as timm_muon
from torch import nn

from core.training.module import OptimizerOptions, create_optimizer
from core.training.muon import Muon


def net() -> nn.Module:
    torch.manual_seed(0)
    linear = [nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), *linear)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> dict[str, torch.Tensor]:
    """How far each parameter went."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(torch.randn(32, 3, 3, 3)).square().mean().backward()
        optimizer.step()
    return {n: p.detach() - start[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"adjust_lr_fn": "original"}, {"conv_mode": "batched"}])
def test_steps_are_those_of_timm(options, monkeypatch):
    monkeypatch.setattr(timm_muon.zeropower_via_newtonschulz, "__defaults__", (1e-7, 1.0, torch.float64, False))
    model = net()
    other = copy.deepcopy(model)
    options = {"lr": 0.02, "weight_decay": 0.1, **options}
    ours, theirs = Muon(model.parameters(), **options), timm_muon.Muon(other.parameters(), **options)
    found, wanted = trained(model, ours), trained(other, theirs)
    assert all(step.abs().max() > 1e-4 for step in wanted.values())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"], rtol=1e-4, atol=1e-7)


def test_groups_and_parameters_without_gradients():
    model = net()
    model[3].requires_grad_(False)
    frozen = model[3].weight.clone()
    plain = {"params": model[4].parameters(), "use_fallback": True}
    optimizer = Muon([{"params": [*model[:4].parameters(), *model[5].parameters()]}, plain], lr=0.02)
    trained(model, optimizer)
    assert torch.equal(model[3].weight, frozen)
    assert "exp_avg" in optimizer.state[model[4].weight]
    assert "momentum_buffer" in optimizer.state[model[2].weight]
    assert model[2].weight.grad is not None


def test_recipes_get_it_by_name():
    assert isinstance(create_optimizer(net(), OptimizerOptions(name="Muon", lr=0.02, betas=(0.8, 0.9))), Muon)
    assert create_optimizer(net(), OptimizerOptions(name="nmuon")).param_groups[0]["nesterov"]
