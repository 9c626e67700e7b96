"""Steps over many rows: the definition against what its parts do one by one, CUDA kernels against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import Tensor

from kernels import nvrtc
from kernels.decode import Conv, project, rows_cuda, scan_step
from kernels.decode.many import Pending, add_rows, heads_step, multiply_rows
from kernels.state_update import state_update

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="the kernels are compiled for GPUs of compute capability 9.0")
EPS = 1e-5


def draw(name: str, *shape: int, like: Tensor | None = None) -> Tensor:
    made = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    return made if like is None else made.to(like)


def product_arguments(
    batch: int, inputs: int, outputs: int, *, bias: bool = False, pending: bool = False, conv: tuple[int, ...] = ()
) -> dict:
    """What ``multiply_rows`` takes, in float64; rows are strided. conv: width, first output and channels."""
    made: dict = {"x": draw("x", batch, inputs + 8)[:, :inputs], "weight": draw("w", outputs, inputs) / inputs**0.5}
    made["bias"] = draw("b", outputs) if bias else None
    if pending:
        made["x"] = Pending(made["x"], draw("s", batch, 3).abs() * inputs / 3)
    if conv:
        width, first, channels = conv
        state = draw("state", batch, width - 1, channels)
        made["conv"] = Conv(draw("cw", channels, width), draw("cb", channels), state, first)
    return made


def cast(made: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The same in another dtype, in memory of its own; squares and what is float32 in a layer stay wide."""
    if isinstance(made, dict):
        wide = dtype if dtype == torch.float64 else torch.float32
        kinds = {name: wide if name in ("A_log", "D", "state", "low") else dtype for name in made}
        return {name: cast(value, kinds[name], device) for name, value in made.items()}
    if isinstance(made, Pending):
        squares = made.squares.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        return Pending(cast(made.rows, dtype, device), squares)
    if isinstance(made, Conv):
        return Conv(*(cast(part, dtype, device) for part in made))
    if not isinstance(made, Tensor):
        return made
    to = torch.empty_strided(made.shape, made.stride(), dtype=dtype, device=device)
    return to.copy_(made)


@pytest.mark.parametrize("pending", [False, True])
def test_products_are_norm_product_and_convolution(pending: bool) -> None:
    made = product_arguments(5, 6, 11, bias=True, conv=(4, 2, 7))
    weight, conv = draw("norm", 6), made["conv"]
    x, residual = made["x"], draw("residual", 5, 6)
    want, total, _ = project(
        x, made["weight"], made["bias"], residual=residual, norm_weight=weight, eps=EPS,
        conv=conv._replace(state=conv.state.clone()), backend="reference",
    )  # fmt: skip
    assert total is not None
    made["x"] = F.rms_norm(total, (6,), weight, EPS)
    if pending:
        made["x"], stream = add_rows(x, torch.eye(6).double(), None, residual, weight)
        torch.testing.assert_close(stream, total)
        assert made["x"].squares.shape == (5, 1)
    torch.testing.assert_close(multiply_rows(**made, eps=EPS), want)
    assert not torch.equal(conv.state, draw("state", 5, 3, 7))


def heads_arguments(batch: int, heads: int, width: int, n: int, groups: int, *, wide_D: bool = False) -> dict:
    inner, keys = heads * width, groups * n
    row = draw("row", batch, 2 * inner + 2 * keys + heads + -heads % 8)
    z, x, B, C, dt = row[:, : 2 * inner + 2 * keys + heads].split([inner, inner, keys, keys, heads], dim=1)
    made = {"x": x, "B": B, "C": C, "z": z, "dt": dt, "dt_bias": draw("bias", heads), "A_log": draw("A", heads)}
    return made | {"D": draw("D", inner if wide_D else heads), "state": draw("h", batch, heads, width, n)}


