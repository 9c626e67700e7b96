"""What ``ssd`` promises as an operator: tracing, dtypes, devices, counting, error messages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import OpContract, assert_refuses, assert_repeats, flops
from ssd_cases import CASES, Case, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernels import compat, ssd
from kernels.ssd import CHUNK, semiseparable_matrix

BACKENDS = ["cpu", "torch"]


def arguments(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    """The arguments of the custom op, by position."""
    inputs, options = case.inputs(dtype), case.options()
    tensors = [inputs.get(n) for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    index = (options["route"], inputs.get("initial_state"), options["cu_seqlens"], options["seq_idx"])
    flags = (options["dt_softplus"], *options["dt_limit"], options["merge"], options["reverse"])
    return (*tensors, *index, *flags, True, backend)


class Model(nn.Module):
    """A module that calls the custom op the way models do: 2 heads of 3, 4 states, two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(2, 2))
        self.D = nn.Parameter(torch.randn(2, 2))
        self.project = nn.Linear(6, 2 * 10)
        self.register_buffer("route", torch.stack([torch.arange(9), torch.arange(9).flip(0)]))

    def forward(self, x: Tensor) -> Tensor:
        dt, B, C = self.project(x).unflatten(-1, (2, 1, 10)).split([2, 4, 4], -1)
        heads = x.unflatten(-1, (2, 3))
        y, state = torch.ops.triscan.ssd(
            heads, dt.squeeze(3), -torch.exp(self.A_log), B, C, self.D, heads, None, self.route,
            None, None, None, True, 0.0, 1.0, "sum", False, True, "auto",
        )  # fmt: skip
        return y.flatten(2) + state.sum()


class Plain(nn.Module):
    """A module on plain operators, by backend or by mode."""

    def __init__(self, case: Case, **way: str) -> None:
        super().__init__()
        self.way = way
        self.inputs = {n: t.detach() for n, t in case.inputs(torch.float32).items()}
        self.options = case.options()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.inputs | {"x": x}
        return ssd(**inputs, **self.options, return_final_state=True, **self.way)


class TestContract(OpContract):
    Model, channels, dynamic = Model, 6, 0

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 3))
        return ssd(heads, x[..., :2], -torch.exp(model.A_log[0]), x[..., None, :3], x[..., None, 3:], model.D[0])


