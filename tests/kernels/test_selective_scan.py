"""The selective scan: the reference against the formula, every CPU backend against the reference, the scan's laws."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import CASES, Case, compare, run
from torch import Tensor

from kernels import selective_scan

BACKENDS = ["cpu", "torch"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an element that nobody wrote shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    @torch.no_grad()
    def poison(t: Tensor) -> Tensor:
        return t.fill_(math.nan) if t.is_floating_point() or t.is_complex() else t

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


def assert_same(got: Tensor, wanted: Tensor, backend: str) -> None:
    """Bit for bit; nearly so for plain operators, whose last bits depend on the memory's layout."""
    if backend == "cpu":
        assert torch.equal(got, wanted)
    else:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def by_hand(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """Algorithm 2 of Gu & Dao 2023, one number at a time, for one group and no state."""
    y = torch.zeros_like(x)
    for b, t, d in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        total = D[d] * x[b, t, d]
        for n in range(A.shape[1]):
            h = 0.0
            for s in range(t + 1):
                step = math.log1p(math.exp(dt[b, s, d] + dt_bias[d]))
                h = math.exp(step * A[d, n]) * h + step * B[b, s, 0, n] * x[b, s, d]
            total = total + C[b, t, 0, n] * h
        y[b, t, d] = total * z[b, t, d] / (1 + math.exp(-z[b, t, d]))
    return y


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_is_the_formula(backend: str) -> None:
    inputs = {n: t.detach() for n, t in Case(L=6, D=2, state=False).inputs(torch.float64).items()}
    torch.testing.assert_close(selective_scan(**inputs, backend=backend), by_hand(**inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_float64(name: str, backend: str) -> None:
    got, wanted = run(CASES[name], torch.float64, backend), run(CASES[name], torch.float64, "reference")
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["two_chunks", "reverse", "complex", "bounds", "packed", "route_padded", "route_keep"])
def test_as_accurate_as_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    compare(CASES[name], dtype, backend)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_combination(data: st.DataObject) -> None:
    K = data.draw(st.integers(0, 3), "K")
    G = data.draw(st.sampled_from([1, 2]), "G")
    case = Case(
        B=data.draw(st.integers(1, 3), "B"),
        L=data.draw(st.integers(1, 70), "L"),
        D=G * data.draw(st.integers(1, 20), "D / G"),
        N=data.draw(st.integers(1, 5), "N"),
        G=G,
        K=K,
        positions=data.draw(st.integers(1, 90), "P") if K else 0,
        rank=data.draw(st.integers(0, 3), "rank"),
        constant=data.draw(st.sampled_from(["", "B", "C", "BC"]), "constant"),
        without=data.draw(st.sampled_from(["", "D", "z", "dt_bias", "D z"]), "without"),
        is_complex=data.draw(st.booleans(), "complex"),
        per_route=bool(K) and data.draw(st.booleans(), "x per route"),
        state=data.draw(st.booleans(), "state"),
        merge=data.draw(st.sampled_from(["sum", "keep"]), "merge"),
        reverse=data.draw(st.booleans(), "reverse"),
        packed=data.draw(st.booleans(), "packed"),
    )
    wanted = run(case, torch.float64, "reference")
    for backend in BACKENDS:
        got = run(case, torch.float64, backend)
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["all", "complex", "bounds", "packed", "route_padded", "constant"])
def test_gradcheck_of_the_kernels(name: str) -> None:
    case = Case(**{**CASES[name].__dict__, "L": 6, "D": 2, "positions": 8 * (CASES[name].K > 0)})
    if case.bounds:
        case = Case(**{**case.__dict__, "bounds": (0, 2, 2, 6)})
    inputs = case.inputs(torch.float64)

    def function(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, **case.options(), return_final_state=True, backend="cpu")  # type: ignore

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


def test_gradients_of_gradients_of_plain_operators() -> None:
    inputs = Case(L=3, D=2, N=2).inputs(torch.float64)

    def function(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), backend="torch")

    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 130), max_size=3))
