"""``conv_update`` on GPUs: one Triton kernel, a program a row and block of channels. Addresses are int64.

B batch, T tokens, D channels, W conv width.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.causal_conv1d.triton_steps import sigmoid

BLOCK = 128  # channels of a program: steps are short, so many programs


@triton.jit
def _input(x, state, j, x_t, s_w, m_d, W: tl.constexpr, ACC: tl.constexpr):
    """Input j (int64) of state and tokens laid end to end."""
    before = j < W - 1
    old = tl.load(state + j * s_w, mask=m_d & before, other=0.0).to(ACC)
    new = tl.load(x + (j - (W - 1)) * x_t, mask=m_d & (j >= W - 1), other=0.0).to(ACC)
    return old + new


@triton.jit
def _update_kernel(
    x, state, weight, bias, y, T, D, blocks, x_b, x_t, x_d, s_b, s_w, s_d, w_d, w_w, bias_d,
    W: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of all tokens, then the state: row i takes what is T inputs further, none of which is overwritten yet."""
    pid = tl.program_id(0)
    b, d = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * BD + tl.arange(0, BD)
    m_d = d < D
    x += b * x_b + d * x_d
    state += b * s_b + d * s_d
    y += b * T * D + d
    weight += d * w_d
    start, first = tl.zeros((BD,), ACC), b * 0
    if HAS_BIAS:
        start = tl.load(bias + d * bias_d, mask=m_d, other=0.0).to(ACC)
    for t in range(T):
        total = start
        for w in tl.static_range(W):
            value = _input(x, state, first + t + w, x_t, s_w, m_d, W, ACC)
            total += value * tl.load(weight + w * w_w, mask=m_d, other=0.0).to(ACC)
        if SILU:
            total *= sigmoid(total)
        tl.store(y + t * D, total, mask=m_d)
    for i in tl.static_range(W - 1):
        tl.store(state + i * s_w, _input(x, state, first + T + i, x_t, s_w, m_d, W, ACC), mask=m_d)


def update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Updates ``state (B, W - 1, D)`` in place and returns y ``(B, T, D)`` in x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    batch, tokens, channels = x.shape
    blocks = triton.cdiv(channels, BLOCK)
    # a state without columns has no memory, but a kernel's argument wants some
    with _on(x):
        _update_kernel[(batch * blocks,)](
            x, state if state.numel() else x, weight, x if bias is None else bias, y, tokens, channels, blocks,
            *x.stride(), *state.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
            W=weight.shape[1], BD=BLOCK, HAS_BIAS=bias is not None, SILU=silu,
            ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=2,
        )  # fmt: skip
    return y


def _on(x: Tensor) -> torch.device | torch.cuda.device:
    """Makes the device of ``x`` the current one while the kernel is launched."""
    return torch.get_device_module(x.device).device(x.device) if x.device.type != "cpu" else torch.device("cpu")
