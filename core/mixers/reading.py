"""Prompts through Mamba and Mamba-2 layers: what a layer leaves to the kernel behind it, where that saves a pass.

No gradients. The output projection, and a Mamba-2 layer's norm in front of it, are left to the block behind the layer,
which adds and normalises (``kernels.norm.late``).

Legend: B batch, L length, D model width, E inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.mixers.mamba import Mamba, MambaState, decay_rates
from core.mixers.mamba2 import Mamba2, Mamba2State
from core.parallel.group import in_parts
from kernels.norm import late
from kernels.norm.late import Late
from kernels.ssd import gated

LINE = 128  # bytes of a GPU's memory that travel together


@torch.no_grad()
def read_mamba2(
    mixer: Mamba2, x: Tensor, state: Mamba2State | None, state_dtype: torch.dtype | None = None
) -> tuple[Tensor | Late, Mamba2State]:
    """``mixer.forward_state`` without gradients, whose norm is left to what follows where that saves time.

    Args:
        mixer: The layer.
        x: (B, L, D).
        state: From ``init_state`` or an earlier call, left as it is; None before the first token, which saves the
            time to read zeros.
        state_dtype: Of the scan's state behind the last token; as the one before by default, or the scan's own.

    Returns:
        (B, L, D), or what waits for its norm, and the state after the last token.
    """
    m, out_proj = mixer.norm, mixer.out_proj
    plain = isinstance(out_proj, nn.Linear) and out_proj.bias is None
    fits = m is not None and not m.norm_before_gate and mixer.ngroups == 1 and not mixer.d_mlp and not mixer.reverse
    if state is None and mixer.init_states is not None:
        state = mixer.init_state(len(x))
    conv, ssm = (None, None) if state is None else state
    mlp, z, xbc, dt = mixer._parts(_enter_aligned(mixer, x))
    xbc, conv_state = mixer._conv(xbc, conv, None, None, True)
    rows, B, C = mixer._split(xbc)
    given = (rows, dt, decay_rates(mixer.A_log), B, C, mixer._skip(), z.unflatten(-1, rows.shape[2:]), mixer.dt_bias)
    limits, wanted = (mixer.dt_min, mixer.dt_max), state_dtype or (None if ssm is None else ssm.dtype)
    if m is not None and fits and plain and not in_parts() and gated.saves_a_pass(*given, ssm, dt_limit=limits):
        y, squares, ssm_state = gated.gated_scan(*given, m.weight, ssm, dt_limit=limits, state_dtype=wanted)
        out: Tensor | Late = Late(y, squares, mixer.d_ssm, m.eps, out_proj.weight)
        if type(out_proj) is not nn.Linear:  # more than a weight
            out = Late(out_proj(y), *out[1:4])
    else:
        y, ssm_state = mixer._scan(xbc, z, dt, ssm, None, None, True)
        out = mixer._output(mlp, y, z)
    kept = mixer.conv1d.weight.dtype if conv is None else conv.dtype
    return out, Mamba2State(conv_state.to(kept), ssm_state if wanted is None else ssm_state.to(wanted))


@torch.no_grad()
def read_mamba(
    mixer: Mamba, x: Tensor, state: MambaState | None, stream: Tensor, weight: Tensor,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor | Late, MambaState]:  # fmt: skip
    """``mixer.forward_state`` without gradients, whose product is left to what follows where that saves time.

    Args:
        mixer: The layer.
        x: (B, L, D).
        state: From ``init_state`` or an earlier call, left as it is; None before the first token.
        stream: (B, L, D) what the output will be added to.
        weight: (D,) like that of the RMSNorm behind it.
        state_dtype: Of the scan's state behind the last token; as the one before by default, or the scan's own.

    Returns:
        (B, L, D), or what waits for its product, and the state after the last token.
    """
    out_proj, (conv, ssm) = mixer.out_proj, (None, None) if state is None else state
    mixed, z = mixer.in_proj(x).chunk(2, dim=-1)
    mixed, conv_state = mixer._conv(mixed, conv, None, None, True)
    y, ssm_state = mixer._scan(mixed, z, ssm, None, None, True)
    plain = type(out_proj) is nn.Linear and out_proj.bias is None and not in_parts()
    if plain and late.saves_a_pass(y, out_proj.weight, stream, weight):
        out: Tensor | Late = Late(y, None, 1, 0.0, out_proj.weight)
    else:
        out = out_proj(y)
    kept = mixer.conv1d.weight.dtype if conv is None else conv.dtype
    wanted = state_dtype or (None if ssm is None else ssm.dtype)
    return out, MambaState(conv_state.to(kept), ssm_state if wanted is None else ssm_state.to(wanted))


def _enter_aligned(mixer: Mamba2, x: Tensor) -> Tensor:
    """The input projection, whose rows begin at whole lines of memory on a GPU: what reads them is faster then."""
    p, size = mixer.in_proj, x.element_size()
    if not x.is_cuda or type(p) is not nn.Linear or p.bias is not None or p.weight.dtype != x.dtype or in_parts():
        return mixer._enter(x)
    columns = -(-p.out_features * size // LINE) * LINE // size
    rows = x.new_empty(*x.shape[:-1], columns)[..., : p.out_features]
    torch.mm(x.flatten(0, 1), p.weight.T, out=rows.flatten(0, 1))
    return rows
