"""A low-rank dt on a GPU: 16-bit factors are multiplied to float32 on tensor cores where no gradient is wanted."""

from __future__ import annotations

import pytest
import torch

from kernels.selective_scan.problem import _narrow, project

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_the_float32_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dt = torch.randn(2, 5, 1, 80, device="cuda", dtype=dtype)[..., :48]
    weight = torch.randn(1, 96, 48, device="cuda", dtype=dtype)
    with torch.no_grad():
        assert _narrow(dt, weight)
        found = project(dt, weight)
    assert not _narrow(dt, weight)  # with gradients
    wanted = torch.einsum("blkr,kdr->blkd", dt.double(), weight.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