@pytest.mark.parametrize("name", ["all", "plain", "bounds", "packed", "route_inputs_keep", "limits"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(name: str, backend: str) -> None:
    torch.library.opcheck(torch.ops.triscan.ssd, arguments(CASES[name], backend))


@pytest.mark.parametrize("name", ["all", "route_padded", "empty"])
def test_opcheck_of_the_backward(name: str) -> None:
    values = arguments(CASES[name], "cpu")
    y, state = torch.ops.triscan.ssd(*values)
    *flags, _, backend = values[12:]
    inputs = [t.detach() if isinstance(t, Tensor) else t for t in values[:12]]
    grads = (torch.randn_like(y), torch.randn_like(state), *inputs, *flags, backend)
    torch.library.opcheck(torch.ops.triscan.ssd_backward, grads)


@pytest.mark.parametrize("name", ["all", "route_padded", "packed"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_plain_backends_behind_the_op_equal_the_function(name: str, backend: str) -> None:
    case = CASES[name]
    values = arguments(case, backend, torch.float64)
    inputs = dict(zip(("x", "dt", "A", "B", "C", "D", "z", "dt_bias"), values[:8], strict=True))
    inputs["initial_state"] = values[9]
    got = torch.ops.triscan.ssd(*values)
    wanted = ssd(**inputs, **case.options(), return_final_state=True, backend=backend)
    torch.testing.assert_close(got, wanted)
    leaves = list(inputs.values())
    loss, wanted_loss = (a.square().sum() + b.square().sum() for a, b in (got, wanted))
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted_loss, leaves))


PLAIN = {
    "two_chunks": Plain(Case(), backend="torch"),
    "reverse": Plain(Case(L=20, reverse=True), backend="torch"),
    "route": Plain(Case(K=2, L=20, positions=25), backend="torch"),
    "packed": Plain(Case(L=20, packed=True), backend="torch"),
    "quadratic": Plain(Case(L=20), mode="quadratic"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_operators_compile(name: str) -> None:
    plain = PLAIN[name]
    x = plain.inputs["x"].clone().requires_grad_()
    wanted, end = plain(x)
    y, state = torch.compile(plain, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close((y, state), (wanted, end))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), x))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_operators_export(name: str) -> None:
    plain = PLAIN[name]
    x = plain.inputs["x"]
    program = torch.export.export(plain, (x,))
    assert not [n.target for n in program.graph.nodes if "triscan" in str(n.target)]
    torch.testing.assert_close(program.module()(x + 1), plain(x + 1))


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch.onnx needs onnx and onnxscript")
def test_plain_operators_export_to_onnx(tmp_path: Path) -> None:
    plain = PLAIN["reverse"]
    torch.onnx.export(plain, (plain.inputs["x"],), tmp_path / "ssd.onnx", dynamo=True)
    assert (tmp_path / "ssd.onnx").stat().st_size > 0


@pytest.mark.parametrize("way", [{"backend": "cpu"}, {"backend": "torch"}, {"mode": "quadratic"}], ids=str)
def test_autocast_rounds_nothing_inside(way: dict[str, str]) -> None:
    inputs = Case().inputs(torch.float32)
    wanted = ssd(**inputs, **way)
    with torch.autocast("cpu", torch.bfloat16):
        y = ssd(**inputs, **way)
        heads = F.linear(inputs["x"], torch.randn(4, 4))
        low, state = ssd(**inputs | {"x": heads}, return_final_state=True, **way)
    assert torch.equal(y, wanted)
    assert (low.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    grads, right = (torch.autograd.grad(t.sum(), list(inputs.values())) for t in (y, wanted))
    torch.testing.assert_close(grads, right)


def test_autocast_around_the_backward_of_the_op_rounds_nothing() -> None:
    inputs = Case().inputs(torch.float32)
    y = ssd(**inputs)
    wanted = torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert all(map(torch.equal, grads, wanted))


def test_semiseparable_matrix_under_autocast() -> None:
    i = Case().inputs(torch.float32)
    wanted = semiseparable_matrix(i["dt"], i["A"], i["B"], i["C"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(semiseparable_matrix(i["dt"], i["A"], i["B"], i["C"]), wanted)


def test_a_second_backward_gives_the_same() -> None:
    inputs = Case().inputs(torch.float32)
    y = ssd(**inputs)
    first = torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert all(map(torch.equal, first, second))


def test_outputs_may_be_changed_in_place() -> None:
    inputs = Case().inputs(torch.float64)
    leaves = list(inputs.values())
    y, state = ssd(**inputs, return_final_state=True)
    wanted = torch.autograd.grad((2 * y).sum() + (3 * state).sum(), leaves)
    y, state = ssd(**inputs, return_final_state=True)
    y *= 2
    state *= 3
    torch.testing.assert_close(torch.autograd.grad(y.sum() + state.sum(), leaves), wanted)


def test_repeats_bit_for_bit() -> None:
    assert_repeats(run, Case(L=200, K=2), "cpu")


def test_runs_on_the_cpu_without_numba(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    from kernels import backend

    monkeypatch.setattr(backend, "has", lambda module: module != "numba")
    inputs = {n: t.detach() for n, t in Case().inputs(torch.float64).items()}
    torch.testing.assert_close(ssd(**inputs), ssd(**inputs, mode="recurrent"))
    assert not recwarn  # matrix products are no slow fallback


def test_flops_are_counted() -> None:
    inputs = Case(B=2, L=9, H=4, P=5, N=3, G=2).inputs(torch.float32)
    forward = 2 * 2 * 9 * (2 * CHUNK * 3 + 4 * CHUNK * 5 + 2 * 4 * 5 * 3)
    backward = 2 * 2 * 9 * (3 * 2 * CHUNK * 3 + 2 * 4 * CHUNK * 5 + 5 * 4 * 5 * 3)
    assert flops(lambda: ssd(**inputs)) == forward + backward
    case = Case(K=2, L=9, positions=12)
    with FlopCounterMode(display=False) as counter:
        ssd(**case.inputs(torch.float32), **case.options())
    assert counter.get_total_flops() == 2 * 2 * 12 * 2 * (CHUNK * 3 + 2 * CHUNK * 4 + 2 * 2 * 4 * 3)


X, DT, A, B = torch.zeros(2, 9, 4, 3), torch.zeros(2, 9, 4), -torch.ones(4), torch.zeros(2, 9, 1, 5)
ROUTED = {"dt": DT[:, :, None], "A": A[None], "B": B[:, :, None], "C": B[:, :, None], "route": torch.arange(9)[None]}
BAD = {
    "x rank": ({"x": X[0]}, r"x: got shape \(9, 4, 3\), wanted \(B, L, H, P\)"),
    "x per route": (ROUTED | {"x": X[:, :, None].expand(2, 9, 3, 4, 3)}, r"x: got shape .*wanted \(B, L, K, H, P\)"),
    "A matrix": ({"A": A[:, None]}, "A: got shape .*a state matrix needs selective_scan"),
    "A of a route": (ROUTED | {"A": A}, r"A: got shape \(4,\), wanted \(K, H\)"),
    "A size": ({"A": A[:3]}, r"A: got shape \(3,\), wanted \(H\) = \(4,\)"),
    "dt": ({"dt": DT[:, :8]}, "dt: got shape"),
    "B rank": ({"B": B[:, :, 0]}, "B: got shape"),
    "C other than B": ({"C": B[..., :4]}, r"C: got shape .*as B"),
    "groups": ({"B": B.expand(2, 9, 3, 5), "C": B.expand(2, 9, 3, 5)}, "B: got 3 groups for 4 heads, wanted a divisor"),
    "D": ({"D": torch.zeros(3)}, r"D: got shape \(3,\), wanted \(H\) or \(H, P\) = \(4,\)"),
    "wide D": ({"D": torch.zeros(4, 4)}, r"D: got shape \(4, 4\), wanted \(H, P\) or \(H\) = \(4, 3\)"),
    "z": ({"z": X[:1]}, "z: got shape"),
    "dt_bias": ({"dt_bias": torch.zeros(1, 4)}, "dt_bias: got shape"),
    "state": ({"initial_state": torch.zeros(2, 4, 5, 3)}, "initial_state: got shape"),
    "integers": ({"x": X.long()}, "x: got dtype torch.int64"),
    "complex": ({"A": A + 0j}, "A: got dtype torch.complex64"),
    "merge": ({"merge": "mean"}, "merge: got 'mean', wanted 'sum'"),
    "limits": ({"dt_limit": (1.0, 0.5)}, r"dt_limit: got \(1.0, 0.5\), wanted \(low, high\)"),
    "both packings": ({"seq_idx": torch.zeros(2, 9).long(), "cu_seqlens": torch.tensor([0, 9])}, "got both"),
    "no groups": ({"B": B[:, :, :0], "C": B[:, :, :0]}, "B: got 0 groups for 4 heads, wanted a divisor"),
    "bounds elsewhere": (
        {"cu_seqlens": torch.tensor([0, 9], device="meta")},
        "cu_seqlens: got device meta, wanted cpu",
    ),
    "numbers of floats": ({"seq_idx": torch.zeros(2, 9)}, "seq_idx: got dtype torch.float32, wanted int32"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 9])}, "B = 2, wanted"),
    "route with bounds": (ROUTED | {"cu_seqlens": torch.tensor([0, 9])}, "route"),
    "route value": (ROUTED | {"route": torch.tensor([[0, 9]])}, r"route: got values in \[0, 9\]"),
    "route twice": (ROUTED | {"route": torch.tensor([[3, 3]])}, "visited twice"),
    "mode": ({"mode": "dual"}, "mode: got 'dual', wanted one of chunked"),
    "mode and backend": ({"mode": "quadratic", "backend": "triton"}, "backend: got 'triton' together with mode"),
    "backend": ({"backend": "tritn"}, "did you mean 'triton'"),
    "cuda": ({"backend": "cuda"}, "no CUDA kernel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wanted(name: str) -> None:
    changes, message = BAD[name]
    assert_refuses(ssd, {"x": X, "dt": DT, "A": A, "B": B, "C": B} | changes, message)


BAD_MATRIX = {
    "dt rank": ({"dt": DT[0]}, r"dt, B: got shapes \(9, 4\)"),
    "A": ({"A": A[:3]}, "A: got shape"),
    "C": ({"C": B[:1]}, "C: got shape"),
    "B": ({"B": B[:, :8], "C": B[:, :8]}, "B: got shape"),
    "groups": ({"B": B.expand(2, 9, 3, 5), "C": B.expand(2, 9, 3, 5)}, "wanted a divisor of 4"),
}


@pytest.mark.parametrize("name", BAD_MATRIX)
def test_bad_matrix_says_what_is_wanted(name: str) -> None:
    changes, message = BAD_MATRIX[name]
    assert_refuses(semiseparable_matrix, {"dt": DT, "A": A, "B": B, "C": B} | changes, message)


BAD_COMPAT = {
    "chunk": ({"chunk_size": 0}, "chunk_size: got 0"),
    "state dtype": ({"state_dtype": torch.bfloat16}, "state_dtype: got torch.bfloat16"),
    "no bounds": ({"return_varlen_states": True}, "return_varlen_states: got it without cu_seqlens"),
    "states": (
        {"return_varlen_states": True, "cu_seqlens": torch.tensor([0, 9]), "initial_states": torch.zeros(1, 4, 3, 5)},
        "initial_states: got them together",
    ),
}


@pytest.mark.parametrize("name", BAD_COMPAT)
def test_adapter_refuses_what_it_does_not_do(name: str) -> None:
    changes, message = BAD_COMPAT[name]
    call = {"x": X, "dt": DT, "A": A, "B": B, "C": B, "chunk_size": 64}
    assert_refuses(compat.mamba_chunk_scan_combined, call | changes, message)


def test_adapter_returns_the_states_of_packed_sequences() -> None:
    i = {n: t.detach() for n, t in Case(B=1, L=30, state=False, without="z").inputs(torch.float64).items()}
    bounds = torch.tensor([0, 11, 30])
    numbers = torch.arange(2).repeat_interleave(bounds.diff())[None]
    y, final, states = compat.mamba_chunk_scan_combined(
        **i, chunk_size=16, dt_softplus=True, seq_idx=numbers, cu_seqlens=bounds, return_final_states=True,
        return_varlen_states=True,
    )  # fmt: skip
    for s, part in enumerate((slice(0, 11), slice(11, 30))):
        rows = {n: t[:, part] if n in ("x", "dt", "B", "C") else t for n, t in i.items()}
        alone, state = ssd(**rows, return_final_state=True)
        torch.testing.assert_close((y[:, part], states[s : s + 1]), (alone, state))
    assert torch.equal(final, states[-1:])
    plain = compat.mamba_chunk_scan_combined(**i, chunk_size=16, dt_softplus=True, seq_idx=numbers)
    torch.testing.assert_close(plain, y)
