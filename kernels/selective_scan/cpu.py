"""The selective scan on the CPU: the host side of the numba kernels.

Work is cut into tasks of (run of sequences, run of channel blocks); the cut depends on the shape alone, so results do
not depend on the number of threads. Memory beyond the inputs and outputs is a few tiles a thread.

B batch, L tokens, D channels, N state, K routes, P scan positions, G groups, S sequences, Q planes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import threads
from kernels.cpu_rows import flat
from kernels.selective_scan import Gradients
from kernels.selective_scan.cpu_arguments import GROUP, Inputs, Sizes
from kernels.selective_scan.cpu_backward import Adjoints, backward_complex, backward_real
from kernels.selective_scan.cpu_forward import forward_complex, forward_real
from kernels.selective_scan.cpu_simd import WIDTH
from kernels.selective_scan.problem import Problem

BLOCK = 192  # at most so many channels in a task's tiles: rows long enough to be read at the memory's speed
TASKS = 4  # blocks are narrower where there would be fewer tasks
RUNS = 32  # at most so many runs of sequences
FORWARD_PARTS = 64  # at most so many runs of blocks
PARTS = 8  # at most so many runs of blocks in the backward, each with its own sums of dB and dC
SMALL = 1 << 16  # state updates that one thread does before a second one has woken up


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the scan.

    Returns:
        y in x's dtype, ``(B, L, D)`` or ``(B, L, K, D)``; the final state ``(S, K, D, N)``; the state before each
        chunk of each sequence in scan order, ``(slots, K, N, D)``.
    """
    keep = p.route is not None and not p.merge
    make = p.x.new_empty if _once(p) else p.x.new_zeros
    sizes, inputs = _arguments(p, _narrow(p))
    y = make(
        (p.batch, p.length, *((p.routes,) if keep else ()), p.channels), dtype=p.x.dtype if _narrow(p) else p.dtype
    )
    final = p.x.new_empty((p.sequences, p.routes, p.channels, p.state), dtype=p.state_dtype)
    make = p.x.new_empty if p.cu_seqlens is None else p.x.new_zeros  # packed sequences may leave slots over
    saved = make((p.slots, p.routes, p.state, p.channels), dtype=p.state_dtype)
    outputs = (flat(y), _memory(final), _memory(saved))
    count = len(inputs.blocks)
    tasks = [(*blocks, *run) for run in _cut(p.sequences, RUNS) for blocks in _cut(count, FORWARD_PARTS)]
    kernel = forward_complex if p.is_complex else forward_real
    _launch(p, lambda *task: kernel(*task, sizes, inputs, *outputs), tasks)
    return y.to(p.x.dtype), final, saved


