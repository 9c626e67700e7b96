"""Mamba2, Mamba2Simple, Mamba3 and MHA with mamba_ssm's signatures: recorded values, caches in place, decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check
from mixer_contract import filled, inputs

from core import mixers
from core.compat import MHA, Mamba2, Mamba2Simple, Mamba3

MAMBA2, MAMBA3 = golden_cases("mamba2_a"), golden_cases("mamba3_a")
STEPPED = [name for name, case in MAMBA2.items() if "y_step" in case["outputs"]]


@dataclass
class InferenceParams:
    """The fields of mamba_ssm's class of this name that a layer reads."""

    max_seqlen: int = 48
    seqlen_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None


def golden(cases: dict, name: str, kind: Any, **options: Any) -> tuple[Any, torch.Tensor, dict]:
    case = cases[name]
    layer = kind(**case["config"], layer_idx=0, **options)
    layer.load_state_dict(golden_state_dict(case, layer))
    return layer, golden_inputs(case)["x"], case["outputs"]


def run(layer: Any, x: torch.Tensor, sizes: list[int], **fields: Any) -> tuple[torch.Tensor, Any]:
    """The outputs of pieces through ``inference_params``, and the cache."""
    params, outputs = InferenceParams(**fields), []
    for piece in x.split(sizes, dim=1):
        outputs.append(layer(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    return torch.cat(outputs, dim=1), params.key_value_memory_dict[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", STEPPED)
def test_golden_mamba2_steps(name: str, grad: bool):
    layer, x, want = golden(MAMBA2, name, Mamba2)
    cache = layer.allocate_inference_cache(x.shape[0], max_seqlen=x.shape[1])
    with torch.set_grad_enabled(grad):
        outputs = [layer.step(x[:, t : t + 1], *cache)[0] for t in range(x.shape[1])]
    check(torch.cat(outputs, dim=1), want["y_step"])
    check(cache[0], want["conv_state"])  # in place: the tensors handed in hold the states
    check(cache[1], want["ssm_state"])


@pytest.mark.parametrize("sizes", [[40], [38, 2], [1, 3, 36]])
def test_golden_mamba2_inference_params(sizes: list[int]):
    layer, x, want = golden(MAMBA2, "strong_scan", Mamba2)
    with torch.no_grad():
        y, (conv_state, ssm_state) = run(layer, x, sizes)
    check(y, want["y"])
    check(conv_state, want["conv_state"])
    check(ssm_state, want["ssm_state"])


def test_mamba2_with_a_number_a_channel_steps():
    """D_has_hdim, on which the original's step fails."""
    layer = filled(Mamba2(8, 4, headdim=4, D_has_hdim=True, d_ssm=8, layer_idx=0), dt_bias=3.0)
    x = inputs(2, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(layer, x, [1] * 6)[0], layer(x))


def test_mamba2_fills_a_cache_from_packed_prompts():
    layer = filled(Mamba2(8, 4, headdim=4, layer_idx=0), dt_bias=3.0)
    x, params = inputs(1, 12, 8), InferenceParams()
    bounds = torch.tensor([0, 7, 9, 12], dtype=torch.int32)
    with torch.no_grad():
        y = layer(x, cu_seqlens=bounds, inference_params=params)
        conv, ssm = params.key_value_memory_dict[0]
        for row, piece in enumerate(x.split([7, 2, 3], dim=1)):
            alone, (conv_alone, ssm_alone) = run(layer, piece, [piece.shape[1]])
            torch.testing.assert_close(y[:, bounds[row] : bounds[row + 1]], alone)
            torch.testing.assert_close(conv[row : row + 1], conv_alone)
            torch.testing.assert_close(ssm[row : row + 1], ssm_alone)


def test_mamba2_takes_flat_tokens():
    layer, x = filled(Mamba2(8, 4, headdim=4)), inputs(2, 6, 8)
    torch.testing.assert_close(layer(x.flatten(0, 1), seqlen=6), layer(x).flatten(0, 1))


def test_a_step_has_gradients():
    layer = filled(Mamba2(8, 4, headdim=4))
    x = inputs(2, 1, 8).requires_grad_()
    layer.step(x, *layer.allocate_inference_cache(2, 1))[0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.A_log.grad is not None


def test_mamba2_simple_normalises_groups():
    """The original's norm forgets them."""
    arguments: dict[str, Any] = {"d_state": 4, "headdim": 4, "ngroups": 2}
    simple, full = filled(Mamba2Simple(8, **arguments)), filled(mixers.Mamba2(8, **arguments))
    assert list(simple.state_dict()) == list(full.state_dict())
    x = inputs(2, 6, 8)
    torch.testing.assert_close(simple(x), full(x))
    learnt = Mamba2Simple(8, learnable_init_states=True, **arguments)
    assert learnt.init_states.shape == (4, 4, 4)
    with pytest.raises(ValueError, match="activation: got 'gelu'"):
        Mamba2Simple(8, activation="gelu", **arguments)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("name", MAMBA3)
def test_golden_mamba3_steps(name: str, flat: bool):
    """Heads of 8 channels and inputs of two and three dimensions: the original's step wants 64 and two."""
    layer, x, want = golden(MAMBA3, name, Mamba3, a_activation=MAMBA3[name]["a_activation"])
    states = layer.allocate_inference_cache(2, 40)
    outputs = []
    with torch.no_grad():
        for t in range(40):
            y, *after = layer.step(x[:, t] if flat else x[:, t : t + 1], *states)
            outputs.append(y.view(2, 1, -1))
            assert all(a is b for a, b in zip(after, states, strict=True))
    check(torch.cat(outputs, dim=1), want["y_step"])
    check(states[1], want["ssm_state"])
    check(states[2][:, 0], want["k_state"])


@pytest.mark.parametrize("grad", [False, True])
def test_golden_mamba3_inference_params(grad: bool):
    layer, x, want = golden(MAMBA3, "main", Mamba3)  # the default activation is the recorded package's
    with torch.set_grad_enabled(grad):
        y, states = run(layer, x, [30, 1, 9])
    check(y, want["y"])
    check(states[3], want["v_state"])


@pytest.mark.parametrize("d_conv", [0, 1, 4])
@pytest.mark.parametrize("sizes", [[9], [6, 1, 1, 1], [2, 7]])
def test_attention_caches(sizes: list[int], d_conv: int):
    """In particular the convolution's state after a prompt, which the original takes from its outputs."""
    layer = filled(MHA(12, 4, 2, 6, causal=True, layer_idx=0, d_conv=d_conv, rotary_emb_dim=4))
    x = inputs(2, 9, 12)
    y, (kv_cache, conv_state) = run(layer, x, sizes)
    torch.testing.assert_close(y, layer(x))
    assert kv_cache.shape == (2, 48, 2, 2, 6)
    if d_conv:
        qkv = F.linear(x, layer.in_proj.weight, layer.in_proj.bias)
        torch.testing.assert_close(conv_state, qkv[:, -d_conv:].mT)


def test_attention_takes_rows_of_their_own_lengths():
    layer, x = filled(MHA(12, 4, causal=True, layer_idx=0, rotary_emb_dim=2)), inputs(2, 9, 12)
    params = InferenceParams()
    layer(x[:, :5], inference_params=params)
    params.seqlen_offset, params.lengths_per_sample = 5, torch.tensor([5, 3])
    y = layer(x[:, 5:6], inference_params=params)
    torch.testing.assert_close(y[:1], layer(x[:1, :6])[:, -1:])
    short = torch.cat([x[1:, :3], x[1:, 5:6]], 1)
    torch.testing.assert_close(y[1:], layer(short)[:, -1:])


def test_bad_calls():
    x = inputs(1, 2, 8)
    layer, params = filled(Mamba2(8, 4, headdim=4)), InferenceParams()
    with pytest.raises(ValueError, match="layer_idx: got None"):
        layer(x, inference_params=params)
    with pytest.raises(ValueError, match="step: got 2 tokens"):
        layer.step(x, *layer.allocate_inference_cache(1, 2))
    with pytest.raises(ValueError, match="process_group: got a value"):
        Mamba2(8, headdim=4, process_group="nccl")  # type: ignore[arg-type]
    heads = filled(MHA(8, 2, causal=True, layer_idx=0))
    with pytest.raises(ValueError, match="max_seqlen: got room for 1 tokens, wanted 2"):
        heads(x, inference_params=InferenceParams(max_seqlen=1))
    with pytest.raises(ValueError, match="inference_params: got seq_idx"):
        filled(Mamba3(8, 4, headdim=4))(x, seq_idx=torch.zeros(1, 2), inference_params=params)


def test_options_by_position_are_the_published_ones():
    assert Mamba2(8, 4, 3, None, 2, 4, 8, 2, (1, 2), True, False, True).d_ssm == 8
    assert Mamba3(8, 4, 2, 4, 1, 1.0).pairs == 2
    assert MHA(12, 4, 2, 6, 0, True, True, None, True, 3, 4).layer_idx == 3
