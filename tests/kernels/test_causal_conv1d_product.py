"""A projection and the convolution of its outputs: the kernel against float64, and what it is defined by.

The kernel has no interpreter: without a GPU it is compiled, and its machine code is looked at.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import machine_code
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from memory import poison
from torch import Tensor

from kernels import nvrtc
from kernels.causal_conv1d import causal_conv1d, product

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="the kernel has products of warp groups, as Hopper GPUs do")


def drawn(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def given(batch: int, length: int, inputs: int, channels: int, width: int = 4) -> tuple[Tensor, ...]:
    x, weight = drawn("x", batch, length, inputs), drawn("w", channels, inputs) / inputs**0.5
    return x, weight, drawn("c", channels, width), drawn("b", channels)


def convolved(x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    y = causal_conv1d(F.linear(x, weight), conv_weight, conv_bias, activation="silu", return_final_state=True)
    assert isinstance(y, tuple)
    return y


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_product_and_convolution(bias: bool) -> None:
    x, weight, conv_weight, conv_bias = given(2, 9, 6, 10, 3)
    arguments = (x, weight, conv_weight, conv_bias if bias else None)
    assert not product.saves_a_pass(*arguments)
    torch.testing.assert_close(product.project_conv(*arguments), convolved(*arguments))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, conv_weight, conv_bias = given(2, 9, 6, 10)
    with pytest.raises(ValueError, match=r"weight: got shape \(10, 5\), wanted \(C, K\) = \(10, 6\)"):
        product.project_conv(x, weight[:, :5], conv_weight, conv_bias)
    with pytest.raises(ValueError, match=r"conv_bias: got shape \(9,\), wanted \(C,\) = \(10,\)"):
        product.project_conv(x, weight, conv_weight, conv_bias[:9])


def test_nothing_stops_the_tensor_cores(tmp_path: Path) -> None:
    """No register goes through memory, and nothing waits for what was written there between a tile's products."""
    try:
        nvrtc.version()
    except OSError:
        pytest.skip("this PyTorch came without NVRTC: it is not a CUDA build")
    assert product.shared(product.TILE) <= 227 << 10
    code = nvrtc.compile_cubin(product.source(product.TILE.outputs), product.macros(product.TILE, 768), "sm_90a")
    if not machine_code.DISASSEMBLER.exists():
        pytest.skip("this Triton comes without a disassembler")
    lines = machine_code.instructions(SimpleNamespace(asm={"cubin": code}), tmp_path)
    products = [at for at, line in enumerate(lines) if "HGMMA" in line]
    assert not [line for line in lines if re.search(r"\b(LDL|STL)\b", line)]
    assert not [line for line in lines[products[0] : products[-1]] if re.search(r"\b(MEMBAR|CCTL)\b", line)]
    assert sum("USETMAXREG" in line for line in lines) == 2


@needs_hopper
@pytest.mark.parametrize(
    ("batch", "length", "inputs", "channels"),
    [(1, 128, 64, 256), (2, 300, 128, 256), (3, 129, 448, 768), (1, 20001, 448, 512), (5, 2048, 768, 1792)],
)
def test_kernel(batch: int, length: int, inputs: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    low = [t.to("cuda", torch.bfloat16) for t in given(batch, length, inputs, channels)]
    truth, want = convolved(*(t.double() for t in low)), convolved(*low)
    for name, got, plain, true in zip(
        ("y", "state"), product.forward(low[0], low[1], low[2], low[3]), want, truth, strict=True
    ):
        assert_as_accurate(name, got, plain, true)


@needs_hopper
def test_it_is_taken_from_so_many_tokens_on() -> None:
    low = [t.to("cuda", torch.bfloat16) for t in given(2, product.LEAST // 2, 64, 512)]
    assert product.saves_a_pass(*low)
    assert not product.saves_a_pass(low[0][:, 1:], *low[1:])
    assert not product.saves_a_pass(low[0], low[1][:500], low[2][:500], low[3][:500])
    assert not product.saves_a_pass(*(t.half() for t in low))
    truth = convolved(*(t.double() for t in low))
    for got, plain, true in zip(product.project_conv(*low), convolved(*low), truth, strict=True):
        assert_as_accurate("taken", got, plain, true)
