"""What the selective scan promises as an operator: tracing, dtypes, devices, processes, counting, error messages."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import OpContract, assert_refuses, flops
from scan_cases import CASES, Case
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from kernels import selective_scan
from kernels.selective_scan.exactness import between_pieces, exact

BACKENDS = ["cpu", "torch"]


def arguments(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    """The arguments of the custom op, by position."""
    inputs, options = case.inputs(dtype), case.options()
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight")
    flags = (options["dt_softplus"], options["route_params"], options["merge"], options["reverse"])
    tensors = [inputs.get(n) for n in names]
    index = (options["route"], inputs.get("initial_state"), options["cu_seqlens"], options["seq_idx"])
    return (*tensors, *index, *flags, True, backend)


class Model(nn.Module):
    """A module that calls the custom op the way models do."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(2, 5, 3))
        self.dt_weight = nn.Parameter(torch.randn(2, 5, 2))
        self.D = nn.Parameter(torch.randn(2, 5))
        self.project = nn.Linear(5, 2 * 8)
        self.register_buffer("route", torch.stack([torch.arange(9), torch.arange(9).flip(0)]))

    def forward(self, x: Tensor) -> Tensor:
        dt, B, C = self.project(x).unflatten(-1, (2, 1, 8)).split([2, 3, 3], -1)
        y, state, _ = torch.ops.triscan.selective_scan(
            x, dt.squeeze(3), -torch.exp(self.A_log), B, C, self.D, x, None, self.dt_weight, self.route,
            None, None, None, True, True, "sum", False, True, "auto",
        )  # fmt: skip
        return y + state.sum()


class Plain(nn.Module):
    """A module on the backend of plain operators."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.inputs = {n: t.detach() for n, t in case.inputs(torch.float32).items()}
        self.options = case.options()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.inputs | {"x": x}
        return selective_scan(**inputs, **self.options, return_final_state=True, backend="torch")


class TestContract(OpContract):
    Model, channels, dynamic = Model, 5, 0

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        return selective_scan(x, x, -torch.exp(model.A_log[0]), x[..., None, :3], x[..., None, 2:], model.D[0])


@pytest.mark.parametrize("name", ["all", "plain", "bounds", "packed", "complex", "route_inputs_keep", "constant"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(name: str, backend: str) -> None:
    if name == "complex":  # the generic check of the traced backward can't compare complex gradients
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.triscan.selective_scan, arguments(CASES[name], backend), test_utils=tests)
    else:
        torch.library.opcheck(torch.ops.triscan.selective_scan, arguments(CASES[name], backend))


@pytest.mark.parametrize("name", ["all", "route_padded"])
def test_opcheck_of_the_backward(name: str) -> None:
    values = arguments(CASES[name], "cpu")
    y, state, saved = torch.ops.triscan.selective_scan(*values)
    *flags, _, backend = values[13:]
    inputs = [t.detach() if isinstance(t, Tensor) else t for t in values[:13]]
    grads = (torch.randn_like(y), torch.randn_like(state), saved, *inputs, *flags, backend)
    torch.library.opcheck(torch.ops.triscan.selective_scan_backward, grads)


@pytest.mark.parametrize("name", ["all", "route_padded", "complex", "packed"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_plain_backends_behind_the_op_equal_the_function(name: str, backend: str) -> None:
    case = CASES[name]
    values = arguments(case, backend, torch.float64)
    inputs = dict(zip(("x", "dt", "A", "B", "C", "D", "z", "dt_bias"), values[:8], strict=True))
    inputs["initial_state"] = values[10]
    y, state, _ = torch.ops.triscan.selective_scan(*values)
    wanted = selective_scan(**inputs, **case.options(), return_final_state=True, backend=backend)
    torch.testing.assert_close((y, state), wanted)
    leaves = list(inputs.values())
    loss, wanted_loss = (a.square().sum() + b.abs().square().sum() for a, b in ((y, state), wanted))
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted_loss, leaves))


PLAIN = {
    "two_chunks": Case(),
    "reverse": Case(L=20, reverse=True),
    "route": Case(K=2, L=20, positions=25),
    "packed": Case(L=20, packed=True),
    "complex": Case(L=20, is_complex=True),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "packed" else n for n in PLAIN])
def test_plain_operators_compile(name: str) -> None:
    plain = Plain(PLAIN[name])
    x = plain.inputs["x"].clone().requires_grad_()
    wanted, end = plain(x)
    y, state = torch.compile(plain, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close((y, state), (wanted, end))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), x))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_operators_export(name: str) -> None:
    plain = Plain(PLAIN[name])
    x = plain.inputs["x"]
    program = torch.export.export(plain, (x,))
    assert not [n.target for n in program.graph.nodes if "triscan" in str(n.target)]
    torch.testing.assert_close(program.module()(x + 1), plain(x + 1))


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch.onnx needs onnx and onnxscript")
def test_plain_operators_export_to_onnx(tmp_path: Path) -> None:
    plain = Plain(Case(L=20))
    torch.onnx.export(plain, (plain.inputs["x"],), tmp_path / "scan.onnx", dynamo=True)
    assert (tmp_path / "scan.onnx").stat().st_size > 0


def test_autocast_keeps_the_state_in_float32() -> None:
    inputs = Case().inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inputs["x"] = F.linear(inputs["x"], torch.randn(5, 5))
        y, state = selective_scan(**inputs, return_final_state=True)
        assert Model()(torch.randn(2, 9, 5)).dtype == torch.float32
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    (grad,) = torch.autograd.grad(y.float().sum(), inputs["A"])
    assert grad.dtype == torch.float32


def test_a_second_backward_gives_the_same() -> None:
    inputs = Case().inputs(torch.float32)
    y = selective_scan(**inputs, backend="cpu")
    first = torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert all(map(torch.equal, first, second))


def test_repeats_bit_for_bit() -> None:
    inputs = {n: t.detach() for n, t in Case(L=200, D=100, K=2).inputs(torch.float32).items()}
    route = Case(L=200, D=100, K=2).options()["route"]
    outputs = [selective_scan(**inputs, route=route, backend="cpu") for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(outputs))


class Scans(Dataset[Tensor]):
    """Scans in a data-loader worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        inputs = {n: t.detach() for n, t in Case(L=300, D=100).inputs(torch.float32).items()}
        return selective_scan(**inputs, backend="cpu")


