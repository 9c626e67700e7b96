"""The norms' Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from norm_cases import CASES, ROUNDED, compare, run

from kernels.backend import interpreting

if not (torch.cuda.is_available() or interpreting()):
    pytest.skip("needs an NVIDIA GPU or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    got = run(CASES[name], torch.float64, "triton", DEVICE)
    for key, value in run(CASES[name], torch.float64, "reference").items():
        torch.testing.assert_close(got[key].cpu(), value, rtol=1e-10, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype, "triton", DEVICE)


def test_repeats_bit_by_bit() -> None:
    first, second = (run(CASES["many_rows"], torch.float32, "triton", DEVICE) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
