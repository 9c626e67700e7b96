"""``kernels.ssd.gated`` on Hopper GPUs, in Gluon: the language below Triton's, where copies and products are in the
order that is written here. Triton's own loop asks for the tiles of a chunk when the one before it is done with.

A program walks the chunks of a row and head with the state in registers. Tiles come by bulk copies a whole chunk ahead,
into two slots; while the products C B^T and C h^T of a chunk are under way, the mask is worked out and the rows are
weighted of the product that is added to h. y goes out through the slot that its gate came by.

B batch, L tokens, H heads, P head dim, N state, G groups, Q positions of a chunk.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# (Gluon's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.selective_scan.triton_plan import device_of
from kernels.ssd.problem import Problem
from kernels.ssd.triton_boxes import as_lines
from kernels.ssd.triton_plan import Plan

SIDE = 64  # P and Q: a product's rows are those of four warps


@gluon.jit
def expect(box, ready, slot, wanted):
    """Makes ``ready`` of a slot wait for a tile."""
    mbarrier.expect(ready.index(slot), box.block_type.nbytes, pred=wanted)


@gluon.jit
def fetch(box, tiles, ready, line, column, slot, wanted):
    """Asks for that tile."""
    tma.async_copy_global_to_shared(box, [line, column], ready.index(slot), tiles.index(slot), pred=wanted)


@gluon.jit
def barriers():
    """One for each of two slots."""
    made = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(made.index(slot), count=1)
    return made


@gluon.jit
def silu(z):
    """z sigmoid(z), by an approximate reciprocal: a division proper takes four more instructions."""
    inverse: gl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
    below = 1 + gl.exp2(z * -1.4426950408889634)
    return z * gl.inline_asm_elementwise(inverse, "=f,f", [below], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit(do_not_specialize=["length"])
def gated_kernel(x_box, B_box, C_box, z_box, y_box, D, norm_weight, steps, initial, final, squares, length, plane, H, G,
                 P: gl.constexpr, N: gl.constexpr, Q: gl.constexpr, HAS_INITIAL: gl.constexpr):  # fmt: skip
    """y (B, L, H, P) gated, times the norm's weight, its squares (B, L, H) before that, and the final states."""
    ROWS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q, 16])  # (Q, Q) and (Q, P)
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])  # (P, N)
    DOWN: gl.constexpr = gl.SliceLayout(1, ROWS)
    ACROSS: gl.constexpr = gl.SliceLayout(0, ROWS)
    MASK: gl.constexpr = gl.DotOperandLayout(0, ROWS, 2)
    FLIPPED: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)  # (P, Q)
    pid = gl.program_id(0)
    head, b = pid % H, pid // H
    column, key, first = head * P, head // (H // G) * N, b * length * Q
    xs = gl.allocate_shared_memory(gl.bfloat16, [2, Q, P], x_box.layout)
    Bs = gl.allocate_shared_memory(gl.bfloat16, [2, Q, N], B_box.layout)
    Cs = gl.allocate_shared_memory(gl.bfloat16, [2, Q, N], C_box.layout)
    zs = gl.allocate_shared_memory(gl.bfloat16, [2, Q, P], z_box.layout)
    hs = gl.allocate_shared_memory(gl.bfloat16, [P, N], B_box.layout)
    x_ready, B_ready, C_ready, z_ready = barriers(), barriers(), barriers(), barriers()
    fence_async_shared()
    for s in gl.static_range(2):
        expect(x_box, x_ready, s, s < length)
        expect(B_box, B_ready, s, s < length)
        expect(C_box, C_ready, s, s < length)
        expect(z_box, z_ready, s, s < length)
        fetch(C_box, Cs, C_ready, first + s * Q, key, s, s < length)
        fetch(B_box, Bs, B_ready, first + s * Q, key, s, s < length)
        fetch(x_box, xs, x_ready, first + s * Q, column, s, s < length)
    fetch(z_box, zs, z_ready, first, column, 0, length > 0)

    i, j = gl.arange(0, Q, layout=DOWN), gl.arange(0, Q, layout=ACROSS)
    causal, nothing = i[:, None] >= j[None, :], gl.zeros([Q, Q], gl.float32, layout=ROWS)
    skip = gl.load(D + head)
    scale = gl.load(norm_weight + column + gl.arange(0, P, layout=ACROSS)).to(gl.float32)
    p, n = gl.arange(0, P, layout=gl.SliceLayout(1, STATE)), gl.arange(0, N, layout=gl.SliceLayout(0, STATE))
    state = (pid.to(gl.int64) * P + p[:, None]) * N + n[None, :]
    h = gl.zeros([P, N], gl.float32, layout=STATE)
    if HAS_INITIAL:
        h = gl.load(initial + state)
    hs.store(h.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    # Of ``steps_kernel``, FOLDED: the running sums of exponents and, in the next plane, those less log2(dt).
    sums = steps + plane + pid.to(gl.int64) * length * Q
    high, low, last = gl.load(sums + i), gl.load(sums + plane + j), gl.load(sums + Q - 1)
    for c in range(length):
        slot, phase, line = c % 2, c // 2 & 1, first + c * Q
        x, B, C = xs.index(slot), Bs.index(slot), Cs.index(slot)
        mbarrier.wait(C_ready.index(slot), phase)
        mbarrier.wait(B_ready.index(slot), phase)
        scores = warpgroup_mma(C, B.permute([1, 0]), nothing, use_acc=False, is_async=True)
        out = warpgroup_mma(C, hs.permute([1, 0]), nothing, use_acc=False, is_async=True)
        weight = gl.exp2(last - gl.convert_layout(low, gl.SliceLayout(0, FLIPPED)))
        mbarrier.wait(x_ready.index(slot), phase)
        rows = (x.permute([1, 0]).load(FLIPPED).to(gl.float32) * weight[None, :]).to(gl.bfloat16)
        after = warpgroup_mma(rows, B, h * gl.exp2(last), is_async=True)
        mask = gl.exp2(gl.where(causal, high[:, None] - low[None, :], float("-inf")))
        scores = warpgroup_mma_wait(2, [scores])
        scores = gl.convert_layout((scores * mask).to(gl.bfloat16), MASK)
        out = warpgroup_mma_wait(1, [out])
        out = warpgroup_mma(scores, x, out * gl.exp2(high)[:, None], is_async=True)
        sums += gl.where(c + 1 < length, Q, 0)
        high, low, last = gl.load(sums + i), gl.load(sums + plane + j), gl.load(sums + Q - 1)
        mbarrier.wait(z_ready.index(slot), phase)
        gate = zs.index(slot).load(ROWS)
        tma.store_wait(0)  # y of the chunk before has left the other slot
        fetch(z_box, zs, z_ready, line + Q, column, 1 - slot, c + 1 < length)
        gate = silu(gate.to(gl.float32))
        h = warpgroup_mma_wait(1, [after])
        out = warpgroup_mma_wait(0, [out])
        out = (out + skip * x.load(ROWS).to(gl.float32)) * gate
        gl.store(squares + (line + i).to(gl.int64) * H + head, gl.sum(out * out, 1))
        hs.store(h.to(gl.bfloat16))
        zs.index(slot).store((out * scale[None, :]).to(gl.bfloat16))
        more = c + 2 < length
        expect(x_box, x_ready, slot, more)
        expect(B_box, B_ready, slot, more)
        expect(C_box, C_ready, slot, more)
        expect(z_box, z_ready, slot, more)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(y_box, [line, column], zs.index(slot))
        fetch(C_box, Cs, C_ready, line + 2 * Q, key, slot, more)
        fetch(B_box, Bs, B_ready, line + 2 * Q, key, slot, more)
        fetch(x_box, xs, x_ready, line + 2 * Q, column, slot, more)
    tma.store_wait(0)
    gl.store(final + state, h.to(final.dtype.element_ty))


def fits(p: Problem) -> bool:
    """Whether ``forward`` takes a problem: full tiles in bfloat16 throughout, one D a head, the tokens in
    order, and heads enough for all of the GPU."""
    if not p.x.is_cuda or torch.version.hip is not None or p.z is None or p.D is None or p.D.ndim != 2:
        return False
    if torch.cuda.get_device_capability(p.x.device)[0] != 9:  # later GPUs have no products of warp groups
        return False
    plan = Plan(p)
    whole = plan.width == plan.chunk == p.head_dim == SIDE and p.state <= 128 and plan.segments.count == 1
    return whole and plan.folded and p.z.dtype == torch.bfloat16 and plan.boxed and as_lines(p.z.unsqueeze(2))


def forward(p: Problem, norm_weight: Tensor, state_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """``kernels.ssd.gated.gated_scan`` of a problem that ``fits``."""
    assert p.z is not None
    plan = Plan(p)
    y = torch.empty(p.batch, p.length, 1, p.heads, p.head_dim, dtype=p.x.dtype, device=p.x.device)
    squares = torch.empty(p.batch, p.length, p.heads, dtype=torch.float32, device=p.x.device)
    size, initial = (p.batch, p.heads, p.head_dim, p.state), plan.initial
    final = torch.empty(size, dtype=p.dtype if state_dtype is None else state_dtype, device=p.x.device)
    boxes = {"x": p.x, "z": p.z.unsqueeze(2), "y": y, "B": p.B, "C": p.C}
    tensors = {
        **{f"{name}_box": _box(t) for name, t in boxes.items()}, "D": plan.D, "norm_weight": norm_weight.contiguous(),
        "steps": plan.steps, "initial": plan.steps if initial is None else initial, "final": final, "squares": squares,
    }  # fmt: skip
    with device_of(p.x):
        plan.launch(
            gated_kernel, (p.batch * p.heads,), tensors,
            lambda: {
                "length": plan.per_row, "plane": plan.steps[0].numel(), "H": p.heads, "G": p.groups, "P": p.head_dim,
                "N": p.state, "Q": plan.chunk, "HAS_INITIAL": initial is not None, "num_warps": 4,
            },
            final.dtype,
        )  # fmt: skip
    return y.flatten(2), squares, final


def _box(t: Tensor) -> TensorDescriptor:
    """The matrix of tokens (B L, H P), in boxes of a head's rows of a chunk."""
    batch, length, _, heads, width = t.shape
    block = [SIDE, width]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(t, [batch * length, heads * width], [t.stride(1), 1], block, layout)
