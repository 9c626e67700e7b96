"""The norms: every backend against the definition, the definition against PyTorch's, the op's contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from contract import OpContract, assert_equals_reference, assert_independent_of_threads, assert_refuses, flops
from norm_cases import CASES, ROUNDED, Case, compare, run
from torch import Tensor, nn

from kernels import norm


def test_rms_is_torch_rms_norm() -> None:
    x, weight = torch.randn(3, 5, 6).double(), torch.randn(6).double()
    torch.testing.assert_close(norm(x, weight, eps=1e-3, backend="reference"), F.rms_norm(x, (6,), weight, 1e-3))


def test_layer_is_torch_layer_norm() -> None:
    x, weight, bias = torch.randn(3, 5, 6).double(), torch.randn(6).double(), torch.randn(6).double()
    got = norm(x, weight, bias, kind="layer", eps=1e-3, backend="reference")
    torch.testing.assert_close(got, F.layer_norm(x, (6,), weight, bias, 1e-3))


def test_gates_and_groups_are_the_formula() -> None:
    x, z, weight = torch.randn(3, 6).double(), torch.randn(3, 6).double(), torch.randn(6).double()
    halves = [F.rms_norm(part, (3,), eps=1e-5) for part in (x * F.silu(z)).split(3, -1)]
    before = norm(x, weight, z=z, group_size=3, norm_before_gate=False, backend="reference")
    torch.testing.assert_close(before, torch.cat(halves, -1) * weight)
    after = norm(x, weight, z=z, backend="reference")
    torch.testing.assert_close(after, F.rms_norm(x, (6,), weight, 1e-5) * F.silu(z))


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    assert_equals_reference(run, CASES[name], "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_residual_dtypes(backend: str) -> None:
    weight = torch.ones(6)
    for x_dtype, residual_dtype, in_fp32, wanted in (
        (torch.bfloat16, torch.bfloat16, True, torch.float32),
        (torch.bfloat16, torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, torch.float32, False, torch.float32),
        (torch.float32, torch.float16, False, torch.float16),
        (torch.float64, torch.float32, True, torch.float64),
        (torch.bfloat16, None, True, torch.float32),
        (torch.bfloat16, None, False, torch.bfloat16),
    ):
        x = torch.randn(2, 6).to(x_dtype).requires_grad_()
        residual = None if residual_dtype is None else torch.randn(2, 6).to(residual_dtype).requires_grad_()
        y, s = norm(x, weight, residual=residual, residual_in_fp32=in_fp32, return_residual=True, backend=backend)
        assert (y.dtype, s.dtype) == (x_dtype, wanted)
        leaves = [x] if residual is None else [x, residual]
        grads = torch.autograd.grad(y.double().sum() + s.double().sum(), leaves)
        assert [g.dtype for g in grads] == [t.dtype for t in leaves]


def test_rows_stand_alone() -> None:
    x, weight = torch.randn(70, 33), torch.randn(33)
    whole = norm(x, weight, backend="cpu")
    assert torch.equal(whole[40:41], norm(x[40:41], weight, backend="cpu"))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    assert_independent_of_threads(run, Case(shape=(300, 33), bias=True, residual=True))


def test_inputs_may_be_slices() -> None:
    wide = torch.randn(3, 7, 12).double()
    weight = torch.randn(12).double()[::2]
    for x in (wide[..., 3:9], wide[:, ::2, :6], wide[..., ::2], wide.transpose(0, 1)[..., :6]):
        wanted = norm(x.contiguous(), weight.contiguous(), z=x.contiguous(), backend="reference")
        torch.testing.assert_close(norm(x, weight, z=x, backend="cpu"), wanted)


@pytest.mark.parametrize("name", ["rms_residual", "layer_groups", "layer_gate_before"])
def test_gradcheck(name: str) -> None:
    case = dataclasses.replace(CASES[name], shape=(2, 6))
    inputs = case.inputs(torch.float64)
    for backend in ("reference", "cpu"):

        def function(*tensors: Tensor, backend: str = backend) -> tuple[Tensor, Tensor]:
            named = dict(zip(inputs, tensors, strict=True))
            return norm(**named, **case.options(), return_residual=True, backend=backend)

        assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("name", ["rms_residual", "rms_residual_low", "layer_groups"])
def test_plain_backend_behind_the_op_equals_the_function(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.bfloat16)
    leaves = list(inputs.values())
    y, s, _, _ = torch.ops.triscan.norm(
        inputs["x"], inputs["weight"], inputs.get("bias"), inputs["residual"], inputs.get("z"),
        case.kind, 1e-5, case.group_size or 0, case.norm_before_gate, case.residual_in_fp32, "torch",
    )  # fmt: skip
    wanted = norm(**inputs, **case.options(), return_residual=True, backend="torch")
    torch.testing.assert_close((y, s), wanted)
    losses = [a.float().square().sum() + b.float().sin().sum() for a, b in ((y, s), wanted)]
    got, truth = (torch.autograd.grad(loss, leaves) for loss in losses)
    torch.testing.assert_close(got, truth, rtol=2e-2, atol=2e-2)


class Model(nn.Module):
    """A module that calls the custom op the way models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y, s, _, _ = torch.ops.triscan.norm(x, self.weight, None, x, x, "rms", 1e-5, 0, True, True, "auto")
        return y + s


class TestContract(OpContract):
    Model, channels = Model, 6

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        return norm(x, model.weight)


