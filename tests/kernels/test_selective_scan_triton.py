"""The Triton kernels of the selective scan against the reference in float64: outputs, final states and every gradient.

On a machine without a GPU: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_selective_scan_triton.py``.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate, relative_rms

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 for its interpreter", allow_module_level=True)

from kernels import selective_scan
from kernels.selective_scan import triton as host
from kernels.selective_scan import triton_backward
from kernels.selective_scan.problem import CHUNK

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FLOATS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_weight", "initial_state")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an element that no kernel wrote shows."""
    empty = torch.empty

    def poison(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() or t.is_complex() else t.fill_(-12345)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(autouse=True)
def scan_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter's associative scan combine whole rows instead of one element at a time."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import ScanOps

    def rows(self, inputs):
        data = [np.moveaxis(t.handle.data, self.axis, 0) for t in inputs]
        out = [np.empty_like(d) for d in data]
        for i in range(len(data[0])):
            row = tuple(self.to_tensor(np.ascontiguousarray(d[i]), t.dtype) for d, t in zip(data, inputs, strict=True))
            total = row if i == 0 else self.combine_fn.fn(*total, *row)  # noqa: F821
            for o, t in zip(out, total, strict=True):
                o[i] = t.handle.data
        return [self.to_tensor(np.moveaxis(o, 0, self.axis), t.dtype) for o, t in zip(out, inputs, strict=True)]

    monkeypatch.setattr(ScanOps, "generic_scan", rows)


def inputs(
    B=2, L=70, D=5, N=2, G=1, K=0, P=0, R=0, *, x_routes=False, options="", seed=0, complex_=False, S=0
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


def run(tensors, backend, dtype, dstate=True, **flags) -> dict[str, torch.Tensor]:
    """y, the final state and the gradients for fixed random output gradients."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    low = ("x", "dt", "B", "C", "z")
    leaves = {
        n: cast(t, dtype if n in low else parameters).to(DEVICE).detach().requires_grad_(n in FLOATS) for n, t in tensors.items()
    }
    y, state = selective_scan(**leaves, **flags, return_final_state=True, backend=backend)
    g = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(DEVICE, y.dtype)
    dh = torch.randn(state.shape, generator=g, dtype=torch.complex128 if state.is_complex() else torch.float64)
    loss = [y, state] if dstate else [y]
    wanted = [n for n in leaves if n in FLOATS]
    grads = torch.autograd.grad(loss, [leaves[n] for n in wanted], [dy, dh.to(DEVICE, state.dtype)][: len(loss)])
    return {"y": y.detach(), "state": state.detach()} | dict(zip(wanted, grads, strict=True))


def check(tensors, dtype=torch.float32, **flags) -> dict[str, torch.Tensor]:
    """Holds the kernels to the reference's accuracy, both against the reference in float64."""
    truth = run(tensors, "reference", torch.float64, **flags)
    ours = run(tensors, "triton", dtype, **flags)
    if dtype == torch.float64:
        for name, t in ours.items():
            assert relative_rms(t, truth[name]) < 1e-11, f"{name}: error {relative_rms(t, truth[name]):.3g}"
        return ours
    reference = run(tensors, "reference", dtype, **flags)
    if dtype != torch.float32:  # the truth of what the low-precision inputs say
        rounded = {n: cast(cast(t, dtype if n in ("x", "dt", "B", "C", "z") else torch.float32), torch.float64)
                   for n, t in tensors.items()}  # fmt: skip
        truth = run(rounded, "reference", torch.float64, **flags)
    for name, t in ours.items():
        assert_as_accurate(name, t, reference[name], truth[name])
    return ours
