"""The decoding step's Triton kernel against the reference: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from contract import assert_equals_reference, assert_repeats, triton_device
from state_update_cases import CASES, ROUNDED, Case, compare, run

from kernels import state_update

DEVICE = triton_device()


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    assert_equals_reference(run, CASES[name], "triton", DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    compare(ROUNDED[name], dtype, "triton", DEVICE)


def test_repeats_bit_by_bit() -> None:
    assert_repeats(run, CASES["ssd_tokens"], "triton", DEVICE)


def test_inputs_and_states_may_be_views() -> None:
    inputs = CASES["ssd_tokens"].inputs(torch.float64, DEVICE)
    wanted = {n: t.clone() for n, t in inputs.items()}
    for name, t in inputs.items():  # every second element of something larger
        wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype, device=DEVICE)
        wide[..., 0] = t
        inputs[name] = wide[..., 0]
    torch.testing.assert_close(state_update(**inputs, backend="triton"), state_update(**wanted, backend="reference"))
    torch.testing.assert_close(inputs["state"], wanted["state"])


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="runs on a GPU")
REALISTIC = {
    "mamba2": Case(B=33, H=24, P=64, N=128),
    "mamba2_tokens": Case(B=4, T=5, H=24, P=64, N=128, state=torch.bfloat16),
    "mamba1": Case(B=9, P=1536, N=16),
    "mamba1_low": Case(B=64, P=1530, N=16, state=torch.bfloat16),
    "one": Case(B=1, H=80, P=64, N=128, G=8),
    "pool": Case(B=4, H=24, P=64, N=64, pool=9, rows=(8, -1, 3, 0), state=torch.float16),
}


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REALISTIC)
def test_realistic_sizes(name: str, dtype: torch.dtype) -> None:
    case = REALISTIC[name]
    got, reference = run(case, dtype, "triton", DEVICE), run(case, dtype, "reference", DEVICE)
    truth = run(case, torch.float64, "reference", DEVICE, rounded=dtype)
    for key, value in got.items():
        assert_as_accurate(key, value, reference[key], truth[key])


@gpu
@needs_gpu
def test_offsets_beyond_int32() -> None:
    case = Case(B=2, H=4, P=64, N=128, pool=70_000, rows=(69_999, 1), state=torch.bfloat16)
    inputs = case.inputs(torch.float32, DEVICE)
    small = {**inputs, "state": inputs["state"][[69_999, 1]].clone(), "state_indices": None}
    assert torch.equal(state_update(**inputs), state_update(**small))
    assert torch.equal(inputs["state"][[69_999, 1]], small["state"])


@gpu
@needs_gpu
def test_replays_as_a_graph() -> None:
    inputs = CASES["ssd_indices"].inputs(torch.float32, DEVICE)
    copy = {n: t.clone() for n, t in inputs.items()}
    start = inputs["state"].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        state_update(**inputs)
    torch.cuda.current_stream().wait_stream(stream)
    inputs["state"].copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = state_update(**inputs)
    for rows in ((6, 2, -1, 3), (-1, 0, 1, 2)):
        inputs["state_indices"].copy_(torch.tensor(rows))
        copy["state_indices"].copy_(torch.tensor(rows))
        graph.replay()
        assert torch.equal(y, state_update(**copy))
        assert torch.equal(inputs["state"], copy["state"])
