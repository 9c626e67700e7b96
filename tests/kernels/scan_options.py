"""Scans with every option, and what a GPU kernel is held to on them: outputs, final states and every gradient."""

from __future__ import annotations

import torch
from accuracy import assert_as_accurate, relative_rms

from kernels import selective_scan
from kernels.selective_scan.problem import CHUNK

FLOATS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight", "initial_state")


def inputs(
    B=2, L=70, D=5, N=1, G=1, K=0, P=0, R=0, *, x_routes=False, options="", seed=0, complex_=False, S=0
) -> dict[str, torch.Tensor]:
    """Float64 tensors of a problem; ``options`` names what is there: D z bias init constB constC."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    def number(*size):
        return torch.complex(normal(*size), normal(*size)) if complex_ else normal(*size)

    lead, want = (K,) if K else (), set(options.split())
    A = -torch.rand((*lead, D, N), generator=g, dtype=torch.float64) * 2 - 0.1
    out = {
        "x": normal(B, L, *((K,) if x_routes else ()), D),
        "dt": normal(B, L, *lead, R or D) - 1,
        "A": torch.complex(A, normal(*lead, D, N) * 3) if complex_ else A,
        "B": number(*lead, D, N) if "constB" in want else number(B, L, *lead, G, N),
        "C": number(*lead, D, N) if "constC" in want else number(B, L, *lead, G, N),
    }
    optional = {
        "D": ("D", lambda: normal(*lead, D)),
        "z": ("z", lambda: normal(B, L, D)),
        "bias": ("dt_bias", lambda: normal(*lead, D) * 0.5),
        "init": ("initial_state", lambda: number(S or B, *lead, D, N)),
    }
    out |= {name: make() for key, (name, make) in optional.items() if key in want}
    if R:
        out["dt_weight"] = normal(*lead, D, R) * 0.5
    if K:
        P = P or L
        route = torch.full((K, P), -1, dtype=torch.int32)
        for k in range(K):
            count = min(P, L)
            slots = torch.randperm(P, generator=g)[:count].sort().values
            route[k, slots] = torch.randperm(L, generator=g)[:count].to(torch.int32)
        out["route"] = route
    return out


def cast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if t.is_complex():
        return t.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return t.to(dtype) if t.is_floating_point() else t


def run(tensors, backend, dtype, device, dstate=True, **flags) -> dict[str, torch.Tensor]:
    """y, the final state and the gradients for fixed random output gradients."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    low = ("x", "dt", "B", "C", "z")
    leaves = {
        n: cast(t, dtype if n in low else parameters).to(device).detach().requires_grad_(n in FLOATS)
        for n, t in tensors.items()
    }
    y, state = selective_scan(**leaves, **flags, return_final_state=True, backend=backend)
    g = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(device, y.dtype)
    dh = torch.randn(state.shape, generator=g, dtype=torch.complex128 if state.is_complex() else torch.float64)
    loss = [y, state] if dstate else [y]
    wanted = [n for n in leaves if n in FLOATS]
    grads = torch.autograd.grad(loss, [leaves[n] for n in wanted], [dy, dh.to(device, state.dtype)][: len(loss)])
    return {"y": y.detach(), "state": state.detach()} | dict(zip(wanted, grads, strict=True))


def check(tensors, backend, device, dtype=torch.float32, **flags) -> dict[str, torch.Tensor]:
    """Holds the kernels to the reference's accuracy, both against the reference in float64."""
    truth = run(tensors, "reference", torch.float64, device, **flags)
    ours = run(tensors, backend, dtype, device, **flags)
    if dtype == torch.float64:
        for name, t in ours.items():
            assert relative_rms(t, truth[name]) < 1e-11, f"{name}: error {relative_rms(t, truth[name]):.3g}"
        return ours
    reference = run(tensors, "reference", dtype, device, **flags)
    if dtype != torch.float32:  # the truth of what the low-precision inputs say
        rounded = {n: cast(cast(t, dtype if n in ("x", "dt", "B", "C", "z") else torch.float32), torch.float64)
                   for n, t in tensors.items()}  # fmt: skip
        truth = run(rounded, "reference", torch.float64, device, **flags)
    for name, t in ours.items():
        assert_as_accurate(name, t, reference[name], truth[name])
    return ours


FULL = "D z bias init"
CASES = {
    "plain": (dict(B=1, L=20, N=3), {}),
    "one_step": (dict(L=1, D=1, N=1, options=FULL), {}),
    "all_chunks": (dict(B=1, L=2 * CHUNK + 3, N=1, options=FULL), {}),
    "no_softplus": (dict(B=1, L=20, options="bias"), dict(dt_softplus=False)),
    "low_rank": (dict(B=1, L=20, R=2, options="bias"), {}),
    "two_blocks": (dict(B=1, L=9, D=35, N=1, options=FULL), {}),
    "groups": (dict(B=1, L=20, D=6, N=2, G=2, options="D"), {}),
    "wide_groups": (dict(B=1, L=9, D=2 * 17, N=1, G=2, options="D z"), {}),
    "constant_B": (dict(B=1, L=CHUNK + 1, N=1, options="D constB"), {}),
    "constant_C_groups": (dict(B=1, L=20, D=6, G=2, options="z constC"), {}),
    "constant_both": (dict(B=2, L=20, options="constB constC init"), {}),
    "reverse": (dict(B=1, L=CHUNK + 5, N=1, options=FULL), dict(reverse=True)),
    "complex": (dict(B=1, L=20, N=2, options=FULL, complex_=True), {}),
    "complex_chunks_reverse": (dict(B=1, L=CHUNK + 5, N=1, options=FULL, complex_=True), dict(reverse=True)),
    "complex_constant": (dict(B=1, L=20, N=1, options="D constB constC", complex_=True), {}),
    "routes": (dict(B=2, L=12, D=3, K=2, options=FULL), {}),
    "routes_keep": (dict(B=1, L=12, D=3, K=2, options=FULL), dict(merge="keep")),
    "route_alone": (dict(B=1, L=12, D=3, K=1, options="z"), {}),
    "route_inputs": (dict(B=1, L=12, D=3, K=2, x_routes=True, R=1, options="D bias"), dict(reverse=True)),
    "routes_padded": (dict(B=1, L=12, D=3, K=2, P=CHUNK + 2, N=1, options=FULL), {}),
    "routes_padded_reverse": (dict(B=1, L=12, D=3, K=2, P=17, N=1, options=FULL), dict(reverse=True, merge="keep")),
    "routes_partial": (dict(B=1, L=12, D=3, K=2, P=7, options=FULL), {}),
    "route_positions": (dict(B=1, L=12, D=3, K=2, P=9, options="bias"), dict(route_params=False)),
    "route_positions_reverse": (dict(B=1, L=12, D=4, K=2, G=2, options="D"), dict(route_params=False, reverse=True)),
    "routes_complex_constant": (dict(B=1, L=9, D=2, K=2, N=1, P=11, options=FULL + " constB", complex_=True), {}),
}
