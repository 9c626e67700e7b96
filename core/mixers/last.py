"""The last token's output of a sequence and the state behind it: what reading a prompt wants of a model's last layer.

No token in front of it sees that layer's other outputs: gate, norm and output projection are worked out for one token.

Legend: B batch, L length, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.mixers.contract import Mixer
from core.mixers.mamba import Mamba, MambaState
from core.mixers.mamba2 import Mamba2, Mamba2State


def forward_last(mixer: Mixer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """``mixer.forward_state``, of whose output only the last token is wanted.

    Args:
        mixer: Any layer; a causal Mamba or Mamba-2 saves what its other tokens' outputs take.
        x: (B, L, D).
        state: From ``init_state`` or an earlier call; left as it is. None before the first token.

    Returns:
        (B, 1, D) and the state after the last token.
    """
    if type(mixer) is Mamba and type(mixer.in_proj) is nn.Linear and not mixer.reverse:
        return _mamba(mixer, x, state)
    if type(mixer) is Mamba2 and type(mixer.in_proj) is nn.Linear and not mixer.reverse:
        return _mamba2(mixer, x, state)
    y, state = mixer.forward_state(x, mixer.init_state(len(x)) if state is None else state)
    return y[:, -1:], state


def _mamba(mixer: Mamba, x: Tensor, state: MambaState | None) -> tuple[Tensor, MambaState]:
    inner, (conv, ssm) = mixer.d_inner, (None, None) if state is None else state
    z = _rows(mixer.in_proj, x[:, -1:], inner, 2 * inner)
    mixed, conv_state = mixer._conv(_rows(mixer.in_proj, x, 0, inner), conv, None, None, True)
    y, ssm_state = mixer._scan(mixed, None, ssm, None, None, True)
    conv_state = _like(conv_state, mixer.conv1d.weight if conv is None else conv)
    return mixer.out_proj(_gated(y[:, -1:], z)), MambaState(conv_state, _like(ssm_state, ssm))


def _mamba2(mixer: Mamba2, x: Tensor, state: Mamba2State | None) -> tuple[Tensor, Mamba2State]:
    if state is None and mixer.init_states is not None:
        state = mixer.init_state(len(x))
    first, (conv, ssm) = 2 * mixer.d_mlp + mixer.d_ssm, (None, None) if state is None else state
    mlp, z = _rows(mixer.in_proj, x[:, -1:], 0, first).split([2 * mixer.d_mlp, mixer.d_ssm], dim=-1)
    rest = _rows(mixer.in_proj, x, first, mixer.in_proj.out_features)
    xbc, dt = rest.split([mixer.conv_dim, mixer.nheads], dim=-1)
    xbc, conv_state = mixer._conv(xbc, conv, None, None, True)
    y, ssm_state = mixer._scan(xbc, None, dt, ssm, None, None, True)
    y = y[:, -1:]
    if mixer.norm is None:
        y = _gated(y, z.unflatten(-1, y.shape[2:]))
    conv_state = _like(conv_state, mixer.conv1d.weight if conv is None else conv)
    return mixer._output(mlp, y, z), Mamba2State(conv_state, _like(ssm_state, ssm))


def _like(after: Tensor, before: Tensor | None) -> Tensor:
    """A state in the dtype of the one before."""
    return after if before is None else after.to(before.dtype)


def _rows(linear: nn.Linear, x: Tensor, first: int, end: int) -> Tensor:
    """Outputs first to end of a linear layer."""
    bias = linear.bias
    return F.linear(x, linear.weight[first:end], None if bias is None else bias[first:end])


def _gated(y: Tensor, z: Tensor) -> Tensor:
    """y silu(z), rounded once."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * F.silu(z.to(wide))).to(y.dtype)
