"""The last token alone: what the whole layer's output ends with, for every kind of layer and option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.block import Block, GatedMLP
from core.lm import MambaConfig, MambaLM
from core.mixers import S4D, Mamba, Mamba2
from core.mixers.last import forward_last
from kernels.norm import late
from kernels.ssd import gated

MIXERS: dict[str, Any] = {
    "mamba": lambda: Mamba(8, d_state=4, bias=True),
    "mamba2": lambda: Mamba2(8, d_state=4, headdim=4, ngroups=2, bias=True),
    "norm before the gate": lambda: Mamba2(8, d_state=4, headdim=4, norm_before_gate=True),
    "without norm": lambda: Mamba2(8, d_state=4, headdim=4, rmsnorm=False),
    "MLP channels": lambda: Mamba2(8, d_state=4, headdim=4, d_ssm=8),
    "another": lambda: S4D(8),
}


@pytest.mark.parametrize("name", MIXERS)
def test_last_is_the_last_of_all(name: str) -> None:
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    _, state = mixer.forward_state(torch.randn_like(x), mixer.init_state(2))
    want, after = mixer.forward_state(x, state)
    got, found = forward_last(mixer, x, state)
    torch.testing.assert_close(got, want[:, -1:])
    torch.testing.assert_close(found, after)


def test_the_other_tokens_are_left_out() -> None:
    """Outputs of in_proj's gate and of out_proj exist for one token."""
    mixer, seen = Mamba(8, d_state=4), []
    mixer.out_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    forward_last(mixer, torch.randn(2, 7, 8), mixer.init_state(2))
    assert seen == [(2, 1, 8)]


def test_an_adapter_is_more_than_a_weight() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    mixer = Mamba(8, d_state=4)
    mixer.in_proj = Doubled(8, 32, bias=False)
    x, state = torch.randn(2, 7, 8), mixer.init_state(2)
    torch.testing.assert_close(forward_last(mixer, x, state)[0], mixer.forward_state(x, state)[0][:, -1:])


def test_a_model_with_an_mlp() -> None:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=8, n_layer=2, vocab_size=9, d_intermediate=12)).double()
    assert isinstance(model.backbone.layers[-1], Block)
    assert isinstance(model.backbone.layers[-1].mlp, GatedMLP)
    ids = torch.randint(9, (2, 7))
    want, after = model.backbone.forward_state(ids, model.init_state(2))
    got, found = model.backbone.forward_last(ids, model.init_state(2))
    torch.testing.assert_close(got, want[:, -1])
    torch.testing.assert_close(found, after)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_late_norms_are_those_of_the_layers(residual_in_fp32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that leaves its norm to what is behind the projection, as on GPUs whose kernel does that."""
    torch.manual_seed(0)
    ssm = dict(layer="Mamba2", d_state=4, headdim=4)
    config = MambaConfig(d_model=8, n_layer=3, vocab_size=9, ssm_cfg=ssm, residual_in_fp32=residual_in_fp32)
    model, taken = MambaLM(config).double(), []
    for layer in model.backbone.layers:
        assert isinstance(layer.mixer, Mamba2)
        assert layer.mixer.norm is not None
        torch.nn.init.normal_(layer.mixer.norm.weight)
    ids = torch.randint(9, (2, 7))
    monkeypatch.setattr(gated, "saves_a_pass", lambda *args, **options: taken.append(args) or True)
    want, after = model.backbone.forward_state(ids, model.init_state(2))
    assert not taken
    with torch.no_grad():
        _, state = model.backbone.forward_last(ids[:, :3], (None,) * 3)
        got, found = model.backbone.forward_last(ids[:, 3:], state)
    assert len(taken) == 4  # of three layers: the last one works for one token
    torch.testing.assert_close(got, want[:, -1])
    torch.testing.assert_close(found, after)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_products_do_what_surrounds_them(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output projections that add and normalise, as on GPUs that have kernels for it, from the first token on."""
    torch.manual_seed(0)
    ssm = {"layer": layer, "d_state": 4} | ({"headdim": 4} if layer == "Mamba2" else {})
    model, taken = MambaLM(MambaConfig(d_model=8, n_layer=3, vocab_size=9, ssm_cfg=ssm)).double(), []
    ids = torch.randint(9, (2, 7))
    want, after = model.backbone.forward_state(ids, model.init_state(2))
    for module in (late, gated):
        name = module.__name__
        monkeypatch.setattr(module, "saves_a_pass", lambda *args, name=name, **kwargs: taken.append(name) or True)
    with torch.no_grad():
        got, found = model.backbone.forward_last(ids, (None,) * 3)
        assert taken == [(late if layer == "Mamba1" else gated).__name__] * 2  # the last layer projects one token
        half, state = model.backbone.forward_last(ids[:, :3], (None,) * 3)
        half, state = model.backbone.forward_last(ids[:, 3:], state)
    for end, states in ((got, found), (half, state)):
        torch.testing.assert_close(end, want[:, -1])
        torch.testing.assert_close(states, after)
