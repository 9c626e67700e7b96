"""The Triton kernels of the selective scan against the reference in float64: outputs, final states and every gradient.

On a machine without a GPU: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_selective_scan_triton.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import scan_options as options
import torch
from accuracy import relative_rms
from contract import capture, triton_device
from scan_options import CASES, FLOATS, FULL, cast, inputs

from kernels import selective_scan
from kernels.selective_scan import triton as host
from kernels.selective_scan import triton_backward, triton_plan
from kernels.selective_scan.problem import CHUNK

DEVICE = triton_device()
INTERPRETED = DEVICE == "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an element that no kernel wrote shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() or t.is_complex() else t.fill_(-12345)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(autouse=True)
def scan_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter's associative scan combine whole rows, not one element at a time.

    Segments are shorter there: an operation on a large tile takes it as long as one on a small tile.
    """
    if not INTERPRETED:
        return
    monkeypatch.setattr(triton_plan, "SEGMENT", 2)
    from triton.runtime.interpreter import ScanOps

    def rows(self, inputs):
        data = [np.moveaxis(t.handle.data, self.axis, 0) for t in inputs]
        out = [np.empty_like(d) for d in data]
        total = ()
        for i in range(len(data[0])):
            row = tuple(self.to_tensor(np.ascontiguousarray(d[i]), t.dtype) for d, t in zip(data, inputs, strict=True))
            total = self.combine_fn.fn(*total, *row) if total else row
            for o, t in zip(out, total, strict=True):
                o[i] = t.handle.data
        return [self.to_tensor(np.moveaxis(o, 0, self.axis), t.dtype) for o, t in zip(out, inputs, strict=True)]

    monkeypatch.setattr(ScanOps, "generic_scan", rows)


def run(tensors, backend, dtype, **flags) -> dict[str, torch.Tensor]:
    return options.run(tensors, backend, dtype, DEVICE, **flags)


def check(tensors, dtype=torch.float32, **flags) -> dict[str, torch.Tensor]:
    return options.check(tensors, "triton", DEVICE, dtype, **flags)


@pytest.mark.parametrize("case", CASES)
def test_option_equals_the_reference_in_float64(case: str) -> None:
    sizes, flags = CASES[case]
    check(inputs(**sizes), torch.float64, **flags)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("split", [False, True])
def test_chunk_borders(length: int, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "splits", lambda p, programs: split)
    check(inputs(B=1, L=length, D=3, N=1, options="init"), torch.float64)


