"""The cases that every implementation of the selective scan is held to, and how they are run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accuracy import assert_as_accurate, relative_rms
from torch import Tensor

from kernels import selective_scan

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; ``K = 0`` means no route, and positions of 0 mean L."""

    B: int = 2
    L: int = 65
    D: int = 5
    N: int = 3
    G: int = 1
    K: int = 0
    positions: int = 0
    rank: int = 0
    constant: str = ""
    without: str = ""
    is_complex: bool = False
    per_route: bool = False
    state: bool = True
    dt_softplus: bool = True
    route_params: bool = True
    merge: str = "sum"
    reverse: bool = False
    bounds: tuple[int, ...] = ()
    packed: bool = False

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """The differentiable inputs, drawn in float64 and rounded, so that all dtypes see nearly the same numbers.

        Parameters and complex tensors stay at least float32.
        """
        generator = torch.Generator().manual_seed(seed)
        high = torch.float64 if dtype == torch.float64 else torch.float32
        K = (self.K,) if self.K else ()
        S = len(self.bounds) - 1 if self.bounds else self.B

        def draw(*shape: int, wide: bool = False) -> Tensor:
            real = torch.randn(shape, generator=generator, dtype=torch.float64)
            if not (wide and self.is_complex):
                return real.to(dtype)
            imaginary = torch.randn(shape, generator=generator, dtype=torch.float64)
            return torch.complex(real, imaginary).to(high.to_complex())

        A = -torch.exp(0.3 * torch.randn(*K, self.D, self.N, generator=generator, dtype=torch.float64))
        if self.is_complex:
            A = torch.complex(A, 3 * torch.randn(A.shape, generator=generator, dtype=torch.float64))
        dt = draw(self.B, self.L, *K, self.rank or self.D)
        named = {
            "x": draw(self.B, self.L, *(K if self.per_route else ()), self.D),
            "dt": dt if self.dt_softplus else dt.abs() * 0.3,
            "A": A.to(high.to_complex() if self.is_complex else high),
            "D": draw(*K, self.D).to(high),
            "z": draw(self.B, self.L, self.D),
            "dt_bias": (draw(*K, self.D) - 2).to(high) if self.dt_softplus else None,
            "dt_weight": draw(*K, self.D, self.rank) if self.rank else None,
            "initial_state": draw(S, *K, self.D, self.N, wide=True)
            .to(A.dtype)
            .to(high.to_complex() if self.is_complex else high)
            if self.state
            else None,
        }
        for name in ("B", "C"):
            shape = (*K, self.D, self.N) if name in self.constant else (self.B, self.L, *K, self.G, self.N)
            named[name] = draw(*shape, wide=True)
        absent = self.without.split()
        return {n: t.requires_grad_() for n, t in named.items() if t is not None and n not in absent}

    def options(self) -> dict[str, object]:
        """The other arguments."""
        generator = torch.Generator().manual_seed(1)
        route = seq_idx = None
        if self.K:
            P = self.positions or self.L
            slots = [torch.arange(self.L), torch.full((P,), -1)] if P != self.L else [torch.arange(P)]
            pool = torch.cat(slots)
            route = torch.stack([pool[torch.randperm(len(pool), generator=generator)][:P] for _ in range(self.K)])
        if self.packed:
            steps = torch.rand(self.B, self.L, generator=generator) < 0.1
            seq_idx = steps.cumsum(1)
            seq_idx[torch.rand(self.B, self.L, generator=generator) < 0.2] = -1
        return {
            "route": route,
            "cu_seqlens": torch.tensor(self.bounds, dtype=torch.int32) if self.bounds else None,
            "seq_idx": seq_idx,
            "dt_softplus": self.dt_softplus,
            "route_params": self.route_params,
            "merge": self.merge,
            "reverse": self.reverse,
        }


