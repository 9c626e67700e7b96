"""The convolution's Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_as_accurate
from contract import assert_equals_reference, assert_repeats, assert_same_bits, triton_device
from conv_cases import CASES, ROUNDED, Case, compare, run
from memory import poison
from torch import Tensor

from kernels import causal_conv1d
from kernels.causal_conv1d import triton_walk
from kernels.causal_conv1d.problem import make_problem

DEVICE = triton_device()
IN_ORDER = {  # what the kernels for tokens in order take: beyond one run, one block of channels, one program
    "runs": Case(B=1, L=300, D=7),
    "runs_reverse": Case(B=2, L=300, D=7, reverse=True),
    "channels": Case(B=2, L=5, D=300, activation=None),
    "channels_reverse": Case(B=2, L=70, D=130, W=2, reverse=True, state=False),
    "no_bias": Case(L=70, D=33, W=3, bias=False),
    "wide": Case(L=40, D=17, W=7),
    "widest": Case(L=40, D=3, W=16, reverse=True),
    "too_wide": Case(L=40, D=3, W=17),
}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an element that no kernel wrote shows."""
    poison(monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    assert_equals_reference(run, CASES[name], "triton", DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype, "triton", DEVICE)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", IN_ORDER)
def test_tokens_in_order(name: str) -> None:
    assert_equals_reference(run, IN_ORDER[name], "triton", DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runs_reverse", "channels", "wide"])
def test_tokens_in_order_in_low_precision(name: str) -> None:
    compare(IN_ORDER[name], torch.bfloat16, "triton", DEVICE)


def test_repeats_bit_by_bit() -> None:
    assert_repeats(run, CASES["long"], "triton", DEVICE)
    assert_repeats(run, CASES["route_padded"], "triton", DEVICE)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_route_of_all_tokens_is_their_order(reverse: bool) -> None:
    case = Case(L=70, D=33, reverse=reverse)
    inputs = case.inputs(torch.float32, DEVICE)
    along = {n: t if n == "x" else t.unsqueeze(1 if n == "initial_state" else 0) for n, t in inputs.items()}
    y = causal_conv1d(**inputs, activation="silu", reverse=reverse, backend="triton")
    route = torch.arange(70, device=DEVICE)[None]
    routed = causal_conv1d(**along, activation="silu", reverse=reverse, route=route, backend="triton")[:, :, 0]
    torch.testing.assert_close(y, routed, rtol=1e-5, atol=1e-5)
    dy, leaves = torch.randn_like(y), list(inputs.values())
    wanted = torch.autograd.grad(routed, leaves, dy)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), wanted, rtol=1e-5, atol=2e-5)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of (2, 70, 3 * 32)
    "half of the channels": lambda t: t[..., 32:64],
    "not aligned": lambda t: t[..., 1:33],
    "channels apart": lambda t: t[..., ::3],
    "tokens apart": lambda t: t[:, ::2, :32],
    "tokens last": lambda t: t[..., :32].mT.contiguous().mT,
    "batch in the middle": lambda t: t[..., :32].transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_inputs_and_gradients_may_be_views(name: str) -> None:
    wide, dwide = (torch.randn(2, 70, 96, device=DEVICE, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(4, 32, device=DEVICE, dtype=torch.float64).T.requires_grad_()
    x, dy = VIEWS[name](wide).requires_grad_(), VIEWS[name](dwide)
    got, wanted = (causal_conv1d(x, weight, activation="silu", backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(got, wanted)
    assert got.is_contiguous()
    torch.testing.assert_close(*(torch.autograd.grad(y, (x, weight), dy) for y in (got, wanted)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", VIEWS)
def test_the_short_way_of_the_next_call_is_the_same(name: str) -> None:
    wide, dwide = (torch.randn(2, 70, 96, device=DEVICE) for _ in range(2))
    weight, bias = torch.randn(32, 4, device=DEVICE).requires_grad_(), torch.randn(32, device=DEVICE).requires_grad_()
    x, dy = VIEWS[name](wide).requires_grad_(), VIEWS[name](dwide)
    found = []
    for _ in range(2):
        y = causal_conv1d(x, weight, bias, activation="silu", backend="triton")
        assert isinstance(y, Tensor)
        found.append((y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)))
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*found, strict=True))


def test_a_gradient_may_be_one_number() -> None:
    x, weight = torch.randn(2, 9, 5, device=DEVICE).requires_grad_(), torch.randn(5, 4, device=DEVICE)
    got, wanted = (causal_conv1d(x, weight, backend=b).sum() for b in ("triton", "reference"))  # type: ignore[union-attr]
    torch.testing.assert_close(*(torch.autograd.grad(y, x) for y in (got, wanted)))


def test_mixed_dtypes() -> None:
    case = Case(L=20, D=8)
    inputs = case.inputs(torch.float32, DEVICE)
    dtypes = {"x": torch.bfloat16, "weight": torch.float32, "bias": torch.float64, "initial_state": torch.float16}
    inputs = {n: t.detach().to(dtypes[n]).requires_grad_() for n, t in inputs.items()}
    y, truth = (causal_conv1d(**inputs, activation="silu", backend=b) for b in ("triton", "reference"))
    assert isinstance(y, Tensor)
    assert isinstance(truth, Tensor)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, truth)
    for name, got, wanted in zip(
        inputs, *(torch.autograd.grad(t.float().sum(), list(inputs.values())) for t in (y, truth)), strict=True
    ):
        assert got.dtype == dtypes[name]
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def test_a_final_state_is_nobodys_view() -> None:
    x, weight = torch.randn(1, 3, 5, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    for reverse in (False, True):
        options = {"reverse": reverse, "return_final_state": True, "backend": "triton"}
        _, state = causal_conv1d(x, weight, **options)
        before = x.clone()
        state.zero_()
        assert torch.equal(x, before)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("width", range(1, triton_walk.MAX_WIDTH + 1))
def test_programs_cover_every_token_once(width: int, backward: bool) -> None:
    for batch, length, channels in ((1, 1, 1), (64, 197, 384), (8, 2048, 1536), (1, 2**20, 256), (2, 5000, 7)):
        x = torch.empty(batch, length, channels, device="meta", dtype=torch.bfloat16)
        weight = torch.empty(channels, width, device="meta")
        shape = triton_walk.shape_of(make_problem(x, weight, None, None, None, None, None, "", False), backward)
        tokens = shape.R * shape.U * shape.steps
        assert (shape.runs - 1) * tokens < length <= shape.runs * tokens
        assert (shape.blocks - 1) * shape.BD < channels <= shape.blocks * shape.BD


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="runs on a GPU")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 5000, 1536), (1, 40000, 256), (64, 197, 384), (3, 1000, 100)])
def test_realistic_sizes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, dy = (torch.randn(sizes, device=DEVICE, dtype=dtype) for _ in range(2))
    parameters = torch.randn(sizes[-1], 4, device=DEVICE), torch.randn(sizes[-1], device=DEVICE)
    found = []
    for kind, backend in ((dtype, "triton"), (dtype, "torch"), (torch.float64, "torch")):
        leaves = [t.to(kind if t.ndim == 3 or kind == torch.float64 else t.dtype).requires_grad_()
                  for t in (x, *parameters)]  # fmt: skip
        y = causal_conv1d(*leaves, activation="silu", backend=backend)
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(kind))])  # type: ignore[call-overload]
    for name, ours, reference, truth in zip(("y", "dx", "dweight", "dbias"), *found, strict=True):
        assert_as_accurate(name, ours, reference, truth)


