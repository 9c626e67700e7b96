"""S4 and S4D: recorded values, the mixer contract, the kernels against recurrences, and the published layouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import relative_rms
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check, fill_input
from mixer_contract import (
    assert_causal,
    assert_gradients,
    assert_packed_is_separate,
    assert_padded_rows_are_alone,
    assert_pieces_are_the_whole,
    inputs,
)
from torch import Tensor

from core import hippo
from core.mixers import S4, S4D
from core.mixers.s4 import S4Kernel, advance, cauchy_kernel, complex_row, real_row, transition
from core.mixers.s4_layouts import from_published, from_standalone_s4d
from core.mixers.s4d import S4DKernel, continuous
from kernels.diagonal_ssm import aten, powers

CASES = golden_cases("s4d_a")
KINDS = {
    "lin": lambda **o: S4D(4, 6, **o),
    "bilinear": lambda **o: S4D(4, 6, "inv", "bilinear", n_ssm=2, **o),
    "legs": lambda **o: S4D(3, 4, "legs", glu=False, dt_transform="softplus", **o),
    "s4": lambda **o: S4(4, 6, n_ssm=2, **o),
}


def layer(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return KINDS[kind](**options).to(dtype)


def recurrence(kernel: Any, u: Tensor) -> Tensor:
    """The definition, with dense matrices of all N states: bilinear or zero-order hold by matrix functions."""
    A, B, C, dt = continuous(kernel)
    outputs = []
    for d in range(A.shape[0]):
        full = torch.diag(torch.cat([A[d], A[d].conj()]))
        if isinstance(kernel, S4Kernel):
            P = kernel._P()[d]
            full = full - torch.outer(torch.cat([P, P.conj()]), torch.cat([P.conj(), P]))
        b, c = torch.cat([B[d], B[d].conj()]), torch.cat([C[d], C[d].conj()])
        one = torch.eye(len(full), dtype=full.dtype)
        h = full * dt[d]
        if isinstance(kernel, S4Kernel) or kernel.disc == "bilinear":
            step, drive = torch.linalg.solve(one - h / 2, one + h / 2), torch.linalg.solve(one - h / 2, b * dt[d])
        else:
            step = torch.linalg.matrix_exp(h)
            drive = torch.linalg.solve(full, (step - one) @ b)
        x, y = torch.zeros(len(u), len(full), dtype=full.dtype), []
        for t in range(u.shape[1]):
            x = x @ step.T + u[:, t, d, None] * drive
            y.append((x @ c).real)
        outputs.append(torch.stack(y, dim=1))
    return torch.stack(outputs, dim=2)


def test_golden_layer() -> None:
    case = CASES["main"]
    config = case["config"]
    mixer = S4D(config["d_model"], config["d_state"], "lin")
    given = golden_state_dict(case)
    A = -hippo.s4d_lin(config["d_state"]).conj()
    given["kernel.log_A_real"] = torch.log(A.real).float().repeat(config["d_model"], 1)
    given["kernel.A_imag"] = A.imag.abs().float().repeat(config["d_model"], 1)
    mixer.load_state_dict(from_standalone_s4d(given))
    x = golden_inputs(case)["x"].requires_grad_()
    y = mixer(x.mT).mT
    check(y, case["outputs"]["y"])
    check(mixer.kernel.taps(64), case["outputs"]["K"])
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    assert x.grad is not None
    check(x.grad, case["grads"]["x"])
    kernel = mixer.layer.kernel
    for name, wanted in (("C", "kernel.C"), ("inv_dt", "kernel.log_dt"), ("A_real", "kernel.log_A_real")):
        check(getattr(kernel, name).grad.reshape(case["grads"][wanted]["shape"]), case["grads"][wanted])
    check(-kernel.A_imag.grad, case["grads"]["kernel.A_imag"])
    check(mixer.output_linear[0].weight.grad[..., None], case["grads"]["output_linear.0.weight"])
    with pytest.raises(ValueError, match="standalone S4D"):
        from_standalone_s4d({"D": torch.zeros(3)})


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("diag") or name == "dplr"])
def test_golden_kernels(name: str) -> None:
    case = CASES[name]
    c = case["config"]
    if name == "dplr":
        kernel: Any = S4Kernel(c["d_model"], c["d_state"], c["n_ssm"])
    else:
        kernel = S4DKernel(c["d_model"], c["d_state"], c["init"].removeprefix("diag-"), c["disc"], c["n_ssm"])
    case["params"].pop("l_kernel", None)
    assert {k: list(v.shape) for k, v in kernel.state_dict().items()} == case["params"]
    given = golden_state_dict(case, kernel)
    if case["overrides"]["A_imag"].get("keep"):  # the recorded module raises imaginary parts to 1e-4
        given["A_imag"] = given["A_imag"].clamp(min=1e-4)
    kernel.load_state_dict(given)
    K = kernel.taps(c["L"])
    check(K[None], case["outputs"]["y"])
    u = golden_inputs(case)["u"].mT
    y, state = kernel.run(u, None)
    check(y.mT[:, None], case["outputs"]["u_conv_K"])
    if "final_state" in case["outputs"]:
        check(state, case["outputs"]["final_state"])
    if name == "dplr":  # its C was stored as C (I - Ā^L), and the other gradients taken at that constant
        A, B, _, dt = continuous(kernel)
        K = cauchy_kernel(A, B, kernel.shortened(c["L"]).detach(), kernel._P(), dt, c["L"])
    (K * fill_input("loss_weight", (1, *K.shape))[0]).sum().backward()
    for key, want in case["grads"].items():
        check(getattr(kernel, key).grad, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7, 130])
def test_scan_convolution_and_definition_agree(kind: str, length: int) -> None:
    mixer = layer(kind)
    x = inputs(2, length, mixer.d_model)
    torch.testing.assert_close(mixer.kernel.run(x, None)[0], recurrence(mixer.kernel, x))
    convolution = layer(kind, method="convolution")
    torch.testing.assert_close(convolution(x), mixer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "CHUNK", 4)
    monkeypatch.setattr("core.mixers.s4.CHUNK", 4)
    mixer = layer(kind)
    assert_pieces_are_the_whole(mixer, inputs(2, 13, mixer.d_model))
    assert_padded_rows_are_alone(mixer, mixer.d_model, [0, 6, 9])
    assert_packed_is_separate(mixer, mixer.d_model)
    assert_causal(layer(kind, torch.float32), mixer.d_model)
    _, before = mixer.forward_state(inputs(2, 3, mixer.d_model), mixer.init_state(2))
    assert_gradients(mixer, inputs(2, 9, mixer.d_model), before)


def test_many_channels_and_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution's frequencies, the Vandermonde factors and the scan's channels, cut to bound memory."""
    x = inputs(2, 37, 4)
    kinds = ("bilinear", "s4")
    want = [layer(kind)(x) for kind in kinds] + [layer(kind).kernel.taps(37) for kind in kinds]
    monkeypatch.setattr(aten, "BLOCK_BYTES", 1)
    monkeypatch.setattr(powers, "BLOCK", 1)
    monkeypatch.setattr("core.mixers.s4.BLOCK", 30)
    got = [layer(kind)(x) for kind in kinds] + [layer(kind).kernel.taps(37) for kind in kinds]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["lin", "s4"])