@pytest.mark.parametrize("first", [False, True])
def test_heads_are_the_step_of_their_states(first: bool) -> None:
    made, limits = heads_arguments(3, 4, 2, 5, 2), (0.5, 2.0)
    state = made["state"].clone()
    shapes = {"x": (4, 2), "B": (2, 5), "C": (2, 5), "z": (4, 2)}
    x, B, C, z = (made[name].unflatten(1, shape).unsqueeze(1) for name, shape in shapes.items())
    A, dt = -made["A_log"].exp(), made["dt"].unsqueeze(1)
    y, gated = (
        state_update(state.clone(), x, dt, A, B, C, made["D"], gate, made["dt_bias"], dt_limit=limits).flatten(1)
        for gate in (None, z)
    )
    torch.testing.assert_close(heads_step(**cast(made, torch.float64), dt_limit=limits), gated)
    weight = draw("norm", 8)
    got = heads_step(**made, norm_weight=weight, norm_before_gate=first, dt_limit=limits)
    assert isinstance(got, Pending)
    normed = got.rows * torch.rsqrt(got.squares.sum(1, keepdim=True) / 8 + EPS)
    want = F.rms_norm(y if first else gated, (8,), weight, EPS)
    torch.testing.assert_close(normed, want * F.silu(made["z"]) if first else want)
    state_update(state, x, dt, A, B, C, made["D"], None, made["dt_bias"], dt_limit=limits)
    torch.testing.assert_close(made["state"], state)


def test_what_does_not_fit_is_refused() -> None:
    made = product_arguments(2, 6, 11)
    with pytest.raises(ValueError, match=r"weight: got shape \(11, 5\), wanted \(O, K\) = \(11, 6\)"):
        multiply_rows(made["x"], made["weight"][:, :5])
    with pytest.raises(ValueError, match="norm_weight: got shape"):
        add_rows(made["x"], made["weight"], None, draw("r", 2, 11), draw("n", 3))
    with pytest.raises(ValueError, match="squares: got shape"):
        multiply_rows(Pending(made["x"], draw("s", 3, 1)), made["weight"])
    with pytest.raises(ValueError, match=r"conv\.first: got 9"):
        multiply_rows(**product_arguments(2, 6, 11, conv=(4, 9, 7)))
    with pytest.raises(ValueError, match=r"wanted \(B, G N\) with G a divisor of H = 4"):
        heads_step(**heads_arguments(3, 4, 2, 5, 3))
    with pytest.raises(ValueError, match="backend 'cuda'"):
        multiply_rows(made["x"], made["weight"], backend="cuda")


def test_sources_compile() -> None:
    """On any machine that has PyTorch's CUDA wheels; without spilled registers a kernel has no local memory."""
    try:
        nvrtc.version()
    except OSError:
        pytest.skip("this PyTorch came without NVRTC")
    half, wide = torch.bfloat16, torch.float32
    tile = rows_cuda.tile_of(768, 3072)
    assert tile is not None
    macros = {
        "product": rows_cuda.product_macros(half, half, wide, 768, tile, conv=4, squares=24),
        "scan": rows_cuda.scan_macros(half, half, wide, wide, half, 48, 16, 8),
        "heads": rows_cuda.heads_macros(half, half, wide, wide, wide, 64, 128, 1, False),
    }
    for name, lines in macros.items():
        assert nvrtc.compile_cubin(rows_cuda.source(name), lines, "sm_90a")


PRODUCTS = {
    "mamba": dict(inputs=768, outputs=3072, pending=True, conv=(4, 0, 1536)),
    "mamba2": dict(inputs=768, outputs=3352, conv=(4, 1536, 1792)),
    "small": dict(inputs=256, outputs=512, bias=True, pending=True, conv=(2, 8, 12)),
    "large": dict(inputs=2560, outputs=2056, bias=True, conv=(1, 4, 40)),
    "plain": dict(inputs=1536, outputs=768, pending=True),
}


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [5, 64, 130])
@pytest.mark.parametrize("name", PRODUCTS)
def test_multiply_rows(name: str, batch: int, dtype: torch.dtype) -> None:
    made = product_arguments(batch, **PRODUCTS[name])
    low = cast(made, dtype)
    found, plain, truth = cast(low, dtype, "cuda"), cast(low, dtype), cast(low, torch.float64)
    got, want, exact = multiply_rows(**found, backend="cuda"), multiply_rows(**plain), multiply_rows(**truth)
    assert_as_accurate("y", got.cpu(), want, exact)
    if "conv" in found and found["conv"].state.numel():
        assert_as_accurate("state", found["conv"].state.cpu(), plain["conv"].state, truth["conv"].state)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs", "pending", "bias"), [(1536, 768, True, False), (512, 384, False, True)])
