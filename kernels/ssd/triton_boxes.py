"""Tiles of ``ssd``'s forward as boxes that the GPU copies by itself (TMA), where the tensors' layout allows that.

B batch, L tokens, K routes, H heads, P head dim, N state, Q positions of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import is_hopper
from kernels.ssd.triton_plan import Plan

BOXES = ("x_box", "B_box", "C_box", "y_box")


def boxes(plan: Plan, y: Tensor) -> dict[str, TensorDescriptor] | None:
    """x, B, C and y as matrices of tokens, in boxes of a chunk; None where tiles must go by addresses."""
    p = plan.p
    if not plan.full or p.reverse or plan.product_dtype != torch.bfloat16 or not is_hopper(p.x.device):
        return None
    found = dict(zip(BOXES, ((p.x, plan.width), (p.B, p.state), (p.C, p.state), (y, plan.width)), strict=True))
    if not all(as_lines(t) for t, _ in found.values()):
        return None
    return {n: descriptor(t, plan.chunk, columns) for n, (t, columns) in found.items()}


def as_lines(t: Tensor) -> bool:
    """Whether (B, L, K, ...) is a matrix of tokens that a bulk copy can read: without gaps, lines of whole 16 bytes."""
    batch, length, routes, heads, width = t.shape
    s = t.stride()
    dense = s[4] == 1 and (heads == 1 or s[3] == width) and (batch == 1 or s[0] == length * s[1])
    return routes == 1 and dense and s[1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The matrix of tokens, read in boxes."""
    batch, length, _, heads, width = t.shape
    return TensorDescriptor(t, [batch * length, heads * width], [t.stride(1), 1], [rows, columns])
