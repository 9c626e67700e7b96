"""The attention layer: against plain operators, the mixer contract, caches that hold and grow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_rms
from mixer_contract import (
    assert_causal,
    assert_gradients,
    assert_packed_is_separate,
    assert_padded_rows_are_alone,
    assert_pieces_are_the_whole,
    assert_states_close,
    filled,
    inputs,
)

from core.mixers import Attention, AttentionCache, AttentionState
from core.mixers.rotary import positions_of, rotate, rotation, sequence_numbers

SMALL = {"embed_dim": 12, "num_heads": 4, "head_dim": 6, "causal": True}
FLAGS = {
    "plain": {},
    "one": {"embed_dim": 3, "num_heads": 1, "head_dim": None, "qkv_proj_bias": False, "out_proj_bias": False},
    "grouped": {"num_heads_kv": 2, "rotary_emb_dim": 4},
    "multi_query": {"num_heads_kv": 1, "rotary_emb_dim": 6, "rotary_emb_interleaved": True, "softmax_scale": 0.7},
    "conv": {"d_conv": 4, "rotary_emb_dim": 4, "rotary_emb_base": 50.0, "num_heads_kv": 2},
    "mlp": {"mlp_dim": 5, "d_conv": 3},
    "everything": {"mlp_dim": 257, "d_conv": 2, "rotary_emb_dim": 2, "num_heads_kv": 2, "out_proj_bias": False},
}


def layer(dtype: torch.dtype = torch.float64, **arguments) -> Attention:
    return filled(Attention(**{**SMALL, **arguments}), dtype)


def by_hand(mixer: Attention, u: torch.Tensor) -> torch.Tensor:
    """The layer written out: heads one by one, rotation by complex numbers, softmax."""
    length, width, shared = u.shape[1], mixer.head_dim, mixer.num_heads // mixer.num_heads_kv
    projected = F.linear(u, mixer.in_proj.weight, mixer.in_proj.bias)
    qkv, mlp = projected[..., : mixer.qkv_dim], projected[..., mixer.qkv_dim :]
    if mixer.conv1d is not None:
        padded = F.pad(qkv.mT, (mixer.d_conv - 1, 0))
        qkv = F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=mixer.qkv_dim).mT
    heads = list(qkv.split(width, -1))
    R = mixer.rotary_emb_dim
    turn = torch.outer(torch.arange(length).double(), mixer.rotary_emb_base ** (-torch.arange(0, R, 2).double() / R))
    for i in range(mixer.num_heads + mixer.num_heads_kv):
        t = heads[i].clone()
        pairs = (slice(0, R, 2), slice(1, R, 2)) if mixer.rotary_emb_interleaved else (slice(R // 2), slice(R // 2, R))
        turned = torch.complex(t[..., pairs[0]], t[..., pairs[1]]) * torch.polar(torch.ones_like(turn), turn)
        t[..., pairs[0]], t[..., pairs[1]] = turned.real, turned.imag
        heads[i] = t
    outputs = []
    for i in range(mixer.num_heads):
        k, v = (heads[mixer.num_heads + j * mixer.num_heads_kv + i // shared] for j in (0, 1))
        scores = heads[i] @ k.mT * mixer.scale
        if mixer.causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    if mixer.mlp_dim:
        up, gate = mlp.chunk(2, -1)
        outputs.append(up * F.silu(gate))
    return F.linear(torch.cat(outputs, -1), mixer.out_proj.weight, mixer.out_proj.bias)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", FLAGS)
def test_matches_the_equations(name: str, causal: bool):
    mixer = layer(**{**FLAGS[name], "causal": causal})
    x = inputs(2, 9, mixer.embed_dim)
    torch.testing.assert_close(mixer(x), by_hand(mixer, x))


def test_parameters_are_the_published_ones():
    mixer = Attention(32, 4, num_heads_kv=2, head_dim=16, mlp_dim=100, d_conv=4, rotary_emb_dim=8)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": (128 + 256, 32), "in_proj.bias": (128 + 256,), "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,), "out_proj.weight": (32, 64 + 128), "out_proj.bias": (32,),
    }  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_whole_pieces_tokens(name: str):
    """In particular the convolution's state after a prompt, which is that of its inputs."""
    mixer = layer(**FLAGS[name])
    assert_pieces_are_the_whole(mixer, inputs(2, 9, mixer.embed_dim))


