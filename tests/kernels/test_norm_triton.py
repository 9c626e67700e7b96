"""The norms' Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from contract import assert_equals_reference, assert_repeats, assert_same_bits, triton_device
from norm_cases import CASES, ROUNDED, Case, compare, run
from torch import Tensor

from kernels import norm
from kernels.norm import triton_shape
from kernels.norm.problem import make_problem

DEVICE = triton_device()
LOOPED = {  # more tiles than programs, once there are few of these
    "rms": Case(shape=(301, 40), bias=True, z=True),
    "layer_residual": Case(shape=(7, 43, 19), kind="layer", bias=True, residual=True),
    "groups": Case(shape=(301, 36), group_size=12, z=True, norm_before_gate=False, residual=True),
    "wide": Case(shape=(77, 1100), kind="layer"),
}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an element that no kernel wrote shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    assert_equals_reference(run, CASES[name], "triton", DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype, "triton", DEVICE)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", LOOPED)
def test_programs_take_many_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_shape, "processors", lambda device: 1)
    assert_equals_reference(run, LOOPED[name], "triton", DEVICE)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_programs_cover_every_row_once(groups: int, plain: bool, backward: bool) -> None:
    for rows, channels in ((1, 4), (16384, 1536), (131072, 256), (12608, 768), (8192, 4096), (33, 65536)):
        x, weight = torch.empty(rows, channels, device="meta"), torch.empty(channels, device="meta")
        p = make_problem(x, weight, None, None, None, "rms", 1e-5, channels // groups, True, True)
        shape = triton_shape.shape_of(p, backward, plain)
        assert shape.block >= channels // groups
        assert (shape.steps - 1) * shape.strips * shape.rows < rows <= shape.steps * shape.strips * shape.rows


def test_repeats_bit_by_bit() -> None:
    assert_repeats(run, CASES["many_rows"], "triton", DEVICE)


def test_inputs_and_gradients_may_be_views() -> None:
    wide, dwide = (torch.randn(3, 7, 96, device=DEVICE, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(64, device=DEVICE, dtype=torch.float64)[::2].requires_grad_()
    for view in (
        lambda t: t[..., 32:64], lambda t: t[..., 1:33], lambda t: t[..., ::3], lambda t: t[:, ::2, :32],
        lambda t: t.transpose(0, 1)[..., :32], lambda t: t[:, :1, :32].expand(-1, 5, -1),
    ):  # fmt: skip
        x, dy = view(wide).requires_grad_(), view(dwide)
        got, wanted = (norm(x, weight, z=x, residual=x, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y, (x, weight), dy) for y in (got, wanted)))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_dtypes_of_sums_and_gradients(x_dtype: torch.dtype, residual_dtype: torch.dtype, in_fp32: bool) -> None:
    x = torch.randn(5, 6, device=DEVICE).to(x_dtype).requires_grad_()
    residual = torch.randn(5, 6, device=DEVICE).to(residual_dtype).requires_grad_()
    weight = torch.randn(6, device=DEVICE, dtype=torch.float64).requires_grad_()
    found = []
    for backend in ("triton", "reference"):
        y, s = norm(x, weight, residual=residual, residual_in_fp32=in_fp32, return_residual=True, backend=backend)
        loss = (y.float() * torch.arange(6, device=DEVICE)).sum() + s.float().sum()
        found.append([y, s, *torch.autograd.grad(loss, [x, residual, weight])])
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="runs on a GPU")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"kind": "layer", "bias": True}, {"z": True}, {"residual": True}], ids=str)
@pytest.mark.parametrize("shape", [(16384, 1536), (20001, 256), (12608, 768), (1000, 4096), (70, 12000)])
def test_realistic_sizes(shape: tuple[int, int], options: dict[str, object], dtype: torch.dtype) -> None:
    case = Case(shape=shape, **options)  # type: ignore[arg-type]
    got, reference = run(case, dtype, "triton", DEVICE), run(case, dtype, "reference", DEVICE)
    truth = run(case, torch.float64, "reference", DEVICE, rounded=dtype)
    for name, value in got.items():
        assert_as_accurate(name, value, reference[name], truth[name])
    assert_same_bits(got, run(case, dtype, "triton", DEVICE))


@gpu
@needs_gpu
def test_offsets_beyond_int32() -> None:
    x = torch.zeros(70_000, 40_000, device=DEVICE, dtype=torch.bfloat16)
    x[-9:] = torch.randn(9, 40_000, device=DEVICE)
    y = norm(x, torch.ones(40_000, device=DEVICE))
    assert isinstance(y, Tensor)
    assert torch.equal(y[-9:], norm(x[-9:].clone(), torch.ones(40_000, device=DEVICE)))


@gpu
@needs_gpu
def test_replays_as_a_graph_and_compiles() -> None:
    x, residual, dy = (torch.randn(500, 64, device=DEVICE) for _ in range(3))
    x, weight = x.requires_grad_(), torch.randn(64, device=DEVICE).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = norm(x, weight, residual=residual)
        assert isinstance(y, Tensor)
        return y.detach(), *torch.autograd.grad(y, (x, weight), dy)

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
    compiled = torch.compile(lambda x: norm(x, weight, residual=residual), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), captured[0])
