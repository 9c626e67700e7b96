"""A late norm whose product waits with it: plainly against product and norm, the CUDA kernel against float64.

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
from kernels.norm import late_product
from kernels.norm.late import Late, add_norm

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="the kernel has products of warp groups, as Hopper GPUs do")
EPS, INNER = 1e-5, 1e-3


def drawn(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def given(
    rows: int, inputs: int, outputs: int, parts: int, dtype: torch.dtype, device: str
) -> tuple[Late, Tensor, Tensor]:
    """A branch, the stream and the norm's weight, of numbers that ``dtype`` has."""
    low = {"device": device, "dtype": dtype}
    wide = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
    x, matrix = drawn("x", 1, rows, inputs).to(**low), (drawn("m", outputs, inputs) / inputs**0.5).to(**low)
    squares = (drawn("s", 1, rows, parts).abs() * 9).to(**wide) if parts else None
    late = Late(x, squares, 40, INNER, matrix)
    return late, drawn("r", 1, rows, outputs).to(**wide), drawn("w", outputs).to(**low)


def exact(late: Late, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, squares, width, eps, matrix = late
    assert matrix is not None
    wide = Late(rows.double(), None if squares is None else squares.double(), width, eps, matrix.double())
    return add_norm(wide, residual.double(), weight.double(), EPS, backend="reference")


def test_the_product_may_wait() -> None:
    late, residual, weight = given(5, 6, 7, 3, torch.float64, "cpu")
    assert late.matrix is not None
    want = add_norm(Late(F.linear(late.rows, late.matrix), *late[1:4]), residual, weight)
    torch.testing.assert_close(add_norm(late, residual, weight), want)


def test_what_does_not_fit_is_refused() -> None:
    late, residual, weight = given(5, 6, 7, 3, torch.float64, "cpu")
    with pytest.raises(ValueError, match=r"matrix: got shape \(7, 5\), wanted \(D, K\) = \(7, 6\)"):
        add_norm(late._replace(matrix=drawn("m", 7, 5)), residual, weight)
    with pytest.raises(ValueError, match=r"residual: got shape \(1, 5, 6\), wanted \(\.\.\., D\) = \(1, 5, 7\)"):
        add_norm(late, residual[..., :6], weight)
    with pytest.raises(ValueError, match="backend 'cuda'"):
        add_norm(late, residual, weight, backend="cuda")


@pytest.mark.parametrize("outputs", late_product.TILES)
def test_nothing_stops_the_tensor_cores(outputs: int, tmp_path: Path) -> None:
    """Between a tile's products no register goes through memory, and nothing waits for what was written there."""
    try:
        nvrtc.version()
    except OSError:
        pytest.skip("this PyTorch came without NVRTC: it is not a CUDA build")
    tile = late_product.TILES[outputs]
    assert tile.outputs * tile.columns == outputs
    assert late_product.shared(tile) <= 227 << 10
    code = nvrtc.compile_cubin(late_product.source(tile.outputs), late_product.macros(tile, 1536, 24), "sm_90a")
    if not machine_code.DISASSEMBLER.exists():
        pytest.skip("this Triton comes without a disassembler")
    lines = machine_code.instructions(SimpleNamespace(asm={"cubin": code}), tmp_path)
    products = [at for at, line in enumerate(lines) if "HGMMA" in line]
    between = lines[products[0] : products[-1]]
    assert not [line for line in between if re.search(r"\b(LDL|STL|MEMBAR|CCTL)\b", line)]
    assert sum("USETMAXREG" in line for line in lines) == 2


@needs_hopper
@pytest.mark.parametrize("outputs", late_product.TILES)
@pytest.mark.parametrize(
    ("rows", "inputs", "parts"), [(1, 64, 1), (77, 128, 5), (128 * 33 * 5 + 60, 448, 24), (500, 576, 0)]
)
def test_kernel(rows: int, inputs: int, parts: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    late, residual, weight = given(rows, inputs, outputs, parts, torch.bfloat16, "cuda")
    assert late.matrix is not None
    truth, want = exact(late, residual, weight), add_norm(late, residual, weight, EPS, backend="reference")
    found = late_product.forward(*late[:4], late.matrix, residual, weight, EPS)
    for name, got, plain, true in zip(("y", "sum"), found, want, truth, strict=True):
        assert_as_accurate(name, got, plain, true)


@needs_hopper
def test_it_is_taken_from_so_many_rows_on() -> None:
    late, residual, weight = given(late_product.LEAST, 64, 768, 1, torch.bfloat16, "cuda")
    assert late_product.fits(late.rows, late.squares, late.matrix, residual, weight)
    assert not late_product.fits(late.rows, late.squares, late.matrix, residual.bfloat16(), weight)
    assert late.squares is not None
    assert not late_product.fits(late.rows[:, 1:], late.squares[:, 1:], late.matrix, residual[:, 1:], weight)
    found, want = (add_norm(late, residual, weight, EPS, backend=b) for b in ("cuda", "triton"))
    for got, plain, true in zip(found, want, exact(late, residual, weight), strict=True):
        assert_as_accurate("taken", got, plain, true)