def test_states_that_grow_and_states_with_room():
    mixer, x = layer(**FLAGS["conv"]), inputs(2, 9, 12)
    grown, fixed = mixer.init_state(2), mixer.init_state(2, max_length=20)
    assert (type(grown), type(fixed)) == (AttentionState, AttentionCache)
    for piece in x.split([4, 1, 4], dim=1):
        y, grown = mixer.forward_state(piece, grown)
        y_fixed, fixed = mixer.forward_state(piece, fixed)
        torch.testing.assert_close(y, y_fixed)
    assert grown.keys.shape == (2, 9, 2, 6)
    assert fixed.keys.shape == (2, 20, 2, 6)
    cut = type(grown)(fixed.conv, fixed.keys[:, :9], fixed.values[:, :9], fixed.length)
    assert_states_close(grown, cut)


@pytest.mark.parametrize("name", ["grouped", "everything"])
@pytest.mark.parametrize("lengths", [(7, 1, 4), (3, 7, 0)])
def test_padded_rows_equal_alone(name: str, lengths: tuple[int, ...]):
    assert_padded_rows_are_alone(layer(**FLAGS[name]), 12, lengths)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_separate(causal: bool):
    assert_packed_is_separate(layer(**{**FLAGS["everything"], "causal": causal}), 12)


def test_returning_sequence_numbers_are_new_sequences():
    mixer, x = layer(rotary_emb_dim=4), inputs(1, 9, 12)
    index = torch.tensor([[0, 0, 0, 1, 1, 0, 0, -1, -1]])
    want = torch.cat([mixer(x[:, :3]), mixer(x[:, 3:5]), mixer(x[:, 5:7])], dim=1)
    torch.testing.assert_close(mixer(x, seq_idx=index)[:, :7], want)
    assert sequence_numbers(9, x.device, index, None).tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 3]]
    assert positions_of(sequence_numbers(9, x.device, index, None)).tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1]]


def test_causal():
    assert_causal(layer(torch.float32, d_conv=3, rotary_emb_dim=4), 12)


def test_gradients():
    mixer = layer(**FLAGS["conv"])
    _, state = mixer.forward_state(inputs(2, 3, 12), mixer.init_state(2))
    assert_gradients(mixer, inputs(2, 4, 12), state)


def test_rotation_is_relative_and_exact_far_away():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    products = []
    for start in (0, 3_000_000):
        cos, sin = rotation(torch.tensor([start, start + 5]), 8, 10000.0, True)
        products.append((rotate(q, cos[0], sin[0], False) * rotate(k, cos[1], sin[1], False)).sum())
    torch.testing.assert_close(*products)
    cos, _ = rotation(torch.tensor([3_000_001]), 8, 10000.0)
    torch.testing.assert_close(cos[0, 0], torch.tensor(3_000_001.0).double().cos().float())


def test_bfloat16():
    arguments = FLAGS["conv"]
    truth, low = layer(**arguments), layer(torch.bfloat16, **arguments)
    truth.load_state_dict(low.state_dict())
    x = inputs(2, 40, 12, torch.bfloat16)
    wanted, state = truth(x.double()), low.init_state(2, max_length=40)
    assert relative_rms(low(x), wanted) < 0.02
    stepped = torch.cat([low.decode(x[:, t : t + 1], state) for t in range(40)], dim=1)
    assert relative_rms(stepped, wanted) < 0.02
    assert (stepped.dtype, state.keys.dtype) == (torch.bfloat16, torch.bfloat16)


def test_autocast():
    mixer, x = layer(torch.float32, **FLAGS["everything"]), inputs(2, 16, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        stepped = mixer.decode(x, mixer.init_state(2, max_length=16))
    assert relative_rms(y.float(), mixer(x)) < 0.03
    torch.testing.assert_close(stepped, y, rtol=2e-2, atol=2e-2)


def test_compiles_and_exports():
    mixer, x = layer(torch.float32, **FLAGS["everything"]), inputs(2, 9, 12, torch.float32)
    want = mixer(x)
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), want)
    torch.testing.assert_close(torch.export.export(mixer, (x,)).module()(x), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 0}, "embed_dim: got 0"),
        ({"num_heads": 5, "head_dim": None}, "num_heads: got 5, wanted a divisor of embed_dim = 12"),
        ({"num_heads_kv": 3}, "num_heads_kv: got 3, wanted a divisor of num_heads = 4"),
        ({"rotary_emb_dim": 3}, "rotary_emb_dim: got 3, wanted an even number up to the head's 6"),
        ({"rotary_emb_dim": 8}, "rotary_emb_dim: got 8"),
        ({"d_conv": -1}, "d_conv: got -1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Attention(**{**SMALL, **arguments})


def test_bad_calls():
    x, free = inputs(2, 4, 12), layer(causal=False)
    with pytest.raises(ValueError, match="causal: got False"):
        free.forward_state(x, free.init_state(2))
    causal = layer()
    with pytest.raises(ValueError, match=r"decode: got a state without fixed room.*max_length=M"):
        causal.decode(x, causal.init_state(2))
