"""A linear recurrence with one complex decay a channel, in parallel over time.

Legend: B batch, L length, P channels, Q chunk, K chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # Q


def linear_scan(log_a: Tensor, u: Tensor, initial: Tensor) -> Tensor:
    """Computes ``x_t = exp(log_a) x_{t-1} + u_t`` for all t.

    Within a chunk it is a product with the (Q, Q) matrix of the powers of exp(log_a); the last states of the chunks
    follow the same recurrence with exp(Q log_a), so that the depth is log_Q(L) (the associative scan of Blelloch 1990,
    with wide leaves). Powers are computed in complex128: a phase grows with its exponent.

    Args:
        log_a: (P,) complex, with real part at most 0.
        u: (B, L, P) complex inputs.
        initial: (B, P) complex, the state before the first.

    Returns:
        (B, L, P) the states.
    """
    length = u.shape[1]
    if not length:
        return u
    size = min(CHUNK, length)
    places = torch.arange(size, device=u.device)
    lags = places[:, None] - places
    matrix = torch.exp(lags.clamp(min=0)[..., None] * log_a.to(torch.complex128)).to(u.dtype) * (lags >= 0)[..., None]
    reach = torch.exp((places + 1)[:, None] * log_a.to(torch.complex128)).to(u.dtype)  # (Q, P)
    chunks = F.pad(u, (0, 0, 0, -length % size)).unflatten(1, (-1, size))  # (B, K, Q, P)
    local = torch.einsum("ijp,bkjp->bkip", matrix, chunks)
    if chunks.shape[1] == 1:
        starts = initial[:, None]
    else:
        ends = linear_scan(size * log_a, local[:, :-1, -1], initial)
        starts = torch.cat([initial[:, None], ends], dim=1)  # (B, K, P)
    return (local + reach * starts[:, :, None]).flatten(1, 2)[:, :length]
