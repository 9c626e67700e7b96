"""Steps of a decoder's layers: one token through a block, its mixer's state updated in place.

The step of a Mamba or Mamba-2 layer is three kernels (for many rows of Mamba four, others), see ``kernels.decode``
and ``kernels.decode.many``; other layers run their ``decode``.

Legend: B batch, D model width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from core.block import Block, start_stream
from core.mixers import Mamba, Mamba2
from core.mixers.mamba import MambaState, decay_rates
from core.mixers.mamba2 import Mamba2State
from kernels import conv_update
from kernels.decode import Conv, project, project_parts, scan_step
from kernels.decode.many import Pending, add_rows, heads_fit, heads_step, multiply_rows, rows_fit
from kernels.state_update import state_update

MANY_ROWS = 64  # up to here a tile of rows is one, and weights are read once
FEW_ROWS = 4  # up to here a projection with everything fused into it beats a matrix product between other kernels


class PlainStep:
    """Any layer, through its mixer's ``decode``; the state changes in place."""

    def __init__(self, layer: Block, state: Any) -> None:
        self.layer, self.state = layer, state

    def __call__(self, x: Tensor | Pending, residual: Tensor | None) -> tuple[Tensor | Pending, Tensor]:
        """One token through the block.

        Args:
            x: (B, D) the branch of the block before; or the stream on its way through this block's norm, where the
                block before has added its branch already.
            residual: (B, D) the residual stream; None in the first block.

        Returns:
            The same of this block.
        """
        assert isinstance(x, Tensor)
        branch, stream = self.layer.norm(x.unsqueeze(1), None if residual is None else residual.unsqueeze(1))
        branch, stream = self.layer.apply_mlp(self.layer.mixer.decode(branch, self.state), stream)
        return branch.squeeze(1), stream.squeeze(1)

    def refresh(self) -> None:
        """Works out anew what the step keeps of the parameters."""