@gpu
@needs_gpu
def test_bits_repeat_at_size() -> None:
    case = Case(B=3, L=3000, D=200)
    assert_same_bits(*(run(case, torch.bfloat16, "triton", DEVICE) for _ in range(2)))


@gpu
@needs_gpu
def test_offsets_beyond_int32() -> None:
    length, wide = 70_000, 40_000  # 2.8e9 elements, 5.6 GB
    x = torch.zeros(1, length, wide, device=DEVICE, dtype=torch.bfloat16)
    x[..., -8:] = torch.randn(length, 8, device=DEVICE)
    weight, narrow = torch.randn(8, 4, device=DEVICE), x[..., -8:]
    assert torch.equal(causal_conv1d(narrow, weight), causal_conv1d(narrow.clone(), weight))
    y = causal_conv1d(x, torch.ones(wide, 4, device=DEVICE), reverse=True)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(
        y[..., -8:], causal_conv1d(narrow.clone(), torch.ones(8, 4, device=DEVICE), reverse=True)
    )


@gpu
@needs_gpu
def test_replays_as_a_graph_and_compiles() -> None:
    x, dy = (torch.randn(2, 100, 64, device=DEVICE) for _ in range(2))
    x, weight = x.requires_grad_(), torch.randn(64, 4, device=DEVICE).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y, state = causal_conv1d(x, weight, activation="silu", return_final_state=True)
        return y.detach(), state.detach(), *torch.autograd.grad(y, (x, weight), dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
    compiled = torch.compile(lambda x: causal_conv1d(x, weight, activation="silu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), captured[0])
