"""``state_update`` on GPUs: one Triton kernel that reads and writes every state once.

A program holds a tile of a head's state, some rows of P by all of N, in registers over all tokens. What is the same for
the whole head (A, dt of SSD) is one number; addresses are int64.

B batch, T tokens, H heads, P head dim, N state, G groups, S rows of states.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.backend import dependent_launch
from kernels.early import prefetch
from kernels.selective_scan.triton_steps import softplus
from kernels.state_update.problem import Problem

MANY = 1 << 24  # states from which on tiles are a quarter as large


@triton.jit
def _time_step(dt, bias, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """dt after bias, softplus and limits."""
    dt += bias
    if SOFTPLUS:
        dt = softplus(dt)
    if CLAMP:
        dt = tl.minimum(tl.maximum(dt, tl.zeros_like(dt) + LOW), tl.zeros_like(dt) + HIGH)
    return dt


@triton.jit
def _update_kernel(
    state, x, dt, A, B, C, D, z, bias, indices, y,
    s_b, s_h, s_p, s_n, x_b, x_t, x_h, x_p, dt_b, dt_t, dt_h, dt_p, A_h, A_p, A_n, B_b, B_t, B_g, B_n,
    C_b, C_t, C_g, C_n, D_h, D_p, z_b, z_t, z_h, z_p, bias_h, bias_p, T, H, P, N, per_group, blocks,
    TIED_DT: tl.constexpr, TIED_A: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    ACC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b, h, block of P) updates ``state[indices[b], h]`` and writes ``y[b, :, h]``."""
    pid = tl.program_id(0)
    head = pid // blocks  # 32 bits: a division of 64 takes a hundred instructions
    block, h, b = (pid % blocks).to(tl.int64), (head % H).to(tl.int64), (head // H).to(tl.int64)
    p, n = block * BP + tl.arange(0, BP), tl.arange(0, BN)
    m_p, m_n = p < P, n < N
    if PDL:  # a projection behind it may fetch its weights; whatever is read here another kernel may have made
        gdc_launch_dependents()
        if not HAS_INDEX:
            begin = tl.minimum(tl.arange(0, LINES) * (BN // LINES), N - 1)
            prefetch(state + b * s_b + h * s_h + tl.minimum(p, P - 1)[:, None] * s_p + begin[None, :] * s_n)
        gdc_wait()
    y += (b * T * H + h) * P + p
    row = b
    if HAS_INDEX:
        row = tl.load(indices + b).to(tl.int64)
        if row < 0:
            for t in range(T):
                tl.store(y + t * H * P, tl.zeros((BP,), y.dtype.element_ty), mask=m_p)
            return
    tile = m_p[:, None] & m_n[None, :]
    state += row * s_b + h * s_h + p[:, None] * s_p + n[None, :] * s_n
    stored = tl.load(state, mask=tile, other=0.0)
    group = (head % H // per_group).to(tl.int64)
    x += b * x_b + h * x_h + p * x_p
    z += b * z_b + h * z_h + p * z_p
    B += b * B_b + group * B_g + n * B_n
    C += b * C_b + group * C_g + n * C_n
    dt += b * dt_b + h * dt_h
    offset = tl.zeros((), ACC)
    if TIED_DT:
        if HAS_BIAS:
            offset = tl.load(bias + h * bias_h).to(ACC)
    else:
        dt += p * dt_p
        if HAS_BIAS:
            offset = tl.load(bias + h * bias_h + p * bias_p, mask=m_p, other=0.0).to(ACC)
    if TIED_A:
        rate = tl.load(A + h * A_h).to(ACC)
    else:
        rate = tl.load(A + h * A_h + p[:, None] * A_p + n[None, :] * A_n, mask=tile, other=0.0).to(ACC)
    if HAS_D:
        skip = tl.load(D + h * D_h + p * D_p, mask=m_p, other=0.0).to(ACC)
    value = stored.to(ACC)
    for _ in range(T):
        if TIED_DT:
            step = _time_step(tl.load(dt).to(ACC), offset, SOFTPLUS, CLAMP, LOW, HIGH)
        else:
            step = _time_step(tl.load(dt, mask=m_p, other=0.0).to(ACC), offset, SOFTPLUS, CLAMP, LOW, HIGH)
        decay = tl.exp(step * rate) if TIED_A else tl.exp((step if TIED_DT else step[:, None]) * rate)
        if TIED_A and not TIED_DT:
            decay = decay[:, None]
        u = tl.load(x, mask=m_p, other=0.0).to(ACC)
        keys = tl.load(B, mask=m_n, other=0.0).to(ACC)
        queries = tl.load(C, mask=m_n, other=0.0).to(ACC)
        value = value * decay + (step * u)[:, None] * keys[None, :]
        out = tl.sum(value * queries[None, :], 1)
        if HAS_D:
            out += skip * u
        if HAS_Z:
            gate = tl.load(z, mask=m_p, other=0.0).to(ACC)
            out *= gate / (1 + tl.exp(-gate))
        tl.store(y, out, mask=m_p)
        x, z, dt, B, C, y = x + x_t, z + z_t, dt + dt_t, B + B_t, C + C_t, y + H * P
    tl.store(state, value, mask=tile)


class Shape(NamedTuple):
    """How a problem is cut.

    Attributes:
        rows: Of P in a tile.
        columns: Of N in a tile, all of them.
        warps: Of a program.
    """

    rows: int
    columns: int
    warps: int


def shape_of(p: Problem) -> Shape:
    """A rule on the sizes: tiles of 8192 states, smaller ones where there would be few programs, or very many."""
    batch, _, heads, width = p.x.shape
    columns = triton.next_power_of_2(p.state.shape[3])
    if batch * heads * width * columns >= MANY:  # the last programs of all are over sooner
        return Shape(max(1, min(triton.next_power_of_2(width), 2048 // columns)), columns, 2)
    rows = max(1, min(triton.next_power_of_2(width), 8192 // columns))
    while rows > 4 and batch * heads * triton.cdiv(width, rows) < 512:
        rows //= 2
    return Shape(rows, columns, max(1, min(4, rows * columns // 512)))


def update(p: Problem) -> Tensor:
    """Updates ``p.state`` in place and returns y ``(B, T, H, P)`` in x's dtype."""
    y = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
    if not y.numel():
        return y
    batch, tokens, heads, width = p.x.shape
    shape = shape_of(p)
    blocks = triton.cdiv(width, shape.rows)

    def strides(t: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (0,) * len(shape) if t is None else t.expand(shape).stride()

    states = p.state.shape[3]
    tied_A = p.A.shape[1] == p.A.shape[2] == 1
    with _on(p.x):
        _update_kernel[(batch * heads * blocks,)](
            p.state, p.x, p.dt, p.A, p.B, p.C, *(p.x if t is None else t for t in (p.D, p.z, p.dt_bias)),
            p.x if p.indices is None else p.indices, y,
            *p.state.stride(), *p.x.stride(), *strides(p.dt, tuple(p.x.shape)), *strides(p.A, (heads, width, states)),
            *p.B.stride(), *p.C.stride(), *strides(p.D, (heads, width)), *strides(p.z, tuple(p.x.shape)),
            *strides(p.dt_bias, (heads, width)), tokens, heads, width, states, heads // p.groups, blocks,
            TIED_DT=p.dt.shape[3] == 1 and (p.dt_bias is None or p.dt_bias.shape[1] == 1), TIED_A=tied_A,
            HAS_D=p.D is not None, HAS_Z=p.z is not None, HAS_BIAS=p.dt_bias is not None,
            HAS_INDEX=p.indices is not None, SOFTPLUS=p.dt_softplus, CLAMP=p.clamped, LOW=p.dt_limit[0],
            HIGH=p.dt_limit[1], ACC=tl.float64 if p.dtype == torch.float64 else tl.float32, BP=shape.rows,
            BN=shape.columns, LINES=max(1, shape.columns * p.state.element_size() // 128), num_warps=shape.warps,
            **dependent_launch(p.x),
        )  # fmt: skip
    return y


def _on(x: Tensor) -> torch.device | torch.cuda.device:
    """Makes the device of ``x`` the current one while the kernel is launched."""
    return torch.get_device_module(x.device).device(x.device) if x.device.type != "cpu" else torch.device("cpu")
