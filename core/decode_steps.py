"""Steps of a decoder's layers: one token through a block, its mixer's state updated in place.

The step of a Mamba or Mamba-2 layer is three kernels for a few rows and six for many, see ``kernels.decode``;
other layers run their ``decode``.

Legend: B batch, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.block import Block, start_stream
from core.mixers import Mamba, Mamba2
from core.mixers.mamba import MambaState, decay_rates
from core.mixers.mamba2 import Mamba2State
from kernels import conv_update
from kernels.decode import Conv, project, project_parts, scan_step
from kernels.state_update import state_update

FEW_ROWS = 4  # up to here a projection with everything fused into it beats a matrix product between other kernels


class PlainStep:
    """Any layer, through its mixer's ``decode``; the state changes in place."""

    def __init__(self, layer: Block, state: Any) -> None:
        self.layer, self.state = layer, state

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token through the block: (B, D) branch and residual stream, before and after."""
        x, stream = self.layer.norm(x.unsqueeze(1), None if residual is None else residual.unsqueeze(1))
        x, stream = self.layer.apply_mlp(self.layer.mixer.decode(x, self.state), stream)
        return x.squeeze(1), stream.squeeze(1)

    def refresh(self) -> None:
        """Works out anew what the step keeps of the parameters."""


class FusedStep(PlainStep):
    """A block whose projections are fused with what is around them.

    Args:
        layer: The block.
        state: Its mixer's state.
        few: Whether the rows are so few that this pays; else there are plain matrix products between the kernels.
    """

    def __init__(self, layer: Block, state: Any, few: bool) -> None:
        super().__init__(layer, state)
        self.few = few

    def project_in(
        self, x: Tensor, residual: Tensor | None, first: int, following: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """in_proj of the normalised sum, and the convolution's step on its outputs from ``first`` on.

        Returns:
            The outputs; the convolved ones; the residual stream; and parts of the projection ``following`` them.
        """
        norm, m = self.layer.norm, self.layer.mixer
        assert isinstance(m, Mamba | Mamba2)
        conv = Conv(m.conv1d.weight.squeeze(1), m.conv1d.bias, self.state.conv, first)
        channels = slice(first, first + conv.weight.shape[0])
        if self.few:
            both, stream, low = project(
                x, m.in_proj.weight, m.in_proj.bias, residual=residual, norm_weight=norm.weight, eps=norm.eps,
                conv=conv, following=following,
            )  # fmt: skip
            stream = start_stream(x, norm.residual_in_fp32) if stream is None else stream
            return both, both[:, channels], stream, low
        x, stream = norm(x, residual)
        both = m.in_proj(x)
        convolved = conv_update(both[:, None, channels], conv.state, conv.weight, conv.bias, activation="silu")[:, 0]
        return both, convolved, stream, None if following is None else project_parts(convolved, following)


class MambaStep(FusedStep):
    """A Mamba block in three kernels, or six."""

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba behind RMSNorm."""
        return isinstance(layer.mixer, Mamba) and not layer.mixer.reverse and layer.norm.kind == "rms"

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        m = self.layer.mixer
        assert isinstance(m, Mamba)
        both, u, stream, low = self.project_in(x, residual, 0, m.x_proj.weight)
        assert low is not None
        z = both[:, m.d_inner :]
        y = scan_step(low, u, z, m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, self.state.ssm)
        x = project(y, m.out_proj.weight, m.out_proj.bias)[0] if self.few else m.out_proj(y)
        return self.layer.apply_mlp(x, stream)


class Mamba2Step(FusedStep):
    """A Mamba-2 block in three kernels, or six. Its decay rates are kept."""

    def __init__(self, layer: Block, state: Any, few: bool) -> None:
        super().__init__(layer, state, few)
        assert isinstance(layer.mixer, Mamba2)
        self.A = decay_rates(layer.mixer.A_log)

    def refresh(self) -> None:
        """Computes the decay rates again."""
        assert isinstance(self.layer.mixer, Mamba2)
        self.A.copy_(decay_rates(self.layer.mixer.A_log))

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba-2 without MLP channels, behind RMSNorm."""
        m = layer.mixer
        return isinstance(m, Mamba2) and not m.reverse and not m.d_mlp and layer.norm.kind == "rms"

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        m = self.layer.mixer
        assert isinstance(m, Mamba2)
        both, convolved, stream, _ = self.project_in(x, residual, m.d_ssm, None)
        size = m.ngroups * m.d_state
        z, dt = both[:, : m.d_ssm], both[:, -m.nheads :]
        u, B, C = convolved.split([m.d_ssm, size, size], dim=-1)
        heads, groups = (1, m.nheads, m.headdim), (1, m.ngroups, m.d_state)
        D = m.D.unflatten(0, (m.nheads, m.headdim)) if m.D_has_hdim else m.D
        y = state_update(
            self.state.ssm, u.unflatten(1, heads), dt.unsqueeze(1), self.A, B.unflatten(1, groups),
            C.unflatten(1, groups), D, None if m.norm else z.unflatten(1, heads), m.dt_bias,
            dt_limit=(m.dt_min, m.dt_max),
        ).flatten(1)  # fmt: skip
        if m.norm is None:
            x = project(y, m.out_proj.weight, m.out_proj.bias)[0] if self.few else m.out_proj(y)
        elif self.few:
            x, _, _ = project(
                y, m.out_proj.weight, m.out_proj.bias, gate=z, norm_weight=m.norm.weight, groups=m.ngroups,
                norm_before_gate=m.norm.norm_before_gate, eps=m.norm.eps,
            )  # fmt: skip
        else:
            x = m.out_proj(m.norm(y, z))
        return self.layer.apply_mlp(x, stream)


def narrowed(state: Any, dtype: torch.dtype | None) -> Any:
    """A layer's state with the scan's part in ``dtype``, if it is a Mamba or Mamba-2 layer's."""
    if dtype is None or not isinstance(state, MambaState | Mamba2State):
        return state
    return state._replace(ssm=state.ssm.to(dtype))


def layer_step(layer: Block, state: Any, batch: int, fused: bool) -> PlainStep:
    """The way to step a layer that fits it best."""
    for kind in (MambaStep, Mamba2Step) if fused else ():
        if kind.supports(layer):
            return kind(layer, state, batch <= FEW_ROWS)
    return PlainStep(layer, state)
