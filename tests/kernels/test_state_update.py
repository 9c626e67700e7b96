"""The decoding step: every backend against the definition, the definition against the scans, the op's contract."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import golden_cases, golden_inputs
from contract import assert_equals_reference, assert_refuses
from fill import check
from state_update_cases import CASES, ROUNDED, Case, compare, run

from kernels import selective_scan, ssd, state_update
from kernels.compat import selective_state_update

GOLDEN = golden_cases("op_state_update_a")


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str) -> None:
    assert_equals_reference(run, CASES[name], "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    compare(ROUNDED[name], dtype, "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_is_the_selective_scan(backend: str) -> None:
    inputs = Case(T=4, P=6, G=2).inputs(torch.float64)
    state = inputs.pop("state")
    wanted, end = selective_scan(**inputs, initial_state=state, return_final_state=True, backend="reference")
    torch.testing.assert_close(state_update(state, **inputs, backend=backend), wanted)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_is_the_duality_scan(backend: str) -> None:
    case = CASES["ssd_limits"]
    inputs = case.inputs(torch.float64)
    state = inputs.pop("state")
    wanted, end = ssd(**inputs, **case.flags(), initial_state=state, return_final_state=True, backend="reference")
    torch.testing.assert_close(state_update(state, **inputs, **case.flags(), backend=backend), wanted)
    torch.testing.assert_close(state, end)


def test_tied_is_free_with_equal_numbers() -> None:
    case = CASES["ssd_tokens"]
    tied = case.inputs(torch.float64)
    free = {n: t.clone() for n, t in tied.items()}
    free["A"] = tied["A"][:, None, None].expand(4, 9, 33)
    free["dt"] = tied["dt"][..., None].expand(2, 3, 4, 9)
    for name in ("D", "dt_bias"):
        free[name] = tied[name][:, None].expand(4, 9)
    for backend in ("reference", "cpu"):
        copies = ({n: t.clone() for n, t in inputs.items()} for inputs in (tied, free))
        torch.testing.assert_close(*(state_update(**inputs, backend=backend) for inputs in copies))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    case = GOLDEN[name]
    inputs = golden_inputs(case)
    outputs = []
    for t in range(len(inputs["x"])):
        step = {n: v[t] if n in ("x", "dt", "B", "C", "z") else v for n, v in inputs.items()}
        outputs.append(selective_state_update(**step, **case["config"]))
    check(torch.stack(outputs), case["outputs"]["y"])
    check(inputs["state"], case["outputs"]["state"])


def test_padding_rows_leave_every_state() -> None:
    case = CASES["ssd_indices"]
    inputs = case.inputs(torch.float32)
    before = inputs["state"].clone()
    y = state_update(**inputs)
    changed = (inputs["state"] != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, True, False, False, True]
    assert (y[2] == 0).all()
    alone = {n: t[1:2] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
    alone.update(state=before[2:3].clone(), state_indices=None)
    torch.testing.assert_close(state_update(**alone)[0], y[1])
    torch.testing.assert_close(alone["state"][0], inputs["state"][2])


@pytest.mark.parametrize("name", ["s6", "ssd"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_state_may_lie_anyhow_in_memory(name: str, backend: str) -> None:
    inputs = CASES[name].inputs(torch.float64)
    turned = {**inputs, "state": inputs["state"].mT.contiguous().mT}
    assert not turned["state"].is_contiguous()
    torch.testing.assert_close(*(state_update(**given, backend=backend) for given in (turned, inputs)))
    torch.testing.assert_close(turned["state"], inputs["state"])


def test_state_may_be_a_view() -> None:
    inputs = CASES["ssd"].inputs(torch.float64)
    wanted = {n: t.clone() for n, t in inputs.items()}
    wide = torch.zeros(2, 9, 4, 3, 5, dtype=torch.float64)
    wide[:, 4] = inputs["state"]
    y = state_update(**{**inputs, "state": wide[:, 4]})
    torch.testing.assert_close(y, state_update(**wanted))
    torch.testing.assert_close(wide[:, 4], wanted["state"])
    assert not wide[:, 5].any()


@pytest.mark.parametrize("name", ["s6_indices", "ssd", "ssd_low"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(name: str, backend: str) -> None:
    case = {**CASES, **ROUNDED}[name]
    inputs = case.inputs(torch.float32)
    order = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state_indices")
    arguments = (*(inputs.get(n) for n in order), True, 0.0, 1.0, backend)
    torch.library.opcheck(torch.ops.triscan.state_update, arguments)


def test_compiles_and_mutates() -> None:
    inputs = CASES["ssd_tokens"].inputs(torch.float32)
    state = inputs.pop("state")
    states = [state.clone() for _ in range(2)]

    def steps(state: torch.Tensor) -> torch.Tensor:
        return state_update(state, **inputs) + state_update(state, **inputs)

    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(states[0]), steps(states[1]))
    assert torch.equal(*states)
    assert not torch.equal(states[0], state)


def test_meta_device() -> None:
    inputs = {n: t.to("meta") for n, t in CASES["ssd_indices"].inputs(torch.bfloat16).items()}
    y = state_update(**inputs)
    assert (y.shape, y.dtype, y.device.type) == (inputs["x"].shape, torch.bfloat16, "meta")


def test_has_no_gradient() -> None:
    inputs = CASES["ssd"].inputs(torch.float32)
    inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        state_update(**inputs).sum().backward()


SSD = CASES["ssd"].inputs(torch.float32)
S6 = CASES["s6"].inputs(torch.float32)
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "one token": (SSD, {"x": SSD["x"][:, 0]}, r"x: got shape \(2, 4, 3\), wanted \(B, T, H, P\).*x.unsqueeze\(1\)"),
    "state": (SSD, {"state": SSD["state"][0, 0]}, r"state: got shape \(3, 5\), wanted \(S, D, N\) for S6 or"),
    "width": (SSD, {"state": torch.zeros(2, 4, 2, 5)}, r"state: got shape \(2, 4, 2, 5\), wanted"),
    "rows": (SSD, {"state": torch.zeros(3, 4, 3, 5)}, "state: got 3 rows for a batch of 2"),
    "groups": (SSD, {n: torch.zeros(2, 1, 3, 5) for n in "BC"}, "B: got 3 groups for 4 heads"),
    "no groups": (SSD, {"B": torch.zeros(2, 1, 5)}, r"B: got shape \(2, 1, 5\), wanted \(B, T, G, N\)"),
    "C": (SSD, {"C": torch.zeros(2, 1, 1, 5)}, "C: got shape"),
    "A": (SSD, {"A": torch.zeros(5)}, r"A: got shape \(5,\), wanted \(H,\) or \(H, P, N\) = \(4,\)"),
    "A of S6": (S6, {"A": torch.zeros(6)}, r"A: got shape \(6,\), wanted \(D, N\) = \(6, 5\)"),
    "dt of S6": (S6, {"dt": torch.zeros(2, 1, 5)}, r"dt: got shape \(2, 1, 5\), wanted \(B, T, D\)"),
    "D": (SSD, {"D": torch.zeros(3)}, r"D: got shape \(3,\), wanted \(H,\) or \(H, P\) = \(4,\)"),
    "limits": (SSD, {"dt_limit": (1.0, 0.0)}, "dt_limit: got .* swap them"),
    "indices": (SSD, {"state_indices": torch.tensor([0, 2])}, r"state_indices: got values in \[0, 2\], wanted rows in"),
    "float indices": (SSD, {"state_indices": torch.zeros(2)}, "state_indices: got dtype torch.float32"),
    "integers": (SSD, {"x": SSD["x"].long()}, "x: got dtype torch.int64"),
    "backend": (SSD, {"backend": "numpy"}, "backend .*got 'numpy', wanted one of auto"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wanted(name: str) -> None:
    inputs, changes, message = BAD[name]
    assert_refuses(state_update, {**inputs, **changes}, message)


@pytest.mark.parametrize("absent", ["D", "dt_bias", "z"])
def test_adapter_takes_absent_tensors(absent: str) -> None:
    """The original fails without D or dt_bias."""
    case = dataclasses.replace(CASES["ssd_free"], T=1)
    inputs = {n: t for n, t in case.inputs(torch.float64).items() if n != absent}
    one = {n: t[:, 0] if n in ("x", "dt", "B", "C", "z") else t.clone() for n, t in inputs.items()}
    y = selective_state_update(**one, dt_softplus=True)
    torch.testing.assert_close(y, state_update(**inputs)[:, 0])
    torch.testing.assert_close(one["state"], inputs["state"])


def test_adapter_finds_tied_numbers() -> None:
    """What is constant over P and N by its strides is taken as one number a head."""
    inputs = CASES["ssd"].inputs(torch.float64)
    one = {
        "state": inputs["state"].clone(), "x": inputs["x"][:, 0], "z": inputs["z"][:, 0],
        "dt": inputs["dt"][:, 0, :, None].expand(2, 4, 3), "A": inputs["A"][:, None, None].expand(4, 3, 5),
        "B": inputs["B"][:, 0], "C": inputs["C"][:, 0],
        "D": inputs["D"][:, None].expand(4, 3), "dt_bias": inputs["dt_bias"][:, None].expand(4, 3),
    }  # fmt: skip
    y = selective_state_update(**one, dt_softplus=True)
    assert torch.equal(y, state_update(**inputs)[:, 0])
    assert torch.equal(one["state"], inputs["state"])


def test_adapter_updates_chosen_rows() -> None:
    inputs = CASES["s6_indices"].inputs(torch.float64)
    one = {n: t[:, 0] if n in ("x", "dt", "z") else t for n, t in inputs.items()}
    one.update({n: inputs[n][:, 0, 0] for n in "BC"}, state=inputs["state"].clone())
    one["state_batch_indices"] = one.pop("state_indices")
    first = {n: t[:, :1] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
    torch.testing.assert_close(selective_state_update(**one, dt_softplus=True), state_update(**first)[:, 0])
    torch.testing.assert_close(one["state"], inputs["state"])
