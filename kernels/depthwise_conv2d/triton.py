"""The depthwise convolution on GPUs: one kernel forward, two backward, with the activation inside.

    s_p = sum_t weight_t x_{p + t} + bias,  y = act(s)
    g = dy act'(s),  dx_p = sum_t weight_t g_{p - t},  dweight_t = sum_p g_p x_{p + t},  dbias = sum_p g_p

A program takes a tile of pixels by channels; pixels are numbered through the whole batch, so that a map may have any
size. Neighbours come from the cache. The first kernel of the backward computes s again, writes g and sums its tiles'
parts of dweight and dbias, which are added up in a fixed order; the second is the forward with the taps turned round.

B batch, H W map, D channels, U V height and width of the kernel.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: RUF005
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing; Triton knows no
# starred expressions.)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.causal_conv1d.triton_shape import processors
from kernels.causal_conv1d.triton_steps import sigmoid
from kernels.plans import on_device

PIXELS = 64  # of a tile of the forward
STEP = 16  # pixels of a tile of the backward, which keeps a sum for each tap
CHANNELS = 32  # of a tile
PROGRAMS = 8  # of the backward, to a multiprocessor


@triton.jit
def _place(p, H, W, pixels):
    """Row and column of pixels, and whether they are there."""
    return (p // W) % H, p % W, p < pixels


@triton.jit
def _neighbour(x_ptr, p, h, w, valid, H, W, step, d, m_d, i: tl.constexpr, j: tl.constexpr):
    """Rows of the pixels that are i rows below and j columns to the right; zeros outside of the map."""
    inside = valid & (h + i >= 0) & (h + i < H) & (w + j >= 0) & (w + j < W)
    return tl.load(x_ptr + (p + i * W + j).to(tl.int64) * step + d, mask=inside & m_d, other=0.0)


@triton.jit
def _slope(s, ACTIVATION: tl.constexpr):
    """The derivative of the activation."""
    if ACTIVATION == "silu":
        gate = sigmoid(s)
        value = gate * (1 + s * (1 - gate))
    elif ACTIVATION == "gelu":
        value = 0.5 * (1 + tl.erf(s * 0.7071067811865476)) + s * tl.exp(-0.5 * s * s) * 0.3989422804014327
    else:
        value = tl.full(s.shape, 1.0, s.dtype)
    return value


@triton.jit(do_not_specialize=["H", "W", "pixels"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, H, W, pixels, D, step,
    U: tl.constexpr, V: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, TURNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of BP pixels by BD channels."""
    blocks = tl.cdiv(D, BD)
    p = (tl.program_id(0) // blocks) * BP + tl.arange(0, BP)[:, None]
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)[None, :]
    h, w, valid = _place(p, H, W, pixels)
    s = tl.zeros((BP, BD), dtype=ACC)
    if HAS_BIAS:
        s += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(ACC)
    for t in tl.static_range(U * V):
        x = _neighbour(x_ptr, p, h, w, valid, H, W, step, d, d < D, t // V - U // 2, t % V - V // 2)
        place = U * V - 1 - t if TURNED else t
        s += x.to(ACC) * tl.load(weight_ptr + place * D + d, mask=d < D, other=0.0).to(ACC)
    if ACTIVATION == "silu":
        s = s * sigmoid(s)
    elif ACTIVATION == "gelu":
        s = 0.5 * s * (1 + tl.erf(s * 0.7071067811865476))
    tl.store(y_ptr + p.to(tl.int64) * D + d, s, mask=valid & (d < D))


@triton.jit(do_not_specialize=["H", "W", "pixels", "steps"])
def _slopes_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, g_ptr, part_ptr, H, W, pixels, D, step, steps,
    U: tl.constexpr, V: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g of ``steps`` tiles of BP pixels by BD channels, and their part of dweight and dbias (U V + 1, D)."""
    blocks = tl.cdiv(D, BD)
    part = tl.program_id(0) // blocks
    p = part * steps * BP + tl.arange(0, BP)[:, None]
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)[None, :]
    m_d = d < D
    dbias = tl.zeros((BP, BD), dtype=ACC)
    taps, dtaps = (), ()
    for t in tl.static_range(U * V):
        taps = taps + (tl.load(weight_ptr + t * D + d, mask=m_d, other=0.0).to(ACC),)
        dtaps = dtaps + (dbias,)
    bias = tl.zeros((1, BD), dtype=ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=m_d, other=0.0).to(ACC)
    for _ in range(steps):
        h, w, valid = _place(p, H, W, pixels)
        rows = ()
        for t in tl.static_range(U * V):
            rows = rows + (_neighbour(x_ptr, p, h, w, valid, H, W, step, d, m_d, t // V - U // 2, t % V - V // 2),)
        place = p.to(tl.int64) * D + d
        g = tl.load(dy_ptr + place, mask=valid & m_d, other=0.0).to(ACC)
        if ACTIVATION != "":
            s = tl.zeros((BP, BD), dtype=ACC) + bias
            for t in tl.static_range(U * V):
                s += rows[t].to(ACC) * taps[t]
            g *= _slope(s, ACTIVATION)
        summed = ()
        for t in tl.static_range(U * V):
            summed = summed + (dtaps[t] + g * rows[t].to(ACC),)
        dtaps = summed
        dbias += g
        tl.store(g_ptr + place, g, mask=valid & m_d)
        p += BP
    part_ptr += part * ((U * V + 1) * D) + d
    for t in tl.static_range(U * V):
        tl.store(part_ptr + t * D, tl.sum(dtaps[t], 0)[None, :], mask=m_d)
    tl.store(part_ptr + U * V * D, tl.sum(dbias, 0)[None, :], mask=m_d)


def _dense(x: Tensor) -> Tensor:
    """x with channels side by side and pixels at one distance, as a part of a wider map has them too."""
    B, H, W, _ = x.shape
    step = x.stride(2)
    regular = x.stride(3) == 1 and (H == 1 or x.stride(1) == W * step) and (B == 1 or x.stride(0) == H * W * step)
    return x if regular and W > 1 else x.contiguous()


def _wide(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def _taps(weight: Tensor) -> Tensor:
    """Taps as the kernels read them, (U V, D)."""
    return weight.flatten(1).t().contiguous()


def _convolve(
    x: Tensor, taps: Tensor, size: Sequence[int], bias: Tensor | None, activation: str, turned: bool
) -> Tensor:
    x, (B, H, W, D) = _dense(x), x.shape
    y = x.new_empty((B, H, W, D))
    pixels, channels = B * H * W, min(CHANNELS, triton.next_power_of_2(D))
    if pixels:
        _forward_kernel[(triton.cdiv(pixels, PIXELS) * triton.cdiv(D, channels),)](
            x, taps, bias, y, H, W, pixels, D, x.stride(2),
            *size, PIXELS, channels, bias is not None, activation, turned, _wide(x)[1],
        )  # fmt: skip
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y ``(B, H, W, D)``; see ``depthwise_conv2d``."""
    with on_device(x):
        return _convolve(x, _taps(weight), weight.shape[2:], bias, activation, False)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty without one)."""
    with on_device(x):
        x, dy, taps = _dense(x), dy.contiguous(), _taps(weight)
        (B, H, W, D), (U, V) = x.shape, weight.shape[2:]
        pixels, channels = B * H * W, min(CHANNELS, triton.next_power_of_2(D))
        blocks, tiles = triton.cdiv(D, channels), triton.cdiv(max(pixels, 1), STEP)
        steps = triton.cdiv(tiles, max(1, PROGRAMS * processors(x.device) // blocks))
        parts = triton.cdiv(tiles, steps)
        g = torch.empty_like(dy, dtype=x.dtype)
        part = torch.empty((parts, U * V + 1, D), dtype=_wide(x)[0], device=x.device)
        _slopes_kernel[(parts * blocks,)](
            dy, x, taps, bias, g, part, H, W, pixels, D, x.stride(2), steps,
            U, V, STEP, channels, bias is not None, activation, _wide(x)[1],
        )  # fmt: skip
        total = part.sum(0)
        dx = _convolve(g, taps, (U, V), None, "", True)
    dbias = x.new_empty(0) if bias is None else total[-1].to(bias.dtype, copy=True)
    return dx, total[:-1].t().reshape(weight.shape).to(weight.dtype).contiguous(), dbias