def backward(p: Problem, dy: Tensor, dstate: Tensor | None, saved: Tensor) -> Gradients:
    """Gradients of everything.

    Args:
        p: The problem of the forward call.
        dy: Gradient of y, in its shape.
        dstate: Gradient of the final state ``(S, K, D, N)``, or None.
        saved: What the forward saved.
    """
    sizes, inputs = _arguments(p)
    runs, parts = _cut(p.sequences, RUNS), _cut(len(inputs.blocks), PARTS)

    def zeros(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return p.x.new_zeros(shape, dtype=dtype)

    planar = (len(runs), p.routes, sizes.planes, p.state, p.channels)
    varying = (len(parts), p.batch, p.length, p.routes, p.groups, p.state)
    make = p.x.new_empty if sizes.once else p.x.new_zeros
    dx = make((p.batch, p.length, sizes.x_routes, p.channels), dtype=p.dtype)
    ddt = make((p.batch, p.length, p.routes, p.channels), dtype=p.dtype)
    dz = make((p.batch, p.length, p.channels) if sizes.gated else (0,), dtype=p.dtype)
    dB = zeros(*varying, dtype=p.state_dtype) if sizes.varying_b else zeros(*planar)
    dC = zeros(*varying, dtype=p.state_dtype) if sizes.varying_c else zeros(*planar)
    dA, dD, dbias = zeros(*planar), zeros(len(runs), p.routes, p.channels), zeros(len(runs), p.routes, p.channels)
    dinitial = zeros(p.sequences, p.routes, p.channels, p.state, dtype=p.state_dtype)
    adjoints = Adjoints(
        y=_rows(dy, p.dtype),
        final=_rows(p.x.new_empty(0) if dstate is None else dstate, p.state_dtype),
        saved=_rows(saved, p.state_dtype),
        x=_memory(dx),
        dt=_memory(ddt),
        z=_memory(dz),
        B=_memory(dB),
        C=_memory(dC),
        A=_memory(dA),
        D=_memory(dD),
        dt_bias=_memory(dbias),
        initial=_memory(dinitial),
    )
    tasks = [(i, *blocks, r, *run) for r, run in enumerate(runs) for i, blocks in enumerate(parts)]
    kernel = backward_complex if p.is_complex else backward_real
    _launch(p, lambda *task: kernel(*task, sizes, inputs, adjoints), tasks)
    return Gradients(
        x=dx,
        dt=ddt,
        A=_unplane(_total(dA)),
        B=_total(dB) if sizes.varying_b else _unplane(_total(dB)),
        C=_total(dC) if sizes.varying_c else _unplane(_total(dC)),
        D=None if p.D is None else _total(dD),
        z=None if p.z is None else dz,
        dt_bias=None if p.dt_bias is None else _total(dbias),
        initial_state=None if p.initial_state is None else dinitial,
    )


def _once(p: Problem) -> bool:
    """Whether each token is visited by one route and exactly once."""
    return p.route is None and p.code is None


def _narrow(p: Problem) -> bool:
    """Whether the forward reads x and z, and writes y, as bfloat16; elsewhere they are copied to and from float32."""
    return _once(p) and not p.is_complex and all(t is None or t.dtype == torch.bfloat16 for t in (p.x, p.z))


def _total(parts: Tensor) -> Tensor:
    """The sum over the first axis, always in the same order."""
    total = parts.new_zeros(parts.shape[1:])
    for part in parts:
        total += part
    return total


def _unplane(t: Tensor) -> Tensor:
    """``(K, Q, N, D)`` to ``(K, D, N)``, complex where there are two planes."""
    planes = t.permute(0, 3, 2, 1).contiguous()
    return torch.view_as_complex(planes) if planes.shape[-1] == 2 else planes.squeeze(-1)


def _launch(p: Problem, function: Callable[..., None], tasks: list[tuple[int, ...]]) -> None:
    """Runs the tasks, in this thread alone where waking others would take longer."""
    if p.sequences * p.positions * p.routes * p.channels * p.state < SMALL:
        for task in tasks:
            function(*task)
    else:
        threads.run(function, tasks)


def _cut(count: int, parts: int) -> list[tuple[int, int]]:
    """``range(count)`` in at most ``parts`` runs of nearly equal length."""
    parts = min(count, parts)
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def _blocks(p: Problem) -> np.ndarray:
    """First and last + 1 channel of blocks of about equal size, at most ``BLOCK``; none crosses a group."""
    size, width = p.channels // p.groups, BLOCK
    while width > WIDTH and p.sequences * p.groups * -(-size // width) < TASKS:
        width //= 2
    step = -(-size // max(1, -(-size // width)))
    step = -(-step // WIDTH) * WIDTH or 1
    edges = [(g * size + d, g * size + min(d + step, size)) for g in range(p.groups) for d in range(0, size, step)]
    return np.array(edges, np.int64).reshape(-1, 2)


def _sizes(p: Problem) -> Sizes:
    """Numbers and switches of the problem."""
    return Sizes(
        batch=p.batch,
        length=p.length,
        positions=p.positions,
        routes=p.routes,
        x_routes=p.x.shape[2],
        channels=p.channels,
        state=p.state,
        groups=p.groups,
        planes=1 + p.is_complex,
        padded=p.state if p.is_complex else -(-p.state // GROUP) * GROUP,
        routed=int(p.route is not None),
        token_params=int(p.route_params),
        coded=int(p.code is not None),
        packed=int(p.cu_seqlens is not None),
        softplus=int(p.dt_softplus),
        reverse=int(p.reverse),
        gated=int(p.z is not None),
        keep=int(p.route is not None and not p.merge),
        once=int(_once(p)),
        varying_b=int(p.B.ndim == 5),
        varying_c=int(p.C.ndim == 5),
    )


def _arguments(p: Problem, narrow: bool = False) -> tuple[Sizes, Inputs]:
    """The problem as the kernels read it, x and z as they are if ``narrow``; what follows from sizes is in its plan."""
    if "cut" not in p.plan:
        p.plan["cut"] = _sizes(p), _blocks(p)
    sizes, blocks = p.plan["cut"]
    zeros = p.x.new_zeros((p.routes, p.channels), dtype=p.dtype)
    no_strides: Any = (0, 0, 0, 0)
    dtype = torch.bfloat16 if narrow else p.dtype
    x, x_strides = _flat(p.x if p.routes == 1 else p.x.expand(-1, -1, p.routes, -1), dtype, 3)
    dt, dt_strides = _flat(p.dt, p.dtype, 3)
    z, z_strides = _flat(p.z, dtype, 2)
    B, B_strides = _flat(p.B, p.state_dtype, 4) if p.B.ndim == 5 else (_planar(p.B, p.state_dtype), no_strides)
    C, C_strides = _flat(p.C, p.state_dtype, 4) if p.C.ndim == 5 else (_planar(p.C, p.state_dtype), no_strides)
    return sizes, Inputs(
        x=x,
        x_strides=x_strides,
        dt=dt,
        dt_strides=dt_strides,
        z=z,
        z_strides=z_strides,
        A=_planar(p.A, p.state_dtype),
        B=B,
        B_strides=B_strides,
        C=C,
        C_strides=C_strides,
        D=_rows(zeros if p.D is None else p.D, p.dtype),
        dt_bias=_rows(zeros if p.dt_bias is None else p.dt_bias, p.dtype),
        initial=_rows(p.x.new_empty(0) if p.initial_state is None else p.initial_state, p.state_dtype),
        route=np.empty((0, 0), np.int32) if p.route is None else p.route.contiguous().numpy(),
        code=np.empty((0, 0, 0), np.int8) if p.code is None else p.code.contiguous().numpy(),
        bounds=np.empty(0, np.int64) if p.cu_seqlens is None else p.cu_seqlens.long().contiguous().numpy(),
        blocks=blocks,
    )


def _flat(t: Tensor | None, dtype: torch.dtype, axes: int) -> tuple[np.ndarray, Any]:
    """The memory of ``t`` as a flat array, and the strides of its first ``axes`` axes; the rest is contiguous.

    Copies only for another dtype or where the rest is not contiguous. Without elements: an empty array.
    """
    t = torch.empty((0,) * (axes + 1), dtype=dtype) if t is None else t.detach().to(dtype).resolve_conj()
    if t.is_complex():
        t = torch.view_as_real(t).flatten(-2)
    if t.numel() == 0:
        return flat(t), (0,) * axes
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        t = t.contiguous()
    return flat(t), t.stride()[:axes]


def _planar(t: Tensor, dtype: torch.dtype) -> np.ndarray:
    """``(K, D, N)`` to flat ``(K, Q, N, D)``."""
    t = t.detach().to(dtype)
    t = torch.view_as_real(t.resolve_conj()).permute(0, 3, 2, 1) if t.is_complex() else t.transpose(1, 2)
    return _memory(t.contiguous())


def _rows(t: Tensor, dtype: torch.dtype) -> np.ndarray:
    """A tensor in its own order, flat."""
    return _memory(t.detach().to(dtype).resolve_conj().contiguous())


def _memory(t: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as a flat real array."""
    return (torch.view_as_real(t) if t.is_complex() else t).view(-1).numpy()
