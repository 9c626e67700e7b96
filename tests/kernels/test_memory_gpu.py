"""Nothing of a call stays in a GPU's memory: what ops keep for a signature holds no tensor."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels

pytestmark = pytest.mark.gpu
ROUTES = 2


def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size, dtype=dtype, device="cuda", requires_grad=True)


def negative(*size: int) -> Tensor:
    return (-torch.rand(size, device="cuda") - 0.1).requires_grad_()


def scan(L: int, N: int = 16, **more: Tensor) -> Tensor:
    x, B = normal(2, L, 64), normal(2, L, 1, N)
    return kernels.selective_scan(x, normal(2, L, 64), negative(64, N), B, normal(2, L, 1, N), **more)


def routed_scan(L: int) -> Tensor:
    route = torch.stack([torch.randperm(L, device="cuda") for _ in range(ROUTES)]).int()
    B, C = normal(2, L, ROUTES, 1, 1), normal(2, L, ROUTES, 1, 1)
    return kernels.selective_scan(
        normal(2, L, 64), normal(2, L, ROUTES, 64), negative(ROUTES, 64, 1), B, C, route=route
    )


def packed_scan(L: int) -> Tensor:
    bounds = torch.tensor([0, 5, 5, L], dtype=torch.int32, device="cuda")
    B, C = normal(1, L, 1, 16), normal(1, L, 1, 16)
    return kernels.selective_scan(normal(1, L, 64), normal(1, L, 64), negative(64, 16), B, C, cu_seqlens=bounds)


OPS: dict[str, Callable[[int], Tensor]] = {
    "selective_scan": scan,
    "selective_scan, gated": lambda L: scan(L, D=normal(64, dtype=torch.float32), z=normal(2, L, 64)),
    "selective_scan, many states": lambda L: scan(L, N=80),
    "selective_scan, routes": routed_scan,
    "selective_scan, packed": packed_scan,
    "ssd": lambda L: kernels.ssd(
        normal(2, L, 2, 64), normal(2, L, 2), negative(2), normal(2, L, 1, 64), normal(2, L, 1, 64)
    ),
    "causal_conv1d": lambda L: kernels.causal_conv1d(normal(2, L, 64), normal(64, 4), activation="silu"),
    "norm": lambda L: kernels.norm(normal(2, L, 64), normal(64), residual=normal(2, L, 64)),
    "depthwise_conv2d": lambda L: kernels.depthwise_conv2d(normal(1, L, 8, 64), normal(64, 1, 3, 3)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_nothing_of_a_call_stays(name: str, compiled: bool) -> None:
    call = torch.compile(OPS[name], backend="aot_eager") if compiled else OPS[name]

    def held(L: int) -> int:
        call(L).float().square().sum().backward()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    assert held(3000) == held(3008)  # the first call loads libraries; every size is a signature of its own