def test_float32_over_a_long_memory(kind: str) -> None:
    """2000 samples at small steps: phases and decays keep their digits; states too."""
    torch.manual_seed(1)
    options: Any = {"n_ssm": 1, "dt_max": 0.002}
    exact = (S4D(2, 64, **options) if kind == "lin" else S4(2, 64, **options)).double()
    mixer = (S4D(2, 64, **options) if kind == "lin" else S4(2, 64, **options)).float()
    mixer.load_state_dict(exact.state_dict())
    exact.load_state_dict(mixer.state_dict())
    x = inputs(1, 2000, 2, torch.float32)
    want, state = exact.kernel.run(x.double(), None)
    got, after = mixer.kernel.run(x, None)
    assert relative_rms(got, want) < 2e-6
    assert relative_rms(after, state) < 2e-6
    assert relative_rms(mixer.kernel.taps(2000), exact.kernel.taps(2000)) < 2e-5


def test_bfloat16_rounds_inputs_and_outputs_only() -> None:
    mixer = layer("lin", torch.float32)
    x = inputs(2, 200, 4, torch.bfloat16)
    got, want = mixer.kernel.run(x, None)[0], layer("lin").kernel.run(x.double(), None)[0]
    assert got.dtype == torch.bfloat16
    assert relative_rms(got, want) < 1.2 * relative_rms(want.bfloat16(), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_rms(mixer.kernel.run(x, None)[0], want) < 1.2 * relative_rms(want.bfloat16(), want)


def test_a_contraction_of_any_length() -> None:
    """The transition of A = Lambda - P P* never grows a state (its Cayley transform is a contraction)."""
    kernel = S4Kernel(3, 64).double()
    A, _, _, dt = continuous(kernel)
    assert float(torch.linalg.matrix_norm(transition(A, kernel._P(), dt), 2).max()) <= 1 + 1e-12
    x = torch.randn(2, 3, 32, dtype=torch.complex128)
    moved = advance(x, torch.zeros_like(A), A, kernel._P(), dt)
    rows = torch.view_as_real(x).flatten(2).transpose(0, 1) @ transition(A, kernel._P(), dt)
    torch.testing.assert_close(torch.view_as_real(moved).flatten(2).transpose(0, 1), rows)
    C = torch.randn(3, 32, dtype=torch.complex128)
    torch.testing.assert_close(complex_row(real_row(C)), C)


def test_published_layouts() -> None:
    mixer = S4(4, 8, n_ssm=2).double()
    state = mixer.state_dict()
    A, _, _, dt = continuous(mixer.layer.kernel)
    power = torch.linalg.matrix_power(transition(A, mixer.layer.kernel._P(), dt), 100)
    column = real_row(torch.view_as_complex(state["layer.kernel.C"])[0])
    stored = torch.view_as_real(complex_row(column - (power @ column[..., None])[..., 0]).resolve_conj())[None]
    published = {**state, "layer.kernel.C": stored, "layer.kernel.l_kernel": torch.tensor(100)}
    new = {f"model.0.layer.{k}": v for k, v in published.items()}
    third = {}
    names = {"inv_dt": "log_dt", "A_real": "inv_w_real", "A_imag": "w_imag", "l_kernel": "L"}
    for key, value in published.items():
        leaf = key.rsplit(".", 1)[1]
        value = -value if leaf == "A_imag" else value[:, 0] if leaf == "inv_dt" else value
        old = f"kernel.kernel.{names.get(leaf, leaf)}" if "layer.kernel" in key else key.removeprefix("layer.")
        third[f"model.0.layer.{old}"] = value
    for given in (new, third):
        got = from_published({**given, "norm.weight": torch.ones(3)})
        assert set(got) == {f"model.0.layer.{k}" for k in state} | {"norm.weight"}
        for key, value in state.items():
            torch.testing.assert_close(got[f"model.0.layer.{key}"], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"d_state": 5}, "d_state: got 5"), ({"init": "log"}, "init: got 'log'"), ({"n_ssm": 3}, "n_ssm: got 3"),
     ({"disc": "euler"}, "disc"), ({"dt_transform": "id"}, "dt_transform"), ({"method": "fft"}, "method")],
)  # fmt: skip
def test_refuses_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4D(4, **options)


def test_initial_steps_are_log_uniform() -> None:
    dt = S4D(4000, 2).layer.kernel.inv_dt.exp()
    assert 0.001 <= float(dt.min()) < 0.0012
    assert 0.09 < float(dt.max()) <= 0.1
    assert float(dt.log().mean()) == pytest.approx(math.log(0.01), abs=0.1)
