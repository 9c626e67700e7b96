"""The Triton kernels of ``ssd`` against the reference in float64: outputs, final states and every gradient.

On a machine without a GPU: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_ssd_triton.py``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from accuracy import relative_rms
from contract import assert_equals_reference, assert_repeats, capture, triton_device
from ssd_cases import CASES, ROUNDED, ROWS, Case, compare, run

from kernels import ssd
from kernels.plans import Plans
from kernels.ssd import triton, triton_backward, triton_boxes, triton_plan, triton_sizes, triton_states
from kernels.ssd.triton_plan import Plan
from kernels.ssd.triton_sizes import Segments

DEVICE = triton_device()
INTERPRETED = DEVICE == "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an element that no kernel wrote shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-12345)

    monkeypatch.setattr(torch, "empty", poison)


def new_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that a test changes must not be those of an earlier call with the same signature."""
    for name in ("_plans", "_backward_plans"):
        monkeypatch.setattr(sys.modules["kernels.ssd"], name, Plans())


@pytest.fixture(autouse=True)
def few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long chunks in the interpreter: an operation on a large tile takes it as long as one on a small tile."""
    new_plans(monkeypatch)
    if INTERPRETED:
        for dtype in triton_sizes.CHUNK:
            monkeypatch.setitem(triton_sizes.CHUNK, dtype, 64)


def in_segments(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Cuts every row in about so many segments."""

    def segments(plan: Plan) -> Segments:
        length = -(-plan.per_row // count)
        return Segments(-(-plan.per_row // length) if length else 1, length)

    new_plans(monkeypatch)
    monkeypatch.setattr(Plan, "segments", property(segments))
    monkeypatch.setattr(Plan, "short_segments", property(segments))


# What the others vary one by one; these take the interpreter seconds each.
QUICK = ("all", "bounds", "route_reverse", "packed")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_float64(name: str) -> None:
    assert_equals_reference(run, CASES[name], "triton", DEVICE)


SEGMENTED = {
    "all": Case(B=1, L=90, H=1),
    "reverse_without_states": Case(B=2, L=70, H=1, reverse=True, state=False, without="D z dt_bias"),
    "packed": Case(B=1, L=60, H=1, packed=True),
    "bounds": Case(B=1, L=70, H=1, bounds=(0, 0, 20, 60, 70)),
    "bounds_reverse": Case(B=1, L=70, H=1, bounds=(0, 20, 70), reverse=True, state=False),
    "route": Case(B=1, L=30, H=1, K=2, positions=70),
}


@pytest.mark.slow
@pytest.mark.parametrize("turns", [False, True], ids=["at_once", "in_turns"])
@pytest.mark.parametrize("name", SEGMENTED)
def test_segments(name: str, turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(triton_sizes.CHUNK, torch.float64, 16)
    in_segments(monkeypatch, 3)
    if turns:
        monkeypatch.setattr(triton_plan, "WORKSPACE", 1)
    assert_equals_reference(run, SEGMENTED[name], "triton", DEVICE)


SHARED = {
    "all": Case(B=2, L=90, H=2),
    "reverse_without_states": Case(B=3, L=70, H=1, reverse=True, state=False, without="D z dt_bias"),
    "packed": Case(B=3, L=60, H=1, packed=True),
    "route": Case(B=1, L=30, H=2, K=2, positions=70),
}


def sharing(monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    """Lets every program of the forward take so many chunks."""
    new_plans(monkeypatch)
    monkeypatch.setattr(Plan, "share", share)


# Chunks of a row are 5 or 6: shares of less, which wait for one another in a chain, of more, and of whole rows.
@pytest.mark.parametrize(
    "share", [pytest.param(2, marks=pytest.mark.slow), 7, pytest.param(12, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [n if n == "all" else pytest.param(n, marks=pytest.mark.slow) for n in SHARED])
def test_rows_shared_evenly(name: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(triton_sizes.CHUNK, torch.float64, 16)
    sharing(monkeypatch, share)
    inputs = {n: t.detach() for n, t in SHARED[name].inputs(torch.float64, DEVICE).items()}
    options = SHARED[name].options(DEVICE) | {"return_final_state": True}
    results = (ssd(**inputs, **options, backend=backend) for backend in ("triton", "reference"))  # type: ignore
    for got, truth in zip(*results, strict=True):
        assert relative_rms(got, truth) < 1e-12


@pytest.mark.parametrize("length", [15, 16, 17, 32])
def test_chunk_borders(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(triton_sizes.CHUNK, torch.float64, 16)
    assert_equals_reference(run, Case(B=1, L=length, H=1), "triton", DEVICE)


@pytest.mark.parametrize(("P", "N"), [(70, 3), (16, 40), (5, 200), (258, 3)])
def test_wide_heads_and_states(P: int, N: int) -> None:
    assert_equals_reference(run, Case(B=1, L=9, H=2, P=P, N=N, wide_d=True), "triton", DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    case = replace(CASES[name], H=2, P=16, N=16)
    products = dtype == torch.bfloat16 and not INTERPRETED
    if products and case.positions:  # terms of padding slots are not known
        case = replace(case, positions=0)
    compare(case, dtype, "triton", DEVICE, products=products)


EMULATED = {
    "mamba2": Case(B=1, L=200, H=2, P=16, N=16, without="z"),
    "gated": Case(B=1, L=130, H=2, P=16, N=16, G=2),
    "packed": Case(B=1, L=100, H=2, P=10, N=20, packed=True),
    "route": Case(B=1, L=70, H=2, P=16, N=16, K=2),
    "dt_of_any_sign": Case(B=1, L=70, H=2, P=16, N=16, dt_softplus=False, dt_limit=(-math.inf, math.inf)),
    "boxes": Case(B=2, L=128, H=4, P=16, N=16, G=2),
}


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels have real bfloat16 products: test_low_precision")
@pytest.mark.parametrize("name", EMULATED)
def test_bfloat16_products_are_accurate_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_hopper(monkeypatch)
    compare(EMULATED[name], torch.bfloat16, "triton", products=True)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels have real bfloat16 products: test_realistic_sizes")
@pytest.mark.parametrize("turns", [False, True], ids=["at_once", "in_turns"])
def test_boxes_in_segments(turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_hopper(monkeypatch)
    in_segments(monkeypatch, 2)
    if turns:
        monkeypatch.setattr(triton_plan, "WORKSPACE", 1)
    compare(Case(B=1, L=256, H=2, P=16, N=128), torch.bfloat16, "triton", products=True)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep the constant")
def test_what_has_decayed_is_not_walked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    with_hopper(monkeypatch)
    monkeypatch.setitem(triton_sizes.CHUNK, torch.bfloat16, 16)
    in_segments(monkeypatch, 2)
    case = Case(B=1, L=256, H=2, P=16, N=16, G=2)
    for gone, right in (
        (20.0, True),
        (-math.inf, False),
    ):  # bits of a bfloat16 result; then only a last chunk is walked
        monkeypatch.setattr(triton_states, "GONE", tl.constexpr(gone))
        if right:
            compare(case, torch.bfloat16, "triton", products=True)
        else:
            with pytest.raises(AssertionError, match="error"):
                compare(case, torch.bfloat16, "triton", products=True)


def with_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no bfloat16 products, and cuts bits off where hardware rounds: here it does as hardware."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widened(t):
        return (t.data.astype(np.uint32) << 16).view(np.float32) if t.dtype.scalar == tl.bfloat16 else t.data

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return interpreter.TensorHandle(np.matmul(widened(a), widened(b)) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    new_plans(monkeypatch)
    monkeypatch.setattr(Plan, "product_dtype", torch.bfloat16)
    monkeypatch.setattr(triton_sizes, "is_hopper", lambda device: True)
    for name in ("NARROWEST", "BY_ADDRESS"):  # the interpreter multiplies narrow tiles well
        monkeypatch.setattr(triton_sizes, name, 16)


SIDE = 16 if INTERPRETED else 32  # compiled kernels copy no narrower tiles in boxes
LAYOUTS = {  # of x (2, 64, 2, SIDE) in memory, and whether boxes can be copied from it
    "heads_of_a_wider_row": (lambda x: torch.cat([x, x], 2)[:, :, :2], True),
    "columns_of_a_wider_head": (lambda x: torch.cat([x, x], 3)[..., :SIDE], False),
    "at_an_odd_address": (lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape), False),
    "odd_strides": (lambda x: torch.cat([x.flatten(2), x[..., 0, :1]], 2)[..., :-1].unflatten(2, (2, SIDE)), False),
    "tokens_first": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), False),
    "columns_first": (lambda x: x.mT.contiguous().mT, False),
}


COPIED = ("at_an_odd_address", "odd_strides", "columns_first")  # which compiled kernels do not read in place


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "first" in n else n for n in LAYOUTS])
def test_boxes_only_where_the_layout_has_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        with_hopper(monkeypatch)
    elif not triton_sizes.is_hopper(torch.device(DEVICE)):
        pytest.skip("a GPU that copies boxes of tensors")
    boxed, rows_box = [], triton_boxes.rows_box
    for module in (triton, triton_backward):  # y and dx go out in boxes where x comes in boxes
        monkeypatch.setattr(module, "rows_box", lambda *args: boxed.append(args) or rows_box(*args))
    case = Case(B=2, L=64, P=SIDE, N=SIDE, without="z")
    layout, possible = LAYOUTS[name]
    inputs = {n: t.detach() for n, t in case.inputs(torch.bfloat16, DEVICE).items()}
    inputs["x"] = layout(inputs["x"])
    compare(
        case, torch.bfloat16, "triton", DEVICE, True, {n: t.requires_grad_() for n, t in inputs.items()}
    )  # fmt: skip
    copied = not INTERPRETED and name in COPIED
    assert bool(boxed) == (possible or copied)


@pytest.mark.parametrize("chunk", [64, 16])
def test_strong_and_weak_decays(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences of large running sums keep their digits, in one chunk and in several: so in ddt and dA."""
    monkeypatch.setitem(triton_sizes.CHUNK, torch.float32, chunk)
    case = Case(B=1, L=64, H=2, P=8, N=8, without="z", dt_softplus=False)
    inputs = case.inputs(torch.float32)
    dt = torch.where(torch.arange(64) % 2 == 0, 20.0, 0.003)[None, :, None].expand(1, 64, 2)
    inputs = {n: t.detach().to(DEVICE).requires_grad_() for n, t in (inputs | {"dt": dt}).items()}
    compare(case, torch.float32, "triton", DEVICE, inputs=inputs)


def test_skipped_tokens_may_hold_nan() -> None:
    case = Case(B=1, L=12, H=1, packed=True)
    options = case.options(DEVICE)
    skipped = options["seq_idx"][0] < 0
    assert skipped.any()
    clean = {n: t.detach() for n, t in case.inputs(torch.float64, DEVICE).items()}
    dirty = {n: t.clone() for n, t in clean.items()}
    for name in ROWS:
        dirty[name][:, skipped] = float("nan")
    results = []
    for inputs in (clean, dirty):
        results.append(run(case, torch.float64, "triton", DEVICE, {n: t.requires_grad_() for n, t in inputs.items()}))
    for name, t in results[0].items():
        assert torch.equal(t, results[1][name]), name
    assert (results[0]["y"][:, skipped] == 0).all()
    assert (results[0]["dx"][:, skipped] == 0).all()


def test_strided_inputs_are_read_in_place() -> None:
    inputs = {n: t.detach() for n, t in Case(B=2, L=9).inputs(torch.float64, DEVICE).items()}
    wanted = ssd(**inputs, backend="triton")
    wide = torch.cat([inputs["x"], inputs["z"]], -1)
    views = inputs | {"x": wide[..., :4], "z": wide[..., 4:], "dt": inputs["dt"].mT.contiguous().mT}
    views["C"] = inputs["C"].transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(ssd(**views, backend="triton"), wanted)


def test_repeats_bit_by_bit() -> None:
    assert_repeats(run, Case(B=1, L=20, K=2), "triton", DEVICE)


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "tokens"])
def test_far_apart_rows_and_tokens(axis: int) -> None:
    """Strides that fit int32 where offsets do not; nobody touches the memory between, which is not there on a CPU."""
    step, count = 2**30, 3
    narrow = Case(B=count, L=2, H=1, N=4) if axis == 0 else Case(B=1, L=count, H=1, N=4)
    inputs = narrow.inputs(torch.bfloat16, DEVICE)
    apart, start = torch.empty((count - 1) * step + 4096, dtype=torch.bfloat16, device=DEVICE), 0
    far = {}
    for name, t in inputs.items():
        far[name] = t.detach()
        if name in ROWS:
            strides = [step if i == axis else stride for i, stride in enumerate(t.stride())]
            view = apart.as_strided(t.shape, strides, start)
            far[name], start = view.copy_(t.detach()), start + t.numel()
        far[name].requires_grad_()
    results = []
    for given in (inputs, far):
        y, end = ssd(**given, return_final_state=True, backend="triton")
        results.append((y, end, *torch.autograd.grad(y.float().square().sum() + end.sum(), list(given.values()))))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: a GPU, without TRITON_INTERPRET")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, L=700, H=4, P=64, N=128, without="z"),
        Case(B=1, L=1100, H=2, P=64, N=64, G=2),
        Case(B=1, L=300, H=2, P=128, N=256, without="z", wide_d=True),
        Case(B=1, L=500, H=3, P=50, N=100, packed=True),
        Case(B=2, L=640, H=4, P=64, N=128, G=2, without="z"),  # bulk copies
        Case(B=1, L=256, H=2, P=64, N=64, without="z D", state=False),
        Case(B=1, L=256, H=2, P=128, N=128),  # the most tiles of a head at a time
        Case(B=1, L=256, H=2, P=256, N=64, without="z"),
        Case(B=2, L=784, H=4, P=16, N=64, K=4, without="z", wide_d=True),  # VMamba's
    ],
    ids=["mamba2", "gated", "wide", "odd", "full", "without_D", "wide_gated", "widest", "routes"],
)
def test_realistic_sizes(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype, "triton", DEVICE, products=dtype == torch.bfloat16)


@gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("state", [16, 32, 64, 128, 256])
def test_every_size_of_tile(state: int, head_dim: int) -> None:
    case = Case(B=2, L=256, H=4, P=head_dim, N=state, without="z")
    compare(case, torch.bfloat16, "triton", DEVICE, products=True)


@gpu
@needs_gpu
def test_a_million_tokens_in_segments_equal_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {n: t.detach() for n, t in Case(B=1, L=1 << 20, H=2, P=16, N=16).inputs(torch.float32, DEVICE).items()}
    many = ssd(**inputs)
    in_segments(monkeypatch, 1)
    assert relative_rms(ssd(**inputs), many) < 1e-5


@gpu
@needs_gpu
def test_offsets_beyond_int32() -> None:
    length, wide = 70_000, 40_000  # 2.8e9 elements, 5.6 GB
    x = torch.zeros(1, length, 1, wide, device=DEVICE, dtype=torch.bfloat16)
    x[..., -16:] = torch.randn(length, 1, 16, device=DEVICE)
    dt = torch.randn(1, length, 1, device=DEVICE, dtype=torch.bfloat16) - 3
    B, C = (torch.randn(1, length, 1, 16, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    A, narrow = -torch.rand(1, device=DEVICE), x[..., -16:]
    assert torch.equal(ssd(narrow, dt, A, B, C), ssd(narrow.clone(), dt, A, B, C))


@gpu
@needs_gpu
def test_survives_a_cuda_graph_and_compile() -> None:
    inputs = Case(B=2, L=200, H=4, P=32, N=32).inputs(torch.float32, DEVICE)

    def step() -> tuple[torch.Tensor, ...]:
        y = ssd(**inputs)
        assert isinstance(y, torch.Tensor)
        return y, *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))

    graph, captured, expected = capture(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    assert torch.equal(torch.compile(ssd, fullgraph=True)(**inputs), expected[0])
