"""The cases that every implementation of ``ssd`` is held to, and how they are run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from accuracy import assert_as_accurate, relative_rms
from torch import Tensor

from kernels import ssd

Results = dict[str, Tensor]
ROWS = ("x", "dt", "B", "C", "z")  # one a token; the rest are parameters and states, at least float32


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; ``K = 0`` means no route, and positions of 0 mean L."""

    B: int = 2
    L: int = 70
    H: int = 2
    P: int = 4
    N: int = 3
    G: int = 1
    K: int = 0
    positions: int = 0
    without: str = ""
    wide_d: bool = False
    per_route: bool = False
    state: bool = True
    dt_softplus: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    merge: str = "sum"
    reverse: bool = False
    bounds: tuple[int, ...] = ()
    packed: bool = False

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """The differentiable inputs, drawn in float64 and rounded, so that all dtypes see nearly the same numbers."""
        g = torch.Generator().manual_seed(seed)
        high = torch.float64 if dtype == torch.float64 else torch.float32
        K = (self.K,) if self.K else ()
        S = len(self.bounds) - 1 if self.bounds else self.B

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        dt = draw(self.B, self.L, *K, self.H)
        named = {
            "x": draw(self.B, self.L, *(K if self.per_route else ()), self.H, self.P),
            "dt": dt if self.dt_softplus else dt.abs() * 0.3,
            "A": -torch.exp(draw(*K, self.H)),
            "B": draw(self.B, self.L, *K, self.G, self.N),
            "C": draw(self.B, self.L, *K, self.G, self.N),
            "D": draw(*K, self.H, *((self.P,) if self.wide_d else ())),
            "z": draw(self.B, self.L, self.H, self.P),
            "dt_bias": draw(*K, self.H) - 2,
            "initial_state": draw(S, *K, self.H, self.P, self.N) if self.state else None,
        }
        absent = [*self.without.split(), *(() if self.dt_softplus else ("dt_bias",))]
        return {
            n: t.to(dtype if n in ROWS else high).to(device).requires_grad_()
            for n, t in named.items()
            if t is not None and n not in absent
        }

    def options(self, device: str = "cpu") -> dict[str, Any]:
        """The other arguments."""
        g = torch.Generator().manual_seed(1)
        route = seq_idx = None
        if self.K:
            T = self.positions or self.L
            slots = [torch.arange(self.L), torch.full((T,), -1)] if T != self.L else [torch.arange(T)]
            pool = torch.cat(slots)
            route = torch.stack([pool[torch.randperm(len(pool), generator=g)][:T] for _ in range(self.K)])
        if self.packed:
            seq_idx = (torch.rand(self.B, self.L, generator=g) < 0.1).cumsum(1)
            seq_idx[torch.rand(self.B, self.L, generator=g) < 0.2] = -1
        bounds = torch.tensor(self.bounds, dtype=torch.int32) if self.bounds else None
        return {
            **{n: None if t is None else t.to(device) for n, t in
               (("route", route), ("cu_seqlens", bounds), ("seq_idx", seq_idx))},
            "dt_softplus": self.dt_softplus,
            "dt_limit": self.dt_limit,
            "merge": self.merge,
            "reverse": self.reverse,
        }  # fmt: skip

    def small(self) -> Case:
        """The same options with few tokens."""
        bounds = (0, 3, 3, 7) if self.bounds else ()
        return replace(self, L=7, H=2 * self.G, P=2, N=2, positions=9 * (self.positions > 0), bounds=bounds)


CASES = {
    "plain": Case(state=False, without="D z dt_bias"),
    "all": Case(),
    "one_token": Case(L=1),
    "below_a_chunk": Case(L=63, H=1, P=1, N=1),
    "one_chunk": Case(L=64, H=3, P=8, N=16),
    "two_chunks": Case(L=130, P=17, N=19),
    "empty": Case(L=0),
    "no_batch": Case(B=0),
    "no_heads": Case(H=0),
    "groups": Case(H=6, G=3),
    "group_per_head": Case(H=3, G=3),
    "wide_d": Case(wide_d=True),
    "linear_dt": Case(dt_softplus=False),
    "limits": Case(dt_limit=(0.05, 0.4)),
    "linear_limits": Case(dt_softplus=False, dt_limit=(0.1, 0.3)),
    "reverse": Case(L=130, reverse=True),
    "bounds": Case(B=1, L=150, bounds=(0, 0, 70, 70, 134, 149, 150)),
    "bounds_reverse": Case(B=1, L=150, bounds=(0, 64, 65, 150), reverse=True),
    "bounds_groups": Case(B=1, L=70, H=4, G=2, bounds=(0, 3, 70), wide_d=True),
    "packed": Case(packed=True, L=130),
    "packed_reverse": Case(packed=True, reverse=True, dt_limit=(0.05, 0.4)),
    "route_1": Case(K=1),
    "route_2": Case(K=2, L=64),
    "route_padded": Case(K=2, L=50, positions=90),
    "route_partial": Case(K=2, positions=40, wide_d=True),
    "route_reverse": Case(K=3, L=50, positions=70, reverse=True),
    "route_keep": Case(K=2, L=50, positions=66, merge="keep"),
    "route_inputs": Case(K=2, L=50, positions=66, per_route=True),
    "route_inputs_keep": Case(K=2, L=50, per_route=True, merge="keep"),
    "route_groups": Case(K=2, L=20, H=4, G=2, positions=25),
    "route_of_padding": Case(L=0, K=2, positions=70),
    "route_packed": Case(K=2, L=50, positions=70, packed=True),
    "route_packed_reverse": Case(K=2, L=50, positions=70, packed=True, reverse=True, merge="keep"),
}
ROUNDED = ("two_chunks", "plain", "reverse", "bounds", "packed", "route_padded", "route_keep", "limits")


