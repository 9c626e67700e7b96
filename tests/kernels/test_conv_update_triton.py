"""The convolution's decoding step: both implementations against the convolution of everything at once."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from contract import assert_refuses, triton_device

from kernels import causal_conv1d, conv_update

DEVICE = triton_device()
BACKENDS = [("reference", "cpu"), ("cpu", "cpu"), ("triton", DEVICE)]


def draw(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3), (9,)])
def test_continues_the_convolution(backend: str, device: str, width: int, sizes: tuple[int, ...]) -> None:
    silu, channels = width != 2, 131
    x, weight, bias = draw(2, sum(sizes), channels, device=device), draw(channels, width, device=device), None
    if width != 4:
        bias = draw(channels, device=device)
    start = draw(2, width - 1, channels, device=device)
    wanted, end = causal_conv1d(
        x, weight, bias, activation="silu" if silu else None, initial_state=start, return_final_state=True,
        backend="reference",
    )  # fmt: skip
    state = start.clone()
    pieces = [
        conv_update(piece, state, weight, bias, activation="silu" if silu else None, backend=backend)
        for piece in x.split(list(sizes), dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    x, weight = draw(3, 2, 140, device=device, dtype=dtype), draw(140, 4, device=device, dtype=torch.float32)
    state = draw(3, 3, 140, device=device, dtype=dtype)
    results = []
    for kind, name in ((dtype, backend), (dtype, "reference"), (torch.float64, "reference")):
        own = state.clone().to(kind)
        results.append((conv_update(x.to(kind), own, weight, activation="silu", backend=name), own))
    for i, name in enumerate(("y", "state")):
        assert_as_accurate(name, *(r[i] for r in results))


def test_views() -> None:
    wide = draw(2, 6, 20, device=DEVICE)
    x, weight = wide[:, ::2, 3:11], draw(4, 8, device=DEVICE).t()
    states = [draw(2, 8, 3, device=DEVICE).mT for _ in range(2)]
    y, wanted = (conv_update(x, s, weight, backend=b) for s, b in zip(states, ("triton", "reference"), strict=True))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(*states)


def test_opcheck() -> None:
    x, state, weight = (draw(*s, dtype=torch.float32) for s in ((2, 3, 5), (2, 3, 5), (5, 4)))
    torch.library.opcheck(torch.ops.triscan.conv_update, (x, state, weight, None, "silu", "cpu"))


X, STATE, WEIGHT = torch.zeros(2, 1, 5), torch.zeros(2, 3, 5), torch.zeros(5, 4)
BAD = {
    "one token": ({"x": X[:, 0]}, r"x: got shape \(2, 5\), wanted \(B, T, D\)"),
    "state": ({"state": torch.zeros(2, 4, 5)}, r"state: got shape \(2, 4, 5\), wanted \(B, W - 1, D\) = \(2, 3, 5\)"),
    "weight": ({"weight": torch.zeros(5)}, r"weight: got shape \(5,\), wanted \(D, W\)"),
    "bias": ({"bias": torch.zeros(4)}, r"bias: got shape \(4,\)"),
    "activation": ({"activation": "gelu"}, "activation: got 'gelu'"),
    "integers": ({"x": X.long()}, "x: got dtype torch.int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_is_wanted(name: str) -> None:
    changes, message = BAD[name]
    assert_refuses(conv_update, {"x": X, "state": STATE, "weight": WEIGHT, **changes}, message)
