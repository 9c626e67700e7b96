"""The CUDA scans' source, run on a CPU, against the reference: outputs, states and every gradient, without a GPU."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from scan_options import FULL, check, inputs

from kernels import nvrtc
from kernels.backend import interpreting
from kernels.plans import Plans
from kernels.selective_scan import cuda, cuda_few, cuda_launch, cuda_shape, cuda_straight, cuda_sums, op
from kernels.selective_scan.problem import CHUNK

interpreted = pytest.mark.skipif(not interpreting(), reason="steps come from a Triton kernel: set TRITON_INTERPRET=1")
pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

SMALL: dict[str, tuple[torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "all options": (BF16, dict(B=2, L=20, D=37, N=16, options=FULL), {}),
    "complex, dB in float32": (F16, dict(B=1, L=CHUNK + 5, D=80, N=1, options=FULL, complex_=True), dict(reverse=True)),
}
LARGE: dict[str, tuple[torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "complex, exact state": (BF16, dict(B=2, L=73, D=37, N=8, options=FULL, complex_=True), dict(reverse=True)),
    "float32": (F32, dict(B=1, L=CHUNK + 5, D=40, N=16, options=FULL), dict(reverse=True)),
    "constant": (BF16, dict(B=2, L=80, D=32, N=8, options="constB constC init D"), {}),
    "constant B": (BF16, dict(B=2, L=80, D=32, N=8, options="constB init D z"), {}),
    "low rank": (BF16, dict(B=1, L=200, D=40, N=16, R=3, options="D z bias"), {}),
    "many states": (BF16, dict(B=1, L=73, D=9, N=80, options=FULL), {}),
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA scans' host code with the emulation behind it."""
    for module in (cuda, cuda_few, cuda_shape):
        monkeypatch.setattr(module, "properties", lambda device: (132, 227 << 10))
    monkeypatch.setattr(nvrtc, "kernel", emulated.kernel)
    monkeypatch.setattr(op, "_choose", lambda p, backend: "cuda")
    monkeypatch.setattr(cuda_launch, "_recipes", {})
    monkeypatch.setattr(op, "_plans", Plans())
    monkeypatch.setattr(op, "_backward_plans", Plans())


@pytest.mark.parametrize("name", SMALL)
def test_small_scans(name: str) -> None:
    dtype, sizes, flags = SMALL[name]
    check(inputs(**sizes), "auto", "cpu", dtype, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_scans(name: str) -> None:
    dtype, sizes, flags = LARGE[name]
    check(inputs(**sizes), "auto", "cpu", dtype, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("short", [True, False])
def test_slices_within_segments(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, supports = cuda_launch.shape_of, cuda_straight.supports
    monkeypatch.setattr(cuda_launch, "shape_of", lambda *args: rule(*args)._replace(segments=2))
    monkeypatch.setattr(cuda_straight, "supports", lambda p: short and supports(p))
    monkeypatch.setattr(cuda_sums, "LEAST", 4)
    check(inputs(B=1, L=17 * CHUNK + 5, D=34, N=16, options=FULL), "auto", "cpu", BF16, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["two channels a thread", "one walk", "twelve warps"])
def test_forms_of_the_forward(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = cuda_launch.shape_of
    changed = dict(each=2, warps=2, extra=2, width=32, blocks=2)
    if form == "one walk":
        changed = dict(lanes=8, states=2, warps=4, extra=8, width=16, blocks=3, tile=CHUNK)
    if form == "twelve warps":
        changed = dict(warps=12, extra=12, width=96, blocks=1, tile=CHUNK // 2)

    def shape_of(*args: Any) -> cuda_shape.Shape:
        return rule(*args) if args[5] else rule(*args)._replace(**changed)

    monkeypatch.setattr(cuda_launch, "shape_of", shape_of)
    check(inputs(B=1, L=2 * CHUNK + 5, D=40, N=16, options=FULL), "auto", "cpu", BF16, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "states"), [(BF16, 16), (torch.float32, 16), (BF16, 40)])
def test_rounds_of_the_backward(dtype: torch.dtype, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = cuda_launch.shape_of

    def shape_of(*args: Any) -> cuda_shape.Shape:
        return rule(*args)._replace(rounds=3) if args[5] else rule(*args)

    monkeypatch.setattr(cuda_launch, "shape_of", shape_of)
    check(inputs(B=2, L=CHUNK + 9, D=70, N=states, options=FULL), "auto", "cpu", dtype, reverse=True)


@pytest.mark.slow
@interpreted
def test_routes() -> None:
    check(inputs(B=2, L=40, D=32, N=4, K=2, G=2, P=CHUNK + 2, options=FULL), "auto", "cpu", BF16)


@pytest.mark.slow
@interpreted
def test_packed_sequences_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = cuda_launch.shape_of
    monkeypatch.setattr(cuda_launch, "shape_of", lambda *args: rule(*args)._replace(segments=2))
    tensors = inputs(B=1, L=5 * CHUNK, D=33, N=16, options=FULL, S=4)
    tensors["cu_seqlens"] = torch.tensor([0, 0, CHUNK + 6, CHUNK + 9, 5 * CHUNK], dtype=torch.int32)
    check(tensors, "auto", "cpu", BF16)
