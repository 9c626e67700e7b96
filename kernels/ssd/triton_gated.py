"""``kernels.ssd.gated`` on Hopper GPUs: the walk of ``kernels.ssd.triton`` over full tiles that bulk copies bring.

A program walks the chunks of a row and head with the state in registers. The gate's tiles are copied a chunk ahead, as
those of x, B and C are: read by their elements' addresses, each chunk would wait for them.

B batch, L tokens, H heads, P head dim, N state, G groups, Q positions of a chunk.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.selective_scan.triton_plan import device_of
from kernels.ssd.problem import Problem
from kernels.ssd.triton_boxes import as_lines, rows_box
from kernels.ssd.triton_plan import Plan
from kernels.ssd.triton_steps import decays, product, weighted_mask


@triton.jit(do_not_specialize=["length"])
def gated_kernel(x_box, B_box, C_box, z_box, y_box, D, norm_weight, steps, initial, final, squares, length, plane, H, G,
                 P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_INITIAL: tl.constexpr, DOT: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """y (B, L, H, P) gated, times the norm's weight, its squares (B, L, H) before that, and the final states."""
    pid = tl.program_id(0)
    head, b = pid % H, pid // H
    group = head // (H // G)
    p, n, j = tl.arange(0, P), tl.arange(0, N), tl.arange(0, Q)
    skip = tl.load(D + head)
    state = (pid.to(tl.int64) * P + p[None, :]) * N + n[:, None]  # (N, P), so that C h reads it as it is
    h = tl.zeros([N, P], tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial + state)
    steps += pid.to(tl.int64) * length * Q
    for c in tl.range(length, num_stages=STAGES):
        line = (b * length + c) * Q
        step, high, low, segment, enter, _leave, weight, through = decays(steps + c * Q, plane, j, Q, False, True,
                                                                         False)  # fmt: skip
        xv, zv = x_box.load([line, head * P]), z_box.load([line, head * P])
        Bv, Cv = B_box.load([line, group * N]), C_box.load([line, group * N])
        scores = product(Cv, tl.trans(Bv), DOT, "ieee")
        scores = (scores * weighted_mask(step, high, low, segment, Q, False, True, False)).to(DOT)
        out = product(Cv, h, DOT, "ieee") * enter[:, None]
        out = product(scores, xv, DOT, "ieee", out)
        xf = xv.to(tl.float32)
        h = product(tl.trans(Bv), xf * weight[:, None], DOT, "ieee", h * through)
        gate = zv.to(tl.float32)
        out = (out + skip * xf) * (gate / (1 + tl.exp(-gate)))
        tl.store(squares + (line.to(tl.int64) + j) * H + head, tl.sum(out * out, 1))
        out *= tl.load(norm_weight + head * P + p).to(tl.float32)[None, :]  # held, it would take registers
        if c < length:  # always: copies of the next chunk are under way before what stands in a condition
            y_box.store([line, head * P], out.to(DOT))
    tl.store(final + state, h)


def fits(p: Problem) -> bool:
    """Whether ``forward`` takes a problem: full tiles in bfloat16 throughout, one D a head, the tokens in
    order, and heads enough for all of the GPU."""
    if not p.x.is_cuda or torch.version.hip is not None or p.z is None or p.D is None or p.D.ndim != 2:
        return False
    plan = Plan(p)
    whole = plan.width == p.head_dim and p.state <= 128 and plan.segments.count == 1  # a program has all of a head
    return whole and plan.folded and p.z.dtype == torch.bfloat16 and plan.boxed and as_lines(p.z.unsqueeze(2))


def forward(p: Problem, norm_weight: Tensor, state_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """``kernels.ssd.gated.gated_scan`` of a problem that ``fits``."""
    assert p.z is not None
    assert p.D is not None
    plan = Plan(p)
    y = torch.empty(p.batch, p.length, 1, p.heads, p.head_dim, dtype=p.x.dtype, device=p.x.device)
    squares = torch.empty(p.batch, p.length, p.heads, dtype=torch.float32, device=p.x.device)
    size, initial = (p.batch, p.heads, p.head_dim, p.state), plan.initial
    final = torch.empty(size, dtype=p.dtype if state_dtype is None else state_dtype, device=p.x.device)
    boxes = {"x": p.x, "z": p.z.unsqueeze(2), "y": y, "B": p.B, "C": p.C}
    columns = {"B": p.state, "C": p.state}
    named = {f"{n}_box": rows_box(t, plan.chunk, columns.get(n, p.head_dim)) for n, t in boxes.items()}
    tensors = {
        **named, "D": plan.D, "norm_weight": norm_weight.contiguous(), "steps": plan.steps,
        "initial": plan.steps if initial is None else initial, "final": final, "squares": squares,
    }  # fmt: skip
    with device_of(p.x):
        plan.launch(
            gated_kernel, (p.batch * p.heads,), tensors,
            lambda: {
                "length": plan.per_row, "plane": plan.steps[0].numel(), "H": p.heads, "G": p.groups, "P": p.head_dim,
                "N": p.state, "Q": plan.chunk, "HAS_INITIAL": initial is not None, "DOT": tl.bfloat16, "STAGES": 2,
                "num_warps": 4,
            },
            final.dtype,
        )  # fmt: skip
    return y.flatten(2), squares, final
