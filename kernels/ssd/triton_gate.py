"""The gate of ``ssd`` in its backward on GPUs, in plain Triton: a kernel of its own, between the scan's forward, which
gives y before the gate once more, and the scan's backward, which gets the gradient of that.

Within the scan's backward z would need a third tile of a head and the state that enters a chunk, which is more than
shared memory and registers hold.

B batch, L tokens, K routes, H heads, P head dim.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ssd.problem import Problem
from kernels.ssd.triton_plan import Plan
from kernels.ssd.triton_sizes import power

ROWS, COLUMNS = 8, 256  # of a program's tile


@triton.jit
def gate_kernel(y, dy, z, dz, ys, zs, dys, tokens, L, K, width, P, BR: tl.constexpr, BE: tl.constexpr,
                real: tl.constexpr):  # fmt: skip
    """In place of y (B, L, K, H, P) as it was before the gate its gradient, and dz (B, L, H, P): with o the gated y,

        dy = do z s(z),   dz = sum over K of do y s(z) (1 + z (1 - s(z))),   s the sigmoid

    One program BR tokens and BE columns of all heads. dz is zero where y is: at tokens that are skipped z may be NaN.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    b, token, live = row // L, row % L, (row < tokens)[:, None] & (e < width)[None, :]
    head, p = e // P, e % P
    columns = head.to(tl.int64)
    z_at = (b * zs[0] + token * zs[1])[:, None] + (columns * zs[2] + p * zs[3])[None, :]
    gate = tl.load(z + z_at, mask=live, other=0).to(real)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    found = tl.zeros([BR, BE], real)
    for k in range(K):
        at = (row * ys[1] + k * ys[2])[:, None] + e[None, :]
        dy_at = (b * dys[0] + token * dys[1] + k * dys[2])[:, None] + (columns * dys[3] + p * dys[4])[None, :]
        before = tl.load(y + at, mask=live, other=0).to(real)
        after = tl.load(dy + dy_at, mask=live, other=0).to(real)
        found += tl.where(before == 0, 0.0, after * before * slope)
        tl.store(y + at, after * gate * sigmoid, mask=live)
    tl.store(dz + row[:, None] * width + e[None, :], found, mask=live)


def ungate(p: Problem, y: Tensor, dy: Tensor) -> Tensor:
    """The gradient of z; and that of y before the gate, in the place of y.

    Args:
        p: The problem, with its gate.
        y: Without the gate, ``(B, L, H, P)`` or ``(B, L, K, H, P)``, without gaps; overwritten.
        dy: Gradient of the gated y, in its shape.

    Returns:
        dz ``(B, L, H, P)`` in z's dtype.
    """
    z = p.z
    assert z is not None
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    width, tokens = p.heads * p.head_dim, p.batch * p.length
    if not (width and tokens):
        return dz
    y, dy = (t if t.ndim == 5 else t.unsqueeze(2) for t in (y, dy))
    columns = min(COLUMNS, power(width))
    Plan(p).launch(
        gate_kernel, (-(-tokens // ROWS), -(-width // columns)),
        {"y": y, "dy": dy, "z": z, "dz": dz},
        lambda: {
            "ys": y.stride(), "zs": z.stride(), "dys": dy.stride(), "tokens": tokens, "L": p.length,
            "K": y.shape[2], "width": width, "P": p.head_dim, "BR": ROWS, "BE": columns,
            "real": getattr(tl, str(p.dtype).removeprefix("torch.")),
        },
    )  # fmt: skip
    return dz
