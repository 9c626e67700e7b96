"""The stand-ins for the published packages: module paths lead to our functions, references to the same values."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from core import compat as modules
from kernels import compat

SHIM = Path(__file__).resolve().parents[1] / "shim"
PATHS = {
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states",),
    "mamba_ssm": ("selective_scan_fn", "mamba_inner_fn", "Mamba", "Mamba2", "Mamba3", "MambaLMHeadModel"),
    "mamba_ssm.models.config_mamba": ("MambaConfig",),
    "mamba_ssm.models.mixer_seq_simple": ("MambaLMHeadModel",),
    "mamba_ssm.modules.mamba2": ("Mamba2",),
    "mamba_ssm.modules.mamba_simple": ("Mamba",),
    "mamba_ssm.utils.generation": ("InferenceParams",),
    "mamba_ssm.ops.selective_scan_interface": ("selective_scan_fn", "mamba_inner_fn"),
    "mamba_ssm.ops.triton.layer_norm": ("layer_norm_fn", "rms_norm_fn"),
    "mamba_ssm.ops.triton.layernorm_gated": ("layernorm_fn", "rmsnorm_fn"),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
}


def _published() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in ("causal_conv1d", "mamba_ssm")]


@pytest.fixture(autouse=True)
def shim(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts the stand-ins in front of the published packages, which may be installed, for one test."""
    kept = {name: sys.modules.pop(name) for name in _published()}
    monkeypatch.syspath_prepend(SHIM)
    yield
    for name in _published():
        del sys.modules[name]
    sys.modules.update(kept)


def module(path: str) -> ModuleType:
    found = importlib.import_module(path)
    assert Path(str(found.__file__)).is_relative_to(SHIM)
    return found


@pytest.mark.parametrize("path", PATHS)
def test_paths_lead_to_our_functions(path: str) -> None:
    for name in PATHS[path]:
        ours = getattr(compat, name, None) or getattr(modules, name)
        assert getattr(module(path), name) is ours


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def both(path: str, name: str, *arguments: Any, **options: Any) -> None:
    """Holds the function ``name`` to the reference of its name."""
    found = module(path)
    got = getattr(found, name)(*arguments, **options)
    torch.testing.assert_close(got, getattr(found, name.replace("_fn", "") + "_ref")(*arguments, **options))


@pytest.mark.parametrize("groups", [(), (2,)])
def test_scan(groups: tuple[int, ...]) -> None:
    B, C = draw(2, *groups, 3, 7), draw(2, *groups, 3, 7)
    arguments = (draw(2, 4, 7), draw(2, 4, 7), -draw(4, 3).abs(), B, C, draw(4), draw(2, 4, 7), draw(4))
    both("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", *arguments, True, return_last_state=True)


@pytest.mark.parametrize("given", ["", "B", "C", "BC"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_inner(given: str, is_complex: bool) -> None:
    def number(*shape: int) -> Tensor:
        return torch.complex(draw(*shape), draw(*shape)) if is_complex else draw(*shape)

    shapes = ((2, 8, 9), (4, 1, 3), (4,), (2 + 3 * (2 - len(given)) * (1 + is_complex), 4), (4, 2), (5, 4))
    options = {"D": draw(4), "delta_bias": draw(4), **{name: number(4, 3) for name in given}}
    A = number(4, 3)
    A = torch.complex(-A.real.abs(), A.imag) if is_complex else -A.abs()
    arguments = (*(draw(*shape) for shape in shapes), None, A)
    both("mamba_ssm.ops.selective_scan_interface", "mamba_inner_fn", *arguments, **options)


def test_convolution() -> None:
    options = {"initial_states": draw(2, 4, 2), "return_final_states": True, "activation": "swish"}
    both("causal_conv1d.causal_conv1d_interface", "causal_conv1d_fn", draw(2, 4, 9), draw(4, 3), draw(4), **options)


@pytest.mark.parametrize("seen", [None, torch.tensor([3, 11])])
def test_update(seen: Tensor | None) -> None:
    found = module("causal_conv1d.causal_conv1d_interface")
    x, state, weight = draw(2, 4, 3), draw(2, 4, 5), draw(4, 3)
    states = state.clone(), state.clone()
    functions = (found.causal_conv1d_update, found.causal_conv1d_update_ref)
    outputs = [f(x, s, weight, cache_seqlens=seen) for f, s in zip(functions, states, strict=True)]
    torch.testing.assert_close(*outputs)
    assert torch.equal(*states)
    assert not torch.equal(states[0], state)


def test_states_of_packed_sequences() -> None:
    both("causal_conv1d.causal_conv1d_varlen", "causal_conv1d_varlen_states", draw(9, 4), torch.tensor([0, 2, 2, 9]), 3)


@pytest.mark.parametrize("name", ["layer_norm_fn", "rms_norm_fn"])
def test_norms(name: str) -> None:
    arguments = (draw(3, 6), draw(6), draw(6), draw(3, 6))
    both("mamba_ssm.ops.triton.layer_norm", name, *arguments, eps=1e-3, prenorm=True)


def test_gated_norm() -> None:
    found = module("mamba_ssm.ops.triton.layernorm_gated")
    arguments = (draw(3, 6), draw(6), draw(6), draw(3, 6), 1e-3, 2, False)
    torch.testing.assert_close(found.rmsnorm_fn(*arguments), found.rms_norm_ref(*arguments))


@pytest.mark.parametrize("inner", [(6,), (3, 2)])
def test_state_update(inner: tuple[int, ...]) -> None:
    found = module("mamba_ssm.ops.triton.selective_state_update")
    state = draw(2, *inner, 5)
    states = state.clone(), state.clone()
    arguments = (draw(2, *inner), draw(2, *inner), -draw(*inner, 5).abs(), draw(2, 5), draw(2, 5))
    options = {"D": draw(*inner), "z": draw(2, *inner), "dt_bias": draw(*inner), "dt_softplus": True}
    functions = (found.selective_state_update, found.selective_state_update_ref)
    torch.testing.assert_close(*(f(s, *arguments, **options) for f, s in zip(functions, states, strict=True)))
    torch.testing.assert_close(*states)
    assert not torch.equal(states[0], state)
