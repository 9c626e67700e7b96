"""The decoding ops: Triton (interpreted without a GPU) against the definition in float64; states in place; refusals."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate
from contract import triton_device
from torch import Tensor

from kernels.decode import Conv, largest, project, project_parts, scan_step

DEVICE = triton_device()
DTYPES = [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
CASES = {  # of project
    "plain": dict(batch=1, inputs=5, outputs=3),
    "bias": dict(batch=2, inputs=17, outputs=9, bias=True),
    "norm": dict(batch=1, inputs=12, outputs=20, norm=True, residual=True),
    "wide": dict(batch=1, inputs=1100, outputs=19, norm=True),
    "gated": dict(batch=3, inputs=12, outputs=5, norm=True, gate=True, groups=3),
    "gate last": dict(batch=1, inputs=6, outputs=5, norm=True, gate=True, norm_before_gate=True),
    "conv": dict(batch=2, inputs=6, outputs=300, width=4, first=0, channels=150, norm=True, following=7),
    "conv inside": dict(batch=1, inputs=2100, outputs=23, width=3, first=5, channels=11, following=3),
    "short conv": dict(batch=1, inputs=4, outputs=6, width=1, first=1, channels=4),
}


def draw(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def arguments(case: dict, dtype: torch.dtype) -> dict:
    """What ``project`` takes; rows of x and of the gate are strided."""
    get = {"width": 0, **case}.get
    batch, inputs, outputs, width = case["batch"], case["inputs"], case["outputs"], get("width")
    made = {
        "x": draw("x", batch, inputs + 3),
        "weight": draw("weight", outputs, inputs) / inputs**0.5,
        "bias": draw("bias", outputs) if get("bias") else None,
        "residual": draw("residual", batch, inputs) if get("residual") else None,
        "gate": draw("gate", batch, inputs + 2) if get("gate") else None,
        "norm_weight": draw("norm", inputs) if get("norm") else None,
        "following": draw("following", case["following"], case["channels"]) if get("following") else None,
    }
    made = {name: None if t is None else t.to(DEVICE, dtype) for name, t in made.items()}
    made["x"] = made["x"][:, :inputs]
    if made["gate"] is not None:
        made["gate"] = made["gate"][:, :inputs]
    if width:
        tensors = draw("cw", case["channels"], width), draw("cb", case["channels"])
        state = draw("state", batch, width - 1, case["channels"]).to(DEVICE, dtype)
        made["conv"] = Conv(*(t.to(DEVICE, dtype) for t in tensors), state, case["first"])
    return made | {"groups": get("groups") or 1, "norm_before_gate": bool(get("norm_before_gate"))}


def widened(made: dict) -> dict:
    """The same numbers in float64, in memory of their own."""

    def wide(t: object) -> object:
        if isinstance(t, Conv):
            return Conv(*(wide(part) for part in t))
        return t.double() if isinstance(t, Tensor) and t.dtype != torch.float64 else _own(t)

    return {name: wide(value) for name, value in made.items()}


def _own(t: object) -> object:
    return t.clone() if isinstance(t, Tensor) else t


def outputs(made: dict, backend: str) -> dict[str, Tensor]:
    y, total, part = project(**made, backend=backend)
    found = {"y": y, "total": total, "part": None if part is None else part.sum(1)}
    if "conv" in made:
        found["state"] = made["conv"].state
    return {name: t for name, t in found.items() if t is not None and t.numel()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_project(name: str, dtype: torch.dtype) -> None:
    made = arguments(CASES[name], dtype)
    truth, plain = outputs(widened(made), "reference"), outputs(arguments(CASES[name], dtype), "reference")
    for key, got in outputs(made, "triton").items():
        if key == "part":  # ours is kept in float32
            got = got.to(plain[key].dtype)
        compare(f"{name} {key}", got, plain[key], truth[key])


def compare(name: str, got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """In float64 by rounding errors, below by the definition's own error."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")
    else:
        assert_as_accurate(name, got, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(5, 300, 40), (70, 1000, 17)])
def test_project_parts(batch: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    made = arguments(dict(batch=batch, inputs=inputs, outputs=outputs), dtype)
    x, weight = made["x"], made["weight"]
    truth = project_parts(x.double(), weight.double())
    parts = project_parts(x, weight, backend="triton")
    assert parts.shape == (batch, parts.shape[1], outputs)
    assert parts.shape[1] > 1
    compare("parts", parts.sum(1), project_parts(x, weight, backend="reference").squeeze(1), truth.squeeze(1))


def scan_arguments(dtype: torch.dtype, batch: int, inner: int, rank: int, n: int, parts: int) -> dict[str, Tensor]:
    both = draw("xz", batch, 2 * inner)
    shapes = {"dt_weight": (inner, rank), "dt_bias": (inner,), "A_log": (inner, n), "D": (inner,)}
    made = {name: draw(name, *shape).to(dtype) for name, shape in shapes.items()}
    low = draw("low", batch, parts, rank + 2 * n) / parts**0.5  # parts of one sum
    made |= {"low": low, "state": draw("state", batch, inner, n)}
    made = {name: t.to(DEVICE) for name, t in made.items()}
    if dtype != torch.float64:
        made |= {name: made[name].float() for name in ("low", "state", "A_log", "D")}
    x, z = both.to(DEVICE, dtype).chunk(2, dim=1)
    return made | {"x": x, "z": z}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(
    "sizes", [(1, 5, 1, 3, 1), (2, 40, 3, 4, 37), (9, 7, 2, 16, 2), (19, 70, 5, 7, 3), (6, 20, 3, 40, 1)]
)
def test_scan_step(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    made = scan_arguments(dtype, *sizes)
    made["dt_bias"] -= 6  # small steps, which a plain log(1 + exp) loses
    want = {name: _own(t.double()) for name, t in made.items()}
    plain = {name: _own(t) for name, t in made.items()}
    truth = scan_step(**want, backend="reference")
    reference = scan_step(**plain, backend="reference")
    compare("y", scan_step(**made, backend="triton"), reference, truth)
    compare("state", made["state"], plain["state"], want["state"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_largest(dtype: torch.dtype) -> None:
    x = draw("scores", 5, 40_000).to(DEVICE, dtype)  # bfloat16 has many equal values
    x[1], x[2, 7], x[3] = -torch.inf, torch.inf, 0
    x[4, 39_000:] = torch.nan
    got = largest(x[:, :39_990], backend="triton")
    first = [int((row == row.max()).nonzero()[0]) for row in x[:4, :39_990]]
    assert got.tolist() == [*first, 39_000]
    with pytest.raises(ValueError, match=r"wanted \(B, V\) with V >= 1"):
        largest(x[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(3, 4).to(DEVICE, torch.float64)), r"weight: got shape \(3, 4\), wanted \(O, K\)"),
        (dict(groups=5), "groups: got 5, wanted a divisor of K = 6"),
        (dict(gate=torch.zeros(2, 5).to(DEVICE, torch.float64)), r"gate: got shape \(2, 5\)"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    made = arguments(CASES["conv"], torch.float64) | change
    with pytest.raises(ValueError, match=message):
        project(**made, backend="reference")
    made = arguments(CASES["conv"], torch.float64)
    with pytest.raises(ValueError, match=r"conv\.first: got 151"):
        project(**{**made, "conv": made["conv"]._replace(first=151)}, backend="reference")
