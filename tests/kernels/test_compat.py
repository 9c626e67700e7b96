"""The adapters for ``mamba_ssm`` and ``causal_conv1d``: golden numbers, options, in-place updates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import golden_cases, golden_inputs
from contract import assert_refuses
from fill import check, fill_input
from torch import Tensor

from kernels import compat, norm, selective_scan

SCAN, CONV = golden_cases("op_selective_scan_a"), golden_cases("op_causal_conv1d_a")
LAYERED = [n for n in CONV if not n.startswith("update")]


def _check_gradients(case: dict[str, Any], inputs: dict[str, Tensor], loss: Tensor) -> None:
    for name, grad in zip(case["grads"], torch.autograd.grad(loss, [inputs[n] for n in case["grads"]]), strict=True):
        check(grad, case["grads"][name])


@pytest.mark.parametrize("name", SCAN)
def test_golden_selective_scan(name: str) -> None:
    case = SCAN[name]
    inputs = {n: t.requires_grad_() for n, t in golden_inputs(case).items()}
    y, state = compat.selective_scan_fn(**inputs, **case["config"])
    check(y, case["outputs"]["y"])
    check(state, case["outputs"]["last_state"])
    loss = (y * fill_input("loss_weight", y.shape)).sum()
    if "last_state" in case["loss"]:
        loss = loss + (state * fill_input("loss_weight_state", state.shape)).sum()
    _check_gradients(case, inputs, loss)


@pytest.mark.parametrize("name", LAYERED)
def test_golden_causal_conv1d(name: str) -> None:
    case = CONV[name]
    inputs = {n: t.requires_grad_(t.is_floating_point()) for n, t in golden_inputs(case).items()}
    y, state = compat.causal_conv1d_fn(**inputs, **case["config"], return_final_states=True)
    check(y, case["outputs"]["y"])
    loss = (y * fill_input("loss_weight", y.shape)).sum()
    if "final_states" in case["outputs"]:
        check(state, case["outputs"]["final_states"])
    if "final_states" in case["loss"]:
        loss = loss + (state * fill_input("loss_weight_state", state.shape)).sum()
    _check_gradients(case, inputs, loss)


@pytest.mark.parametrize("name", sorted(set(CONV) - set(LAYERED)))
def test_golden_causal_conv1d_update(name: str) -> None:
    case = CONV[name]
    inputs = golden_inputs(case)
    y = compat.causal_conv1d_update(**inputs, **case["config"])
    check(y, case["outputs"]["y"])
    check(inputs["conv_state"], case["outputs"]["conv_state"])


def test_complex_scan_takes_packed_parts() -> None:
    u, delta = torch.randn(2, 3, 7).double(), torch.rand(2, 3, 7).double()
    A = torch.complex(-torch.rand(3, 4), torch.randn(3, 4)).to(torch.complex128)
    B, C = torch.randn(2, 4, 14).double(), torch.randn(3, 4).to(torch.complex128)
    y, state = compat.selective_scan_fn(u, delta, A, B, C, return_last_state=True)
    h, wanted = torch.zeros(2, 3, 4).to(torch.complex128), []
    for t in range(7):
        b = torch.complex(B[..., 2 * t], B[..., 2 * t + 1])
        h = torch.exp(delta[..., t, None] * A) * h + (delta * u)[..., t, None] * b[:, None]
        wanted.append(2 * (h * C).sum(-1).real)
    torch.testing.assert_close(y, torch.stack(wanted, -1))
    torch.testing.assert_close(state, h)


def _inner_arguments(is_complex: bool = False) -> dict[str, Tensor]:
    E, N, R, W, M = 6, 3, 2, 4, 5
    shapes = {
        "xz": (2, 2 * E, 9), "conv1d_weight": (E, 1, W), "conv1d_bias": (E,),
        "x_proj_weight": (R + 2 * N * (1 + is_complex), E), "delta_proj_weight": (E, R),
        "out_proj_weight": (M, E), "out_proj_bias": (M,), "D": (E,), "delta_bias": (E,),
    }  # fmt: skip
    tensors = {n: torch.randn(s).double() * 0.5 for n, s in shapes.items()}
    tensors["A"] = -torch.rand(E, N).double()
    if is_complex:
        tensors["A"] = torch.complex(tensors["A"], torch.randn(E, N).double())
    return {n: t.requires_grad_() for n, t in tensors.items()}


def _inner_by_hand(a: dict[str, Tensor], norms: dict[str, Tensor]) -> Tensor:
    x, z = a["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(x, a["conv1d_weight"], a["conv1d_bias"], padding=3, groups=6)[..., :9]).transpose(1, 2)
    dt, B, C = (x @ a["x_proj_weight"].t()).split([2, 3, 3], dim=-1)
    dt = dt @ a["delta_proj_weight"].t()
    if norms:
        B, C = F.rms_norm(B, (3,), norms["b_rms_weight"], 1e-6), F.rms_norm(C, (3,), norms["c_rms_weight"], 1e-6)
        dt = F.rms_norm(dt, (6,), norms["dt_rms_weight"], 1e-6)
    y = selective_scan(
        x, dt, a["A"], B[:, :, None], C[:, :, None], a["D"], z.transpose(1, 2), a["delta_bias"], backend="reference"
    )
    return y @ a["out_proj_weight"].t() + a["out_proj_bias"]


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
def test_mamba_inner(with_norms: bool, checkpoint_lvl: int) -> None:
    a = _inner_arguments()
    norms = {f"{n}_rms_weight": torch.rand(6 if n == "dt" else 3).double() for n in ("b", "c", "dt") if with_norms}
    y, wanted = compat.mamba_inner_fn(**a, **norms, checkpoint_lvl=checkpoint_lvl), _inner_by_hand(a, norms)
    torch.testing.assert_close(y, wanted)
    weight = torch.randn(y.shape).double()
    grads = [torch.autograd.grad((t * weight).sum(), list(a.values())) for t in (y, wanted)]
    for name, got, want in zip(a, *grads, strict=True):  # the output bias too, which the original gets wrong
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def test_mamba_inner_with_given_and_biased_parameters() -> None:
    a = {n: t.detach() for n, t in _inner_arguments().items()}
    bias = torch.randn(3).double()
    B = torch.randn(6, 3).double()
    narrow = {**a, "x_proj_weight": a["x_proj_weight"][[0, 1, 5, 6, 7]]}
    y = compat.mamba_inner_fn(**narrow, B=B, C_proj_bias=bias)
    x, z = a["xz"].chunk(2, dim=1)
    x = compat.causal_conv1d_fn(x, a["conv1d_weight"].squeeze(1), a["conv1d_bias"], activation="silu")
    low = x.transpose(1, 2) @ narrow["x_proj_weight"].t()
    delta, C = low[..., :2] @ a["delta_proj_weight"].t(), low[..., 2:] + bias
    scan = compat.selective_scan_fn(
        x, delta.transpose(1, 2), a["A"], B, C.transpose(1, 2), a["D"], z, a["delta_bias"], delta_softplus=True
    )
    torch.testing.assert_close(y, F.linear(scan.transpose(1, 2), a["out_proj_weight"], a["out_proj_bias"]))


def test_mamba_inner_with_complex_states() -> None:
    a = _inner_arguments(is_complex=True)
    y = compat.mamba_inner_fn(**a)
    assert y.shape == (2, 9, 5)
    assert all(
        torch.isfinite(torch.view_as_real(g) if g.is_complex() else g).all()
        for g in torch.autograd.grad(y.sum(), list(a.values()))
    )
    with pytest.raises(ValueError, match="got complex A, wanted real"):
        compat.mamba_inner_fn(**a, b_rms_weight=torch.ones(3))


def test_mamba_inner_with_complex_states_of_one_token() -> None:
    a = {n: t.detach() for n, t in _inner_arguments(is_complex=True).items()}
    rank = a["x_proj_weight"][:1]  # an odd one: B and C begin at an odd column
    odd = a | {
        "x_proj_weight": torch.cat([rank, a["x_proj_weight"][2:]]),
        "delta_proj_weight": a["delta_proj_weight"][:, :1],
    }
    whole = compat.mamba_inner_fn(**odd)
    one = compat.mamba_inner_fn(**(odd | {"xz": a["xz"][:1, :, :1]}))
    torch.testing.assert_close(one, whole[:1, :1])


def test_one_group_beside_several() -> None:
    u, delta, A = torch.randn(2, 6, 9).double(), torch.rand(2, 6, 9).double(), -torch.rand(6, 3).double()
    one, two = torch.randn(2, 3, 9).double(), torch.randn(2, 2, 3, 9).double()
    both = one[:, None].expand(2, 2, 3, 9)
    torch.testing.assert_close(
        compat.selective_scan_fn(u, delta, A, one, two), compat.selective_scan_fn(u, delta, A, both, two)
    )
    torch.testing.assert_close(
        compat.selective_scan_fn(u, delta, A, two, one[:, None]), compat.selective_scan_fn(u, delta, A, two, both)
    )


def test_final_states_out_is_written_and_returned() -> None:
    x, weight, out = torch.randn(2, 5, 9), torch.randn(5, 4), torch.zeros(2, 5, 3)
    _, state = compat.causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out, activation="swish")
    assert state is out
    torch.testing.assert_close(out, x[..., -3:])


@pytest.mark.parametrize("S", [1, 3, 8])
def test_update_continues_the_convolution(S: int) -> None:
    x, weight, bias = torch.randn(2, 5, 6 + S), torch.randn(5, 4), torch.randn(5)
    wanted = compat.causal_conv1d_fn(x, weight, bias, activation="silu")[..., 6:]
    state = x[..., 1:6].clone()
    y = compat.causal_conv1d_update(x[..., 6:], state, weight, bias, "silu")
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(state, x[..., -5:])


@pytest.mark.parametrize("S", [1, 3, 8])
def test_update_of_a_circular_buffer(S: int) -> None:
    T, seen = 5, torch.tensor([6, 13])
    x, weight = torch.randn(2, 5, 13 + S), torch.randn(5, 4)
    state = torch.zeros(2, 5, T)
    wanted = []
    for b, n in enumerate(seen.tolist()):
        for t in range(n - T, n):
            state[b, :, t % T] = x[b, :, t]
        wanted.append(compat.causal_conv1d_fn(x[b : b + 1, :, : n + S], weight)[..., n:])
    new = torch.stack([x[b, :, n : n + S] for b, n in enumerate(seen.tolist())])
    y = compat.causal_conv1d_update(new, state, weight, cache_seqlens=seen.int())
    torch.testing.assert_close(y, torch.cat(wanted))
    for b, n in enumerate(seen.tolist()):
        for t in range(n + S - T, n + S):
            torch.testing.assert_close(state[b, :, t % T], x[b, :, t])


def test_update_of_chosen_rows() -> None:
    x, weight, state = torch.randn(4, 5), torch.randn(5, 4), torch.randn(6, 5, 3)
    rows = torch.tensor([4, -1, 0, -1], dtype=torch.int32)
    before = state.clone()
    y = compat.causal_conv1d_update(x, state, weight, conv_state_indices=rows)
    for b, row in ((0, 4), (2, 0)):
        alone = before[row : row + 1].clone()
        torch.testing.assert_close(y[b : b + 1], compat.causal_conv1d_update(x[b : b + 1], alone, weight))
        torch.testing.assert_close(state[row], alone[0])
    assert (y[[1, 3]] == 0).all()
    assert torch.equal(state[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    untouched = state.clone()
    compat.causal_conv1d_update(x, state, weight, conv_state_indices=torch.full((4,), -1))
    assert torch.equal(state, untouched)


def test_varlen_states() -> None:
    x = torch.randn(9, 5)
    states = compat.causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9]), 3)
    torch.testing.assert_close(states[0], F.pad(x[:2], (0, 0, 1, 0)).t())
    assert (states[1] == 0).all()
    torch.testing.assert_close(states[2], x[6:].t())


def test_norms() -> None:
    x, residual, weight, bias = torch.randn(3, 6).bfloat16(), torch.randn(3, 6), torch.rand(6), torch.rand(6)
    y, total = compat.rms_norm_fn(x, weight, None, residual, prenorm=True)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, F.rms_norm(total, (6,), weight, 1e-6).bfloat16())
    y, total = compat.layer_norm_fn(x, weight, bias, residual.bfloat16(), prenorm=True, residual_in_fp32=True)
    assert total.dtype == torch.bfloat16
    y, total = compat.layer_norm_fn(x, weight, bias, prenorm=True, residual_in_fp32=True)
    assert total.dtype == torch.float32
    torch.testing.assert_close(y, F.layer_norm(x.float(), (6,), weight, bias, 1e-6).bfloat16())
    z = torch.randn(3, 6).bfloat16()
    gated = compat.rmsnorm_fn(x, weight, bias, z, group_size=3, norm_before_gate=False)
    torch.testing.assert_close(gated, norm(x, weight, bias, z=z, eps=1e-6, group_size=3, norm_before_gate=False))
    assert not torch.equal(gated, compat.layernorm_fn(x, weight, bias, z, group_size=3, norm_before_gate=False))


@pytest.mark.parametrize("function", [compat.layer_norm_fn, compat.rms_norm_fn])
@pytest.mark.parametrize("rest", ["x1", "rowscale"])
def test_norm_of_a_sum(function: Any, rest: str) -> None:
    draw = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True)
    x, residual, weight, bias, weight1, bias1 = draw(3, 6), draw(3, 6), draw(6), draw(6), draw(6), draw(6)
    other = draw(3, 6) if rest == "x1" else draw(3)
    total = residual + (x + other if rest == "x1" else x * other[:, None])
    free = total - total.mean(-1, keepdim=True) if function is compat.layer_norm_fn else total
    unit = free / (free.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    wanted = (unit * weight + bias, unit * weight1 + bias1, total)
    found = function(x, weight, bias, residual, weight1=weight1, bias1=bias1, eps=1e-3, prenorm=True, **{rest: other})
    leaves = [x, residual, weight, bias, weight1, bias1, other]
    weights = [torch.randn_like(t) for t in wanted]
    for got, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, truth)
    torch.testing.assert_close(*(torch.autograd.grad(t, leaves, weights) for t in (found, wanted)))


def test_norm_of_dropouts() -> None:
    x, x1, weight = torch.randn(50, 40).bfloat16(), torch.randn(50, 40).bfloat16(), torch.rand(40)
    y, total, mask, mask1 = compat.rms_norm_fn(
        x, weight, None, x1=x1, dropout_p=0.25, prenorm=True, residual_in_fp32=True, return_dropout_mask=True
    )
    assert (y.dtype, total.dtype, mask.dtype) == (torch.bfloat16, torch.float32, torch.bool)
    assert 0.7 < mask.float().mean() < 0.8
    assert not torch.equal(mask, mask1)
    torch.testing.assert_close(total, (x * mask + x1 * mask1).float() / 0.75, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y, F.rms_norm(total, (40,), weight, 1e-6).bfloat16())
    y, mask, mask1 = compat.rms_norm_fn(x, weight, None, return_dropout_mask=True)
    assert mask is None
    assert mask1 is None
    assert torch.equal(y, compat.rms_norm_fn(x, weight, None))


X, WEIGHT, STATE = torch.zeros(2, 5, 9), torch.zeros(5, 4), torch.zeros(2, 5, 3)
INNER = {n: t.detach() for n, t in _inner_arguments().items()}
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "activation": (compat.causal_conv1d_fn, {"activation": "gelu"}, "activation: got 'gelu'"),
    "weight of a Conv1d": (compat.causal_conv1d_fn, {"weight": WEIGHT[:, None]}, "a Conv1d's weight takes squeeze"),
    "states": (
        compat.causal_conv1d_fn,
        {"initial_states": STATE.mT},
        r"initial_states: .*\(B, D, W - 1\) = \(2, 5, 3\)",
    ),
    "out": (compat.causal_conv1d_fn, {"final_states_out": STATE[:1]}, "final_states_out: got shape"),
    "columns": (
        compat.causal_conv1d_update,
        {"conv_state": STATE[..., :2]},
        "got 2 columns, wanted at least W - 1 = 3",
    ),
    "batch": (compat.causal_conv1d_update, {"conv_state": STATE[:1]}, r"conv_state: got shape \(1, 5, 3\), wanted"),
    "token": (compat.causal_conv1d_update, {"x": X[0, 0]}, r"x: got shape .*, wanted \(B, D\) or \(B, D, S\)"),
    "channels": (compat.causal_conv1d_update, {"x": X[:, :4]}, r"weight: got shape \(5, 4\), wanted \(D, W\) as x"),
    "seen": (compat.causal_conv1d_update, {"cache_seqlens": torch.tensor([1])}, r"cache_seqlens: got shape \(1,\)"),
    "rows": (compat.causal_conv1d_update, {"conv_state_indices": torch.tensor([0, 2])}, r"wanted rows in \[0, 2\)"),
    "row twice": (compat.causal_conv1d_update, {"conv_state_indices": torch.tensor([1, 1])}, "each row at most once"),
    "float rows": (compat.causal_conv1d_update, {"conv_state_indices": torch.zeros(2)}, "got dtype torch.float32"),
    "batch of one": (compat.causal_conv1d_varlen_states, {}, r"x\[0\] takes the batch of one away"),
    "bounds": (compat.causal_conv1d_varlen_states, {"x": X[0]}, "wanted ascending bounds from 0 to T = 5"),
    "B": (compat.selective_scan_fn, {"B": torch.zeros(2, 9, 3)}, r"B: got shape \(2, 9, 3\), wanted \(B, N, L\), "),
    "C": (compat.selective_scan_fn, {"C": torch.zeros(3)}, r"C: got shape \(3,\), wanted \(B, N, L\), "),
    "delta": (compat.selective_scan_fn, {"delta": X.mT}, "delta: got shape .* the shape of u"),
    "tokens first": (compat.selective_scan_fn, {"u": X.mT, "delta": X.mT}, r"\(D, N\) as u \(B, D, L\)"),
    "pairs": (compat.selective_scan_fn, {"A": torch.zeros(5, 3) + 0j}, r"wanted \(B, N, 2 L\), \(B, G, N, 2 L\) or"),
    "inner x": (compat.mamba_inner_fn, {"xz": torch.zeros(2, 13, 9)}, r"xz: got shape \(2, 13, 9\), wanted"),
    "inner rows": (compat.mamba_inner_fn, {"B": torch.zeros(6, 3)}, r"x_proj_weight: got shape \(8, 6\), wanted"),
    "inner filter": (compat.mamba_inner_fn, {"conv1d_weight": torch.zeros(6, 4)}, r"and \(D, 1, W\)"),
    "dropout": (compat.layer_norm_fn, {"dropout_p": 1.0}, "dropout_p: got 1.0"),
    "scale and x1": (compat.layer_norm_fn, {"x1": X, "rowscale": X[..., 0]}, "rowscale: got it together with x1"),
    "scale": (compat.layer_norm_fn, {"rowscale": X}, "rowscale: got shape"),
}
GOOD: dict[Any, dict[str, Any]] = {
    compat.causal_conv1d_fn: {"x": X, "weight": WEIGHT, "return_final_states": True},
    compat.causal_conv1d_update: {"x": X, "conv_state": STATE, "weight": WEIGHT},
    compat.causal_conv1d_varlen_states: {"x": X, "cu_seqlens": torch.tensor([0, 6]), "state_len": 3},
    compat.selective_scan_fn: {
        "u": X, "delta": X, "A": -torch.ones(5, 3), "B": torch.zeros(2, 3, 9), "C": torch.zeros(2, 3, 9)
    },
    compat.mamba_inner_fn: INNER,
    compat.layer_norm_fn: {"x": X, "weight": torch.ones(9), "bias": None},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wanted(name: str) -> None:
    function, changes, message = BAD[name]
    assert_refuses(function, GOOD[function] | changes, message)


def test_outputs_may_be_changed_in_place() -> None:
    x, weight = torch.randn(2, 5, 9, requires_grad=True), torch.randn(5, 4)
    y, state = compat.causal_conv1d_fn(x, weight, return_final_states=True)
    (wanted,) = torch.autograd.grad((2 * y).sum() + (3 * state).sum(), x)
    y, state = compat.causal_conv1d_fn(x, weight, return_final_states=True)
    y *= 2
    state *= 3
    torch.testing.assert_close(torch.autograd.grad(y.sum() + state.sum(), x)[0], wanted)
    y = compat.selective_scan_fn(x, x, -torch.ones(5, 3), torch.randn(2, 3, 9), torch.randn(2, 3, 9))
    y += 1
    assert torch.autograd.grad(y.sum(), x)[0].any()