class FusedStep(PlainStep):
    """A block whose projections are fused with what is around them.

    Args:
        layer: The block.
        state: Its mixer's state.
        few: Whether the rows are so few that weights are read to registers; else products are made on tensor cores.
    """

    def __init__(self, layer: Block, state: Any, few: bool) -> None:
        super().__init__(layer, state)
        self.few = few
        self.hands_on = not few and len(self.state.conv) <= MANY_ROWS and products_fit(layer, self.conv)
        self.following: Block | None = None  # the next block, if this one begins its norm

    @property
    def conv(self) -> Conv:
        """The convolution's step on outputs of in_proj."""
        m = self.layer.mixer
        assert isinstance(m, Mamba | Mamba2)
        first = m.d_ssm if isinstance(m, Mamba2) else 0
        return Conv(m.conv1d.weight.squeeze(1), m.conv1d.bias, self.state.conv, first)

    def precede(self, step: PlainStep) -> None:
        """Have this block add its branch to the stream and begin the norm of the block behind it, if both can."""
        if self.hands_on and self.layer.mlp is None and isinstance(step, FusedStep) and step.hands_on:
            mixer = self.layer.mixer
            assert isinstance(mixer, Mamba | Mamba2)
            if step.layer.norm.weight.dtype == mixer.out_proj.weight.dtype:
                self.following = step.layer

    def project_in(
        self, x: Tensor | Pending, residual: Tensor | None, following: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """in_proj of the normalised sum, and the convolution's step on some of its outputs.

        Returns:
            The outputs; the convolved ones; the residual stream; and of few rows parts of the projection ``following``.
        """
        norm, m, conv = self.layer.norm, self.layer.mixer, self.conv
        assert isinstance(m, Mamba | Mamba2)
        channels = slice(conv.first, conv.first + conv.weight.shape[0])
        if self.few:
            assert isinstance(x, Tensor)
            both, stream, low = project(
                x, m.in_proj.weight, m.in_proj.bias, residual=residual, norm_weight=norm.weight, eps=norm.eps,
                conv=conv, following=following,
            )  # fmt: skip
            stream = start_stream(x, norm.residual_in_fp32) if stream is None else stream
            return both, both[:, channels], stream, low
        if isinstance(x, Tensor):
            x, residual = norm(x, residual)
        if self.hands_on:
            both = multiply_rows(x, m.in_proj.weight, m.in_proj.bias, eps=norm.eps, conv=conv)
            convolved = both[:, channels]
        else:
            assert isinstance(x, Tensor)
            both = m.in_proj(x)
            mixed = both[:, None, channels]
            convolved = conv_update(mixed, conv.state, conv.weight, conv.bias, activation="silu").squeeze(1)
        return both, convolved, cast(Tensor, residual), None

    def project_out(self, y: Tensor | Pending, stream: Tensor, eps: float = 0.0) -> tuple[Tensor | Pending, Tensor]:
        """out_proj of many rows, which may wait for a norm with ``eps``, and what follows it."""
        m = self.layer.mixer
        assert isinstance(m, Mamba | Mamba2)
        weight, bias = m.out_proj.weight, m.out_proj.bias
        if self.following is not None:
            return add_rows(y, weight, bias, stream, self.following.norm.weight, eps=eps)
        x = multiply_rows(y, weight, bias, eps=eps) if isinstance(y, Pending) else m.out_proj(y)
        return self.layer.apply_mlp(x, stream)


class MambaStep(FusedStep):
    """A Mamba block in three kernels, or four for many rows."""

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba behind RMSNorm."""
        return isinstance(layer.mixer, Mamba) and not layer.mixer.reverse and layer.norm.kind == "rms"

    def __call__(self, x: Tensor | Pending, residual: Tensor | None) -> tuple[Tensor | Pending, Tensor]:
        m = self.layer.mixer
        assert isinstance(m, Mamba)
        both, u, stream, low = self.project_in(x, residual, m.x_proj.weight)
        z, parameters = both[:, m.d_inner :], (m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, self.state.ssm)
        low = project_parts(u, m.x_proj.weight) if low is None else low
        y = scan_step(low, u, z, *parameters)
        if self.few:
            return self.layer.apply_mlp(project(y, m.out_proj.weight, m.out_proj.bias)[0], stream)
        return self.project_out(y, stream)


class Mamba2Step(FusedStep):
    """A Mamba-2 block in three kernels. Its decay rates are kept."""

    def __init__(self, layer: Block, state: Any, few: bool) -> None:
        super().__init__(layer, state, few)
        m = layer.mixer
        assert isinstance(m, Mamba2)
        self.A = decay_rates(m.A_log)
        x = m.in_proj.weight.new_empty(1, m.in_proj.out_features)[:, m.d_ssm : 2 * m.d_ssm]
        weight = None if m.norm is None else m.norm.weight
        fits = heads_fit(x, state.ssm, weight, m.dt_bias, m.A_log, m.D)
        self.steps_heads = self.hands_on and (m.norm is None or m.ngroups == 1) and fits

    def refresh(self) -> None:
        """Computes the decay rates again."""
        assert isinstance(self.layer.mixer, Mamba2)
        if not self.steps_heads:  # which works them out itself
            self.A.copy_(decay_rates(self.layer.mixer.A_log))

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba-2 without MLP channels, behind RMSNorm."""
        m = layer.mixer
        return isinstance(m, Mamba2) and not m.reverse and not m.d_mlp and layer.norm.kind == "rms"

    def __call__(self, x: Tensor | Pending, residual: Tensor | None) -> tuple[Tensor | Pending, Tensor]:
        m = self.layer.mixer
        assert isinstance(m, Mamba2)
        both, convolved, stream, _ = self.project_in(x, residual)
        size = m.ngroups * m.d_state
        z, dt = both[:, : m.d_ssm], both[:, -m.nheads :]
        u, B, C = convolved.split([m.d_ssm, size, size], dim=-1)
        if self.steps_heads:
            weight, first, eps = None, False, 0.0
            if m.norm is not None:
                weight, first, eps = m.norm.weight, m.norm.norm_before_gate, m.norm.eps
            y = heads_step(
                u, B, C, z, dt, m.dt_bias, m.A_log, m.D, self.state.ssm, norm_weight=weight, norm_before_gate=first,
                dt_limit=(m.dt_min, m.dt_max),
            )  # fmt: skip
            return self.project_out(y, stream, eps)
        heads, groups = (1, m.nheads, m.headdim), (1, m.ngroups, m.d_state)
        D = m.D.unflatten(0, (m.nheads, m.headdim)) if m.D_has_hdim else m.D
        y = state_update(
            self.state.ssm, u.unflatten(1, heads), dt.unsqueeze(1), self.A, B.unflatten(1, groups),
            C.unflatten(1, groups), D, None if m.norm else z.unflatten(1, heads), m.dt_bias,
            dt_limit=(m.dt_min, m.dt_max),
        ).flatten(1)  # fmt: skip
        if not self.few:
            return self.project_out(y if m.norm is None else m.norm(y, z), stream)
        if m.norm is None:
            x = project(y, m.out_proj.weight, m.out_proj.bias)[0]
        else:
            x, _, _ = project(
                y, m.out_proj.weight, m.out_proj.bias, gate=z, norm_weight=m.norm.weight, groups=m.ngroups,
                norm_before_gate=m.norm.norm_before_gate, eps=m.norm.eps,
            )  # fmt: skip
        return self.layer.apply_mlp(x, stream)


def products_fit(layer: Block, conv: Conv) -> bool:
    """Whether the products of a layer take rows that wait for a norm, and hand such on."""
    m = layer.mixer
    assert isinstance(m, Mamba | Mamba2)
    into, out = m.in_proj.weight, m.out_proj.weight
    return rows_fit(into[:1], into, m.in_proj.bias, conv) and rows_fit(out[:1], out, m.out_proj.bias)


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
