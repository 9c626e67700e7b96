"""Elementary functions for numba loops that LLVM can vectorise: exp, softplus, sigmoid, cosine and sine.

Numba from PyPI has no vector math library, so one libm call keeps a whole loop scalar. In float32 these functions are
range reductions and polynomials instead (Chebyshev fits over the reduced range; errors within 2 units in the last
place); in float64 they call libm. Called from Python they are the plain float64 functions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

# Fused multiply-adds and nothing more: reassociation would undo the rounding tricks below. Divisions don't raise.
MATH: Any = {"fastmath": {"contract"}, "error_model": "numpy"}

F = np.float32
ONE, TWO, HALF = F(1), F(2), F(0.5)
LOG2E, LN2_HIGH, LN2_LOW = F(1.4426950408889634), F(0.693359375), F(-2.12194440e-4)  # ln 2 in two; n * high is exact
# Adding 1.5 * 2^23 rounds to an integer n; with 127 more the low bits are the exponent field of 2^n.
ROUND = F(12582912 + 127)
LOWEST, HIGHEST = F(-88.1), F(88.8)  # the exponent field is 0 here (2^n = 0), 255 there (2^n = inf)
E2, E3, E4, E5, E6 = F(0.5000000013), F(0.1666657698), F(0.0416664649), F(0.0083631801), F(0.001393365)  # e^r - 1 - r
L3, L5, L7, L9 = F(0.3333331983), F(0.2000383543), F(0.1411697805), F(0.1343377423)  # atanh(s) - s, s <= 1/3
S3, S5, S7 = F(-0.1666666467), F(0.0083327486), F(-0.0001958795)  # sin(r) - r, |r| <= pi / 4
C4, C6, C8 = F(4.1666664662e-2), F(-1.3888303340e-3), F(2.4547991314e-5)  # cos(r) - 1 + r^2 / 2
LINEAR = 20  # softplus(v) is v beyond this, as in PyTorch
TURNS = 2 / math.pi  # quarter turns in a radian


def exp(v: float) -> float:
    """The exponential; in float32 zero below -87.7 and infinite above 88.4."""
    return math.exp(v)


def softplus(v: float) -> float:
    """``log(1 + e^v)``, and ``v`` above 20."""
    return v if v > LINEAR else max(v, 0.0) + math.log1p(math.exp(-abs(v)))


def sigmoid(v: float) -> float:
    """``1 / (1 + e^-v)``."""
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def rotation(dt: float, frequency: float) -> tuple[float, float]:
    """Cosine and sine of ``dt * frequency`` radians; in float32 good to 1e7 radians."""
    return math.cos(dt * frequency), math.sin(dt * frequency)


@overload(exp, jit_options=MATH)
def _exp(v):
    def polynomial(v):
        v = LOWEST if v < LOWEST else v  # written so that NaN stays NaN
        v = HIGHEST if v > HIGHEST else v
        biased = v * LOG2E + ROUND
        n = biased - ROUND
        r = (v - n * LN2_HIGH) - n * LN2_LOW
        r2 = r * r
        p = ((E6 * r2 + (E5 * r + E4)) * r2 + (E3 * r + E2)) * r2 + (r + ONE)
        field = np.int32(np.float32(biased).view(np.int32) << 23)
        return p * np.int32(field).view(np.float32)

    def libm(v):
        return math.exp(v)

    return polynomial if v == types.float32 else libm


@overload(softplus, jit_options=MATH)
def _softplus(v):
    def polynomial(v):
        u = exp(-abs(v))
        s = u / (TWO + u)  # log(1 + u) = 2 atanh(s)
        q = s * s
        log1p = TWO * (s + s * q * (L3 + q * (L5 + q * (L7 + q * L9))))
        return v if v > F(LINEAR) else (v if v > F(0) else F(0)) + log1p

    def libm(v):
        return v if v > LINEAR else max(v, 0.0) + math.log1p(math.exp(-abs(v)))

    return polynomial if v == types.float32 else libm


@overload(sigmoid, jit_options=MATH)
def _sigmoid(v):
    def polynomial(v):
        u = exp(-abs(v))
        return (ONE if v >= F(0) else u) / (ONE + u)

    def libm(v):
        u = math.exp(-abs(v))
        return (1.0 if v >= 0 else u) / (1.0 + u)

    return polynomial if v == types.float32 else libm


@overload(rotation, jit_options=MATH)
def _rotation(dt, frequency):
    def polynomial(dt, frequency):
        angle = np.float64(dt) * np.float64(frequency)  # exact, and reduced in float64: large angles keep their phase
        turn = np.rint(angle * TURNS)
        r = np.float32(angle - turn / TURNS)
        quarter = np.int32(turn - 4.0 * np.floor(turn * 0.25))
        q = r * r
        sine = r + r * q * (S3 + q * (S5 + q * S7))
        cosine = ONE - HALF * q + q * q * (C4 + q * (C6 + q * C8))
        odd = quarter == 1 or quarter == 3
        c, s = (sine, cosine) if odd else (cosine, sine)
        c = -c if quarter == 1 or quarter == 2 else c
        s = -s if quarter >= 2 else s
        return c, s

    def libm(dt, frequency):
        return math.cos(dt * frequency), math.sin(dt * frequency)

    return polynomial if dt == types.float32 else libm
