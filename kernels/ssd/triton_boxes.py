"""Tiles of ``ssd``'s tensors as boxes that the GPU copies by itself (TMA), where their layout allows that.

B batch, L tokens, K routes, H heads, P head dim, N state, Q positions of a chunk.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# (Triton's launcher takes numbers and tensors where the kernel's signature says constexpr or nothing.)
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.ssd.problem import Problem
from kernels.ssd.triton_steps import read_rows


def as_lines(t: Tensor) -> bool:
    """Whether (B, L, K, ...) is a matrix of tokens that a bulk copy can read: without gaps, lines of whole 16 bytes."""
    batch, length, routes, heads, width = t.shape
    s = t.stride()
    dense = s[4] == 1 and (heads == 1 or s[3] == width) and (batch == 1 or s[0] == length * s[1])
    aligned = s[1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
    return routes == 1 and dense and aligned and batch * length < 2**31  # coordinates have 32 bits


def rows_box(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The matrix of tokens (B L, H P), in boxes."""
    batch, length, _, heads, width = t.shape
    return TensorDescriptor(t, [batch * length, heads * width], [t.stride(1), 1], [rows, columns])


def states_box(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """States (chunks, K, H, P, N) as a matrix (chunks K H P, N), in boxes."""
    state = t.shape[-1]
    return TensorDescriptor(t, [t.numel() // state, state], [state, 1], [rows, columns])


def with_even_rows(p: Problem) -> Problem:
    """The problem with x copied where a GPU would have to read its bfloat16 rows in less than 16 bytes at a time: so
    read, tests on an H200 failed."""
    x = p.x
    even = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    if even or not x.is_cuda or x.dtype != torch.bfloat16:
        return p
    return replace(p, x=x.clone(memory_format=torch.contiguous_format))


@triton.jit
def tile_rows(rows, strides, box, line, column, origin, token, there, p, live, FULL: tl.constexpr, TMA: tl.constexpr):
    """A tile of x or dy (Q, P): by a bulk copy from the matrix of tokens, or by its elements' addresses."""
    if TMA:
        found = box.load([line, column])
    else:
        found = read_rows(rows, strides[1], strides[4], origin, token, there, p, live, FULL)
    return found


@triton.jit
def state_tile(states, box, number, block, column, P, N, p, n, FULL: tl.constexpr, TMA: tl.constexpr,
               BP: tl.constexpr):  # fmt: skip
    """A tile of one of the states (P, N) of ``states``: BP rows, the columns n."""
    if TMA:
        found = box.load([(number * P + block * BP).to(tl.int32), column])
    else:
        at = states + number * P * N + (p[:, None] * N + n[None, :])
        found = tl.load(at) if FULL else tl.load(at, mask=(p < P)[:, None] & (n < N)[None, :], other=0)
    return found
