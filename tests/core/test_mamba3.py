"""The Mamba-3 layer: recorded values, the mixer contract, the recurrence written out with one input and several."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_rms
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check, fill_input
from mixer_contract import (
    assert_gradients,
    assert_packed_is_separate,
    assert_padded_rows_are_alone,
    assert_pieces_are_the_whole,
    filled,
    inputs,
)

from core.mixers import Mamba3
from core.mixers.mamba3_scan import cumulative_angles

CASES = golden_cases("mamba3_a")
SMALL = {"d_model": 8, "d_state": 6, "headdim": 4, "a_activation": "heavy_tail"}
FLAGS = {
    "plain": {},
    "smallest": {"d_model": 2, "d_state": 2, "headdim": 1, "expand": 1, "rope_fraction": 1.0},
    "norm": {"is_outproj_norm": True, "ngroups": 2, "rope_fraction": 1.0},
    "softplus": {"a_activation": "softplus", "A_floor": 0.7, "d_state": 5},
    "mimo": {"is_mimo": True, "mimo_rank": 3, "ngroups": 2},
    "mimo_norm": {"is_mimo": True, "is_outproj_norm": True, "mimo_rank": 2, "rope_fraction": 1.0},
    "mimo_one": {"is_mimo": True, "mimo_rank": 1, "a_activation": "softplus"},
}


def layer(dtype: torch.dtype = torch.float64, **arguments) -> Mamba3:
    """A layer whose scan matters: dt near 1, and gates and keys away from zero."""
    mixer = Mamba3(**{**SMALL, **arguments})
    return filled(
        mixer,
        dtype,
        dt_bias=3.0,
        B_bias=1.0,
        C_bias=1.0,
        **{n: 0.5 for n in ("mimo_x", "mimo_z", "mimo_o") if mixer.is_mimo},
    )


def golden_layer(name: str) -> Mamba3:
    case = CASES[name]
    config = {k: v for k, v in case["config"].items() if k != "chunk_size"}
    mixer = Mamba3(**config, a_activation=case["a_activation"])
    assert {k: list(v.shape) for k, v in mixer.state_dict().items()} == case["params"]
    mixer.load_state_dict(golden_state_dict(case, mixer))
    return mixer


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str):
    case, mixer = CASES[name], golden_layer(name)
    x = golden_inputs(case)["x"].requires_grad_()
    y = mixer(x)
    check(y, case["outputs"]["y"])
    loss = (y * fill_input("loss_weight", y.shape)).sum()
    assert loss.item() == pytest.approx(case["loss_value"], rel=1e-4)
    loss.backward()
    gradients = {"x": x.grad, **{k: p.grad for k, p in mixer.named_parameters()}}
    for key, want in case["grads"].items():
        check(gradients[key], want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 40])
def test_golden_states(name: str, size: int):
    case, mixer = CASES[name], golden_layer(name)
    x, want = golden_inputs(case)["x"], case["outputs"]
    state, outputs = mixer.init_state(2), []
    for piece in x.split(size, dim=1):
        outputs.append(mixer.decode(piece, state))
    check(torch.cat(outputs, dim=1), want["y_step"])
    check(state.angle.cos(), want["cos_angle_state"])
    check(state.angle.sin(), want["sin_angle_state"])
    check(state.ssm, want["ssm_state"])
    check(state.k[:, 0], want["k_state"])
    check(state.v, want["v_state"])


def by_hand(mixer: Mamba3, u: torch.Tensor) -> torch.Tensor:
    """The layer as a loop over time, states rotated by complex numbers."""
    E, H, P, N, R, S = mixer.d_inner, mixer.nheads, mixer.headdim, mixer.d_state, mixer.rank, mixer.pairs
    z, x, B, C, dt, A, trap, angle = F.linear(u, mixer.in_proj.weight).split(
        [E, E, N * R * mixer.ngroups, N * R * mixer.ngroups, H, H, H, S], dim=-1
    )
    z, x = z.unflatten(-1, (H, P)), x.unflatten(-1, (H, P))
    dt, trap = F.softplus(dt + mixer.dt_bias), trap.sigmoid()
    rate = F.softplus(A) if mixer.a_activation == "softplus" else torch.where(A < 0, 1 / (1 - A), 1 + A)
    rate = rate.clamp(min=mixer.A_floor)
    one = torch.ones(H, 1, P, dtype=u.dtype)
    up, gates, down = (mixer.mimo_x, mixer.mimo_z, mixer.mimo_o) if mixer.is_mimo else (one, one, one)
    pairs = (slice(0, S), slice(N // 2, N // 2 + S)) if mixer.is_mimo else (slice(0, 2 * S, 2), slice(1, 2 * S, 2))

    def heads(t: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        t = F.rms_norm(t.unflatten(-1, (R, mixer.ngroups, N)), (N,), weight, 1e-5)
        t = t.repeat_interleave(H // mixer.ngroups, 2).transpose(1, 2) + bias  # (B, H, R, N)
        turned = torch.complex(t[..., pairs[0]], t[..., pairs[1]]) * turn[:, :, None]
        t = t.clone()
        t[..., pairs[0]], t[..., pairs[1]] = turned.real, turned.imag
        return t

    h = torch.zeros(len(u), H, P, N, dtype=u.dtype)
    k_before, v_before = torch.zeros(len(u), H, R, N, dtype=u.dtype), torch.zeros(len(u), H, R, P, dtype=u.dtype)
    theta, outputs = torch.zeros(len(u), H, S, dtype=u.dtype), []
    for t in range(u.shape[1]):
        theta = theta + torch.tanh(angle[:, t, None]) * math.pi * dt[:, t, :, None]
        turn = torch.polar(torch.ones_like(theta), theta)
        k = heads(B[:, t], mixer.B_norm.weight, mixer.B_bias, turn)
        q = heads(C[:, t], mixer.C_norm.weight, mixer.C_bias, turn)
        v = x[:, t, :, None] * up
        alpha, step, own = torch.exp(-rate[:, t] * dt[:, t]), dt[:, t], trap[:, t]
        h = alpha[..., None, None] * h
        h = h + torch.einsum("bh,bhrp,bhrn->bhpn", (1 - own) * step * alpha, v_before, k_before)
        h = h + torch.einsum("bh,bhrp,bhrn->bhpn", own * step, v, k)
        y = torch.einsum("bhpn,bhrn->bhrp", h, q) + mixer.D[:, None, None] * v
        if mixer.norm is not None:
            y = F.rms_norm(y, (P,), eps=1e-5) * mixer.norm.weight.view(H, 1, P)
        outputs.append((y * F.silu(z[:, t, :, None] * gates) * down).sum(2).flatten(1))
        k_before, v_before = k, v
    return F.linear(torch.stack(outputs, 1), mixer.out_proj.weight)


@pytest.mark.parametrize("name", FLAGS)
def test_matches_the_recurrence(name: str):
    """Values and gradients of every parameter."""
    mixer = layer(**FLAGS[name])
    x = inputs(2, 13, mixer.d_model).requires_grad_()
    y, want = mixer(x), by_hand(mixer, x)
    torch.testing.assert_close(y, want)
    leaves, weight = [x, *mixer.parameters()], torch.randn(y.shape, dtype=y.dtype)
    got, truth = (torch.autograd.grad((t * weight).sum(), leaves, materialize_grads=True) for t in (y, want))
    for name, a, b in zip(["x", *(n for n, _ in mixer.named_parameters())], got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", FLAGS)
def test_whole_pieces_tokens(name: str):
    mixer = layer(**FLAGS[name])
    assert_pieces_are_the_whole(mixer, inputs(2, 9, mixer.d_model))


@pytest.mark.parametrize("name", ["norm", "mimo"])
@pytest.mark.parametrize("lengths", [(7, 1, 4), (3, 7, 0)])
def test_padded_rows_equal_alone(name: str, lengths: tuple[int, ...]):
    assert_padded_rows_are_alone(layer(**FLAGS[name]), 8, lengths)


@pytest.mark.parametrize("name", ["plain", "mimo"])
def test_packed_equals_separate(name: str):
    assert_packed_is_separate(layer(**FLAGS[name]), 8)


@pytest.mark.parametrize("name", ["plain", "mimo"])
def test_causal(name: str):
    """A later token changes nothing: the two halves of an input that the scan gets at once are told apart again."""
    mixer, x = layer(**FLAGS[name]), inputs(2, 21, 8)
    changed = x.clone()
    changed[:, 10] += 1
    difference = (mixer(changed) - mixer(x)).abs().amax((0, 2))
    assert difference[:10].max() < 1e-12
    assert difference[10:].min() > 1e-6


@pytest.mark.parametrize("name", ["norm", "mimo"])
def test_gradients_of_states(name: str):
    """In particular those of the state of several inputs, which the published kernels drop."""
    mixer = layer(**FLAGS[name])
    _, state = mixer.forward_state(inputs(2, 3, 8), mixer.init_state(2))
    assert_gradients(mixer, inputs(2, 4, 8), state)


def test_decay_of_nothing_and_of_everything():
    """Keys are divided by the decay's exponent: neither its underflow nor that of the decay makes a NaN."""
    for shift in (-120.0, 60.0):
        for dtype in (torch.float32, torch.float16):
            mixer = layer(torch.float32, is_mimo=True, mimo_rank=2)
            with torch.no_grad():
                mixer.dt_bias += shift
            y = mixer.to(dtype)(inputs(1, 9, 8, dtype))
            assert y.isfinite().all()
            y.float().sum().backward()
            assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_angles_do_not_lose_turns():
    angle, dt = torch.full((1, 100_000, 1), 0.3), torch.full((1, 100_000, 1), 7.0)
    got = cumulative_angles(angle, dt, None)[0, -1, 0, 0].double()
    turns = 100_000 * (torch.tanh(angle[0, 0, 0]) * torch.tensor(3.5)).double()
    error = (got / (2 * math.pi) - turns).remainder(1)
    assert min(error, 1 - error) < 1e-4


