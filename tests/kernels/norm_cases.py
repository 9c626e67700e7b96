"""The cases that every implementation of the norms is held to, and how they are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accuracy import assert_as_accurate
from torch import Tensor

from kernels import norm


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    shape: tuple[int, ...] = (3, 5, 6)
    kind: str = "rms"
    bias: bool = False
    residual: bool = False
    z: bool = False
    group_size: int | None = None
    norm_before_gate: bool = True
    residual_in_fp32: bool = True

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors, drawn in float32 so that all dtypes see the same numbers, then rounded; weights stay float32."""
        generator = torch.Generator().manual_seed(0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = {
            "x": (self.shape, dtype),
            "weight": (self.shape[-1:], wide),
            "bias": (self.shape[-1:] if self.bias else None, wide),
            "residual": (self.shape if self.residual else None, dtype),
            "z": (self.shape if self.z else None, dtype),
        }
        return {
            name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
            for name, (shape, dtype) in shapes.items()
            if shape is not None
        }

    def options(self) -> dict[str, Any]:
        """The other arguments."""
        names = ("kind", "group_size", "norm_before_gate", "residual_in_fp32")
        return {name: getattr(self, name) for name in names}


CASES = {
    "rms": Case(),
    "layer": Case(kind="layer", bias=True),
    "layer_no_bias": Case(kind="layer"),
    "rms_bias": Case(bias=True),
    "rms_residual": Case(residual=True),
    "layer_residual": Case(kind="layer", residual=True, bias=True),
    "rms_residual_low": Case(residual=True, residual_in_fp32=False),
    "layer_residual_low": Case(kind="layer", residual=True, residual_in_fp32=False, z=True),
    "gate_after": Case(z=True, bias=True),
    "gate_before": Case(z=True, norm_before_gate=False),
    "layer_gate_before": Case(kind="layer", bias=True, z=True, norm_before_gate=False, residual=True),
    "groups": Case(group_size=2, z=True, norm_before_gate=False),
    "layer_groups": Case(kind="layer", group_size=3, bias=True, z=True, residual=True),
    "single_channels": Case(shape=(4, 3), group_size=1, bias=True),
    "vector": Case(shape=(7,), residual=True),
    "many_rows": Case(shape=(77, 3, 67), z=True, residual=True, bias=True),
    "wide": Case(shape=(3, 2100), kind="layer", z=True),
    "no_rows": Case(shape=(0, 6), residual=True, bias=True),
}

ROUNDED = (  # also run in lower precision
    "rms", "layer", "rms_residual", "rms_residual_low", "layer_residual_low", "layer_gate_before",
    "groups", "many_rows",
)  # fmt: skip


def run(
    case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", rounded: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients (of a loss over y and the sum) by name, of inputs that were first ``rounded``."""
    inputs = case.inputs(rounded or dtype, device)
    inputs = {n: t.detach().to(dtype if rounded else t.dtype).requires_grad_() for n, t in inputs.items()}
    y, s = norm(**inputs, **case.options(), return_residual=True, backend=backend)
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator).to(device, rounded or y.dtype).to(y.dtype)
    # bfloat16 first: the same numbers in every dtype of s
    ds = torch.randn(s.shape, generator=generator).to(device).bfloat16().to(s.dtype)
    grads = torch.autograd.grad([y, s], list(inputs.values()), [dy, ds])
    return {"y": y.detach(), "s": s.detach(), **{f"d{n}": g for n, g in zip(inputs, grads, strict=True)}}


def compare(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Holds a backend to the reference, judged by float64 on the same rounded inputs."""
    got, reference = run(case, dtype, backend, device), run(case, dtype, "reference", device)
    for name, truth in run(case, torch.float64, "reference", rounded=dtype).items():
        if truth.numel():
            assert_as_accurate(name, got[name], reference[name], truth)
        else:
            assert (got[name].shape, got[name].dtype) == (truth.shape, reference[name].dtype), name
