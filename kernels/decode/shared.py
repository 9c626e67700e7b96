"""What the decoding kernels share: activation and the step of a convolution.

Legend: as in ``kernels.decode``.
"""

# pyright: reportGeneralTypeIssues=false
# (Triton's loops are no iterators.)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def slots(ptr, step, c, m_c, NUMBER: tl.constexpr):
    """``NUMBER`` rows of channels c, ``step`` apart, as a tuple."""
    rows = ()
    for j in tl.static_range(NUMBER):
        rows = rows + (tl.load(ptr + j * step + c, mask=m_c, other=0.0),)  # noqa: RUF005  Triton has no unpacking
    return rows


@triton.jit
def conv_tile(value, bias, taps, past, state_ptr, c, m_c, C, W: tl.constexpr, ACC: tl.constexpr):
    """silu of the convolution's output (BLOCK,) for the new input ``value``; the state's slots move by one."""
    y = bias + value * taps[W - 1].to(ACC)
    for j in tl.static_range(W - 1):
        y += past[j].to(ACC) * taps[j].to(ACC)
    tl.debug_barrier()  # where channels are fewer than threads, several have loaded a slot and one stores it
    for j in tl.static_range(1, W - 1):
        tl.store(state_ptr + (j - 1) * C + c, past[j], mask=m_c)
    if W > 1:
        tl.store(state_ptr + (W - 2) * C + c, value, mask=m_c)
    return silu(y)
