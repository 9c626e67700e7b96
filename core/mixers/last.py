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
from core.parallel.group import in_parts
from kernels.causal_conv1d import product


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
    mixed, conv_state = _convolved(mixer, x, 0, inner, conv)
    y, ssm_state = mixer._scan(mixed, None, ssm, None, None, True)
    after = MambaState(_like(conv_state, conv), _like(ssm_state, ssm))
    return mixer.out_proj(_gated(y[:, -1:], z)), after


def _mamba2(mixer: Mamba2, x: Tensor, state: Mamba2State | None) -> tuple[Tensor, Mamba2State]:
    if state is None and mixer.init_states is not None:
        state = mixer.init_state(len(x))
    first, (conv, ssm) = 2 * mixer.d_mlp + mixer.d_ssm, (None, None) if state is None else state
    mlp, z = _rows(mixer.in_proj, x[:, -1:], 0, first).split([2 * mixer.d_mlp, mixer.d_ssm], dim=-1)
    end = first + mixer.conv_dim
    dt = _rows(mixer.in_proj, x, end, end + mixer.nheads)
    xbc, conv_state = _convolved(mixer, x, first, end, conv)
    y, ssm_state = mixer._scan(xbc, None, dt, ssm, None, None, True)
    y = y[:, -1:]
    if mixer.norm is None:
        y = _gated(y, z.unflatten(-1, y.shape[2:]))
    return mixer._output(mlp, y, z), Mamba2State(_like(conv_state, conv), _like(ssm_state, ssm))


def _convolved(mixer: Mamba | Mamba2, x: Tensor, first: int, end: int, conv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs first to end of in_proj behind the convolution, and its state."""
    p, filters = mixer.in_proj, (mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
    plain = conv is None and p.bias is None and not torch.is_grad_enabled() and not in_parts()
    if plain and product.saves_a_pass(x, p.weight[first:end], *filters):
        _, y, _, state = product.project_conv(x, p.weight[first:end], *filters)
        return y, state
    return mixer._conv(_rows(p, x, first, end), conv, None, None, True)


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
