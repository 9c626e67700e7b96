"""Mamba-S4 and complex Mamba: the mixer contract, and what they are by other means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixer_contract import (
    assert_causal,
    assert_gradients,
    assert_packed_is_separate,
    assert_padded_rows_are_alone,
    assert_pieces_are_the_whole,
    inputs,
)

from core.mixers import Mamba, MambaComplex, MambaS4

KINDS = {
    "s4d": lambda: MambaS4(3, 4, 3, kernel_cfg={"init": "inv"}),
    "s4": lambda: MambaS4(2, 4, 1, 3, diagonal=False, conv_bias=False, bias=True),
    "complex": lambda: MambaComplex(3, 2, d_conv=3),
}


def layer(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return KINDS[kind]().to(dtype)


@pytest.mark.parametrize("kind", ["s4d", "s4", pytest.param("complex", marks=pytest.mark.slow)])
def test_contract(kind: str) -> None:
    mixer = layer(kind)
    width = mixer.d_model
    assert_pieces_are_the_whole(mixer, inputs(2, 9, width))
    assert_padded_rows_are_alone(mixer, width, [0, 4, 7])
    assert_packed_is_separate(mixer, width)
    assert_causal(layer(kind, torch.float32), width)
    _, before = mixer.forward_state(inputs(2, 3, width), mixer.init_state(2))
    assert_gradients(mixer, inputs(2, 5, width), before)


def test_complex_states_without_imaginary_parts_are_real_ones() -> None:
    """With real A, B and C, y = 2 Re <C, h> is real Mamba's with C doubled."""
    mixer, real = layer("complex"), Mamba(3, 2, d_conv=3).double()
    rank, states = mixer.dt_rank, mixer.d_state
    with torch.no_grad():
        mixer.A_imag.zero_()
        weight = mixer.x_proj.weight
        weight[rank + 1 :: 2] = 0
        given = {k: v for k, v in mixer.state_dict().items() if k != "A_imag"}
        B, C = weight[rank : rank + 2 * states : 2], weight[rank + 2 * states :: 2]
        given["x_proj.weight"] = torch.cat([weight[:rank], B, 2 * C])
    real.load_state_dict(given)
    x = inputs(2, 11, 3)
    torch.testing.assert_close(mixer(x), real(x))


def test_mamba_s4_refuses_by_name() -> None:
    with pytest.raises(ValueError, match="d_conv: got 0"):
        MambaS4(4, d_conv=0)
    with pytest.raises(ValueError, match="d_state: got 3"):
        MambaS4(4, 3)
