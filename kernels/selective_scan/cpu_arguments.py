"""What the CPU kernels of the scan are given, and how they are compiled.

B batch, L tokens, D channels, N state, K routes, P scan positions, G groups, S sequences, Q planes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from kernels.selective_scan.cpu_math import MATH

# Functions that only kernels call: without the wrappers for Python, which take longer to compile than they do.
INNER: Any = {**MATH, "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Inner loops that take or return lanes, which so stay in registers.
FUSED: Any = {**INNER, "forceinline": True}
# Parts of one kernel: compiled with it, not once alone and once more inside it.
PART: Any = {**MATH, "inline": "always"}
GROUP = 4  # states walked at once: enough chains to fill the processor, and h, A and temporaries fit its registers
# What the kernels are made of. Numba keys its disk cache by the file of the kernel itself and by the values that the
# kernel closes over, so each kernel closes over this: an edit of any of these files compiles it again.
SOURCES = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("cpu_*.py")))).hexdigest()


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compiles a kernel on its first call, and keeps it on disk where a folder can be written."""
    options = {**MATH, "nogil": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder for its cache
        return njit(**options)(function)


class Sizes(NamedTuple):
    """Numbers and switches (0 or 1) of one call."""

    batch: int
    length: int
    positions: int
    routes: int
    x_routes: int  # K, or 1 where all routes read the same x
    channels: int
    state: int
    groups: int
    planes: int
    padded: int  # N, for real A rounded up to whole groups of states: the others are zeros
    routed: int
    token_params: int
    coded: int
    packed: int
    softplus: int
    reverse: int
    gated: int
    keep: int
    once: int  # every token is written once: nothing needs to be zero before, or added
    varying_b: int  # B varies over time, else (K, Q, N, D)
    varying_c: int


class Inputs(NamedTuple):
    """Inputs as flat arrays with the strides of all axes but the last one, which is contiguous.

    x (B, L, K), dt (B, L, K), z (B, L), B and C (B, L, K, G); A, constant B and constant C lie as ``(K, Q, N, D)``,
    the initial state as ``(S, K, D, N, Q)``, D and dt_bias as ``(K, D)``. Absent ones are zeros.
    """

    x: np.ndarray
    x_strides: tuple[int, int, int]
    dt: np.ndarray
    dt_strides: tuple[int, int, int]
    z: np.ndarray
    z_strides: tuple[int, int]
    A: np.ndarray
    B: np.ndarray
    B_strides: tuple[int, int, int, int]
    C: np.ndarray
    C_strides: tuple[int, int, int, int]
    D: np.ndarray
    dt_bias: np.ndarray
    initial: np.ndarray
    route: np.ndarray  # (K, P)
    code: np.ndarray  # (B, K, P)
    bounds: np.ndarray  # (S + 1,) int64
    blocks: np.ndarray  # (blocks, 2) first and last + 1 channel; none crosses a group
