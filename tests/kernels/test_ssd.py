"""``ssd``: the reference against the formula, every mode and backend against the reference, the op's laws."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_rms
from cases import golden_cases, golden_inputs
from fill import check, fill_input
from hypothesis import given, settings
from hypothesis import strategies as st
from ssd_cases import CASES, ROUNDED, ROWS, Case, compare, run
from torch import Tensor

from kernels import compat, selective_scan, ssd
from kernels.ssd import semiseparable_matrix
from kernels.ssd.aten import CHUNK

BACKENDS = ["cpu", "torch"]
MODES = {
    "cpu": {"backend": "cpu"},
    "torch": {"backend": "torch"},
    "quadratic": {"mode": "quadratic", "backend": "auto"},
}
GOLDEN = golden_cases("op_ssd_a")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an element that nobody wrote shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    @torch.no_grad()
    def poison(t: Tensor) -> Tensor:
        return t.fill_(math.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


def detached(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in case.inputs(dtype).items()}


def by_hand(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """Equation 2 of Dao & Gu 2024, one number at a time, for one group and no state."""
    y = torch.zeros_like(x)
    for b, t, h, p in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        total = D[h] * x[b, t, h, p]
        for n in range(B.shape[3]):
            state = 0.0
            for s in range(t + 1):
                step = math.log1p(math.exp(dt[b, s, h] + dt_bias[h]))
                state = math.exp(step * A[h]) * state + step * B[b, s, 0, n] * x[b, s, h, p]
            total = total + C[b, t, 0, n] * state
        y[b, t, h, p] = total * z[b, t, h, p] / (1 + math.exp(-z[b, t, h, p]))
    return y


@pytest.mark.parametrize("mode", ["chunked", "recurrent", "quadratic"])
def test_is_the_formula(mode: str) -> None:
    inputs = detached(Case(B=1, L=6, P=2, state=False))
    torch.testing.assert_close(ssd(**inputs, mode=mode), by_hand(**inputs))


@pytest.mark.parametrize("way", MODES)
@pytest.mark.parametrize("name", CASES)
def test_float64(name: str, way: str) -> None:
    got, wanted = run(CASES[name], torch.float64, **MODES[way]), run(CASES[name], torch.float64, "reference")
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ROUNDED)
def test_as_accurate_as_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    compare(CASES[name], dtype, backend)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_combination(data: st.DataObject) -> None:
    K = data.draw(st.integers(0, 3), "K")
    G = data.draw(st.sampled_from([1, 2]), "G")
    case = Case(
        B=data.draw(st.integers(1, 3), "B"),
        L=data.draw(st.integers(1, 70), "L"),
        H=G * data.draw(st.integers(1, 3), "H / G"),
        P=data.draw(st.integers(1, 9), "P"),
        N=data.draw(st.integers(1, 9), "N"),
        G=G,
        K=K,
        positions=data.draw(st.integers(1, 90), "T") if K else 0,
        without=data.draw(st.sampled_from(["", "D", "z", "dt_bias", "D z"]), "without"),
        wide_d=data.draw(st.booleans(), "D per channel"),
        per_route=bool(K) and data.draw(st.booleans(), "x per route"),
        state=data.draw(st.booleans(), "state"),
        dt_limit=data.draw(st.sampled_from([(0.0, math.inf), (0.1, 0.3)]), "limits"),
        merge=data.draw(st.sampled_from(["sum", "keep"]), "merge"),
        reverse=data.draw(st.booleans(), "reverse"),
        packed=data.draw(st.booleans(), "packed"),
    )
    wanted = run(case, torch.float64, "reference")
    for way in MODES.values():
        got = run(case, torch.float64, **way)
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["all", "bounds", "packed", "route_padded", "groups", "limits"])
def test_gradcheck(name: str) -> None:
    case = CASES[name].small()
    inputs = case.inputs(torch.float64)

    def function(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return ssd(**named, **case.options(), return_final_state=True, backend="cpu")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("mode", ["chunked", "quadratic"])
def test_gradients_of_gradients_of_plain_operators(mode: str) -> None:
    inputs = Case(L=3, P=2, N=2).inputs(torch.float64)

    def function(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return ssd(**dict(zip(inputs, tensors, strict=True)), mode=mode, backend="torch")

    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    case = GOLDEN[name]
    inputs = {n: t.requires_grad_(t.is_floating_point()) for n, t in golden_inputs(case).items()}
    y, state = compat.mamba_chunk_scan_combined(**inputs, **case["config"], return_final_states=True)
    check(y, case["outputs"]["y"])
    check(state, case["outputs"]["final_states"])
    loss = (y * fill_input("loss_weight", y.shape)).sum()
    if "final_states" in case["loss"]:
        loss = loss + (state * fill_input("loss_weight_state", state.shape)).sum()
    for n, grad in zip(case["grads"], torch.autograd.grad(loss, [inputs[n] for n in case["grads"]]), strict=True):
        check(grad, case["grads"][n])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, 130), max_size=3))
def test_pieces_equal_the_whole(backend: str, reverse: bool, cuts: list[int]) -> None:
    inputs = Case(L=130).inputs(torch.float64)
    state = inputs.pop("initial_state")
    options = {"reverse": reverse, "return_final_state": True, "backend": backend}
    whole, end = ssd(**inputs, initial_state=state, **options)
    pieces: list[Tensor] = []
    h: Tensor = state
    spans = list(pairwise([0, *sorted(cuts), 130]))
    for start, stop in reversed(spans) if reverse else spans:
        part = {n: t[:, start:stop] if n in ROWS else t for n, t in inputs.items()}
        y, h = ssd(**part, initial_state=h, **options)
        pieces.append(y)
    y = torch.cat(pieces[::-1] if reverse else pieces, 1)
    torch.testing.assert_close((y, h), (whole, end))
    leaves = [*inputs.values(), state]
    wanted = torch.autograd.grad(whole.sin().sum() + end.sin().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum() + h.sin().sum(), leaves), wanted)


def test_one_token_at_a_time() -> None:
    inputs = detached(Case(L=CHUNK + 3))
    h = inputs.pop("initial_state")
    whole, end = ssd(**inputs, initial_state=h, return_final_state=True)
    for t in range(CHUNK + 3):
        step = {n: v[:, t : t + 1] if n in ROWS else v for n, v in inputs.items()}
        y, h = ssd(**step, initial_state=h, return_final_state=True)
        torch.testing.assert_close(y[:, 0], whole[:, t])
    torch.testing.assert_close(h, end)


def test_is_the_selective_scan_with_one_decay_a_head() -> None:
    i = detached(Case(H=4, P=3, G=2))
    channels = {n: i[n].repeat_interleave(3, -1) for n in ("dt", "A", "D", "dt_bias")}
    channels |= {n: i[n].flatten(2) for n in ("x", "z")} | {"B": i["B"], "C": i["C"]}
    channels["A"] = channels["A"][:, None].expand(-1, 3)
    y, state = selective_scan(**channels, initial_state=i["initial_state"].flatten(1, 2), return_final_state=True)
    got, end = ssd(**i, return_final_state=True)
    torch.testing.assert_close((got.flatten(2), end.flatten(1, 2)), (y, state))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_sequences_equal_separate_ones(backend: str, reverse: bool) -> None:
    case = CASES["bounds"]
    inputs = detached(case)
    state = inputs.pop("initial_state")
    options = {"reverse": reverse, "return_final_state": True, "backend": backend}
    bounds = torch.tensor(case.bounds)
    y, end = ssd(**inputs, initial_state=state, cu_seqlens=bounds, **options)
    numbers = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())[None]
    by_number = ssd(**inputs, seq_idx=numbers, reverse=reverse, backend=backend)
    for s, (start, stop) in enumerate(pairwise(case.bounds)):
        part = {n: t[:, start:stop] if n in ROWS else t for n, t in inputs.items()}
        alone, alone_end = ssd(**part, initial_state=state[s : s + 1], **options)
        torch.testing.assert_close((y[:, start:stop], end[s : s + 1]), (alone, alone_end))
        fresh = ssd(**part, reverse=reverse, backend=backend)
        torch.testing.assert_close(by_number[:, start:stop], fresh)


def test_padding_tokens_count_for_nothing_even_when_they_are_nan() -> None:
    inputs = {n: t.detach().requires_grad_() for n, t in Case(B=1).inputs(torch.float64).items()}
    keep = torch.tensor([t for t in range(100) if t % 10 not in (3, 4, 9)])
    rest = torch.tensor([t for t in range(100) if t not in keep])
    seq_idx = torch.full((1, 100), -1).index_fill(1, keep, 0)
    padded = {
        n: t.new_full((1, 100, *t.shape[2:]), math.nan).index_copy(1, keep, t.detach()) if n in ROWS else t.detach()
        for n, t in inputs.items()
    }
    padded = {n: t.clone().requires_grad_() for n, t in padded.items()}
    wanted, end = ssd(**inputs, return_final_state=True)
    y, padded_end = ssd(**padded, seq_idx=seq_idx, return_final_state=True)
    torch.testing.assert_close((y[:, keep], padded_end), (wanted, end))
    assert (y[:, rest] == 0).all()
    grads = torch.autograd.grad(y.sum() + padded_end.sum(), list(padded.values()))
    right = torch.autograd.grad(wanted.sum() + end.sum(), list(inputs.values()))
    for name, grad, truth in zip(padded, grads, right, strict=True):
        if name in ROWS:
            assert (grad[:, rest] == 0).all(), name
            grad = grad[:, keep]
        torch.testing.assert_close(grad, truth, msg=lambda m, name=name: f"{name}: {m}")


def test_a_route_is_a_scan_of_the_tokens_in_its_order() -> None:
    inputs = detached(Case(K=2, L=50, state=False))
    route = torch.stack([torch.arange(50), torch.randperm(50)])
    kept = ssd(**inputs, route=route, merge="keep")
    for k in range(2):
        alone = {n: inputs[n][k] for n in ("A", "D", "dt_bias")}
        alone |= {n: inputs[n][:, route[k], k] for n in ("dt", "B", "C")}
        alone |= {n: inputs[n][:, route[k]] for n in ("x", "z")}
        torch.testing.assert_close(kept[:, route[k], k], ssd(**alone, mode="recurrent"))
    torch.testing.assert_close(ssd(**inputs, route=route), kept.sum(2))


@pytest.mark.parametrize("way", [*MODES.values(), {"backend": "reference"}], ids=[*MODES, "reference"])
@pytest.mark.parametrize("merge", ["sum", "keep"])
def test_tokens_on_no_route_are_never_read(merge: str, way: dict[str, str]) -> None:
    inputs = detached(Case(B=1, K=2, L=20))
    options = {"route": torch.tensor([[0, -1, 5, 7, -1, 2], [19, 5, -1, -1, 0, 2]]), "merge": merge, **way}
    wanted = ssd(**inputs, **options)
    rest = [t for t in range(20) if t not in (0, 2, 5, 7, 19)]
    for name in ROWS:
        inputs[name] = inputs[name].index_fill(1, torch.tensor(rest), math.nan).requires_grad_()
    y = ssd(**inputs, **options)
    assert torch.equal(y, wanted)
    assert (y[:, rest] == 0).all()
    for name, grad in zip(ROWS, torch.autograd.grad(y.sum(), [inputs[n] for n in ROWS]), strict=True):
        assert grad.isfinite().all(), name
        assert (grad[:, rest] == 0).all(), name


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_dtypes_may_be_mixed(backend: str) -> None:
    inputs = Case().inputs(torch.float32)
    inputs["x"] = inputs["x"].detach().bfloat16().requires_grad_()
    inputs["D"] = inputs["D"].detach().double().requires_grad_()
    y, state = ssd(**inputs, return_final_state=True, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(y.float().sum(), list(inputs.values()))
    assert [g.dtype for g in grads] == [t.dtype for t in inputs.values()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_in_the_loss(backend: str) -> None:
    inputs = Case().inputs(torch.float64)
    y, state = ssd(**inputs, return_final_state=True, backend=backend)
    wanted_y, wanted_state = ssd(**inputs, return_final_state=True, backend="reference")
    leaves = list(inputs.values())
    for loss, wanted in ((y.sum(), wanted_y.sum()), (state.sum(), wanted_state.sum())):
        got = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        right = torch.autograd.grad(wanted, leaves, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(got, right)


def test_strong_and_weak_decays_in_one_chunk() -> None:
    """No decay is the quotient of two that underflow, no exponent a difference of two large ones."""
    case = Case(B=1, L=64, without="z", dt_softplus=False)
    dt = torch.where(torch.arange(64) % 2 == 0, 300.0, 0.003)[None, :, None].expand(1, 64, 2)
    inputs = {n: t.detach().requires_grad_() for n, t in (case.inputs(torch.float32) | {"dt": dt}).items()}
    compare(case, torch.float32, "cpu", inputs=inputs)


def test_matrix_is_that_of_the_op() -> None:
    i = detached(Case(H=4, G=2, L=20, state=False, without="D z"))
    M = semiseparable_matrix(*(i[n] for n in ("dt", "A", "B", "C", "dt_bias")), dt_limit=(0.1, 0.5))
    y = torch.einsum("bhij,bjhp->bihp", M, i["x"])
    torch.testing.assert_close(ssd(**i, dt_limit=(0.1, 0.5), mode="recurrent"), y)
    assert (M.triu(1) == 0).all()
    for rank in (torch.linalg.matrix_rank(M[..., t:, : t + 1]) for t in range(20)):
        assert (rank <= 3).all()  # every block below the diagonal has rank N at most: the definition of semiseparable


def test_decay_one_is_causal_linear_attention() -> None:
    i = detached(Case(H=2, G=2, state=False, without="D z dt_bias"))
    queries, keys, values = i["C"], i["B"], i["x"]
    scores = torch.einsum("bihn,bjhn->bhij", queries, keys).tril()
    wanted = torch.einsum("bhij,bjhp->bihp", scores, values)
    got = ssd(values, torch.ones_like(i["dt"]), torch.zeros(2).double(), keys, queries, dt_softplus=False)
    torch.testing.assert_close(got, wanted)


def test_fixed_decay_is_retention() -> None:
    """Sun et al. 2023, equation 5: D_nm = gamma^(n - m), one gamma a head."""
    i = detached(Case(H=2, G=2, state=False, without="D z dt_bias"))
    gamma = 1 - 2.0 ** -torch.arange(5.0, 7.0, dtype=torch.float64)
    distance = torch.arange(70)[:, None] - torch.arange(70)
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance, 0)
    scores = torch.einsum("bihn,bjhn->bhij", i["C"], i["B"]) * decay
    wanted = torch.einsum("bhij,bjhp->bihp", scores, i["x"])
    got = ssd(i["x"], torch.ones_like(i["dt"]), gamma.log(), i["B"], i["C"], dt_softplus=False)
    torch.testing.assert_close(got, wanted)


def test_structured_mask_is_a_product_of_decays() -> None:
    """Dao & Gu 2024, definition 4.2: masked attention with L_ij = a_i ... a_{j+1}, keys scaled by dt."""
    i = detached(Case(B=1, L=12, H=1, state=False, without="D z dt_bias"))
    dt = F.softplus(i["dt"])[0, :, 0]
    a = torch.exp(dt * i["A"])
    L = torch.stack([torch.stack([a[c + 1 : r + 1].prod() * (r >= c) for c in range(12)]) for r in range(12)])
    wanted = (L * (i["C"][0, :, 0] @ (dt[:, None] * i["B"][0, :, 0]).t())) @ i["x"][0, :, 0]
    torch.testing.assert_close(ssd(**i)[0, :, 0], wanted)


def test_memory_is_bounded() -> None:
    """The CPU path on 2048 tokens never holds what a (B, H, L, L) matrix takes; the quadratic mode does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    inputs = detached(Case(B=1, L=2048, H=2, P=4, N=4, state=False), torch.float32)
    with Largest() as chunked:
        ssd(**inputs, backend="torch")
    with Largest() as quadratic:
        ssd(**inputs, mode="quadratic")
    assert quadratic.elements >= 2 * 2048 * 2048
    assert chunked.elements <= 2 * 2048 * 16
    assert relative_rms(ssd(**inputs), ssd(**inputs, mode="recurrent")) < 1e-6