@pytest.mark.parametrize("name", ["plain", "mimo_norm"])
def test_low_precision(name: str):
    """float32 is float32 (the published kernels round it to bfloat16), and bfloat16 is near."""
    truth = layer(**FLAGS[name])
    x = inputs(2, 64, 8, torch.bfloat16)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        low = layer(dtype, **FLAGS[name])
        truth.load_state_dict(low.state_dict())
        wanted = truth(x.double())
        assert relative_rms(low(x.to(dtype)), wanted) < tolerance
        state = low.init_state(2)
        stepped = torch.cat([low.decode(x[:, t : t + 1].to(dtype), state) for t in range(64)], dim=1)
        assert stepped.dtype == dtype
        assert relative_rms(stepped, wanted) < tolerance


def test_autocast():
    mixer, x = layer(torch.float32, **FLAGS["mimo"]), inputs(2, 16, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert relative_rms(y.float(), mixer(x)) < 0.03


def test_compiles():
    mixer, x = layer(torch.float32, **FLAGS["mimo"]), inputs(2, 9, 8, torch.float32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x))


def test_initialisation():
    mixer = Mamba3(64, headdim=1, is_mimo=True, a_activation="softplus", dtype=torch.bfloat16)
    assert mixer.in_proj.weight.dtype == mixer.B_norm.weight.dtype == torch.bfloat16
    assert mixer.dt_bias.dtype == mixer.B_bias.dtype == mixer.mimo_x.dtype == torch.float32
    assert (mixer.mimo_x == 0.25).all()
    assert (mixer.mimo_z == 1).all()
    dt = F.softplus(mixer.dt_bias.double())
    assert 0.999e-3 <= dt.min() < dt.max() <= 0.1001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model: got 0"),
        ({"headdim": 3}, "headdim: got 3, wanted a divisor of expand"),
        ({"ngroups": 3}, "ngroups: got 3, wanted a divisor of the 4 heads"),
        ({"rope_fraction": 0.1}, "rope_fraction: got 0.1"),
        ({"rope_fraction": 1.5}, "rope_fraction: got 1.5"),
        ({"is_mimo": True, "d_state": 5}, "d_state: got 5 with is_mimo"),
        ({"is_mimo": True, "mimo_rank": 17}, "mimo_rank: got 17"),
        ({"is_mimo": True, "mimo_rank": 0}, "mimo_rank: got 0"),
        ({"a_activation": "relu"}, "a_activation: got 'relu', wanted one of heavy_tail, softplus"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Mamba3(**{**SMALL, **arguments})


def test_the_activation_must_be_said():
    with pytest.raises(TypeError, match="a_activation"):
        Mamba3(8, headdim=4)