@pytest.mark.parametrize("extra", [{}, dict(complex_=True)], ids=["real", "complex"])
def test_chunks_at_once_equal_chunks_in_turn(extra: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(B=2, L=CHUNK + 7, D=3, N=1, K=1, options=FULL, **extra)
    for split in (False, True):
        monkeypatch.setattr(host, "splits", lambda p, programs, split=split: split)
        check(tensors, torch.float64, reverse=True)


PRECISIONS = {
    "tokens": {},
    "routes": dict(L=12, K=2, P=24),
    "complex": dict(complex_=True),
    "complex_constant": dict(complex_=True, options=FULL + " constB constC"),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", PRECISIONS)
def test_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype, case: str) -> None:
    if case == "complex" and dtype != torch.float32:
        pytest.skip("complex B and C are float32 at least: complex_constant has the low precisions")
    sizes = dict(B=1, L=40, D=16, N=2, options=FULL) | PRECISIONS[case]  # 16 lanes: enough numbers for an rms
    check(inputs(**sizes), dtype)


def test_small_steps_keep_their_relative_accuracy() -> None:
    tensors = inputs(B=1, L=20, D=4, N=1)
    tensors["dt"] -= 12  # softplus is about 1e-6 there
    check(tensors)


@pytest.mark.parametrize("bounds", [[0, 5, 5, 20], [0, 0, CHUNK + 6, CHUNK + 9, CHUNK + 9]])
@pytest.mark.parametrize(("reverse", "split"), [(False, False), (True, False), (True, True)])
def test_packed_sequences(bounds: list[int], reverse: bool, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "splits", lambda p, programs: split)
    tensors = inputs(B=1, L=bounds[-1], D=3, N=1, options=FULL, S=len(bounds) - 1)
    tensors["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    check(tensors, torch.float64, reverse=reverse)


@pytest.mark.parametrize("split", [False, True])
def test_no_tokens_at_all(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "splits", lambda p, programs: split)
    tensors = inputs(B=1, L=0, D=3, options=FULL, S=2)
    tensors["cu_seqlens"] = torch.tensor([0, 0, 0], dtype=torch.int32)
    got = run(tensors, "triton", torch.float64)
    assert torch.equal(got["state"].cpu(), tensors["initial_state"])
    assert got["initial_state"].shape == tensors["initial_state"].shape
    assert got["initial_state"].abs().min() > 0  # handed through from the final state
    assert (got["A"] == 0).all()
    assert (got["dt_bias"] == 0).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("extra", [dict(), dict(K=2, P=21)], ids=["tokens", "routes"])
def test_restarts_and_skipped_tokens(reverse: bool, extra: dict) -> None:
    tensors = inputs(**dict(B=2, L=18, D=3, N=1, options=FULL) | extra)
    if not extra:
        rows = [0] * 4 + [1] * 6 + [-1] * 2 + [1] * 3 + [2] * 3, [-1] * 3 + [7] * 5 + [3] * 10
        tensors["seq_idx"] = torch.tensor(rows)
    else:  # along a route the sequences alternate
        tensors["seq_idx"] = torch.tensor([[0] * 9 + [1] * 9, [0] * 6 + [-1] * 3 + [1] * 9])
    check(tensors, torch.float64, reverse=reverse)


@pytest.mark.parametrize("extra", [dict(), dict(K=2)], ids=["tokens", "routes"])
def test_nan_at_skipped_tokens_stays_there(extra: dict) -> None:
    tensors = inputs(**dict(B=1, L=12, D=3, N=1, options="D z bias") | extra)
    skipped = torch.tensor([2, 3, 11])
    tensors["seq_idx"] = torch.zeros(1, 12, dtype=torch.int64)
    tensors["seq_idx"][:, skipped] = -1
    clean = run(tensors, "triton", torch.float64)
    for name in ("x", "dt", "B", "C", "z"):
        tensors[name] = tensors[name].index_fill(1, skipped, float("nan"))
    for name, t in run(tensors, "triton", torch.float64).items():
        assert torch.equal(t, clean[name]), name
    assert (clean["y"][:, skipped.to(DEVICE)] == 0).all()
    assert (clean["x"][:, skipped.to(DEVICE)] == 0).all()


def test_strided_inputs_are_read_in_place() -> None:
    tensors = inputs(B=2, L=9, D=4, N=1, options="z")
    wide = torch.cat([tensors["x"], tensors["z"]], -1)
    strided = tensors | {"x": wide[..., :4], "z": wide[..., 4:], "dt": tensors["dt"].transpose(1, 2).contiguous().mT}
    plain = run(tensors, "triton", torch.float64)
    leaves = {n: t.to(DEVICE) for n, t in strided.items()}
    assert torch.equal(selective_scan(**leaves, backend="triton"), plain["y"])


def test_channel_blocks_take_turns_in_a_small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(B=1, L=9, D=70, N=1)
    whole = run(tensors, "triton", torch.float64)
    monkeypatch.setattr(triton_backward, "WORKSPACE", 1)
    for name, t in run(tensors, "triton", torch.float64).items():
        assert relative_rms(t, whole[name]) < 1e-14, name


def test_bits_repeat() -> None:
    tensors = inputs(B=1, L=CHUNK + 3, D=3, N=1, K=2, options=FULL)
    first, second = (run(tensors, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_saved_states_are_those_before_the_chunks() -> None:
    tensors = inputs(B=1, L=2 * CHUNK + 1, D=2, N=1, options="init")
    leaves = {n: t.to(DEVICE) for n, t in tensors.items()}
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight", "route", "initial_state")
    positional = [leaves.get(n) for n in names]
    saved = torch.ops.triscan.selective_scan(*positional, None, None, True, True, "sum", False, False, "triton")[2]
    for slot in range(3):
        part = {n: t[:, : slot * CHUNK] if n in ("x", "dt", "B", "C") else t for n, t in leaves.items()}
        state = selective_scan(**part, return_final_state=True, backend="reference")[1]
        assert relative_rms(saved[slot, 0].T, state[0]) < 1e-13


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: a GPU, without TRITON_INTERPRET")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "channels"), [(2, 1500, 96), (1, 5000, 33)])
def test_realistic_sizes(batch: int, length: int, channels: int, dtype: torch.dtype) -> None:
    check(inputs(B=batch, L=length, D=channels, N=16, options=FULL), dtype)


@gpu
@needs_gpu
def test_a_million_tokens_split_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator(DEVICE).manual_seed(0)
    x, dt = (torch.randn(1, 1 << 20, 32, device=DEVICE, generator=g) for _ in range(2))
    A = -torch.rand(32, 4, device=DEVICE, generator=g)
    B, C = (torch.randn(1, 1 << 20, 1, 4, device=DEVICE, generator=g) for _ in range(2))
    outputs = []
    for split in (False, True):
        monkeypatch.setattr(host, "splits", lambda p, programs, split=split: split)
        outputs.append(selective_scan(x, dt - 4, A, B, C))
    assert relative_rms(outputs[0], outputs[1]) < 1e-5


@gpu
@needs_gpu
def test_offsets_beyond_int32() -> None:
    length, wide = 70_000, 40_000  # 2.8e9 elements, 5.6 GB
    x = torch.zeros(1, length, wide, device=DEVICE, dtype=torch.bfloat16)
    x[..., -8:] = torch.randn(length, 8, device=DEVICE)
    narrow = x[..., -8:]
    dt = torch.randn(1, length, 8, device=DEVICE, dtype=torch.bfloat16) - 3
    A = -torch.rand(8, 2, device=DEVICE)
    B, C = (torch.randn(1, length, 1, 2, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(selective_scan(narrow, dt, A, B, C), selective_scan(narrow.clone(), dt, A, B, C))


def _leaves() -> dict[str, torch.Tensor]:
    tensors = inputs(B=2, L=100, D=24, N=4, K=2, options="D z bias")
    return {n: cast(t, torch.float32).to(DEVICE).requires_grad_(n in FLOATS) for n, t in tensors.items()}


@gpu
@needs_gpu
def test_survives_a_cuda_graph() -> None:
    leaves = _leaves()
    wanted = [t for n, t in leaves.items() if n in FLOATS]

    def step():
        y = selective_scan(**leaves)
        return y, *torch.autograd.grad(y, wanted, torch.ones_like(y))

    graph, captured, expected = capture(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@gpu
@needs_gpu
def test_survives_compile() -> None:
    leaves = _leaves()
    y = selective_scan(**leaves)
    compiled = torch.compile(selective_scan, fullgraph=True)(**leaves)
    assert torch.equal(y, compiled)
    grads = [torch.autograd.grad(t.sum(), leaves["x"])[0] for t in (y, compiled)]
    assert torch.equal(*grads)
