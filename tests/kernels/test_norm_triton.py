"""The norms' Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from contract import assert_equals_reference, assert_repeats, triton_device
from norm_cases import CASES, ROUNDED, compare, run

DEVICE = triton_device()


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    assert_equals_reference(run, CASES[name], "triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype, "triton", DEVICE)


def test_repeats_bit_by_bit() -> None:
    assert_repeats(run, CASES["many_rows"], "triton", DEVICE)
