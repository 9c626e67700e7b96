"""H3, Mamba's and S4's block around each transformation: the recurrence written out, and the mixer contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fill import fill_input
from mixer_contract import assert_packed_is_separate, assert_padded_rows_are_alone, assert_pieces_are_the_whole
from torch import Tensor, nn

from core.mixers import H3, S4, GatedBlock, Mamba, UngatedBlock
from core.mixers.inner import S6, LongConvolution, TimeInvariant

WIDTH, LENGTH = 4, 11
INNER: dict[str, dict[str, Any]] = {
    "s4": {"d_state": 4},
    "s4d": {"d_state": 4},
    "dss": {"d_state": 4},
    "s6": {"d_state": 3},
    "hyena": {"l_max": 30, "filter_order": 8, "w": 3.0},
}
BLOCKS = {"h3": H3, "gated": GatedBlock, "ungated": UngatedBlock}
EVERY = [pytest.param(block, inner, id=f"{block}-{inner}") for block in BLOCKS for inner in INNER]
CARRIED = [case for case in EVERY if case.values[1] != "hyena"]


def layer(block: str, inner: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return BLOCKS[block](WIDTH, inner=inner, inner_cfg={**INNER[inner], **arguments}, dtype=torch.float64)


def inputs(batch: int = 2, length: int = LENGTH, width: int = WIDTH) -> Tensor:
    return fill_input("x", (batch, length, width)).double()


def recurrence(inner: nn.Module, u: Tensor) -> Tensor:
    """The transformation token by token, from its definition."""
    outputs = []
    if isinstance(inner, S6):
        dt, B, C = inner._parts(u)
        dt = F.softplus((dt if inner.dt_weight is None else dt @ inner.dt_weight.T) + inner.dt_bias)
        B, C = (t.squeeze(2)[:, :, None] if t.ndim == 4 else t.expand(*u.shape, -1) for t in (B, C))
        h = u.new_zeros(u.shape[0], u.shape[2], inner.d_state)
        for t in range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * -inner.A_log.exp()) * h + (dt * u)[:, t, :, None] * B[:, t]
            outputs.append((h * C[:, t]).sum(-1) + inner.D * u[:, t])
    elif isinstance(inner, TimeInvariant):
        state = inner.start(u.shape[0], u.device, u.dtype)
        outputs = [inner.steps(u[:, t : t + 1], state)[:, 0] for t in range(u.shape[1])]
    else:
        assert isinstance(inner, LongConvolution)
        taps, bias = inner.filter_fn.filter(u.shape[1]), inner.filter_fn.bias
        for t in range(u.shape[1]):
            outputs.append(sum(taps[s] * u[:, t - s] for s in range(t + 1)) + bias * u[:, t])
    return torch.stack(outputs, dim=1)


def convolved(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.mT, (conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, groups=x.shape[2]).mT


@pytest.mark.parametrize(("block", "inner"), EVERY)
def test_matches_the_equations(block: str, inner: str) -> None:
    mixer, x = layer(block, inner), inputs()
    if block == "h3":
        y = recurrence(mixer.inner, convolved(mixer.conv1d, mixer.k_proj(x)) * mixer.v_proj(x))
        want = mixer.out_proj(mixer.q_proj(x) * y)
    elif block == "gated":
        u, z = mixer.in_proj(x).chunk(2, dim=-1)
        want = mixer.out_proj(recurrence(mixer.inner, F.silu(convolved(mixer.conv1d, u))) * F.silu(z))
    else:
        want = F.glu(mixer.out_proj(F.gelu(recurrence(mixer.inner, x))), dim=-1)
    torch.testing.assert_close(mixer(x), want)


@pytest.mark.parametrize(("block", "inner"), CARRIED)
def test_pieces_rows_and_packing(block: str, inner: str) -> None:
    mixer = layer(block, inner)
    assert_pieces_are_the_whole(mixer, inputs())
    if block == "h3":
        assert_padded_rows_are_alone(mixer, WIDTH, (7, 1, 0))
        assert_packed_is_separate(mixer, WIDTH)


@pytest.mark.parametrize("block", BLOCKS)
def test_long_convolution_in_pieces(block: str) -> None:
    mixer, x = layer(block, "hyena"), inputs()
    state, outputs = mixer.init_state(2), []
    for piece in x.split(4, dim=1):
        y, state = mixer.forward_state(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), mixer(x))
    with pytest.raises(ValueError, match="at most l_max = 30"):
        mixer.forward_state(inputs(length=20), state)
    with pytest.raises(ValueError, match="decode: a long convolution's state grows"):
        mixer.decode(x[:, :1], state)
    with pytest.raises(ValueError, match="lengths: a transformation whose state grows"):
        mixer.forward_state(x, mixer.init_state(2), torch.tensor([3, 4]))


def test_gated_s6_is_mamba() -> None:
    """The same function as the Mamba layer with the same weights."""
    block, mamba = layer("gated", "s6", dt_rank=1), Mamba(WIDTH, d_state=3, dt_rank=1, dtype=torch.float64)
    weights = {name.removeprefix("inner."): tensor for name, tensor in block.state_dict().items()}
    weights["dt_proj.weight"], weights["dt_proj.bias"] = weights.pop("dt_weight"), weights.pop("dt_bias")
    mamba.load_state_dict(weights)
    torch.testing.assert_close(block(inputs()), mamba(inputs()))


def test_ungated_s4_is_s4() -> None:
    block, s4 = layer("ungated", "s4"), S4(WIDTH, d_state=4, dtype=torch.float64)
    weights = {}
    for name, tensor in block.state_dict().items():
        name = name.replace("inner.", "layer.").replace("out_proj", "output_linear.0")
        weights[name] = tensor[None] if name == "layer.D" else tensor
    s4.load_state_dict(weights)
    torch.testing.assert_close(block(inputs()), s4(inputs()))


@pytest.mark.parametrize("selective", [(), ("dt",), ("B",), ("C",), ("B", "C"), ("dt", "B", "C")])
def test_selection_is_of_the_named_parts(selective: tuple[str, ...]) -> None:
    """Equal to the recurrence; linear in the input exactly if nothing is selective."""
    mixer, u = layer("gated", "s6", selective=selective).inner, inputs(width=2 * WIDTH)
    y = mixer.run(u, None)[0]
    torch.testing.assert_close(y, recurrence(mixer, u))
    assert torch.allclose(mixer.run(2 * u, None)[0], 2 * y) == (not selective)
    made = {"B": mixer.B is None, "C": mixer.C is None, "dt": mixer.dt_weight is not None}
    assert {part for part, by_input in made.items() if by_input} == set(selective)


def test_gradients() -> None:
    for block, inner in (("h3", "s4d"), ("gated", "hyena"), ("ungated", "s6")):
        mixer = layer(block, inner)
        assert torch.autograd.gradcheck(mixer, (inputs(1, 5).requires_grad_(),), fast_mode=True)
        mixer(inputs()).sum().backward()
        assert [name for name, p in mixer.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H3(4, inner="s5"), "inner: got 's5', wanted one of s4"),
        (lambda: H3(4, inner="s6", inner_cfg={"dstate": 3}), "inner_cfg: s6 has no dstate"),
        (lambda: GatedBlock(4, inner="hyena"), "inner_cfg: hyena"),
        (lambda: GatedBlock(5, expand=1.5), "expand: got 1.5"),
        (lambda: UngatedBlock(0), "d_model: got 0"),
        (lambda: S6(4, selective=("A",)), "selective: got"),
        (lambda: S6(4, init="ones"), "init: got 'ones'"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