@pytest.mark.parametrize("batch", [5, 64, 130])
def test_add_rows(batch: int, inputs: int, outputs: int, pending: bool, bias: bool, stream: torch.dtype) -> None:
    low = cast(product_arguments(batch, inputs, outputs, pending=pending, bias=bias), torch.bfloat16)
    residual, weight = draw("r", batch, outputs).to(stream), draw("n", outputs).bfloat16()
    given = cast(low, torch.bfloat16, "cuda")
    found = add_rows(**given, residual=residual.cuda(), norm_weight=weight.cuda(), backend="cuda")
    plain = add_rows(**low, residual=residual, norm_weight=weight)
    truth = add_rows(**cast(low, torch.float64), residual=residual.double(), norm_weight=weight.double())
    assert_as_accurate("rows", found[0].rows.cpu(), plain[0].rows, truth[0].rows)
    assert_as_accurate("stream", found[1].cpu(), plain[1], truth[1])
    sums = [t[0].squares.sum(1).cpu() for t in (found, plain, truth)]
    assert_as_accurate("squares", *sums)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("state", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inner", "rank", "n", "parts"), [(1536, 48, 16, 8), (96, 8, 8, 3), (64, 24, 32, 1)])
@pytest.mark.parametrize("batch", [5, 64, 130])
def test_scan_rows(batch: int, inner: int, rank: int, n: int, parts: int, state: torch.dtype) -> None:
    made = {
        "low": draw("low", batch, parts, rank + 2 * n), "x": draw("x", batch, inner + 8)[:, :inner],
        "z": draw("z", batch, inner + 8)[:, :inner], "dt_weight": draw("w", inner, rank) / rank**0.5,
        "dt_bias": draw("b", inner) - 4, "A_log": draw("A", inner, n), "D": draw("D", inner),
        "state": draw("h", batch, inner, n),
    }  # fmt: skip
    low = cast(made, torch.bfloat16)
    low["state"] = low["state"].to(state)
    found, plain, truth = ({k: v.clone() for k, v in low.items()} for _ in range(3))
    found = {k: v.cuda() for k, v in found.items()}
    truth = {k: v.double() for k, v in truth.items()}
    y = scan_step(**found, backend="cuda")
    assert_as_accurate("y", y.cpu(), scan_step(**plain), scan_step(**truth))
    assert_as_accurate("state", found["state"].cpu(), plain["state"], truth["state"])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("state", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("sizes", "norm", "wide_D"),
    [((24, 64, 128, 1), 1, False), ((3, 40, 16, 3), 2, True), ((2, 128, 64, 1), 0, False), ((1, 8, 256, 1), 1, False)],
)
@pytest.mark.parametrize("batch", [5, 64])
def test_heads_step(
    batch: int, sizes: tuple[int, ...], norm: int, wide_D: bool, state: torch.dtype
) -> None:  # fmt: skip
    made = heads_arguments(batch, *sizes, wide_D=wide_D) | {"dt_limit": (0.1, 1.5)}
    if norm:
        made |= {"norm_weight": draw("norm", sizes[0] * sizes[1]), "norm_before_gate": norm == 2}
    low = cast(made, torch.bfloat16)
    low["state"] = low["state"].to(state)
    found, plain, truth = (dict(low) for _ in range(3))
    plain["state"] = low["state"].clone()
    found = {k: cast(v, v.dtype, "cuda") if isinstance(v, Tensor) else v for k, v in low.items()}
    truth = {k: cast(v, torch.float64) if isinstance(v, Tensor) else v for k, v in low.items()}
    results = heads_step(**found, backend="cuda"), heads_step(**plain), heads_step(**truth)
    rows = [t.rows.cpu() if isinstance(t, Pending) else t.cpu() for t in results]
    assert_as_accurate("y", *rows)
    assert_as_accurate("state", found["state"].cpu(), plain["state"], truth["state"])
    if norm:
        assert_as_accurate("squares", *(t.squares.sum(1).cpu() for t in results if isinstance(t, Pending)))