@pytest.mark.parametrize("name", ["rms", "layer", "rms_residual", "layer_residual_low", "groups"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    arguments = (
        inputs["x"], inputs["weight"], inputs.get("bias"), inputs.get("residual"), inputs.get("z"),
        case.kind, 1e-5, case.group_size or 0, case.norm_before_gate, case.residual_in_fp32, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.triscan.norm, arguments)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck_of_the_backward(backend: str) -> None:
    x, weight, stats = torch.randn(4, 6).bfloat16(), torch.randn(6), torch.rand(4, 1)
    dy = torch.randn_like(x)
    tensors, flags = (x, weight, None, x.clone(), None), ("rms", 1e-5, 0, True, False)
    arguments = (dy, None, stats, stats, *tensors, x.dtype, *flags, backend)
    torch.library.opcheck(torch.ops.triscan.norm_backward, arguments)


def test_flops_are_counted() -> None:
    assert flops(lambda: Model()(torch.randn(2, 9, 6))) == 2 * 9 * 6 * ((5 + 1 + 2) + 2 * (5 + 2))


X = torch.zeros(2, 6)
BAD = {
    "kind": ({"kind": "batch"}, "kind: got 'batch', wanted 'rms' or 'layer'"),
    "weight": ({"weight": torch.ones(5)}, r"weight: got shape \(5,\), wanted \(D,\) = \(6,\)"),
    "bias": ({"bias": torch.ones(5)}, r"bias: got shape \(5,\)"),
    "residual": ({"residual": torch.ones(3, 6)}, r"residual: got shape \(3, 6\), wanted the shape of x"),
    "gate": ({"z": torch.ones(2, 5)}, r"z: got shape \(2, 5\), wanted the shape of x"),
    "groups": ({"group_size": 4}, "group_size: got 4, wanted a divisor of D = 6"),
    "integers": ({"x": X.long()}, "x: got dtype torch.int64"),
    "no channels": ({"x": X[:, :0]}, "D >= 1"),
    "backend": ({"backend": "numpy"}, "backend .*got 'numpy', wanted one of auto"),
}


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("name", [n for n in BAD if n != "kind"])
def test_bad_input_says_the_same_under_autograd(name: str, kind: str) -> None:
    changes, message = BAD[name]
    arguments = {"x": X, "weight": torch.ones(6), **changes, "kind": kind}
    assert_refuses(norm, {**arguments, "weight": arguments["weight"].requires_grad_()}, message)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_weights_of_any_dtype(kind: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 6).to(x_dtype).requires_grad_(), torch.randn(6).to(dtype).requires_grad_()
    y, wanted = (norm(x, weight, kind=kind, backend=backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(y, wanted)
    dy = torch.randn(3, 6).to(x_dtype)
    got, truth = (torch.autograd.grad(t, (x, weight), dy) for t in (y, wanted))
    torch.testing.assert_close(got, truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wanted(name: str) -> None:
    changes, message = BAD[name]
    assert_refuses(norm, {"x": X, "weight": torch.ones(6), **changes}, message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through_op", [False, True])
def test_a_layer_norm_of_one_channel_has_no_gradient(dtype: torch.dtype, through_op: bool) -> None:
    """Its output doesn't depend on x: rounding errors must not meet the large ``rstd = eps^-1/2``."""
    x, weight = torch.randn(40, 7, dtype=dtype).requires_grad_(), torch.randn(7)
    if through_op:
        y = torch.ops.triscan.norm(x, weight, None, None, None, "layer", 1e-5, 1, True, True, "cpu")[0]
    else:
        y = norm(x, weight, kind="layer", group_size=1, backend="cpu")
    (grad,) = torch.autograd.grad(y, x, torch.randn(40, 7, dtype=dtype))
    assert not grad.any()


def both_ways(case: Case, dtype: torch.dtype) -> list[list[Tensor]]:
    """Outputs and gradients of the function, which goes straight to the kernels, and of the op."""
    found = []
    for op in (False, True):
        inputs = case.inputs(dtype)
        if op:
            tensors = (inputs.get(n) for n in ("x", "weight", "bias", "residual", "z"))
            flags = (case.kind, 1e-5, case.group_size or 0, case.norm_before_gate, case.residual_in_fp32, "cpu")
            y, s, _, _ = torch.ops.triscan.norm(*tensors, *flags)
        else:
            y, s = norm(**inputs, **case.options(), return_residual=True, backend="cpu")
        outputs = [y, s] if case.residual else [y]
        generator = torch.Generator().manual_seed(3)
        grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, list(inputs.values()), grads)])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_function_is_the_op(name: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, wanted in zip(*both_ways(CASES[name], dtype), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_rows_do_not_infect_each_other(kind: str, bad: float) -> None:
    x, weight = torch.randn(40, 19), torch.randn(19)
    x[3, 5] = bad
    x.requires_grad_()
    y = norm(x, weight, kind=kind, backend="cpu")
    assert isinstance(y, Tensor)
    (grad,) = torch.autograd.grad(y, x, torch.ones(40, 19))
    others = torch.arange(40) != 3
    assert y[others].isfinite().all()
    assert grad[others].isfinite().all()
    assert not y[3].isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(6)
    y = norm(x, weight, backend="cpu")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="norm_backward has no derivative; use backend='torch'"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_autocast_changes_nothing(kind: str) -> None:
    x, weight, residual = torch.randn(3, 6).bfloat16(), torch.randn(6), torch.randn(3, 6)
    wanted = norm(x, weight, residual=residual, kind=kind, return_residual=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x, weight, residual=residual, kind=kind, return_residual=True), wanted)


def test_large_layer_norms_are_as_accurate() -> None:
    """Sums over many rows; PyTorch's own, which takes part for some sizes, rounds these to bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        compare(Case(shape=(700, 70), kind="layer", bias=True, residual=True), dtype, "cpu")
        compare(Case(shape=(700, 70), kind="layer", bias=True), dtype, "cpu")
