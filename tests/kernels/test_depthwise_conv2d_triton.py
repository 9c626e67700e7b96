"""The Triton kernels of the depthwise convolution, interpreted or on a GPU, against the definition in float64."""

import pytest
import torch
from accuracy import assert_as_accurate

from kernels import depthwise_conv2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(B, H, W, D, kernel=(3, 3), bias=True, dtype=torch.float32, cut=False):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, H, W, 2 * D if cut else D, generator=g).to(DEVICE, dtype)
    weight = torch.randn(D, 1, *kernel, generator=g).to(DEVICE, dtype)
    b = torch.randn(D, generator=g).to(DEVICE, dtype) if bias else None
    dy = torch.randn(B, H, W, D, generator=g).to(DEVICE, dtype)
    return x[..., :D] if cut else x, weight, b, dy


def results(x, weight, bias, dy, activation, backend, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
    y = depthwise_conv2d(leaves[0], leaves[1], *leaves[2:], activation=activation, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


@pytest.mark.parametrize("activation", ["silu", "gelu", None])
@pytest.mark.parametrize(
    ("shape", "kernel", "bias", "cut"),
    [
        ((2, 5, 7, 20), (3, 3), True, False),
        ((1, 14, 3, 40), (3, 3), False, True),
        ((3, 1, 9, 8), (1, 3), True, False),
        ((1, 6, 1, 5), (5, 1), True, False),
        ((1, 1, 1, 1), (3, 3), True, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_as_accurate_as_the_definition(shape, kernel, bias, cut, activation, dtype):
    x, weight, b, dy = problem(*shape, kernel, bias, dtype, cut)
    given = [x, weight, b, dy, activation]
    truth = results(*given, "reference", torch.float64)
    reference = results(*given, "reference", dtype)
    names = ["y", "dx", "dweight", "dbias"]
    for name, ours, theirs, true in zip(names, results(*given, "triton", dtype), reference, truth, strict=False):
        assert_as_accurate(name, ours, theirs, true)


def test_the_sums_repeat():
    given = [*problem(2, 7, 9, 33), "silu", "triton", torch.float32]
    for first, second in zip(results(*given), results(*given), strict=True):
        assert torch.equal(first, second)
