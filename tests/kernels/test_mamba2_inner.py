"""The inside of a Mamba-2 layer that keeps little: against the ops that it is made of, and what it keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from contract import assert_refuses
from torch import Tensor

from kernels import causal_conv1d, norm, ssd
from kernels.compat import mamba_split_conv1d_scan_combined
from kernels.mamba2_inner import mamba2_inner

H, P, G, N, W, OUT = 4, 3, 2, 5, 3, 7
CHANNELS = H * P + 2 * G * N


def arguments(mlp: int = 0, hdim: bool = False, absent: tuple[str, ...] = (), rows: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = {
        "zxbcdt": (rows, 11, 2 * mlp + H * P + CHANNELS + H),
        "conv_weight": (CHANNELS, W),
        "conv_bias": (CHANNELS,),
        "dt_bias": (H,),
        "A": (H,),
        "D": (H, P) if hdim else (H,),
        "norm_weight": (H * P,),
        "out_weight": (OUT, mlp + H * P),
        "out_bias": (OUT,),
        "initial_state": (rows, H, P, N),
    }
    found = {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
    found["A"] = -found["A"].exp()
    return {n: None if n in absent else t.requires_grad_() for n, t in found.items()}


def by_ops(a: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same by the ops, which autograd sees."""
    packing = {n: options.get(n) for n in ("cu_seqlens", "seq_idx")}
    reverse, scan = options.get("reverse", False), H * P
    mlp = a["zxbcdt"].shape[-1] - scan - CHANNELS - H
    z0, x0, z, xbc, dt = a["zxbcdt"].split([mlp // 2, mlp // 2, scan, CHANNELS, H], -1)
    xbc = causal_conv1d(xbc, a["conv_weight"], a["conv_bias"], activation="silu", reverse=reverse, **packing)
    x, B, C = xbc.split([scan, G * N, G * N], -1)
    y, state = ssd(
        x.unflatten(-1, (H, P)), dt, a["A"], B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)), a["D"],
        z.unflatten(-1, (H, P)) if a["norm_weight"] is None else None, a["dt_bias"],
        dt_limit=options.get("dt_limit", (0.0, math.inf)), initial_state=a["initial_state"], reverse=reverse,
        return_final_state=True, **packing,
    )  # fmt: skip
    y = y.flatten(2)
    if a["norm_weight"] is not None:
        first = options.get("norm_before_gate", False)
        y = norm(y, a["norm_weight"], z=z, group_size=scan // G, eps=1e-3, norm_before_gate=first)
    return F.linear(torch.cat([F.silu(z0) * x0, y], -1), a["out_weight"], a["out_bias"]), state


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all": ({"mlp": 4, "hdim": True}, {"dt_limit": (0.1, 0.9)}),
    "norm_first": ({}, {"norm_before_gate": True}),
    "no_norm": ({"mlp": 2, "absent": ("norm_weight", "conv_bias", "out_bias")}, {}),
    "least": ({"absent": ("norm_weight", "conv_bias", "out_bias", "D", "initial_state")}, {"reverse": True}),
    "packed": ({"rows": 1, "absent": ("initial_state",)}, {"cu_seqlens": torch.tensor([0, 4, 11])}),
    "numbered": ({}, {"seq_idx": torch.tensor([[0] * 5 + [1] * 6, [0] * 9 + [-1] * 2])}),
}


@pytest.mark.parametrize("name", CASES)
def test_is_what_it_is_made_of(name: str) -> None:
    shape, options = CASES[name]
    a = arguments(**shape)
    got = mamba2_inner(**a, **options, headdim=P, ngroups=G, eps=1e-3, return_final_state=True)
    wanted = by_ops(a, options)
    torch.testing.assert_close(got, wanted)
    leaves = [t for t in a.values() if t is not None]
    grads = [torch.autograd.grad([t.sin().sum() for t in found], leaves) for found in (got, wanted)]
    for key, x, y in zip([n for n, t in a.items() if t is not None], *grads, strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, key=key: f"{key}: {m}")
    alone = [torch.autograd.grad(mamba2_inner(**a, **options, headdim=P, ngroups=G).sum(), leaves, allow_unused=True)]
    assert all(g is not None for g in alone[0])