def test_pieces_equal_the_whole(backend: str, reverse: bool, cuts: list[int]) -> None:
    inputs = Case(L=130).inputs(torch.float64)
    state = inputs.pop("initial_state")
    options = {"reverse": reverse, "return_final_state": True, "backend": backend}
    whole, end = selective_scan(**inputs, initial_state=state, **options)
    pieces: list[Tensor] = []
    h: Tensor = state
    spans = list(pairwise([0, *sorted(cuts), 130]))
    for start, stop in reversed(spans) if reverse else spans:
        part = {n: t[:, start:stop] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
        y, h = selective_scan(**part, initial_state=h, **options)
        pieces.append(y)
    y = torch.cat(pieces[::-1] if reverse else pieces, 1)
    torch.testing.assert_close((y, h), (whole, end))
    leaves = [*inputs.values(), state]
    wanted = torch.autograd.grad(whole.sin().sum() + end.sin().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum() + h.sin().sum(), leaves), wanted)


def test_one_step_at_a_time() -> None:
    inputs = {n: t.detach() for n, t in Case(L=70, D=33, N=16).inputs(torch.float32).items()}
    h = inputs.pop("initial_state")
    whole, end = selective_scan(**inputs, initial_state=h, return_final_state=True, backend="cpu")
    for t in range(70):
        step = {n: v[:, t : t + 1] if n in ("x", "dt", "B", "C", "z") else v for n, v in inputs.items()}
        y, h = selective_scan(**step, initial_state=h, return_final_state=True, backend="cpu")
        assert torch.equal(y[:, 0], whole[:, t]), t
    assert torch.equal(h, end)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_changes_no_bit_of_the_past(backend: str) -> None:
    inputs = {n: t.detach() for n, t in Case(L=130).inputs(torch.float32).items()}
    before = selective_scan(**inputs, backend=backend)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 77:] += 1
    assert_same(selective_scan(**inputs, backend=backend)[:, :77], before[:, :77], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_is_the_flip_of_the_flip(backend: str) -> None:
    inputs = {n: t.detach() for n, t in Case(L=130).inputs(torch.float32).items()}
    flipped = {n: t.flip(1) if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
    y, h = selective_scan(**inputs, reverse=True, return_final_state=True, backend=backend)
    wanted, end = selective_scan(**flipped, return_final_state=True, backend=backend)
    assert_same(y, wanted.flip(1), backend)
    assert_same(h, end, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_sequences_equal_separate_ones(backend: str, reverse: bool) -> None:
    case = CASES["bounds"]
    inputs = {n: t.detach() for n, t in case.inputs(torch.float32).items()}
    state = inputs.pop("initial_state")
    options = {"reverse": reverse, "return_final_state": True, "backend": backend}
    bounds = torch.tensor(case.bounds)
    y, end = selective_scan(**inputs, initial_state=state, cu_seqlens=bounds, **options)
    numbers = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())[None]
    by_number = selective_scan(**inputs, seq_idx=numbers, reverse=reverse, backend=backend)
    for s, (start, stop) in enumerate(pairwise(case.bounds)):
        part = {n: t[:, start:stop] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
        alone, alone_end = selective_scan(**part, initial_state=state[s : s + 1], **options)
        assert_same(y[:, start:stop], alone, backend)
        assert_same(end[s : s + 1], alone_end, backend)
        fresh = selective_scan(**part, reverse=reverse, backend=backend)
        torch.testing.assert_close(by_number[:, start:stop], fresh)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_padding_tokens_count_for_nothing_even_when_they_are_nan(backend: str) -> None:
    case = Case(B=1, L=70, D=20)
    inputs = {n: t.detach() for n, t in case.inputs(torch.float32).items()}
    keep = torch.tensor([t for t in range(100) if t % 10 not in (3, 4, 9)])
    seq_idx = torch.full((1, 100), -1).index_fill(1, keep, 0)
    leaves, padded = {}, {}
    for name, t in inputs.items():
        wide = name in ("x", "dt", "B", "C", "z")
        leaves[name] = t.clone().requires_grad_()
        padded[name] = t.new_full((1, 100, *t.shape[2:]), math.nan).index_copy(1, keep, t) if wide else t.clone()
        padded[name].requires_grad_()
    wanted, end = selective_scan(**leaves, return_final_state=True, backend=backend)
    y, padded_end = selective_scan(**padded, seq_idx=seq_idx, return_final_state=True, backend=backend)
    torch.testing.assert_close((y[:, keep], padded_end), (wanted, end))
    rest = torch.tensor([t for t in range(100) if t not in keep])
    assert (y[:, rest] == 0).all()
    grads = torch.autograd.grad(y.sum() + padded_end.sum(), list(padded.values()))
    right = torch.autograd.grad(wanted.sum() + end.sum(), list(leaves.values()))
    for name, grad, truth in zip(padded, grads, right, strict=True):
        if name in ("x", "dt", "B", "C", "z"):
            assert (grad[:, rest] == 0).all(), name
            grad = grad[:, keep]
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("case", [Case(rank=2), Case(K=2, rank=2), Case(K=2, rank=2, positions=40, route_params=False)])
def test_padding_reaches_no_weight_of_a_low_rank_dt(case: Case, backend: str) -> None:
    inputs, options = case.inputs(torch.float64), case.options()
    seq_idx = torch.zeros(case.B, case.L, dtype=torch.int32)
    seq_idx[0, 5:9] = seq_idx[1, 60:] = -1
    options["seq_idx"] = seq_idx
    skipped = seq_idx < 0
    if not case.route_params:  # a row of dt goes with the token at its scan position
        skipped = F.pad(skipped[:, options["route"]], (0, case.L - case.positions), value=True).transpose(1, 2)
    grads = []
    for value in (1.0, math.nan):
        dt = torch.where(
            skipped.reshape(*skipped.shape, *[1] * (inputs["dt"].ndim - skipped.ndim)), value, inputs["dt"]
        )
        y, end = selective_scan(**(inputs | {"dt": dt}), **options, return_final_state=True, backend=backend)
        grads.append(torch.autograd.grad(y.square().sum() + end.sum(), list(inputs.values())))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_route_of_nothing_but_slots_only_decays(packed: bool, backend: str) -> None:
    inputs = Case(K=2, L=0).inputs(torch.float64)
    seq_idx = torch.zeros(2, 0, dtype=torch.int64) if packed else None
    y, end = selective_scan(
        **inputs, route=torch.full((2, 3), -1), seq_idx=seq_idx, return_final_state=True, backend=backend
    )
    decay = torch.exp(3 * F.softplus(inputs["dt_bias"])[..., None] * inputs["A"])
    assert y.shape == (2, 0, 5)
    torch.testing.assert_close(end, decay * inputs["initial_state"])
    grads = torch.autograd.grad(end.sum(), [inputs[n] for n in ("A", "dt_bias", "initial_state")])
    wanted = torch.autograd.grad(
        (decay * inputs["initial_state"]).sum(), [inputs[n] for n in ("A", "dt_bias", "initial_state")]
    )
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_state_after_nothing_is_a_tensor_of_its_own(backend: str) -> None:
    inputs = {n: t.detach() for n, t in Case(L=0).inputs(torch.float32).items()}
    kept = inputs["initial_state"].clone()
    _, end = selective_scan(**inputs, return_final_state=True, backend=backend)
    assert torch.equal(end, kept)
    end += 1
    assert torch.equal(inputs["initial_state"], kept)


def test_slots_and_unvisited_tokens_are_never_read() -> None:
    case = Case(K=2, L=20, positions=24)
    inputs = {n: t.detach() for n, t in case.inputs(torch.float32).items()}
    route = torch.tensor([[0, -1, 5, 7, -1, 2], [19, 5, -1, -1, 0, 2]])
    visited = torch.tensor([0, 2, 5, 7, 19])
    wanted = selective_scan(**inputs, route=route, backend="cpu")
    rest = torch.tensor([t for t in range(20) if t not in visited])
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].index_fill(1, rest, math.nan)
    y = selective_scan(**inputs, route=route, backend="cpu")
    assert torch.equal(y, wanted)
    assert (y[:, rest] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_renaming_the_tokens_renames_the_outputs(backend: str) -> None:
    case = Case(K=2, L=50)
    inputs = {n: t.detach() for n, t in case.inputs(torch.float32).items()}
    route = torch.stack([torch.randperm(50), torch.randperm(50)])
    order = torch.randperm(50)  # token i becomes token order[i]
    moved = {
        n: torch.empty_like(t).index_copy_(1, order, t) if n in ("x", "dt", "B", "C", "z") else t
        for n, t in inputs.items()
    }
    wanted = selective_scan(**inputs, route=route, backend=backend)
    assert_same(selective_scan(**moved, route=order[route], backend=backend)[:, order], wanted, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_route_is_a_scan_of_the_tokens_in_its_order(backend: str) -> None:
    case = Case(K=2, L=50, state=False)
    inputs = {n: t.detach() for n, t in case.inputs(torch.float64).items()}
    route = torch.stack([torch.arange(50), torch.randperm(50)])
    kept = selective_scan(**inputs, route=route, merge="keep", backend=backend)
    for k in range(2):
        alone = {n: inputs[n][k] for n in ("A", "D", "dt_bias")} | {
            n: inputs[n][:, route[k], k] for n in ("dt", "B", "C")
        }
        alone |= {n: inputs[n][:, route[k]] for n in ("x", "z")}
        torch.testing.assert_close(kept[:, route[k], k], selective_scan(**alone, backend="reference"))
    torch.testing.assert_close(selective_scan(**inputs, route=route, backend=backend), kept.sum(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_be_slices_and_broadcasts(backend: str) -> None:
    case = Case(L=20, D=6)
    inputs = {n: t.detach() for n, t in case.inputs(torch.float64).items()}
    wanted = selective_scan(**inputs, backend=backend)
    wide = torch.cat([inputs["x"], inputs["z"]], -1)
    views = inputs | {"x": wide[..., :6], "z": wide[..., 6:]}
    views["dt"] = torch.stack([inputs["dt"]] * 2, -1)[..., 0]
    views["A"] = inputs["A"].t().contiguous().t()
    views["B"] = inputs["B"].transpose(1, 3).contiguous().transpose(1, 3)
    assert_same(selective_scan(**views, backend=backend), wanted, backend)
    same = inputs | {"dt": inputs["dt"][:, :1, :1].expand(2, 20, 6), "C": inputs["C"][:1, :1].expand(2, 20, 1, 3)}
    copied = {n: t.contiguous() for n, t in same.items()}
    assert_same(selective_scan(**same, backend=backend), selective_scan(**copied, backend=backend), backend)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(Case(B=3, L=300, D=230, N=2, G=2), torch.float32, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_dtypes_may_be_mixed() -> None:
    inputs = Case().inputs(torch.float32)
    inputs["x"] = inputs["x"].detach().bfloat16().requires_grad_()
    inputs["D"] = inputs["D"].detach().double().requires_grad_()
    for backend in ("reference", *BACKENDS):
        y, state = selective_scan(**inputs, return_final_state=True, backend=backend)
        assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        grads = torch.autograd.grad(y.float().sum(), list(inputs.values()))
        assert [g.dtype for g in grads] == [t.dtype for t in inputs.values()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_in_the_loss(backend: str) -> None:
    inputs = Case().inputs(torch.float64)
    y, state = selective_scan(**inputs, return_final_state=True, backend=backend)
    wanted_y, wanted_state = selective_scan(**inputs, return_final_state=True, backend="reference")
    leaves = list(inputs.values())
    for loss, wanted in ((y.sum(), wanted_y.sum()), (state.sum(), wanted_state.sum())):
        got = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        right = torch.autograd.grad(wanted, leaves, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_decays_over_and_under_flow_as_exp_does(dtype: torch.dtype) -> None:
    exponents = torch.tensor([-1e30, -3e5, -200, -87, -1, -1e-6, 0, 1, 88, 200, 3e5, math.nan], dtype=dtype)
    D = len(exponents)
    zeros, ones = torch.zeros(1, 1, D, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    _, state = selective_scan(
        zeros, zeros + 1, exponents[:, None], ones, ones, initial_state=torch.ones(1, D, 1, dtype=dtype),
        dt_softplus=False, return_final_state=True, backend="cpu",
    )  # fmt: skip
    wanted = exponents.double().exp().to(dtype)
    torch.testing.assert_close(state[0, :, 0], wanted, rtol=4e-7, atol=1e-37, equal_nan=True)


def test_extreme_steps_stay_finite() -> None:
    inputs = {n: t.detach() for n, t in Case(D=16, N=16).inputs(torch.float32).items()}
    inputs["dt"] = inputs["dt"] * 1e4  # softplus: from 0 to 20000, decays from 1 to 0
    y = selective_scan(**inputs, backend="cpu")
    wanted = selective_scan(**{n: t.double() for n, t in inputs.items()}, backend="reference")
    torch.testing.assert_close(y, wanted.float(), rtol=1e-4, atol=1e-3)


def test_a_state_that_only_decays_ends_at_zero() -> None:
    x = torch.zeros(1, 4000, 16)
    B, A = torch.ones(1, 4000, 1, 4), -torch.ones(16, 4)
    ones = torch.ones(1, 16, 4)
    _, state = selective_scan(
        x, x + 0.1, A, B, B, initial_state=ones, dt_softplus=False, return_final_state=True, backend="cpu"
    )
    assert torch.equal(state, torch.zeros_like(ones))


@pytest.mark.parametrize("state", [4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_that_decay_alike(state: int, dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    case = Case(N=state, D=20, K=3, positions=65, L=70)
    inputs = case.inputs(dtype)
    inputs["A"] = inputs["A"][..., :1].expand(-1, -1, state)
    inputs["A"] = torch.where(torch.arange(3)[:, None, None] == 1, case.inputs(dtype, 1)["A"], inputs["A"])  # not all
    route = torch.stack([torch.randperm(70, generator=torch.Generator().manual_seed(k))[:65] for k in range(3)])
    found = {
        backend: selective_scan(
            **{n: t.double() if backend == "reference" else t for n, t in inputs.items()},
            route=route, return_final_state=True, backend=backend,
        )
        for backend in ("cpu", "reference")
    }  # fmt: skip
    for got, wanted in zip(*found.values(), strict=True):
        assert relative_rms(got, wanted) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_large_gate_and_step_match_torch() -> None:
    v = torch.linspace(-90, 90, 1001)[None, :, None].expand(1, 1001, 16)
    ones, alone = torch.ones(1, 1001, 1, 1), torch.arange(1001)[None]
    options = {"seq_idx": alone, "backend": "cpu"}  # each token a sequence: h = dt x
    step = selective_scan(torch.ones_like(v), v, -torch.ones(16, 1), ones, ones, **options)
    torch.testing.assert_close(step, F.softplus(v.double()).float(), rtol=4e-7, atol=1e-37)
    gated = selective_scan(v * 0 + 1, v * 0, -torch.ones(16, 1), ones * 0, ones, torch.ones(16), v, **options)
    torch.testing.assert_close(gated, F.silu(v.double()).float(), rtol=4e-7, atol=1e-35)
