"""What a convolution by FFT does besides transforming, on GPUs: each a pass over memory, none of them strided.

Activations lie with channels next to each other, transforms want time. cuFFT transforms complex numbers in fewer passes
than real ones, so two real channels a and b travel as one complex a + i b. With Z its transform,

    F(a)_k = (Z_k + conj Z_{n-k}) / 2,    F(b)_k = (Z_k - conj Z_{n-k}) / 2i,

and the transform of two convolutions is put together from places k and n - k of both factors' transforms.

    _pack_kernel      (B, L, C) -> (B, C / 2, n) complex, zeros after L; of a product of two, too
    _multiply_kernel  products of transforms, one perhaps conjugated, over the first one's memory
    _finish_kernel    (B, C / 2, n) complex -> (B, L, C), and the gates and the bias of Hyena
    _gradient_kernel  the same with the gradients of the gates

B batch, L tokens, C channels, n length of the transforms.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.plans import on_device

TIME, CHANNELS, FREQUENCIES = 64, 32, 512  # of a program's tile


@triton.jit
def _rows(ptr, b, sb, sl, t, c, L, C):
    """A tile (time, channels), zeros outside, in float32."""
    mask = (t < L)[:, None] & (c < C)[None, :]
    return tl.load(ptr + b * sb + t[:, None] * sl + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pairs(b, t, first, n, C, BC: tl.constexpr):
    """Places (channel pairs, time, 2) of a tile in the complex layout, and which exist."""
    pair = (first // 2 + tl.arange(0, BC // 2)).to(tl.int64)
    place = ((b * (C // 2) + pair)[:, None] * n + t[None, :]) * 2
    inside = (pair < C // 2)[:, None] & (t < n)[None, :]
    return place[:, :, None] + tl.arange(0, 2)[None, None, :], inside[:, :, None]


@triton.jit
def _tile(BT: tl.constexpr, BC: tl.constexpr):
    """Batch row, times and channels of this program."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BC
    return tl.program_id(2).to(tl.int64), t, first, first + tl.arange(0, BC)


