"""The causal convolution: every backend against the reference, the reference against the formula, the op's contract."""

from __future__ import annotations

import math
import multiprocessing
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from contract import OpContract, assert_equals_reference, assert_independent_of_threads, assert_refuses, flops
from conv_cases import CASES, ROUNDED, ROUTES, SEQ_IDX, Case, compare, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels import causal_conv1d

LOW = (torch.bfloat16, torch.float16)


def test_reference_is_the_formula() -> None:
    x, weight, bias = torch.randn(2, 7, 3).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    y = causal_conv1d(x, weight, bias, activation="silu", backend="reference")
    for b, t, d in ((0, 0, 0), (0, 2, 1), (1, 6, 2), (1, 3, 0)):
        s = bias[d] + sum(weight[d, w] * x[b, t - 3 + w, d] for w in range(4) if t - 3 + w >= 0)
        torch.testing.assert_close(y[b, t, d], s * torch.sigmoid(s))


def test_reference_is_torch_conv1d() -> None:
    x, weight = torch.randn(2, 11, 3).double(), torch.randn(3, 4).double()
    wanted = F.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=3)[..., :11].transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, weight, backend="reference"), wanted)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_float64(name: str, backend: str) -> None:
    assert_equals_reference(run, CASES[name], backend, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype, backend: str) -> None:
    compare(CASES[name], dtype, backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_plain_backends_behind_the_op_equal_the_function(backend: str) -> None:
    inputs = CASES["seq_idx"].inputs(torch.float64)
    x, weight, bias, state = inputs.values()
    y, final = torch.ops.triscan.causal_conv1d(
        x, weight, bias, None, state, None, SEQ_IDX, "silu", False, True, backend
    )
    options = {"seq_idx": SEQ_IDX, "activation": "silu", "return_final_state": True}
    wanted = causal_conv1d(x, weight, bias, initial_state=state, backend=backend, **options)
    torch.testing.assert_close((y, final), wanted)
    loss, wanted_loss = y.square().sum() + final.sin().sum(), wanted[0].square().sum() + wanted[1].sin().sum()
    leaves = list(inputs.values())
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted_loss, leaves))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["state", "packed", "seq_idx", "route_padded"])
def test_gradcheck_to_second_order(name: str, backend: str) -> None:
    case = CASES[name]
    small = Case(**{**case.__dict__, "D": 2, "W": 3})
    inputs = small.inputs(torch.float64)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return causal_conv1d(**named, **small.options(), return_final_state=True, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


def test_gradcheck_of_the_kernels() -> None:
    inputs = CASES["state"].inputs(torch.float64)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return causal_conv1d(**named, activation="silu", return_final_state=True, backend="cpu")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, 9), W=st.integers(1, 6), reverse=st.booleans())
def test_pieces_equal_the_whole(backend: str, cut: int, W: int, reverse: bool) -> None:
    inputs = Case(W=W).inputs(torch.float64)
    x, weight, bias, state = (t.detach() for t in inputs.values())
    options = {"activation": "silu", "reverse": reverse, "return_final_state": True, "backend": backend}
    whole, end = causal_conv1d(x, weight, bias, initial_state=state, **options)
    parts = [x[:, :cut], x[:, cut:]]
    outs = [None, None]
    for i in (1, 0) if reverse else (0, 1):
        outs[i], state = causal_conv1d(parts[i], weight, bias, initial_state=state, **options)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_reverse_is_the_flip_of_the_flip(backend: str) -> None:
    x, weight, bias, state = (t.detach() for t in CASES["state"].inputs(torch.float64).values())
    options = {"initial_state": state, "activation": "silu", "return_final_state": True, "backend": backend}
    y, end = causal_conv1d(x, weight, bias, reverse=True, **options)
    flipped, flipped_end = causal_conv1d(x.flip(1), weight, bias, **options)
    torch.testing.assert_close((y, end), (flipped.flip(1), flipped_end))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_route_is_a_permutation(backend: str) -> None:
    x, weight, bias = torch.randn(2, 9, 5).double(), torch.randn(2, 5, 4).double(), torch.randn(2, 5).double()
    route = torch.stack([torch.randperm(9), torch.randperm(9)])
    y = causal_conv1d(x, weight, bias, route=route, backend=backend)
    for k in range(2):
        along = causal_conv1d(x[:, route[k]], weight[k], bias[k], backend="reference")
        torch.testing.assert_close(y[:, route[k], k], along)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_equal_separate_ones(backend: str, reverse: bool) -> None:
    lengths = [3, 0, 1, 5]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    x, weight, state = torch.randn(1, 9, 5).double(), torch.randn(5, 4).double(), torch.randn(4, 3, 5).double()
    options = {"reverse": reverse, "return_final_state": True, "backend": backend}
    y, end = causal_conv1d(x, weight, initial_state=state, cu_seqlens=bounds, **options)
    for s, (a, b) in enumerate(pairwise(bounds)):
        alone, alone_end = causal_conv1d(x[:, a:b], weight, initial_state=state[s : s + 1], **options)
        torch.testing.assert_close((y[:, a:b], end[s : s + 1]), (alone, alone_end))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_padding_tokens_count_for_nothing(backend: str) -> None:
    x, weight, state = torch.randn(1, 4, 5).double(), torch.randn(5, 4).double(), torch.randn(1, 3, 5).double()
    options = {"initial_state": state, "return_final_state": True, "backend": backend}
    wanted, end = causal_conv1d(x, weight, **options)
    keep = torch.tensor([2, 3, 5, 8])
    padded = torch.full((1, 9, 5), math.nan).double().index_copy(1, keep, x).requires_grad_()
    seq_idx = torch.full((1, 9), -1).index_fill(1, keep, 0)
    y, padded_end = causal_conv1d(padded, weight, seq_idx=seq_idx, **options)
    torch.testing.assert_close((y[:, keep], padded_end), (wanted, end))
    rest = [t for t in range(9) if t not in keep]
    assert (y[:, rest] == 0).all()
    (grad,) = torch.autograd.grad(y.sum() + padded_end.sum(), padded)
    assert (grad[:, rest] == 0).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_route_of_nothing_but_slots_moves_the_state(reverse: bool, packed: bool, backend: str) -> None:
    weight, state = torch.randn(2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 3, requires_grad=True)
    y, end = causal_conv1d(
        torch.zeros(1, 0, 3), weight, route=torch.full((2, 2), -1), initial_state=state, return_final_state=True,
        seq_idx=torch.zeros(1, 0, dtype=torch.int32) if packed else None, reverse=reverse, backend=backend,
    )  # fmt: skip
    assert y.shape == (1, 0, 2, 3)
    assert torch.equal(end, F.pad(state[:, :, 2:], (0, 0, 0, 2)))
    dweight, dstate = torch.autograd.grad(y.sum() + (end * end).sum() / 2, (weight, state), materialize_grads=True)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dstate, F.pad(state[:, :, 2:], (0, 0, 2, 0)))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    case = Case(B=3, L=700, D=33, activation=None)  # the exponentials are ATen's, whose last bit depends on it
    assert_independent_of_threads(run, case)


