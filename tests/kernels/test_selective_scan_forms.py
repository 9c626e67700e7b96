"""Forms of the CUDA scans: which of them a size gets, and each, in segments and slices, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import capture
from scan_options import FULL, check, inputs

from kernels import selective_scan
from kernels.plans import Plans
from kernels.selective_scan import cuda_launch, cuda_shape, cuda_sums, op
from kernels.selective_scan.problem import CHUNK

gpu = pytest.mark.gpu


@pytest.mark.parametrize("state", range(1, 65))
def test_shapes_hold_the_state_and_fit_the_gpu(state: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_shape, "properties", lambda device: (132, 227 << 10))
    rule = cuda_shape.shape_of.__wrapped__
    for channels in (1, 9, 33, 1536):
        for backward, wide, slots in itertools.product((False, True), (False, True), (32, 1024)):
            shape = rule(state, channels, 8, slots, wide, backward, state % 2 == 0, torch.device("cuda"))
            assert shape.lanes * shape.states >= state
            assert shape.blocks * shape.width >= channels
            assert (shape.blocks - 1) * shape.width < channels
            words = shape.backward_words(ends=False) if backward else shape.forward_words
            assert 4 * words <= 227 << 10
            assert 1 <= shape.segments <= min(64, slots)
            assert shape.lanes != 4 or 4 * words * shape.resident <= 227 << 10
            assert state % 2 or shape.states % 2 == 0  # both parts of a complex number
            loaders = shape.warps + shape.extra if backward else shape.extra
            assert all(32 * loaders % (shape.width // v) == 0 for v in (1, 2, 4) if shape.width % v == 0)
            assert shape.width == 32 // shape.lanes * shape.warps * shape.each
            assert shape.blocks % shape.rounds == 0
            assert shape.rounds == 1 or (backward and shape.segments == 1)
    assert rule(state, 1536, 512, 32, False, True, False, torch.device("cuda")).segments == 1  # enough blocks without


@pytest.mark.parametrize(
    ("sizes", "rounds"),
    [
        ((16, 1536, 8, 32), 1),  # all at once: with more rounds, half of the GPU
        ((16, 2048, 8, 8), 2),
        ((16, 768, 64, 4), 4),
        ((16, 768, 64, 16), 1),  # in slices
        ((16, 1536, 64, 8), 4),  # 8 would be as fast
        ((16, 736, 64, 4), 1),  # 23 blocks
        ((64, 1536, 8, 8), 3),
        ((16, 2048, 1, 64), 1),  # in segments
    ],
)
def test_rounds_of_the_backward(sizes: tuple[int, ...], rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_shape, "properties", lambda device: (132, 227 << 10))
    shape = cuda_shape.shape_of.__wrapped__(*sizes, False, True, False, torch.device("cuda"))
    assert shape.rounds == rounds


@pytest.mark.parametrize(
    ("sizes", "each", "lanes", "segments", "warps"),
    [
        ((16, 2048, 8, 8), 2, 4, 1, 8),  # short and many
        ((16, 2048, 2, 8), 1, 4, 4, 4),  # too few blocks of two channels a thread
        ((64, 1536, 8, 32), 2, 8, 1, 4),
        ((16, 2048, 1, 64), 1, 8, 1, 4),  # one walk
        ((16, 2048, 1, 1024), 1, 4, 6, 12),
        ((16, 1536, 8, 32), 1, 4, 1, 12),  # a block to a multiprocessor
        ((16, 1536, 9, 32), 1, 4, 1, 4),  # more than one
        ((16, 128, 4, 2048), 1, 4, 16, 4),  # channels that don't fill it
    ],
)
def test_form_of_the_forward(
    sizes: tuple[int, int, int, int], each: int, lanes: int, segments: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_shape, "properties", lambda device: (132, 227 << 10))
    rule, device = cuda_shape.shape_of.__wrapped__, torch.device("cuda")
    shape = rule(*sizes, False, False, False, device)
    assert (shape.each, shape.lanes, shape.segments, shape.warps) == (each, lanes, segments, warps)
    assert 4 * shape.forward_words <= 227 << 10
    looked_up = rule(16, 2048, 1, 64, False, False, False, device, True)
    assert (looked_up.lanes, looked_up.warps) == (4, 4)


def cut_in(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = cuda_launch.shape_of
    monkeypatch.setattr(cuda_launch, "_recipes", {})
    monkeypatch.setattr(op, "_plans", Plans())
    monkeypatch.setattr(cuda_launch, "shape_of", lambda *args: rule(*args)._replace(segments=segments))


@gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_complex_segments_at_once(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_in(5, monkeypatch)
    tensors = inputs(B=1, L=60 * CHUNK, D=40, N=4, options=FULL, complex_=True)
    tensors["A"][3, 2] = complex(-1e-4, 5.0)  # remembers all of them
    check(tensors, "cuda", "cuda", torch.float32, reverse=reverse)


@gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_restarts_and_skipped_tokens_in_segments(reverse: bool) -> None:
    tensors = inputs(B=1, L=20 * CHUNK + 3, D=33, N=16, options=FULL)
    tensors["seq_idx"] = (torch.arange(20 * CHUNK + 3) // 333)[None]
    tensors["seq_idx"][:, 100:130] = -1
    check(tensors, "cuda", "cuda", torch.float32, reverse=reverse)


@gpu
@pytest.mark.parametrize("segments", [1, 2, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_at_once_equal_one(segments: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_in(segments, monkeypatch)
    monkeypatch.setattr(cuda_sums, "LEAST", 1)  # and in slices
    check(inputs(B=2, L=10 * CHUNK + 5, D=40, N=16, options=FULL), "cuda", "cuda", torch.float32, reverse=reverse)


@gpu
@pytest.mark.parametrize(("dtype", "state"), [(torch.bfloat16, 16), (torch.float32, 16), (torch.bfloat16, 40)])
@pytest.mark.parametrize("reverse", [False, True])
def test_rounds_equal_blocks(dtype: torch.dtype, state: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_in(1, monkeypatch)
    rule = cuda_launch.shape_of
    monkeypatch.setattr(cuda_launch, "shape_of", lambda *a: rule(*a)._replace(rounds=3) if a[5] else rule(*a))
    monkeypatch.setattr(cuda_sums, "LEAST", 1)  # and in slices
    check(inputs(B=2, L=3 * CHUNK + 5, D=70, N=state, options=FULL), "cuda", "cuda", dtype, reverse=reverse)


@gpu
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_forget_no_more_than_they_may(slow: bool, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_in(3, monkeypatch)
    tensors = inputs(B=1, L=60 * CHUNK, D=40, N=16, options=FULL)  # what a segment ends in has decayed a slot later
    if slow:
        tensors["A"][3, 2] = -1e-4  # but for one channel
    check(tensors, "cuda", "cuda", torch.float32, reverse=reverse)


@gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "state"), [(40, 16), (70, 11), (20, 40)])
def test_two_channels_a_thread(batch: int, state: int, reverse: bool) -> None:
    tensors = inputs(B=batch, L=70, D=330, N=state, options=FULL)
    check(tensors, "cuda", "cuda", torch.bfloat16, reverse=reverse)


@gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_one_walk_where_channels_just_fill_the_gpu(reverse: bool) -> None:
    check(inputs(B=1, L=17 * CHUNK + 5, D=1700, N=16, options=FULL), "cuda", "cuda", torch.bfloat16, reverse=reverse)


@gpu
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_twelve_warps_that_walk(segments: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_in(segments, monkeypatch)
    rule, joined = cuda_launch.shape_of, dict(tile=32, warps=12, extra=12, resident=1, width=96, blocks=3)
    monkeypatch.setattr(cuda_launch, "shape_of", lambda *a: rule(*a) if a[5] else rule(*a)._replace(**joined))
    tensors = inputs(B=2, L=9 * CHUNK + 5, D=200, N=16, options=FULL)
    check(tensors, "cuda", "cuda", torch.bfloat16, reverse=reverse)


@gpu
def test_kernels_that_start_early_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments, slices and sums follow each other, each started before the one before has ended."""
    cut_in(2, monkeypatch)
    monkeypatch.setattr(cuda_sums, "LEAST", 1)
    tensors = inputs(B=2, L=9 * CHUNK, D=64, N=16, options="D z bias")
    leaves = {n: t.cuda().float().requires_grad_() for n, t in tensors.items()}

    def step() -> list[torch.Tensor]:
        y = selective_scan(**leaves, backend="cuda")
        return [y, *torch.autograd.grad(y, list(leaves.values()), torch.zeros_like(y).fill_(0.5))]

    graph, captured, expected = capture(step)
    for _ in range(20):
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
