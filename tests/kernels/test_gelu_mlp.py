"""The perceptron as one op: numbers, gradients, what it keeps, how it traces, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

from kernels import gelu_mlp
from kernels.gelu_mlp import plain

SIZES = ((2, 5, 3), (7, 3), (7,), (4, 7), (4,))


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for size in SIZES]


def results(function, given, dy):
    y = function(*given)
    return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]


def test_numbers_and_gradients():
    x, weight1, bias1, weight2, bias2 = given = inputs()
    wanted = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
    torch.testing.assert_close(gelu_mlp(*given), wanted)
    assert torch.autograd.gradcheck(gelu_mlp, given)


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
def test_low_precision_is_as_accurate_as_plain_operators(parameters):
    low = inputs(torch.bfloat16)
    given = [low[0], *(t.detach().to(parameters).requires_grad_() for t in low[1:])]
    dy = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    truth = results(plain, [t.detach().double().requires_grad_() for t in given], dy.bfloat16().double())
    for name, ours, theirs, true in zip(
        ("y", "dx", "dweight1", "dbias1", "dweight2", "dbias2"),
        results(gelu_mlp, given, dy), results(plain, given, dy), truth, strict=True,
    ):  # fmt: skip
        assert_as_accurate(name, ours, theirs, true)


def test_keeps_its_input_alone():
    given, kept = inputs(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        gelu_mlp(*given)
    assert sorted(kept) == sorted(SIZES[:4])


def test_the_op_traces():
    torch.library.opcheck(torch.ops.triscan.gelu_mlp, tuple(inputs(torch.float32)))


@pytest.mark.parametrize(
    ("index", "size", "message"),
    [(1, (7, 2), "weight1: got shape"), (3, (4, 6), "weight2: got shape"), (4, (4, 1), "bias2: got shape")],
)
def test_wrong_shapes_are_refused(index, size, message):
    given = inputs(torch.float32)
    given[index] = torch.zeros(size)
    with pytest.raises(ValueError, match=message):
        gelu_mlp(*given)