def test_inputs_may_be_slices() -> None:
    wide = torch.randn(2, 9, 13).double()
    weight = torch.randn(4, 5).double().t()
    for x in (wide[..., 4:9], wide[:, ::2, :5], wide[..., ::2][..., :5], wide.transpose(1, 2)[..., :5]):
        wanted = causal_conv1d(x.contiguous(), weight.contiguous(), backend="reference")
        torch.testing.assert_close(causal_conv1d(x, weight, backend="cpu"), wanted)
        torch.testing.assert_close(causal_conv1d(x, weight, backend="torch"), wanted)


def test_mixed_dtypes() -> None:
    x, weight, bias = torch.randn(2, 9, 5).bfloat16(), torch.randn(5, 4), torch.randn(5).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for backend in ("cpu", "torch", "reference"):
        y = causal_conv1d(x, weight, bias, activation="silu", backend=backend)
        assert y.dtype == torch.bfloat16
        assert [g.dtype for g in torch.autograd.grad(y.float().sum(), leaves)] == [t.dtype for t in leaves]


def _convolve_in_child(queue: multiprocessing.Queue) -> None:
    queue.put(causal_conv1d(torch.ones(4, 600, 8), torch.ones(8, 4), backend="cpu").sum().item())


def test_survives_a_fork() -> None:
    wanted = causal_conv1d(torch.ones(4, 600, 8), torch.ones(8, 4), backend="cpu").sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_convolve_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == wanted
    child.join(timeout=60)
    assert child.exitcode == 0


