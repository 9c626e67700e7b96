"""What mixers of the family make of nothing, of padding and of float16's range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fill import fill_input
from torch import Tensor

from core.mixers import DSS, H3, S4, S4D, S5, GatedBlock, Hyena, LinearAttention, MambaS4, Retention, UngatedBlock

WIDTH = 6
LAYERS: dict[str, Callable[..., Any]] = {
    "s4": lambda **f: S4(WIDTH, 8, **f),
    "s4_convolution": lambda **f: S4(WIDTH, 8, method="convolution", **f),
    "s4d_convolution": lambda **f: S4D(WIDTH, 8, method="convolution", **f),
    "dss": lambda **f: DSS(WIDTH, 8, **f),
    "dss_softmax": lambda **f: DSS(WIDTH, 8, variant="softmax", l_max=16, **f),
    "s5": lambda **f: S5(WIDTH, 8, **f),
    "h3": lambda **f: H3(WIDTH, **f),
    "hyena": lambda **f: Hyena(WIDTH, 16, **f),
    "hyena_two_sided": lambda **f: Hyena(WIDTH, 16, bidirectional=True, **f),
    "retention": lambda **f: Retention(WIDTH, 3, **f),
    "linear_attention": lambda **f: LinearAttention(WIDTH, 2, **f),
    "mamba_s4": lambda **f: MambaS4(WIDTH, 8, **f),
    "gated_hyena": lambda **f: GatedBlock(WIDTH, inner="hyena", inner_cfg={"l_max": 16}, **f),
    "ungated_s6": lambda **f: UngatedBlock(WIDTH, inner="s6", **f),
}
WHOLE = ("dss_softmax", "hyena_two_sided")  # whole sequences only
ROWS = [name for name in LAYERS if name not in (*WHOLE, "gated_hyena")]  # with rows of unequal length


def layer(name: str) -> Any:
    torch.manual_seed(0)
    return LAYERS[name](dtype=torch.float64)


def inputs(batch: int = 3, length: int = 11) -> Tensor:
    return fill_input("x", (batch, length, WIDTH)).double()


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_in_nothing_out(name: str) -> None:
    mixer, x = layer(name), inputs()
    for empty in (x[:, :0], x[:0]):
        y = mixer(empty.requires_grad_())
        assert y.shape == empty.shape
        y.sum().backward()
    if name in WHOLE:
        return
    _, state = mixer.forward_state(x, mixer.init_state(3))
    y, after = mixer.forward_state(x[:, :0], state)
    assert y.shape == (3, 0, WIDTH)
    for a, b in zip(after, state, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ROWS)
def test_padding_of_rows_reaches_neither_numbers_nor_gradients(name: str) -> None:
    mixer, x, lengths = layer(name), inputs(), [11, 4, 0]
    real = torch.arange(11) < torch.tensor(lengths)[:, None]
    leaves, grads = list(mixer.parameters()), []
    alone = [mixer.forward_state(x[r : r + 1, :n], mixer.init_state(1))[0] for r, n in enumerate(lengths) if n]
    wanted = torch.cat([y[0] for y in alone])
    grads.append(torch.autograd.grad(wanted.square().sum(), leaves, materialize_grads=True))
    for value in (0.0, 3.0):
        padded = torch.where(real[..., None], x, value)
        y, _ = mixer.forward_state(padded, mixer.init_state(3), torch.tensor(lengths))
        torch.testing.assert_close(y[real], wanted)
        grads.append(torch.autograd.grad(y[real].square().sum(), leaves, materialize_grads=True))
    for got in grads[1:]:
        torch.testing.assert_close(got, grads[0])
    nan = torch.where(real[..., None], x, math.nan)
    y, after = mixer.forward_state(nan, mixer.init_state(3), torch.tensor(lengths))
    torch.testing.assert_close(y[real], wanted)
    assert all(t.isfinite().all() for t in after)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "hyena_two_sided"])
def test_padding_within_a_packed_sequence_is_skipped(name: str) -> None:
    mixer, x = layer(name), inputs()
    seq_idx = torch.tensor([[-1, 0, 0, -1, 0, 5, 5, 5, 2, -1, -1], [0] * 11, [-1] * 11])
    x = torch.where((seq_idx >= 0)[..., None], x, math.nan)
    y = mixer(x, seq_idx=seq_idx)
    for row, places in ((0, [1, 2, 4]), (0, [5, 6, 7]), (0, [8]), (1, list(range(11)))):
        torch.testing.assert_close(y[row, places], mixer(x[row, places][None])[0])
    assert (y[seq_idx < 0] == 0).all()


def test_sums_of_linear_attention_may_pass_float16() -> None:
    torch.manual_seed(0)
    mixer = LinearAttention(64, 1, dtype=torch.float16)
    with torch.no_grad():
        mixer.in_proj.weight[:128] *= 4
    x = torch.randn(1, 2000, 64).half()
    wanted = mixer.double()(x.double()).detach()
    q, k, _ = mixer.in_proj(x.double()).chunk(3, dim=-1)
    weights = (torch.nn.functional.elu(q[0, -1]) + 1) @ (torch.nn.functional.elu(k[0]) + 1).sum(0)
    assert weights > torch.finfo(torch.float16).max
    y = mixer.half()(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), wanted, rtol=0.01, atol=0.01 * float(wanted.square().mean().sqrt()))


@pytest.mark.parametrize("name", ["s4", "s5", "hyena", "h3"])
def test_shapes_without_memory(name: str) -> None:
    mixer = LAYERS[name](device="meta")
    assert mixer(torch.empty(2, 9, WIDTH, device="meta")).shape == (2, 9, WIDTH)
