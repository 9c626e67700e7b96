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


def given(batch: int, length: int, inputs: int, outputs: int, channels: int, width: int = 4) -> tuple[Tensor, ...]:
    x, weight = drawn("x", batch, length, inputs), drawn("w", outputs, inputs) / inputs**0.5
    return x, weight, drawn("c", channels, width), drawn("b", channels)


def plainly(x: Tensor, weight: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, first: int) -> tuple[Tensor, ...]:
    both, end = F.linear(x, weight), first + len(conv_weight)
    y = causal_conv1d(both[..., first:end], conv_weight, conv_bias, activation="silu", return_final_state=True)
    return both[..., :first], y[0], both[..., end:], y[1]


def check(found: product.Projected, x: Tensor, weight: Tensor, filters: tuple[Tensor, Tensor], first: int) -> None:
    want = plainly(x, weight, *filters, first)
    truth = plainly(x.double(), weight.double(), filters[0].double(), filters[1].double(), first)
    for name, got, plain, true in zip(found._fields, found, want, truth, strict=True):
        assert got.shape == true.shape
        if got.numel():
            assert_as_accurate(name, got, plain, true)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_product_and_convolution(bias: bool) -> None:
    x, weight, conv_weight, conv_bias = given(2, 9, 6, 17, 10, 3)
    arguments = (x, weight, conv_weight, conv_bias if bias else None, 4)
    assert not product.saves_a_pass(*arguments)
    torch.testing.assert_close(tuple(product.project_conv(*arguments)), plainly(*arguments))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, conv_weight, conv_bias = given(2, 9, 6, 10, 10)
    with pytest.raises(ValueError, match=r"weight: got shape \(10, 5\), wanted \(N, K\) = \(10, 6\)"):
        product.project_conv(x, weight[:, :5], conv_weight, conv_bias)
    with pytest.raises(ValueError, match=r"conv_bias: got shape \(9,\), wanted \(C,\) = \(10,\)"):
        product.project_conv(x, weight, conv_weight, conv_bias[:9])
    with pytest.raises(ValueError, match="first: got 1, wanted 0 to 0: N - C"):
        product.project_conv(x, weight, conv_weight, conv_bias, 1)


def test_nothing_stops_the_tensor_cores(tmp_path: Path) -> None:
    """Between a tile's products no register goes through memory, and nothing waits for what was written there."""
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
    between = lines[products[0] : products[-1]]
    assert not [line for line in between if re.search(r"\b(LDL|STL|MEMBAR|CCTL)\b", line)]
    assert sum("USETMAXREG" in line for line in lines) == 2


@needs_hopper
@pytest.mark.parametrize(
    ("batch", "length", "inputs", "outputs", "channels", "first"),
    [
        (1, 128, 64, 192, 192, 0),
        (2, 300, 128, 256, 256, 0),
        (3, 129, 448, 768, 384, 0),
        (1, 20001, 448, 512, 320, 56),
        (5, 2048, 768, 3352, 1792, 1536),
    ],
)
def test_kernel(
    batch: int, length: int, inputs: int, outputs: int, channels: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    low = (t.to("cuda", torch.bfloat16) for t in given(batch, length, inputs, outputs, channels))
    x, weight, conv_weight, conv_bias = low
    found = product.forward(x, weight, conv_weight, conv_bias, first)
    check(found, x, weight, (conv_weight, conv_bias), first)


@needs_hopper
def test_it_is_taken_from_so_many_tokens_on() -> None:
    low = [t.to("cuda", torch.bfloat16) for t in given(2, product.LEAST // 2, 64, 512, 256)]
    x, weight, conv_weight, conv_bias = low
    assert product.saves_a_pass(x, weight, conv_weight, conv_bias, 256)
    assert not product.saves_a_pass(x, weight, conv_weight, conv_bias, 4)
    assert not product.saves_a_pass(x[:, 1:], weight, conv_weight, conv_bias)
    assert not product.saves_a_pass(x.half(), weight.half(), conv_weight.half(), conv_bias.half())
    check(product.project_conv(x, weight, conv_weight, conv_bias, 256), x, weight, (conv_weight, conv_bias), 256)
