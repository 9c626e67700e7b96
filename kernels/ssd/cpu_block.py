"""The inside of chunks of ``ssd`` on the CPU without gradients: the masked matrices in one numba pass, then products.

The decay from position j to i is the running product of exp(a) that starts at j, one multiplication an entry, where the
plain operators take a running sum and an exponential, each a pass over all entries.

B batch, H heads, P head dim, N state, G groups, K routes, T positions, Q positions of a chunk, R = H / G.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kernels.jit import compiled
from kernels.ssd.aten import CHUNK
from kernels.ssd.quadratic import full_precision


@compiled(fastmath={"contract"})
def _matrix(a, dt, scores, out, enter, weight):
    """Fills out (M, R, T, T): decay times score times dt below the diagonal and on it, 0 above.

    Reads a and dt (M, R, T), scores (M, T, T). Writes enter (M, R, T), the decay from before the first position, and
    weight (M, R, T), the decay to the last times dt.
    """
    count, heads, length = a.shape
    product = np.empty(length, a.dtype)
    for m in range(count):
        for r in range(heads):
            step, since = dt[m, r], a.dtype.type(1)
            for i in range(length):
                decay = a.dtype.type(math.exp(a[m, r, i]))
                since *= decay
                enter[m, r, i] = since
                product[i] = 1
                row, score = out[m, r, i], scores[m, i]
                for j in range(i):
                    product[j] *= decay
                for j in range(i + 1):
                    row[j] = product[j] * score[j] * step[j]
                for j in range(i + 1, length):
                    row[j] = 0
            for j in range(length):
                weight[m, r, j] = product[j] * step[j]


def block(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, restart: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``kernels.ssd.quadratic.block`` without gradients, for any T: shapes and meaning are its."""
    done = x.shape[1] // CHUNK * CHUNK
    if 0 < done < x.shape[1]:
        halves = []
        for span in (slice(0, done), slice(done, None)):
            y, h = block(x[:, span], dt[:, span], A, B[:, span], C[:, span], h, _part(restart, span))
            halves.append(y)
        return torch.cat(halves, 1), h
    Q = min(CHUNK, x.shape[1])
    split, each = (x.shape[1] // Q, Q), (B.shape[3], x.shape[3] // B.shape[3])  # n chunks, Q; G, R
    a, dt = (t.unflatten(1, split).permute(0, 1, 3, 4, 2) for t in (dt * A, dt))  # (B, n, K, H, Q)
    if restart is not None:
        starts = restart.unflatten(2, split).transpose(1, 2)  # (B, n, K, Q)
        a = torch.where(starts[:, :, :, None], -math.inf, a)
    x, B, C = (t.unflatten(1, split).permute(0, 1, 3, 4, 2, 5) for t in (x, B, C))
    with full_precision(x.device):
        scores = C @ B.transpose(-1, -2)  # (B, n, K, G, Q, Q)
        out, enter, weight = _matrices(a, dt, scores)
        added = ((x * weight.unsqueeze(-1)).unflatten(3, each).transpose(-1, -2) @ B.unsqueeze(4)).flatten(3, 4)
        states, last = [], enter[..., -1, None, None]
        for i in range(split[0]):
            states.append(h)
            h = torch.addcmul(added[:, i], last[:, i], h)
        before = torch.stack(states, 1).unflatten(3, each)
        read = (C.unsqueeze(4) @ before.transpose(-1, -2)).flatten(3, 4)  # (B, n, K, H, Q, P)
        y = torch.addcmul(out @ x, read, enter.unsqueeze(-1))
    return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2), h


def _part(restart: Tensor | None, span: slice) -> Tensor | None:
    return None if restart is None else restart[:, :, span]


def _matrices(a: Tensor, dt: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_matrix`` writes for a and dt (..., H, Q) and scores (..., G, Q, Q)."""
    heads, Q = a.shape[-2:]
    lead = (*a.shape[:-2], heads, Q)
    out, enter, weight = (scores.new_empty(size) for size in ((*lead, Q), lead, lead))
    shape = (math.prod(scores.shape[:-2]), heads // scores.shape[-3], Q)
    given = [t.reshape(shape).detach().numpy() for t in (a, dt)]
    written = (out.view(*shape, Q), enter.view(shape), weight.view(shape))
    _matrix(*given, scores.reshape(shape[0], Q, Q).detach().numpy(), *(t.numpy() for t in written))
    return out, enter, weight
