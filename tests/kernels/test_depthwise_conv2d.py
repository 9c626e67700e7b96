"""The depthwise convolution: its definition, its gradients, how it traces, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from kernels import depthwise_conv2d


def inputs(B=2, H=4, W=5, D=3, kernel=(3, 3), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    sizes = ((B, H, W, D), (D, 1, *kernel), (D,))
    return [torch.randn(size, generator=g, dtype=dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (7, 7)])
def test_is_a_cross_correlation_with_zeros_around(kernel):
    x, weight, bias = inputs(kernel=kernel)
    y = depthwise_conv2d(x, weight, bias)
    U, V = kernel
    for b, h, w, d in ((0, 0, 0, 0), (1, 3, 4, 2), (1, 2, 1, 1)):
        total = bias[d].clone()
        for u in range(U):
            for v in range(V):
                i, j = h + u - U // 2, w + v - V // 2
                if 0 <= i < 4 and 0 <= j < 5:
                    total = total + weight[d, 0, u, v] * x[b, i, j, d]
        torch.testing.assert_close(y[b, h, w, d], total)


@pytest.mark.parametrize("activation", ["silu", "gelu", None])
def test_gradients(activation):
    given = inputs(B=1, H=3, W=2, D=2)
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv2d(*t, activation=activation), given)
    y = depthwise_conv2d(*given, activation=activation)
    plain = depthwise_conv2d(*given)
    torch.testing.assert_close(y, getattr(F, activation)(plain) if activation else plain)


@pytest.mark.parametrize("bias", [True, False])
def test_the_op_traces(bias):
    x, weight, b = inputs(dtype=torch.float32)
    arguments = (x, weight, b if bias else None, "silu", "auto")
    torch.library.opcheck(torch.ops.triscan.depthwise_conv2d, arguments)


def test_a_part_of_a_wider_map():
    x, weight, bias = inputs(D=8)
    half = x[..., 4:]
    torch.testing.assert_close(
        depthwise_conv2d(half, weight[:4], bias[:4]), depthwise_conv2d(half.clone(), weight[:4], bias[:4])
    )


def test_low_precision_is_summed_in_float32():
    x, weight, bias = (t.detach().bfloat16() for t in inputs(dtype=torch.float32))
    wanted = depthwise_conv2d(x.float(), weight.float(), bias.float(), activation="silu").bfloat16()
    assert torch.equal(depthwise_conv2d(x, weight, bias, activation="silu"), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, r"x: got shape \(2, 4, 3\), wanted \(B, H, W, D\)"),
        ({"weight": torch.zeros(3, 1, 2, 3)}, "U and V odd"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, r"weight: got shape \(4, 1, 3, 3\)"),
        ({"bias": torch.zeros(4)}, "bias: got shape"),
        ({"activation": "relu"}, "activation: got 'relu'"),
        ({"x": torch.zeros(2, 4, 5, 3, dtype=torch.int64)}, "x: got dtype torch.int64"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    given = {"x": torch.zeros(2, 4, 5, 3), "weight": torch.zeros(3, 1, 3, 3), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**{**given, **change})