@triton.jit
def _pack_kernel(
    a_ptr, g_ptr, z_ptr, L, C, n, sab, sal, sgb, sgl,
    GATED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b, t, first, c = _tile(BT, BC)
    value = _rows(a_ptr, b, sab, sal, t, c, L, C)
    if GATED:
        value *= _rows(g_ptr, b, sgb, sgl, t, c, L, C)
    value = tl.permute(tl.reshape(value, (BT, BC // 2, 2)), (1, 0, 2))
    place, inside = _pairs(b, t, first, n, C, BC)
    tl.store(z_ptr + place, value, mask=inside)


@triton.jit
def _unpacked(z_ptr, b, t, first, n, C, BT: tl.constexpr, BC: tl.constexpr):
    """A tile (time, channels) from the complex layout."""
    place, inside = _pairs(b, t, first, n, C, BC)
    value = tl.load(z_ptr + place, mask=inside, other=0.0)
    return tl.reshape(tl.permute(value, (1, 0, 2)), (BT, BC))


@triton.jit
def _at(z_ptr, base, k, mask):
    """Real and imaginary parts of a row's numbers at k."""
    place = base + 2 * k[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(z_ptr + place, mask=mask[:, None], other=0.0))


@triton.jit
def _two(z_ptr, base, k, mirror, mask):
    """Transforms at k of the two channels that travel together: four real numbers."""
    x, y = _at(z_ptr, base, k, mask)
    u, v = _at(z_ptr, base, mirror, mask)
    return 0.5 * (x + u), 0.5 * (y - v), 0.5 * (y + v), 0.5 * (u - x)


@triton.jit
def _multiply_kernel(z_ptr, w_ptr, n, pairs, sw, scale, CONJUGATE: tl.constexpr, BK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    row = tl.program_id(1).to(tl.int64)
    mask = k <= n // 2
    mirror = tl.where(k == 0, 0, n - k)
    base = 2 * n * row
    ar, ai, br, bi = _two(z_ptr, base, k, mirror, mask)
    cr, ci, dr, di = _two(w_ptr, 2 * n * (row // pairs * sw + row % pairs), k, mirror, mask)
    if CONJUGATE == 1:
        ai, bi = -ai, -bi
    if CONJUGATE == 2:
        ci, di = -ci, -di
    pr, pi = scale * (ar * cr - ai * ci), scale * (ar * ci + ai * cr)
    qr, qi = scale * (br * dr - bi * di), scale * (br * di + bi * dr)
    ends = tl.arange(0, 2)[None, :]
    tl.store(z_ptr + base + 2 * k[:, None] + ends, tl.join(pr - qi, pi + qr), mask=mask[:, None])
    # Where k is its own mirror p and q are real, and this writes the same number again.
    tl.store(z_ptr + base + 2 * mirror[:, None] + ends, tl.join(pr + qi, qr - pi), mask=mask[:, None])


@triton.jit
def _finish_kernel(
    z_ptr, v_ptr, g_ptr, bias_ptr, h_ptr, w_ptr, y_ptr, L, C, n, svb, svl, sgb, sgl, shb, shl,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b, t, first, c = _tile(BT, BC)
    value = _unpacked(z_ptr, b, t, first, n, C, BT, BC)
    out = (b * L + t)[:, None] * C + c[None, :]
    mask = (t < L)[:, None] & (c < C)[None, :]
    if GATED:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
            value += bias * _rows(v_ptr, b, svb, svl, t, c, L, C) * _rows(g_ptr, b, sgb, sgl, t, c, L, C)
        tl.store(w_ptr + out, value, mask=mask)
        value *= _rows(h_ptr, b, shb, shl, t, c, L, C)
    tl.store(y_ptr + out, value, mask=mask)


@triton.jit
def _gradient_kernel(
    z_ptr, v_ptr, g_ptr, h_ptr, bias_ptr, w_ptr, dy_ptr, dv_ptr, dg_ptr, dh_ptr, part_ptr,
    L, C, n, svb, svl, sgb, sgl, shb, shl, sdb, sdl,
    HAS_BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b, t, first, c = _tile(BT, BC)
    du = _unpacked(z_ptr, b, t, first, n, C, BT, BC)
    v, g = _rows(v_ptr, b, svb, svl, t, c, L, C), _rows(g_ptr, b, sgb, sgl, t, c, L, C)
    dy = _rows(dy_ptr, b, L * C, C, t, c, L, C)
    dw = dy * _rows(h_ptr, b, shb, shl, t, c, L, C)
    mask = (t < L)[:, None] & (c < C)[None, :]
    if HAS_BIAS:
        du += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :] * dw
        part = b * tl.num_programs(0) + tl.program_id(0)
        tl.store(part_ptr + part * C + c, tl.sum(dw * v * g, axis=0), mask=c < C)
    place = b * sdb + t[:, None] * sdl + c[None, :]
    tl.store(dv_ptr + place, du * g, mask=mask)
    tl.store(dg_ptr + place, du * v, mask=mask)
    tl.store(dh_ptr + place, dy * _rows(w_ptr, b, L * C, C, t, c, L, C), mask=mask)


def _grid(batch: int, length: int, channels: int) -> tuple[int, int, int]:
    return triton.cdiv(length, TIME), triton.cdiv(channels, CHANNELS), batch


def spectrum(a: Tensor, gate: Tensor | None, n: int) -> Tensor:
    """Transforms of a, or of a times gate, pairs of channels together.

    Args:
        a: (B, L, C), channels next to each other, C even.
        gate: (B, L, C) or None.
        n: Length of the transforms.

    Returns:
        (B, C / 2, n) complex64.
    """
    batch, length, channels = a.shape
    z = torch.empty((batch, channels // 2, n), dtype=torch.complex64, device=a.device)
    g = a if gate is None else gate
    with on_device(a):
        _pack_kernel[_grid(batch, n, channels)](
            a, g, torch.view_as_real(z), length, channels, n, *a.stride()[:2], *g.stride()[:2],
            GATED=gate is not None, BT=TIME, BC=CHANNELS, num_warps=4,
        )  # fmt: skip
    return torch.fft.fft(z)


def multiply(z: Tensor, w: Tensor, conjugate: int = 0) -> Tensor:
    """Transforms of convolutions, or with ``conjugate`` of correlations, over n, in the memory of z.

    Args:
        z: (B, C / 2, n), of ``spectrum``.
        w: The same, or (1, C / 2, n) for all rows.
        conjugate: Take the conjugate of none (0), of z (1) or of w (2).
    """
    batch, pairs, n = z.shape
    with on_device(z):
        _multiply_kernel[(triton.cdiv(n // 2 + 1, FREQUENCIES), batch * pairs)](
            torch.view_as_real(z), torch.view_as_real(w), n, pairs, pairs if w.shape[0] > 1 else 0, 1.0 / n,
            CONJUGATE=conjugate, BK=FREQUENCIES, num_warps=4,
        )  # fmt: skip
    return z


def plain(z: Tensor, length: int) -> Tensor:
    """The first ``length`` numbers of the channels whose transforms are z: (B, L, C) float32."""
    batch, pairs, n = z.shape
    z = torch.fft.ifft(z, norm="forward")
    y = torch.empty((batch, length, 2 * pairs), dtype=torch.float32, device=z.device)
    with on_device(z):
        _finish_kernel[_grid(batch, length, 2 * pairs)](
            torch.view_as_real(z), y, y, y, y, y, y, length, 2 * pairs, n, 0, 0, 0, 0, 0, 0,
            GATED=False, HAS_BIAS=False, BT=TIME, BC=CHANNELS, num_warps=4,
        )  # fmt: skip
    return y


def finish(z: Tensor, v: Tensor, gate: Tensor, bias: Tensor | None, last: Tensor) -> tuple[Tensor, Tensor]:
    """w = the convolution whose transform is z, plus bias times v times gate, and w times the last gate.

    Args:
        z: (B, C / 2, n).
        v: (B, L, C).
        gate: (B, L, C).
        bias: (C,) or None.
        last: (B, L, C).

    Returns:
        w and the product, in v's dtype.
    """
    batch, length, channels = v.shape
    z = torch.fft.ifft(z, norm="forward")
    w, y = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    with on_device(z):
        _finish_kernel[_grid(batch, length, channels)](
            torch.view_as_real(z), v, gate, y if bias is None else bias, last, w, y, length, channels, z.shape[-1],
            *v.stride()[:2], *gate.stride()[:2], *last.stride()[:2],
            GATED=True, HAS_BIAS=bias is not None, BT=TIME, BC=CHANNELS, num_warps=4,
        )  # fmt: skip
    return w, y


def gradients(
    z: Tensor, v: Tensor, gate: Tensor, bias: Tensor | None, last: Tensor, w: Tensor, dy: Tensor, into: list[Tensor]
) -> Tensor | None:
    """Gradients of v, gate and last, written to ``into`` (B, L, C) of one stride, and that of the bias.

    Args:
        z: (B, C / 2, n): its inverse transform is the gradient of v times gate by way of the convolution.
        v: (B, L, C), as the next ones.
        gate: See ``finish``.
        bias: (C,) or None.
        last: See ``finish``.
        w: What ``finish`` returned.
        dy: Gradient of the product, contiguous.
        into: Of v, gate and last.
    """
    batch, length, channels = v.shape
    z = torch.fft.ifft(z, norm="forward")
    grid = _grid(batch, length, channels)
    parts = torch.empty((batch * grid[0], channels), dtype=torch.float32, device=v.device)
    with on_device(z):
        _gradient_kernel[grid](
            torch.view_as_real(z), v, gate, last, parts if bias is None else bias, w, dy, *into, parts,
            length, channels, z.shape[-1],
            *v.stride()[:2], *gate.stride()[:2], *last.stride()[:2], *into[0].stride()[:2],
            HAS_BIAS=bias is not None, BT=TIME, BC=CHANNELS, num_warps=4,
        )  # fmt: skip
    return None if bias is None else parts.sum(0)