def test_survives_a_fork_after_a_parallel_call() -> None:
    wanted = Scans()[0]
    loader = DataLoader(Scans(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    for y in loader:
        assert torch.equal(y, wanted)


def test_flops_are_counted() -> None:
    inputs = Case(B=2, L=9, D=5, N=3).inputs(torch.float32)
    forward = 7 * 2 * 9 * 5 * 3
    assert flops(lambda: selective_scan(**inputs)) == 4 * forward
    case = Case(K=2, L=9, positions=12, rank=4)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**case.inputs(torch.float32), **case.options())
    assert counter.get_total_flops() == 2 * 12 * 2 * 5 * (7 * 3 + 2 * 4)


X, A = torch.zeros(2, 9, 4), -torch.ones(4, 3)
B = torch.zeros(2, 9, 1, 3)
ROUTED = {"dt": X[:, :, None], "A": A[None], "B": B[:, :, None], "C": B[:, :, None], "route": torch.arange(9)[None]}
BAD = {
    "x of two axes": ({"x": X[0]}, r"x: got shape \(9, 4\), wanted \(B, L, D\)"),
    "x with routes but no route": ({"x": X[:, :, None]}, "needs a route"),
    "dt": ({"dt": X[:, :8]}, r"dt: got shape \(2, 8, 4\), wanted .* = \(2, 9, 4\)"),
    "A of one axis": ({"A": A[0]}, r"A: got shape \(3,\), wanted \(D, N\)"),
    "A of other channels": ({"A": A[:3]}, r"A: got shape \(3, 3\)"),
    "B without groups": ({"B": B[0, 0]}, "B: got shape"),
    "groups": ({"B": B.expand(2, 9, 3, 3), "C": B.expand(2, 9, 3, 3)}, "B: got 3 groups for 4 channels"),
    "no groups": ({"B": B[:, :, :0], "C": B[:, :, :0]}, "B: got 0 groups for 4 channels, wanted a divisor"),
    "groups that differ": ({"C": B.expand(2, 9, 2, 3)}, "C: got 2 groups, wanted 1"),
    "D": ({"D": torch.zeros(3)}, r"D: got shape \(3,\), wanted \(D\) = \(4,\)"),
    "z": ({"z": X[:1]}, "z: got shape"),
    "dt_bias": ({"dt_bias": torch.zeros(1, 4)}, "dt_bias: got shape"),
    "dt_weight": ({"dt_weight": torch.zeros(4, 2)}, "dt: got shape"),
    "state": ({"initial_state": torch.zeros(2, 3, 4)}, "initial_state: got shape"),
    "integers": ({"x": X.long()}, "x: got dtype torch.int64"),
    "complex x": ({"x": X + 0j}, "x: got dtype torch.complex64"),
    "complex A only": ({"A": A + 0j}, "B: got dtype torch.float32, wanted a complex one"),
    "complex B only": ({"B": B + 0j}, "B: got dtype torch.complex64, wanted a real floating-point one"),
    "merge": ({"merge": "mean"}, "merge: got 'mean', wanted 'sum'"),
    "both packings": ({"seq_idx": torch.zeros(2, 9).long(), "cu_seqlens": torch.tensor([0, 9])}, "got both"),
    "bounds of floats": ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens: got dtype torch.float32, wanted int32"),
    "bounds elsewhere": (
        {"cu_seqlens": torch.tensor([0, 9], device="meta")},
        "cu_seqlens: got device meta, wanted cpu",
    ),
    "numbers of floats": ({"seq_idx": torch.zeros(2, 9)}, "seq_idx: got dtype torch.float32, wanted int32"),
    "numbers elsewhere": ({"seq_idx": torch.zeros(2, 9, device="meta").int()}, "seq_idx: got device meta, wanted cpu"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 9])}, "B = 2, wanted"),
    "route with bounds": (ROUTED | {"cu_seqlens": torch.tensor([0, 9])}, "route"),
    "route of one axis": (ROUTED | {"route": torch.arange(9)}, r"route: got shape \(9,\), wanted \(K, P\)"),
    "route value": (ROUTED | {"route": torch.tensor([[0, 9]])}, r"route: got values in \[0, 9\]"),
    "route twice": (ROUTED | {"route": torch.tensor([[3, 3]])}, "visited twice"),
    "route dtype": (ROUTED | {"route": torch.zeros(1, 9)}, "route: got dtype torch.float32"),
    "route too long": (
        ROUTED | {"route": torch.full((1, 12), -1), "route_params": False},
        "route: got 12 positions, wanted at most L = 9",
    ),
    "backend": ({"backend": "tritn"}, "did you mean 'triton'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wanted(name: str) -> None:
    changes, message = BAD[name]
    assert_refuses(selective_scan, {"x": X, "dt": X, "A": A, "B": B, "C": B} | changes, message)


def test_states_between_pieces_need_no_exact_exponentials() -> None:
    assert exact(True)
    assert not exact(False)
    with between_pieces():
        assert not exact(True)
    assert exact(True)


@pytest.mark.gpu
def test_states_between_pieces_on_a_gpu() -> None:
    """Close to the exact ones, not the same bits: the kernel is another one; both give the same y."""
    torch.manual_seed(0)
    x, dt = (torch.randn(1, 500, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    A, B, C = -torch.rand(32, 8, device="cuda"), *(torch.randn(1, 500, 1, 8, device="cuda").bfloat16() for _ in "BC")

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.triscan.selective_scan(
            x, dt, A, B, C, None, None, None, None, None, None, None, None, True, True, "sum", False, True, "auto"
        )[:2]

    (y, state), again = run(), run()
    with between_pieces():
        rough_y, rough = run()
    assert torch.equal(state, again[1])
    assert not torch.equal(state, rough)
    torch.testing.assert_close(rough, state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rough_y, y, rtol=1e-2, atol=1e-2)
