"""Elementary functions for numba, of numbers and of ``Lanes``: exp, softplus, sigmoid; of numbers, cosine and sine.

Numba from PyPI has no vector math library, so one libm call keeps a whole loop scalar. In float32 these functions are
range reductions and polynomials instead (Chebyshev fits over the reduced range; errors within 2 units in the last
place); in float64 they call libm. Called from Python they are the plain float64 functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from kernels.selective_scan.cpu_simd import Lanes
from kernels.selective_scan.cpu_simd_math import (
    choose,
    clamp,
    each_exp,
    each_log,
    exponent,
    fma,
    has_avx512,
    magnitude,
    scaled,
    sixteenth,
)

# Fused multiply-adds and nothing more: reassociation would undo the rounding tricks below. Divisions don't raise.
MATH: Any = {"fastmath": {"contract"}, "error_model": "numpy"}

F = np.float32
ONE, HALF = F(1), F(0.5)
LOG2E, LN2_HIGH, LN2_LOW = F(1.4426950408889634), F(0.693359375), F(-2.12194440e-4)  # ln 2 in two; n * high is exact
# Adding 1.5 * 2^23 rounds to an integer n; with 127 more the low bits are the exponent field of 2^n.
ROUND = F(12582912 + 127)
LOG2E_LOW = F(math.log2(math.e) - float(LOG2E))
LOWEST, HIGHEST = F(-88.1), F(88.8)  # the exponent field is 0 here (2^n = 0), 255 there (2^n = inf)
E2, E3, E4, E5, E6 = F(0.5000000013), F(0.1666657698), F(0.0416664649), F(0.0083631801), F(0.001393365)  # e^r - 1 - r
FIELD0, FIELD255 = F(12582912), F(12582912 + 255)  # what clamps such a number to the fields of 0 and of infinity
P1, P2, P3 = F(0.693147188), F(0.240226508), F(0.0555035711)  # 2^r - 1, |r| <= 1/2
P4, P5, P6 = F(0.00961808256), F(0.00133908634), F(0.000154531629)
# log(1 + u) - u, 0 <= u <= 1: the coefficients of u^2 to u^10
L2, L3, L4 = F(-0.49999997), F(0.333328419), F(-0.249865262)
L5, L6, L7 = F(0.198541062), F(-0.158475657), F(0.115618454)
L8, L9, L10 = F(-0.066757725), F(0.0252240543), F(-0.00446621159)
LIMIT = F(2**32)  # of both factors of a decay's exponent: its polynomial stays finite beyond where exp is 0 or infinite
SIXTEENTHS = F(786432)  # adding 1.5 * 2^19 rounds to a sixteenth, whose numerator are the lowest bits
T1, T2, T3 = F(0.693147181), F(0.24023427), F(0.05550346)  # 2^r - 1, |r| <= 1/32; with ln 2 as it is for small r
S3, S5, S7 = F(-0.1666666467), F(0.0083327486), F(-0.0001958795)  # sin(r) - r, |r| <= pi / 4
C4, C6, C8 = F(4.1666664662e-2), F(-1.3888303340e-3), F(2.4547991314e-5)  # cos(r) - 1 + r^2 / 2
LINEAR = 20  # softplus(v) is v beyond this, as in PyTorch
TURNS = 2 / math.pi  # quarter turns in a radian


def exp(v: float) -> float:
    """The exponential; in float32 zero below -87.7 and infinite above 88.4."""
    return math.exp(v)


def in_base_two(dt: float) -> tuple[float, float]:
    """``dt`` as ``decay`` wants it: in float32 times log2(e), at most ``LIMIT``, and the rounding error of that."""
    return dt, 0.0


def decay(dt: float, low: float, rate: float) -> float:
    """``exp(dt A)`` of ``in_base_two(dt)`` and A; in float32 zero below dt A = -87.7 and infinite above 88.8.

    In float32 A must be within ``LIMIT``. An exponent of which only the leading part were kept would be off by the same
    amount at every step of equal dt, which a long memory adds up.
    """
    return math.exp(dt * rate + low * rate)


def softplus(v: float) -> float:
    """``log(1 + e^v)``, and ``v`` above 20."""
    return v if v > LINEAR else max(v, 0.0) + math.log1p(math.exp(-abs(v)))


def sigmoid(v: float) -> float:
    """``1 / (1 + e^-v)``."""
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def rotation(dt: float, frequency: float) -> tuple[float, float]:
    """Cosine and sine of ``dt * frequency`` radians; in float32 good to 1e7 radians."""
    return math.cos(dt * frequency), math.sin(dt * frequency)


def _pick(v: Any, polynomial: Callable[..., Any], libm: Callable[..., Any], lanes: Callable[..., Any]) -> Any:
    """The implementation for a numba type: float32, scalar or lanes; float64 lanes; float64."""
    if isinstance(v, Lanes):
        return polynomial if v.kind == types.float32 else lanes
    return polynomial if v == types.float32 else libm


@overload(exp, jit_options=MATH)
def _exp(v):
    def polynomial(v):
        v = clamp(v, LOWEST, HIGHEST)
        biased = v * LOG2E + ROUND
        n = biased - ROUND
        r = (v - n * LN2_HIGH) - n * LN2_LOW
        r2 = r * r
        p = ((r2 * E6 + (r * E5 + E4)) * r2 + (r * E3 + E2)) * r2 + (r + ONE)
        return p * exponent(biased)

    def libm(v):
        return math.exp(v)

    def lanes(v):
        return each_exp(v)

    return _pick(v, polynomial, libm, lanes)


@overload(in_base_two, jit_options=MATH)
def _in_base_two(dt):
    def parts(dt):
        dt = clamp(dt, -LIMIT, LIMIT)
        high = dt * LOG2E
        return high, fma(dt, LOG2E_LOW, fma(dt, LOG2E, -high))

    def same(dt):
        return dt, dt - dt

    return parts if dt.kind == types.float32 else same


@overload(decay, jit_options=MATH)
def _decay(dt, low, rate):
    def looked_up(dt, low, rate):
        biased = fma(dt, rate, SIXTEENTHS)  # rounded to sixteenths
        n = biased - SIXTEENTHS
        r = fma(low, rate, fma(dt, rate, -n))
        power = sixteenth(biased)
        return scaled(fma(power * r, (r * T3 + T2) * r + T1, power), n)

    def polynomial(dt, low, rate):
        biased = fma(dt, rate, ROUND)
        n = biased - ROUND
        r = fma(low, rate, fma(dt, rate, -n))
        # One multiply-add a coefficient: other states' fill the time that each waits for the one before.
        p = (((((r * P6 + P5) * r + P4) * r + P3) * r + P2) * r + P1) * r + ONE
        return p * exponent(clamp(biased, FIELD0, FIELD255))

    def lanes(dt, low, rate):
        return exp(dt * rate)

    if rate.kind != types.float32:
        return lanes
    return looked_up if has_avx512() else polynomial


@overload(softplus, jit_options=MATH)
def _softplus(v):
    def polynomial(v):
        u = exp(-magnitude(v))
        u2 = u * u
        u4 = u2 * u2
        low = (u * L5 + L4) * u2 + (u * L3 + L2)
        high = (u * L9 + L8) * u2 + (u * L7 + L6)
        log1p = ((u4 * L10 + high) * u4 + low) * u2 + u
        return choose(v, F(LINEAR), v, choose(v, F(0), v, F(0)) + log1p)

    def libm(v):
        return v if v > LINEAR else max(v, 0.0) + math.log1p(math.exp(-abs(v)))

    def lanes(v):
        u = exp(-magnitude(v))
        w = u + 1.0  # log(1 + u) = log(w) u / (w - 1), where the rounding of w cancels (Kahan); u itself where w is 1
        log1p = choose(w, 1.0, each_log(w) * u / choose(w, 1.0, w - 1.0, 1.0), u)
        return choose(v, float(LINEAR), v, choose(v, 0.0, v, 0.0) + log1p)

    return _pick(v, polynomial, libm, lanes)


@overload(sigmoid, jit_options=MATH)
def _sigmoid(v):
    def polynomial(v):
        return ONE / (exp(-v) + ONE)

    def libm(v):
        return 1.0 / (1.0 + math.exp(-v))

    def lanes(v):
        return 1.0 / (exp(-v) + 1.0)

    return _pick(v, polynomial, libm, lanes)


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
