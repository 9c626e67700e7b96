"""The decay of the CPU scan with and without AVX-512, and what the kernels leave of the processor's settings."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from kernels import selective_scan

pytest.importorskip("numba")

PROGRAM = """
import numpy as np
from numba import njit
from kernels.selective_scan.cpu_math import LIMIT, MATH, decay, in_base_two
from kernels.selective_scan.cpu_simd import load, store
from kernels.selective_scan.cpu_simd_math import has_avx512

@njit(**MATH)
def decays(dt, A, out):
    for at in range(0, dt.size, 16):
        high, low = in_base_two(load(dt, at, 0, 1))
        store(out, at, 0, decay(high, low, load(A, at, 0, 1)))

rng = np.random.default_rng(0)
dt = np.concatenate([rng.uniform(0, 5, 4000), rng.uniform(0, 1e-3, 80), [1e30, 0, 1, 3, 1, 1e-30, 2, 9], np.ones(8)])
A = np.concatenate([-rng.uniform(0, 17, 4080), [-1, -1, -1e9, 0, 88, -1, 1e5, -9, -86.9, *[-1] * 7]])
dt, A = dt.astype(np.float32), A.astype(np.float32)
out = np.empty_like(dt)
decays(dt, A, out)
with np.errstate(over="ignore", under="ignore"):
    wanted = np.exp(dt.astype(np.float64) * A).astype(np.float32)
normal = (wanted > 1e-37) & np.isfinite(wanted)
worst = np.max(np.abs(out[normal] - wanted[normal]) / np.spacing(wanted[normal]))
print(int(has_avx512()), worst, np.all((out == wanted)[np.isinf(wanted)]), out[~normal & (wanted < 1)].max())
"""


OLDER = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize(
    "settings", [{}, pytest.param(OLDER, marks=pytest.mark.skipif(not X86, reason="names an x86 processor"))]
)
def test_decays_are_exact_to_two_units(settings: dict[str, str]) -> None:
    settings = os.environ | settings
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=settings, capture_output=True, text=True, check=True)
    wide, worst, infinite, tiny = run.stdout.split()
    assert infinite == "True"
    assert "NUMBA_CPU_NAME" not in settings or wide == "0"
    assert float(worst) <= 2
    assert float(tiny) < 1e-37


def test_denormals_are_back_after_a_scan() -> None:
    ones = torch.ones(1, 3, 1, 1)
    selective_scan(ones[..., 0], ones[..., 0], -ones[0, :1, 0], ones, ones, backend="cpu")
    assert np.float32(1e-40) * np.float32(0.5) > 0