def kept(function: Any) -> int:
    """Bytes of the tensors that a forward keeps for its backward, parameters and inputs left out."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.grad_fn is not None or not t.requires_grad:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(found.values())


def test_keeps_a_third() -> None:
    a = arguments(absent=("initial_state",))
    little = kept(lambda: mamba2_inner(**a, headdim=P, ngroups=G))
    assert little <= kept(lambda: by_ops(a, {})) / 2
    y = 2 * 11 * H * P * 8
    assert little <= y + 2 * (2 * 11 * G * 8) + 64  # the scan's output and the norm's statistics


@pytest.mark.parametrize("name", ["all", "least", "packed"])
def test_opcheck(name: str) -> None:
    shape, options = CASES[name]
    a = arguments(**shape)
    flags = (P, G, 1e-5, False, 0.0, 1.0, options.get("reverse", False), True, "cpu")
    torch.library.opcheck(
        torch.ops.triscan.mamba2_inner, (*a.values(), options.get("cu_seqlens"), options.get("seq_idx"), *flags)
    )


def test_low_precision_keeps_dtypes() -> None:
    a = {n: t.detach().float().requires_grad_() for n, t in arguments(mlp=4).items()}
    low = {**a, "zxbcdt": a["zxbcdt"].detach().bfloat16().requires_grad_()}
    y = mamba2_inner(**low, headdim=P, ngroups=G)
    assert y.dtype == torch.bfloat16
    truth = mamba2_inner(**{n: t.detach().double() for n, t in low.items()}, headdim=P, ngroups=G)
    reference = mamba2_inner(**{n: t.detach() for n, t in low.items()}, headdim=P, ngroups=G, backend="reference")
    assert_as_accurate("y", y, reference, truth)
    y.float().sum().backward()
    assert all(t.grad.dtype == t.dtype for t in low.values())


@pytest.mark.parametrize("name", ["all", "norm_first", "no_norm"])
def test_published_signature(name: str) -> None:
    shape, options = CASES[name]
    a = arguments(**shape)
    y, state = mamba_split_conv1d_scan_combined(
        a["zxbcdt"], a["conv_weight"], a["conv_bias"], a["dt_bias"], a["A"], a["D"], 16, a["initial_state"],
        dt_limit=options.get("dt_limit", (0.0, math.inf)), return_final_states=True, rmsnorm_weight=a["norm_weight"],
        rmsnorm_eps=1e-3, outproj_weight=a["out_weight"], outproj_bias=a["out_bias"], headdim=P, ngroups=G,
        norm_before_gate=options.get("norm_before_gate", False),
    )  # fmt: skip
    torch.testing.assert_close((y, state), by_ops(a, options))


def test_published_signature_without_a_projection() -> None:
    a = arguments(hdim=True)
    y = mamba_split_conv1d_scan_combined(
        a["zxbcdt"], a["conv_weight"], a["conv_bias"], a["dt_bias"], a["A"], a["D"], 16,
        rmsnorm_weight=a["norm_weight"], ngroups=G,
    )  # fmt: skip
    a.update(initial_state=None, out_weight=torch.eye(H * P).double(), out_bias=None)
    wanted = mamba2_inner(**a, headdim=P, ngroups=G, eps=1e-6, norm_before_gate=True)
    torch.testing.assert_close(y, wanted)


GOOD = {**arguments(), "headdim": P, "ngroups": G}
BAD = {
    "columns": ({"zxbcdt": GOOD["zxbcdt"][..., 1:]}, "zxbcdt: got 47 columns, wanted 2 M"),
    "channels": ({"ngroups": 3}, "conv_weight: got 32 channels, wanted H P"),
    "norm": ({"norm_weight": torch.ones(3).double()}, r"norm_weight: got shape \(3,\)"),
    "projection": ({"out_weight": torch.ones(7, 3).double()}, r"out_weight: got shape \(7, 3\), wanted \(D, M"),
    "rank": ({"A": torch.ones(4, 2).double()}, r"got shapes .*\(4, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wanted(name: str) -> None:
    changes, message = BAD[name]
    assert_refuses(mamba2_inner, {**GOOD, **changes}, message)


def test_published_signature_refuses() -> None:
    a = arguments()
    given = (a["zxbcdt"], a["conv_weight"], a["conv_bias"], a["dt_bias"], a["A"], a["D"], 16)
    with pytest.raises(ValueError, match="activation: got 'gelu'"):
        mamba_split_conv1d_scan_combined(*given, activation="gelu", headdim=P, ngroups=G)
    with pytest.raises(ValueError, match="headdim: got None"):
        mamba_split_conv1d_scan_combined(*given, ngroups=G)
