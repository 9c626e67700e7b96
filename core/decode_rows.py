"""Steps of a decoder's layers for many rows, in models of Mamba and Mamba-2 layers alone.

Each projection is a matrix product with what is around it in the same kernel (``kernels.decode.project_rows``): four
launches a Mamba layer, three a Mamba-2 layer. A layer adds its branch to the residual stream itself. So the steps here
are handed the stream twice, rounded to the weights' dtype for the next product and as it is, and can't be mixed with
those of ``core.decode_steps``, where branch and stream travel apart.

Legend: B batch, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.block import Block, start_stream
from core.decode_steps import FEW_ROWS, PlainStep, SsdStep
from core.lm import MambaLM
from core.mixers import Mamba, Mamba2
from kernels.decode import Conv, project_parts, project_rows, scan_step

MANY_ROWS = 128  # up to here the fused products are worth more than larger tiles


class MambaRows(PlainStep):
    """A Mamba block in four kernels."""

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba behind RMSNorm, without an MLP."""
        return isinstance(layer.mixer, Mamba) and not layer.mixer.reverse and _plain(layer)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token through the block: (B, D) the stream, rounded and as it is, before and after."""
        m, norm = self.layer.mixer, self.layer.norm
        assert isinstance(m, Mamba)
        conv = Conv(m.conv1d.weight.squeeze(1), m.conv1d.bias, self.state.conv, 0)
        both, _ = project_rows(
            x, m.in_proj.weight, m.in_proj.bias, norm_weight=norm.weight, eps=norm.eps, conv=conv
        )  # fmt: skip
        u, z = both.split(m.d_inner, dim=1)
        low = project_parts(u, m.x_proj.weight)
        y = scan_step(low, u, z, m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, self.state.ssm)
        return _onto(residual, y, m)


class Mamba2Rows(SsdStep):
    """A Mamba-2 block in three kernels."""

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba-2 behind RMSNorm, without MLPs, its norm over all heads
        and after the gate."""
        m = layer.mixer
        if not isinstance(m, Mamba2) or m.reverse or m.d_mlp or not _plain(layer):
            return False
        return m.norm is None or (m.ngroups == 1 and not m.norm.norm_before_gate)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As ``MambaRows``."""
        m, norm = self.layer.mixer, self.layer.norm
        assert isinstance(m, Mamba2)
        conv = Conv(m.conv1d.weight.squeeze(1), m.conv1d.bias, self.state.conv, m.d_ssm)
        both, _ = project_rows(
            x, m.in_proj.weight, m.in_proj.bias, norm_weight=norm.weight, eps=norm.eps, conv=conv
        )  # fmt: skip
        y = self.update(both[:, m.d_ssm : -m.nheads], both[:, -m.nheads :], both[:, : m.d_ssm])
        return _onto(residual, y, m, m.norm)


def _plain(layer: Block) -> bool:
    return layer.mlp is None and layer.norm.kind == "rms"


def _onto(residual: Tensor | None, y: Tensor, mixer: Mamba | Mamba2, norm: Any = None) -> tuple[Tensor, Tensor]:
    """The stream with a mixer's output on it, rounded and as it is."""
    assert residual is not None
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    x, total = project_rows(
        y, mixer.out_proj.weight, mixer.out_proj.bias, norm_weight=weight, eps=eps, residual=residual
    )  # fmt: skip
    assert total is not None
    return x, total


def rows_steps(model: MambaLM, states: list[Any]) -> list[PlainStep] | None:
    """A step for each layer, or None if there is one that has none here."""
    steps = []
    for layer, state in zip(model.backbone.layers, states, strict=True):
        kind = next((kind for kind in (MambaRows, Mamba2Rows) if kind.supports(layer)), None)
        if kind is None:
            return None
        steps.append(kind(layer, state))
    return steps


def many(model: MambaLM, batch: int) -> bool:
    """Whether so many rows are worth these steps: their kernels are for 16-bit weights."""
    weight = model.lm_head.weight
    fits = weight.dtype in (torch.bfloat16, torch.float16) or not weight.is_cuda
    return FEW_ROWS < batch <= MANY_ROWS and fits and model.backbone.norm_f.kind == "rms"


def hidden_of(model: MambaLM, steps: list[PlainStep], tokens: Tensor) -> Tensor:
    """The normalised output (B, D) of the last layer for one token a row."""
    norm = model.backbone.norm_f
    x = model.backbone.embedding(tokens)
    stream = start_stream(x, norm.residual_in_fp32)
    for step in steps:
        x, stream = step(x, stream)
    return norm(stream)[0].to(x.dtype)