CASES = {
    "plain": Case(state=False, without="D z dt_bias"),
    "all": Case(),
    "one_token": Case(L=1),
    "below_a_chunk": Case(L=63, D=1, N=1),
    "one_chunk": Case(L=64, D=60, N=16),
    "two_chunks": Case(L=130, D=60, N=16),
    "many_channels": Case(B=1, L=9, D=211, N=2),
    "empty": Case(L=0),
    "no_batch": Case(B=0),
    "groups": Case(D=60, G=3),
    "group_per_channel": Case(G=5),
    "constant_b": Case(constant="B"),
    "constant_c": Case(constant="C"),
    "constant": Case(constant="BC"),
    "low_rank": Case(rank=2),
    "linear_dt": Case(dt_softplus=False),
    "reverse": Case(L=130, reverse=True),
    "complex": Case(is_complex=True, L=130),
    "complex_groups": Case(is_complex=True, D=6, G=2, N=16),
    "complex_constant": Case(is_complex=True, constant="BC"),
    "complex_constant_c_reverse": Case(is_complex=True, constant="C", reverse=True),
    "bounds": Case(B=1, L=150, bounds=(0, 0, 70, 70, 134, 149, 150)),
    "bounds_reverse": Case(B=1, L=150, bounds=(0, 64, 65, 150), reverse=True),
    "bounds_complex": Case(B=1, L=70, bounds=(0, 3, 70), is_complex=True),
    "bounds_groups": Case(B=1, L=70, bounds=(0, 3, 70), D=6, G=2, constant="C"),
    "packed": Case(packed=True, L=130),
    "packed_reverse": Case(packed=True, reverse=True),
    "packed_complex": Case(packed=True, is_complex=True),
    "packed_constant": Case(packed=True, constant="BC"),
    "route_1": Case(K=1),
    "route_2": Case(K=2, L=64),
    "route_4": Case(K=4, L=30, D=60, N=16),
    "route_padded": Case(K=2, L=50, positions=90),
    "route_partial": Case(K=2, positions=40),
    "route_reverse": Case(K=3, L=50, positions=70, reverse=True),
    "route_keep": Case(K=2, L=50, positions=66, merge="keep"),
    "route_inputs": Case(K=2, L=50, positions=66, per_route=True),
    "route_inputs_keep": Case(K=2, L=50, per_route=True, merge="keep", rank=2),
    "route_positions": Case(K=2, L=50, positions=40, route_params=False),
    "route_positions_reverse": Case(K=2, L=50, route_params=False, reverse=True, rank=3),
    "route_groups": Case(K=2, L=20, D=6, G=2, positions=25),
    "route_constant": Case(K=2, L=20, positions=25, constant="BC"),
    "route_complex": Case(K=2, L=20, positions=25, is_complex=True, reverse=True),
    "route_complex_constant": Case(K=2, L=20, positions=25, is_complex=True, constant="B", merge="keep"),
    "route_of_padding": Case(L=0, K=2, positions=25),
    "route_packed": Case(K=2, L=50, positions=70, packed=True),
    "route_packed_reverse": Case(K=2, L=50, positions=70, packed=True, reverse=True, merge="keep"),
    "route_linear_dt": Case(K=2, L=20, positions=25, dt_softplus=False),
}


def run(case: Case, dtype: torch.dtype, backend: str, inputs: dict[str, Tensor] | None = None) -> Results:
    """Outputs and gradients (of a loss over y and the final state) by name."""
    inputs = case.inputs(dtype) if inputs is None else inputs
    y, state = selective_scan(**inputs, **case.options(), return_final_state=True, backend=backend)  # type: ignore
    weights = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=weights).to(dtype).to(y.dtype)
    dstate = torch.randn(state.shape, generator=weights, dtype=torch.float32).to(state.dtype)
    pairs = [(t, g) for t, g in ((y, dy), (state, dstate)) if t.requires_grad]
    outputs, douts = [t for t, _ in pairs], [g for _, g in pairs]
    grads = torch.autograd.grad(outputs, list(inputs.values()), douts, allow_unused=True)
    named = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(inputs.items(), grads, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def exact(case: Case, dtype: torch.dtype) -> Results:
    """The reference in float64 on the inputs and output gradients as ``dtype`` rounds them."""

    def widen(t: Tensor) -> Tensor:
        return t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_()

    return run(case, dtype, "reference", {n: widen(t) for n, t in case.inputs(dtype).items()})


def compare(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Holds a backend to the reference, judged by float64 on the same rounded inputs.

    Parameters' gradients are float32 sums over time that may cancel: 2e-6 is the error of any order of summation.
    """
    got, reference = run(case, dtype, backend), run(case, dtype, "reference")
    for name, truth in exact(case, dtype).items():
        if got[name].dtype != torch.float32 or relative_rms(got[name], truth) > 2e-6:
            assert_as_accurate(name, got[name], reference[name], truth)
