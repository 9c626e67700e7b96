"""The Mamba-2 layer: recorded values, the mixer contract, every flag, and the equations written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_rms
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check, fill_input
from mixer_contract import (
    assert_causal,
    assert_gradients,
    assert_packed_is_separate,
    assert_padded_rows_are_alone,
    assert_pieces_are_the_whole,
    filled,
    inputs,
)

from core.mixers import Mamba2

CASES = golden_cases("mamba2_a")
STEPPED = [name for name, case in CASES.items() if "y_step" in case["outputs"]]
SMALL = {"d_model": 8, "d_state": 5, "headdim": 4, "d_conv": 3}
FLAGS = {
    "plain": {},
    "smallest": {"d_model": 2, "d_state": 1, "headdim": 1, "d_conv": 1, "expand": 1},
    "mlp": {"d_ssm": 8, "ngroups": 2},
    "hdim": {"D_has_hdim": True, "bias": True},
    "no_norm": {"rmsnorm": False, "conv_bias": False, "D_has_hdim": True},
    "gate_last": {"norm_before_gate": True, "ngroups": 4},
    "limits": {"dt_limit": (0.2, 0.6), "d_ssm": 12},
    "learnt": {"learnable_init_states": True},
    "reverse": {"reverse": True, "ngroups": 2},
}


def layer(dtype: torch.dtype = torch.float64, **arguments) -> Mamba2:
    return filled(Mamba2(**{**SMALL, **arguments}), dtype, dt_bias=3.0)


def golden_layer(name: str) -> Mamba2:
    case = CASES[name]
    mixer = Mamba2(**{k: v for k, v in case["config"].items() if k != "chunk_size"})
    assert {k: list(v.shape) for k, v in mixer.state_dict().items()} == case["params"]
    mixer.load_state_dict(golden_state_dict(case, mixer))
    return mixer


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str):
    case, mixer = CASES[name], golden_layer(name)
    given = golden_inputs(case)
    given["x"].requires_grad_()
    y = mixer(**given)
    check(y, case["outputs"]["y"])
    loss = (y * fill_input("loss_weight", y.shape)).sum()
    assert loss.item() == pytest.approx(case["loss_value"], rel=1e-4)
    loss.backward()
    gradients = {"x": given["x"].grad, **{k: p.grad for k, p in mixer.named_parameters()}}
    for key, want in case["grads"].items():
        check(gradients[key], want)


@pytest.mark.parametrize("name", STEPPED)
def test_golden_steps(name: str):
    case, mixer = CASES[name], golden_layer(name)
    x = golden_inputs(case)["x"]
    state = mixer.init_state(x.shape[0])
    y = torch.cat([mixer.decode(x[:, t : t + 1], state) for t in range(x.shape[1])], dim=1)
    check(y, case["outputs"]["y_step"])
    check(state.ssm, case["outputs"]["ssm_state"])


@pytest.mark.parametrize("name", FLAGS)
def test_whole_pieces_tokens(name: str):
    mixer = layer(**FLAGS[name])
    x = inputs(2, 11, mixer.d_model)
    assert_pieces_are_the_whole(mixer, x)
    state = mixer.init_state(2)
    assert state.conv.shape == (2, mixer.d_conv - 1, mixer.conv_dim)
    assert state.ssm.shape == (2, mixer.nheads, mixer.headdim, mixer.d_state)


@pytest.mark.parametrize("name", ["mlp", "hdim", "no_norm", "gate_last", "limits", "learnt"])
def test_matches_the_equations(name: str):
    """The layer written out with plain operators and a loop over time."""
    mixer, u = layer(**FLAGS[name]), inputs(2, 12, 8)
    scan, heads, width, states, groups = mixer.d_ssm, mixer.nheads, mixer.headdim, mixer.d_state, mixer.ngroups
    projected = F.linear(u, mixer.in_proj.weight, mixer.in_proj.bias)
    z0, x0, z, xbc, dt = projected.split([mixer.d_mlp, mixer.d_mlp, scan, mixer.conv_dim, heads], dim=-1)
    xbc = F.conv1d(F.pad(xbc.mT, (2, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=mixer.conv_dim).mT
    x, B, C = F.silu(xbc).split([scan, groups * states, groups * states], dim=-1)
    x = x.unflatten(-1, (heads, width))
    B, C = (t.unflatten(-1, (groups, states)).repeat_interleave(heads // groups, 2) for t in (B, C))
    dt = F.softplus(dt + mixer.dt_bias).clamp(*FLAGS[name].get("dt_limit", (0, math.inf)))
    D = mixer.D.view(heads, -1)
    h, outputs = torch.zeros(2, heads, width, states, dtype=torch.float64), []
    if mixer.init_states is not None:
        assert mixer.init_states.abs().sum() > 0
        h = h + mixer.init_states
    for t in range(12):
        decay = torch.exp(dt[:, t] * -mixer.A_log.exp())[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1) + D * x[:, t])
    y, gate = torch.stack(outputs, 1).flatten(2), F.silu(z)
    if mixer.norm is not None:
        y = y if FLAGS[name].get("norm_before_gate") else y * gate
        y = F.rms_norm(y.unflatten(-1, (groups, -1)), (scan // groups,), eps=1e-5).flatten(2) * mixer.norm.weight
    if mixer.norm is None or FLAGS[name].get("norm_before_gate"):
        y = y * gate
    if mixer.d_mlp:
        y = torch.cat([F.silu(z0) * x0, y], -1)
    torch.testing.assert_close(mixer(u), F.linear(y, mixer.out_proj.weight, mixer.out_proj.bias))


@pytest.mark.parametrize("reverse", [False, True])
def test_causal(reverse: bool):
    assert_causal(layer(torch.float32, reverse=reverse), 8)


def test_reverse_is_flip():
    causal, reverse, x = layer(), layer(reverse=True), inputs(2, 11, 8)
    torch.testing.assert_close(reverse(x), causal(x.flip(1)).flip(1))


@pytest.mark.parametrize("lengths", [(7, 1, 4), (3, 7, 0)])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_padded_rows_equal_alone(lengths: tuple[int, ...], d_conv: int):
    assert_padded_rows_are_alone(layer(d_conv=d_conv), 8, lengths)


@pytest.mark.parametrize("name", ["mlp", "reverse", "learnt"])
def test_packed_equals_separate(name: str):
    assert_packed_is_separate(layer(**FLAGS[name]), 8, by_index=name != "learnt")


def test_gradients():
    mixer = layer(d_ssm=8, bias=True, D_has_hdim=True, dt_limit=(0.0, 5.0), ngroups=2)
    state = mixer.init_state(2)
    assert_gradients(mixer, inputs(2, 5, 8), type(state)(*(torch.full_like(t, 0.5) for t in state)))


def test_initial_states_get_gradients():
    mixer = layer(learnable_init_states=True)
    assert_gradients(mixer, inputs(1, 4, 8), mixer.init_state(1))
    mixer = layer(learnable_init_states=True)
    mixer(inputs(2, 4, 8)).sum().backward()
    assert mixer.init_states.grad.abs().sum() > 0


def test_bfloat16():
    truth, low = layer(d_state=16), layer(torch.bfloat16, d_state=16)
    x = inputs(2, 64, 8, torch.bfloat16)
    truth.load_state_dict(low.state_dict())
    y = low(x)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, truth(x.double())) < 0.02
    state = low.init_state(2)
    stepped = torch.cat([low.decode(x[:, t : t + 1], state) for t in range(64)], dim=1)
    assert relative_rms(stepped, truth(x.double())) < 0.02
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)


def test_autocast():
    mixer, x = layer(torch.float32, d_ssm=8), inputs(2, 16, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        stepped = mixer.decode(x, mixer.init_state(2))
    assert relative_rms(y.float(), mixer(x)) < 0.03
    torch.testing.assert_close(stepped, y, rtol=2e-2, atol=2e-2)


def test_an_adapter_around_the_output_projection_counts():
    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    mixer, x = layer(d_ssm=8), inputs(2, 9, 8)
    want = 2 * mixer(x)
    mixer.out_proj = Adapter(mixer.out_proj)  # type: ignore[assignment]
    torch.testing.assert_close(mixer(x), want)


def test_initialisation():
    mixer = Mamba2(d_model=64, headdim=1, A_init_range=(2, 3), conv_init=0.25, dtype=torch.bfloat16)
    assert mixer.A_log.dtype == mixer.D.dtype == mixer.dt_bias.dtype == torch.float32
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias.double())
    assert 2 <= A.min() < 2.2 < 2.8 < A.max() <= 3
    assert 0.999e-3 <= dt.min() < dt.max() <= 0.1001
    assert (mixer.D == 1).all()
    assert 0.2 < mixer.conv1d.weight.abs().max() <= 0.25
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traceable():
    mixer, x = layer(torch.float32, d_ssm=8), inputs(2, 9, 8, torch.float32)
    want = mixer(x)
    torch.testing.assert_close(torch.jit.script(mixer)(x), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(mixer)(x), want)
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), want)
    torch.testing.assert_close(torch.export.export(mixer, (x,)).module()(x), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model: got 0"),
        ({"expand": 1.3}, "expand: got 1.3"),
        ({"d_ssm": 20}, "d_ssm: got 20, wanted 1 to expand"),
        ({"headdim": 3}, "headdim: got 3, wanted a divisor of the scan's 16 channels"),
        ({"ngroups": 3}, "ngroups: got 3, wanted a divisor of the 4 heads"),
        ({"A_init_range": (0, 1)}, "A_init_range: got"),
        ({"dt_limit": (1, 0)}, "dt_limit: got"),
        ({"dt_min": 0.0}, "dt_min and dt_max"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Mamba2(**{**SMALL, **arguments})


def test_bad_calls():
    x = inputs(2, 4, 8)
    reverse, learnt = layer(reverse=True), layer(learnable_init_states=True)
    with pytest.raises(ValueError, match="lengths: a reverse layer"):
        reverse.forward_state(x, reverse.init_state(2), torch.tensor([4, 2]))
    with pytest.raises(ValueError, match="decode: a reverse layer"):
        reverse.decode(x, reverse.init_state(2))
    with pytest.raises(ValueError, match="seq_idx: the initial states"):
        learnt(x, seq_idx=torch.zeros(2, 4, dtype=torch.int32))