def run(
    case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", inputs: dict[str, Tensor] | None = None,
    mode: str = "chunked",
) -> Results:  # fmt: skip
    """Outputs and gradients (of a loss over y and the final state) by name."""
    inputs = case.inputs(dtype, device) if inputs is None else inputs
    y, state = ssd(**inputs, **case.options(device), return_final_state=True, backend=backend, mode=mode)  # type: ignore
    pairs = [(t, g) for t, g in zip((y, state), out_gradients(y, state, dtype), strict=True) if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in pairs], list(inputs.values()), [g for _, g in pairs], allow_unused=True
    )  # fmt: skip
    named = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(inputs.items(), grads, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def out_gradients(y: Tensor, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random gradients of y and of the final state, that of y rounded to ``dtype``."""
    g = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=g).to(dtype).to(y.device, y.dtype)
    return dy, torch.randn(state.shape, generator=g, dtype=torch.float32).to(y.device, state.dtype)


def compare(
    case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", products: bool = False,
    inputs: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Holds a backend to the reference, judged by float64 on the same rounded inputs.

    Parameters' gradients are float32 sums over time that may cancel: 2e-6 is the error of any order of summation.
    ``products`` says that a backend multiplies in ``dtype``: then everything is judged as rounded to ``dtype``, its
    float32 results (states, parameters' gradients) too; and the gradients of A and dt_bias may have twice the error
    that they have as the sum over positions of terms that are each rounded once, since these terms cancel.
    """
    inputs = case.inputs(dtype, device) if inputs is None else inputs
    wide = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    got, reference = (run(case, dtype, name, device, inputs) for name in (backend, "reference"))
    exact = run(case, dtype, "reference", device, wide)
    terms = {"dA": decay_terms(case, dtype, device, wide), "ddt_bias": exact["ddt"]} if products else {}
    for name, truth in exact.items():
        value, other = got[name], reference[name]
        assert value.dtype == other.dtype, name
        if products:
            value, other = value.to(dtype), other.to(dtype)
        if name in terms and truth.numel():
            rounding = (terms[name].to(dtype).double() - terms[name]).square().sum((0, 1)).mean().sqrt().item()
            if (value - truth).square().mean().sqrt().item() <= 2 * rounding:
                continue
        if value.dtype != torch.float32 or relative_rms(value, truth) > 2e-6:
            assert_as_accurate(name, value, other, truth)


def decay_terms(case: Case, dtype: torch.dtype, device: str, inputs: dict[str, Tensor]) -> Tensor:
    """What each position adds to the gradient of A, ``(B, L, [K,] H)``, for cases whose routes have no padding.

    It is dt / A times the gradient of dt through the decays alone, which is all of it if x dt is held fixed.
    """
    inputs = {n: t.detach() for n, t in inputs.items() if n != "D"}
    raw = inputs["dt"] + inputs.pop("dt_bias", torch.zeros(()).to(device))
    dt = (torch.nn.functional.softplus(raw) if case.dt_softplus else raw).clamp(*case.dt_limit)
    leaf = dt.clone().requires_grad_()
    x = inputs["x"].unsqueeze(2) if case.K and not case.per_route else inputs["x"]
    inputs |= {"dt": leaf, "x": x * (dt / leaf).unsqueeze(-1)}
    options = case.options(device) | {"dt_softplus": False, "dt_limit": (-math.inf, math.inf)}
    y, state = ssd(**inputs, **options, return_final_state=True, backend="reference")  # type: ignore
    (grad,) = torch.autograd.grad([y, state], leaf, out_gradients(y, state, dtype))
    return dt * grad / inputs["A"]
