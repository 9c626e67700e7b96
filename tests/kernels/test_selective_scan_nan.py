"""NaN where no step is: between strided rows, at skipped tokens, beside routes, at later steps. None of it is read.

What is not read changes no bit: each result is held to that of the same numbers without NaN. Nothing is said of a
gradient of an output that is NaN itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scan_options import FLOATS, cast, inputs
from torch import Tensor

from kernels import selective_scan
from kernels.selective_scan.problem import CHUNK

gpu = pytest.mark.gpu
BACKENDS = ["reference", "torch", "cpu", pytest.param("cuda", marks=gpu), pytest.param("triton", marks=gpu)]
BY_TOKEN = ("x", "dt", "B", "C", "z")
NAN = float("nan")
Tensors = dict[str, Any]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def placed(tensors: Tensors, backend: str, dtype: torch.dtype) -> Tensors:
    """The tensors as a model would have them: tokens' values in ``dtype``, parameters in float32."""
    low = {n: cast(t, dtype if n in BY_TOKEN else torch.float32) for n, t in tensors.items()}
    return {n: t.to(device_of(backend)) for n, t in low.items()}


def surrounded(t: Tensor, fill: float) -> Tensor:
    """The tensor as part of a larger one that is ``fill`` elsewhere: before, after and between its rows."""
    wide = t.new_full((t.shape[0] + 1, t.shape[1] + 5, *t.shape[2:-1], t.shape[-1] + 16), fill)
    part = wide[: t.shape[0], 2 : 2 + t.shape[1], ..., 8 : 8 + t.shape[-1]]  # as aligned as before
    return part.copy_(t)


def results(tensors: Tensors, backend: str, dy: Tensor | None = None, **flags: Any) -> Tensors:
    """y and every gradient."""
    leaves = {n: t.detach().requires_grad_(n in FLOATS) for n, t in tensors.items()}
    y = selective_scan(**leaves, backend=backend, **flags)
    assert isinstance(y, Tensor)
    wanted = [n for n in leaves if n in FLOATS]
    dy = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y) if dy is None else dy
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], dy)
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    for name, t in wanted.items():
        assert t.isfinite().all(), f"{name} without NaN around"
        assert torch.equal(found[name], t), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "channels", "state"), [(70, 40, 16), (2 * CHUNK + 35, 36, 13), (37, 16, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_between_rows(backend: str, length: int, channels: int, state: int, dtype: torch.dtype, reverse: bool) -> None:
    tensors = placed(inputs(B=2, L=length, D=channels, N=state, options="D z bias"), backend, dtype)
    dy = torch.linspace(-1, 1, 2 * length * channels, device=tensors["x"].device, dtype=dtype).view(2, length, channels)

    def within(fill: float) -> Tensors:
        strided = {n: surrounded(t, fill) if n in BY_TOKEN else t for n, t in tensors.items()}
        return results(strided, backend, surrounded(dy, fill), reverse=reverse)

    assert_equal(within(NAN), within(0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [1, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_at_skipped_tokens(backend: str, state: int, dtype: torch.dtype) -> None:
    tensors = placed(inputs(B=1, L=150, D=40, N=state, options="D z bias"), backend, dtype)
    skipped = torch.tensor([t for t in range(150) if t % 10 in (3, 4, 9) or 60 <= t < 80 or t >= 140])
    tensors["seq_idx"] = torch.zeros(1, 150, dtype=torch.int64).index_fill(1, skipped, -1).to(tensors["x"].device)
    skipped = skipped.to(tensors["x"].device)
    without, with_nan = (
        {n: t.index_fill(1, skipped, fill) if n in BY_TOKEN else t for n, t in tensors.items()} for fill in (0.0, NAN)
    )
    clean = results(without, backend)
    assert_equal(results(with_nan, backend), clean)
    assert (clean["y"][:, skipped] == 0).all()


@pytest.mark.parametrize("merge", ["sum", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [1, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_routes(backend: str, state: int, dtype: torch.dtype, merge: str) -> None:
    """Routes with slots for padding, which leave out tokens; what a route doesn't visit is NaN in its dt, B and C."""
    tensors = placed(inputs(B=2, L=90, D=20, N=state, K=2, P=CHUNK + 2, options="D z bias"), backend, dtype)
    route = tensors["route"].clone()
    route[:, 5:9], route[1, -7:] = -1, -1
    tensors["route"] = route
    visited = torch.zeros(2, 91, dtype=torch.bool, device=route.device).scatter_(1, route.long() % 91, True)[:, :90]
    assert (visited.any(0) != visited.all(0)).any(), "tokens that one route visits"
    assert not visited.any(0).all(), "tokens that none does"

    def filled(fill: float) -> Tensors:
        found = dict(tensors)
        for name in BY_TOKEN:
            t = tensors[name]
            mask = ~(visited.t() if name in ("dt", "B", "C") else visited.any(0))
            found[name] = t.masked_fill(mask.view(1, *mask.shape, *[1] * (t.ndim - 1 - mask.ndim)), fill)
        return found

    clean = results(filled(0.0), backend, merge=merge)
    assert_equal(results(filled(NAN), backend, merge=merge), clean)
    assert (clean["y"][:, ~visited.any(0)] == 0).all()


@pytest.mark.parametrize("name", BY_TOKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_token_stays_behind_it(backend: str, final: bool, dtype: torch.dtype, name: str) -> None:
    tensors = placed(inputs(B=2, L=90, D=40, N=16, options="D z bias"), backend, dtype)

    def y_of(tensors: Tensors) -> Tensor:
        y = selective_scan(**tensors, backend=backend, return_final_state=final)
        return y[0] if isinstance(y, tuple) else y

    clean, at = y_of(tensors), 41
    tensors[name] = tensors[name].clone()
    (tensors[name][0, at] if name in ("B", "C") else tensors[name][0, at, 3:4]).fill_(NAN)
    found = y_of(tensors)
    assert torch.equal(found[0, :at], clean[0, :at])
    assert torch.equal(found[1], clean[1])
    assert found[0, at, 3].isnan()
    if name in ("C", "z"):
        assert torch.equal(found[0, at + 1 :], clean[0, at + 1 :])
    if name not in ("B", "C"):
        others = torch.arange(40, device=clean.device) != 3
        assert torch.equal(found[:, :, others], clean[:, :, others])