class Model(nn.Module):
    """A module that calls the custom op the way models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        y, state = torch.ops.triscan.causal_conv1d(
            x, self.weight, self.bias, None, None, None, None, "silu", False, True, "auto"
        )
        return y + state.sum()


class TestContract(OpContract):
    Model, channels = Model, 5

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        return causal_conv1d(x, model.weight, model.bias)


@pytest.mark.parametrize("name", ["plain", "state", "packed", "seq_idx", "route_inputs"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(name: str, backend: str) -> None:
    case = CASES[name]
    inputs, options = case.inputs(torch.float32), case.options()
    arguments = (
        inputs["x"], inputs["weight"], inputs.get("bias"), options["route"], inputs.get("initial_state"),
        options["cu_seqlens"], options["seq_idx"], case.activation or "", case.reverse, True, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.triscan.causal_conv1d, arguments)


def test_opcheck_of_the_backward() -> None:
    x, weight = torch.randn(2, 9, 5), torch.randn(5, 4)
    arguments = (torch.randn(2, 9, 5), None, x, weight, None, None, None, None, None, "silu", False, "cpu")
    torch.library.opcheck(torch.ops.triscan.causal_conv1d_backward, arguments)


def test_flops_are_counted() -> None:
    assert flops(lambda: Model()(torch.randn(2, 9, 5))) == (1 + 3) * 2 * 2 * 9 * 5 * 4


def test_only_the_state_in_the_loss() -> None:
    x = torch.randn(2, 9, 5, requires_grad=True)
    _, state = causal_conv1d(x, torch.randn(5, 4), return_final_state=True, backend="cpu")
    (grad,) = torch.autograd.grad(state.sum(), x)
    assert grad[:, -3:].eq(1).all()
    assert grad[:, :-3].eq(0).all()


IN_ORDER = [n for n, c in CASES.items() if c.route is None and c.cu_seqlens is None and c.seq_idx is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*IN_ORDER, "two blocks", "runs"])
def test_the_function_is_the_op(name: str, dtype: torch.dtype) -> None:
    """The function goes straight to the kernels; over edges of blocks of channels and of a job's tiles, too."""
    more = {"two blocks": Case(L=40, D=290), "runs": Case(B=2, L=700, D=3, W=3, reverse=True)}
    case = CASES.get(name) or more[name]
    found = []
    for op in (False, True):
        inputs = case.inputs(dtype)
        if op:
            x, weight, bias, state = (inputs.get(n) for n in ("x", "weight", "bias", "initial_state"))
            tensors = (x, weight, bias, None, state, None, None)
            outputs = torch.ops.triscan.causal_conv1d(*tensors, case.activation or "", case.reverse, True, "cpu")
        else:
            outputs = causal_conv1d(**inputs, **case.options(), return_final_state=True, backend="cpu")
        generator = torch.Generator().manual_seed(3)
        grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
        leaves = list(inputs.values())
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, grads, allow_unused=True)])
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted)
    if name not in CASES:
        compare(case, dtype, "cpu")


def test_gradients_may_come_in_any_layout() -> None:
    x, weight, state = torch.randn(2, 9, 5, requires_grad=True), torch.randn(5, 4), torch.randn(2, 3, 5)
    dy, dlast = torch.randn(5, 9, 2).transpose(0, 2), torch.randn(1, 3, 5).expand(2, 3, 5)
    grads = []
    for backend in ("cpu", "reference"):
        outputs = causal_conv1d(x, weight, initial_state=state, return_final_state=True, backend=backend)
        grads.append(torch.autograd.grad(outputs, x, (dy, dlast))[0])
    torch.testing.assert_close(*grads)
    y = causal_conv1d(x, weight, backend="cpu")
    assert isinstance(y, Tensor)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x), torch.autograd.grad(causal_conv1d(x, weight, backend="reference").sum(), x)
    )


def test_outputs_are_their_own() -> None:
    """A piece's final state outlives what is done to its input and output."""
    x, weight = torch.randn(2, 9, 5), torch.randn(5, 4)
    y, last = causal_conv1d(x, weight, return_final_state=True, backend="cpu")
    kept = x[:, -3:].clone()
    x.zero_()
    y.zero_()
    assert torch.equal(last, kept)


X, WEIGHT = torch.zeros(2, 9, 5), torch.zeros(5, 4)
BAD = {
    "x of two axes": ({"x": X[0]}, r"x: got shape \(9, 5\), wanted \(B, L, D\)"),
    "x with routes but no route": ({"x": X[:, :, None]}, "needs a route"),
    "weight of another width": ({"weight": WEIGHT[:4]}, r"weight: got shape \(4, 4\), wanted \(D, W\) = \(5, 4\)"),
    "weight without taps": ({"weight": WEIGHT[:, :0]}, "W >= 1"),
    "bias": ({"bias": torch.zeros(4)}, r"bias: got shape \(4,\), wanted \(D\) = \(5,\)"),
    "integers": ({"x": X.long()}, "x: got dtype torch.int64"),
    "activation": ({"activation": "relu"}, "activation: got 'relu', wanted None or 'silu'"),
    "state": ({"initial_state": torch.zeros(2, 4, 5)}, r"initial_state: .*wanted \(B, W - 1, D\) = \(2, 3, 5\)"),
    "both packings": ({"x": X[:1], "seq_idx": SEQ_IDX[:1], "cu_seqlens": torch.tensor([0, 9])}, "got both"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 9])}, "B = 2, wanted"),
    "bounds": ({"x": X[:1], "cu_seqlens": torch.tensor([0, 5, 4, 9])}, "ascending bounds from 0 to L = 9"),
    "route with bounds": (
        {"x": X[:1], "weight": WEIGHT.expand(2, 5, 4), "route": ROUTES["even"], "cu_seqlens": torch.tensor([0, 9])},
        "together with a route",
    ),
    "route value": ({"weight": WEIGHT[None], "route": torch.tensor([[0, 9]])}, r"route: got values in \[0, 9\]"),
    "route twice": ({"weight": WEIGHT[None], "route": torch.tensor([[3, 3]])}, "visited twice"),
    "route dtype": ({"weight": WEIGHT[None], "route": torch.tensor([[3.0]])}, "route: got dtype torch.float32"),
    "backend": ({"backend": "tritn"}, "did you mean 'triton'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wanted(name: str) -> None:
    changes, message = BAD[name]
    assert_refuses(causal_conv1d, {"x": X, "weight": WEIGHT, **changes}, message)
