"""The short way to the CUDA scans: it must launch what the long one does, and leave other tensors to it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scan_options import FULL, inputs, run
from torch.multiprocessing.reductions import StorageWeakRef

from kernels import nvrtc, selective_scan
from kernels.plans import Plans
from kernels.selective_scan import cuda, cuda_few, cuda_launch, cuda_shape, cuda_straight, op
from kernels.selective_scan.problem import CHUNK

Launched = list[tuple[Any, ...]]


def fresh(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """No plans yet; scans that are cut in so many segments."""
    rule = cuda_launch.shape_of
    monkeypatch.setattr(cuda_launch, "_recipes", {})
    monkeypatch.setattr(op, "_plans", Plans())
    monkeypatch.setattr(op, "_backward_plans", Plans())
    monkeypatch.setattr(cuda_launch, "shape_of", lambda *args: rule(*args)._replace(segments=segments))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Notes, without a GPU, what would be launched: names, macros, sizes, numbers, which addresses are there."""
    seen: Launched = []

    def kernel(source: str, name: str, macros: tuple[str, ...], shared: int, early: bool) -> Callable[..., None]:
        def launch(blocks: int, threads: int, fields: Any) -> None:
            pointers = len(cuda_launch.POINTERS)
            found = (*(v != 0 for v in fields[:pointers]), *fields[pointers:])
            struct = dict(zip((*cuda_launch.POINTERS, *cuda_launch.INTEGERS), found, strict=True))
            seen.append((name, sorted(macros), shared, blocks, threads, struct))

        return launch

    for module in (cuda, cuda_few, cuda_shape):
        monkeypatch.setattr(module, "properties", lambda device: (132, 227 << 10))
    monkeypatch.setattr(nvrtc, "kernel", kernel)
    monkeypatch.setattr(op, "_choose", lambda p, backend: "cuda")
    return seen


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(("options", "rank"), [("", 0), ("D z", 3), (FULL, 0)])
def test_launches_what_the_long_way_does(
    options: str, rank: int, segments: int, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh(monkeypatch, segments)
    tensors = inputs(B=2, L=54 * CHUNK + 5, D=40, N=16, R=rank, options=options)
    for wanted in (False, True):  # the final state
        leaves = {n: t.float().requires_grad_() for n, t in tensors.items()}
        calls = []
        for takes in (True, False):
            monkeypatch.setattr(op, "_plans", Plans())
            monkeypatch.setattr(op, "_backward_plans", Plans())
            monkeypatch.setattr(cuda_straight, "supports", lambda p, takes=takes: takes)
            for _ in range(2):  # the first call makes the plan
                launched.clear()
                found = selective_scan(**leaves, return_final_state=wanted)
                outputs = found if isinstance(found, tuple) else (found,)
                torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(t) for t in outputs])
            calls.append(list(launched))
        assert len(calls[0]) > 2 * segments
        for short, long in zip(*calls, strict=True):
            assert short[:5] == long[:5]
            free = {"final", "dinitial", "y"}  # the long way always has memory for the states
            differ = {n for n, v in short[5].items() if v != long[5][n]} - free
            assert not differ, f"{short[0]}: {differ}"


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("options", ["", FULL, "constB constC init D"])
def test_keeps_no_tensor_of_a_call(
    options: str, takes: bool, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for a signature outlives the call that it was made for: memory must not."""
    fresh(monkeypatch, 2)
    if not takes:
        monkeypatch.setattr(cuda_straight, "supports", lambda p: False)
    leaves = {n: t.float() for n, t in inputs(B=2, L=3 * CHUNK, D=40, N=16, options=options).items()}
    memory = [StorageWeakRef(t.untyped_storage()) for t in leaves.values()]
    run(leaves, "auto", torch.float32, "cpu")
    assert launched
    del leaves
    gc.collect()
    assert all(m.expired() for m in memory)


def test_lazy_and_watched_tensors_take_the_long_way(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch, 1)
    tensors = {n: t.float() for n, t in inputs(B=1, L=9, D=4, N=3).items()}
    for _ in range(2):
        selective_scan(**tensors)
    short = cuda_straight.Straight.forward
    taken = []
    monkeypatch.setattr(cuda_straight.Straight, "forward", lambda *a: taken.append(a[2]) or short(*a))
    selective_scan(**tensors)
    assert taken == [False]  # nothing is kept where nobody asks for gradients
    selective_scan(**tensors | {"x": torch._neg_view(tensors["x"])})
    with torch.profiler.profile() as seen:
        selective_scan(**tensors)
    assert taken == [False, True, True]  # by the op, which the profiler sees and which makes lazy numbers real
    assert "triscan::selective_scan" in {event.name for event in seen.events()}


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_long_way_bit_by_bit(
    dtype: torch.dtype, rank: int, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh(monkeypatch, segments)
    tensors = inputs(B=2, L=30 * CHUNK + 5, D=72, N=16, R=rank, options=FULL)
    run(tensors, "cuda", dtype, "cuda", reverse=True)
    short = run(tensors, "cuda", dtype, "cuda", reverse=True)
    monkeypatch.setattr(op, "_plans", Plans())
    monkeypatch.setattr(op, "_backward_plans", Plans())
    monkeypatch.setattr(cuda_straight, "supports", lambda p: False)
    long = run(tensors, "cuda", dtype, "cuda", reverse=True)
    assert all(torch.equal(t, long[n]) for n, t in short.items())


@pytest.mark.gpu
def test_memory_that_others_use_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch, 3)
    tensors = inputs(B=1, L=40 * CHUNK, D=64, N=16, options=FULL)
    first = run(tensors, "cuda", torch.bfloat16, "cuda")
    for _ in range(10):  # workspaces come from the allocator's lists and go back at once
        again = run(tensors, "cuda", torch.bfloat16, "cuda")
        assert all(torch.equal(t, first[n]) for n, t in again.items())
