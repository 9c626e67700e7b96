"""``selective_state_update`` of ``mamba_ssm.ops.triton.selective_state_update``.

B batch, D channels, H heads, P head dim, N state, G groups, S rows of states.
"""

from __future__ import annotations

from torch import Tensor

from kernels.state_update import state_update


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Decodes one token and updates the state in place.

    Args:
        state: ``(S, D, N)`` or ``(S, H, P, N)``.
        x: ``(B, D)`` or ``(B, H, P)``.
        dt: Shape of x. Where dt, A, D and dt_bias have stride 0 along P (and N), each is one number a head.
        A: ``(D, N)`` or ``(H, P, N)``.
        B: ``(B, N)`` or ``(B, G, N)``.
        C: As B.
        D: ``(D,)`` or ``(H, P)``, or None.
        z: Gate, shape of x, or None.
        dt_bias: As D.
        dt_softplus: Whether dt goes through softplus.
        state_batch_indices: ``(B,)``, the row of ``state`` of each row of x; -1 is padding.

    Returns:
        Shape and dtype of x.
    """
    B, C = (t.unsqueeze(1) if t.ndim == 2 else t for t in (B, C))
    if state.ndim == 4:
        dt = _tied(dt)
        A = A[:, 0, 0] if A.ndim == 3 and A.stride()[1:] == (0, 0) else A
        D, dt_bias = (None if t is None else _tied(t) for t in (D, dt_bias))
    x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))
    z = None if z is None else z.unsqueeze(1)
    y = state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, state_indices=state_batch_indices)
    return y.squeeze(1)


def _tied(t: Tensor) -> Tensor:
    """``(..., H, P)`` as ``(..., H)`` where all of P is one number in memory."""
    return t[..., 0] if t.stride(-1) == 0 else t
