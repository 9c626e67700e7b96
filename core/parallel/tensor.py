"""Tensor parallelism: the heads of every Mamba-2 layer and the channels of every MLP shared out among processes.

A process holds its heads' rows of the fused input projection (z, x and dt by head, B and C by group), of the
convolution, of what is one number a head, and their columns of the output projection; ops see local tensors. Outputs
of a layer add up over the processes. Between layers the tokens are shared out (Korthikanti et al. 2022): each process
adds and normalises its own, a layer gathers all tokens and scatters its sums.

Where a group of heads spans processes, they share its B and C, whose gradients they add up, and the mean square of its
norm.

Legend: R ranks, B batch, L length, D model width, F channels of the scan, H heads, G groups, N state.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from core.block import AddNorm, Block, GatedMLP
from core.lm import Backbone, MambaLM
from core.loss import linear_cross_entropy
from core.mixers.mamba2 import Mamba2
from core.parallel.cuts import Cut, Part, cut_of, cut_parameter, keep_names, replicate
from core.parallel.tensor_group import TensorGroup, spread
from kernels.checks import autocast_dtype
from kernels.gated_squares import gate_with_squares


class _SharedNorm(torch.autograd.Function):
    """y (..., F) over the root of its mean square (plus eps), of which each of several ranks has a share."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, eps: float, sharers: DeviceMesh) -> Tensor:
        wide = torch.promote_types(torch.float32, y.dtype)
        with torch.autocast(y.device.type, enabled=False):  # which would widen all of y
            mean = torch.linalg.vector_norm(y, dim=-1, keepdim=True, dtype=wide).square()
        dist.all_reduce(mean, group=sharers.get_group())
        rstd = (mean / (y.shape[-1] * sharers.size()) + eps).rsqrt()
        ctx.save_for_backward(y, rstd)
        ctx.sharers = sharers
        return torch.mul(y, rstd, out=torch.empty_like(y))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        y, rstd = ctx.saved_tensors
        inner = torch.mul(dy, y, out=torch.empty_like(y, dtype=rstd.dtype)).sum(-1, keepdim=True)
        dist.all_reduce(inner, group=ctx.sharers.get_group())
        slope = inner * rstd**3 / (y.shape[-1] * ctx.sharers.size())
        return torch.addcmul(dy * rstd, y, slope, value=-1).to(y.dtype), None, None


class _ParallelMamba2(Mamba2):
    """A Mamba-2 layer of this rank's heads."""

    group: TensorGroup
    spanning: int  # ranks that share a group of heads

    def cut(self, group: TensorGroup) -> None:
        """Keep this rank's share of a whole layer."""
        ranks = group.size
        for name, count, fits in (
            ("heads", self.nheads, self.nheads % ranks == 0),
            ("channels of the MLP", self.d_mlp, self.d_mlp % ranks == 0),
            ("groups", self.ngroups, self.ngroups % ranks == 0 or ranks % self.ngroups == 0),
        ):
            if not fits:
                kind = "a multiple or a divisor" if name == "groups" else "a multiple"
                raise ValueError(
                    f"got {count} {name} for {ranks} processes, wanted {kind} of that number; use fewer processes"
                )
        self.group, self.spanning = group, max(1, ranks // self.ngroups)
        self.fuses = self.spanning == 1
        self._cut_parameters()
        self.d_inner, self.d_ssm, self.d_mlp = (n // ranks for n in (self.d_inner, self.d_ssm, self.d_mlp))
        self.nheads, self.ngroups = self.nheads // ranks, max(1, self.ngroups // ranks)
        self.conv_dim = self.d_ssm + 2 * self.ngroups * self.d_state
        keep_names(self)

    def _cut_parameters(self) -> None:
        mesh, state = self.group.mesh, self.ngroups * self.d_state
        sharers = self.group.sharers(self.spanning).get_group() if self.spanning > 1 else None
        mlp, scan, keys, heads = Part(self.d_mlp), Part(self.d_ssm), Part(state, self.spanning), Part(self.nheads)
        rows = Cut(mesh, 0, [mlp, mlp, scan, scan, keys, keys, heads], sharers)
        for name in ("weight", "bias"):
            cut_parameter(self.in_proj, name, rows)
            cut_parameter(self.conv1d, name, Cut(mesh, 0, [scan, keys, keys], sharers))
        for name in ("dt_bias", "A_log", "D", "init_states"):
            cut_parameter(self, name, Cut(mesh, 0, [scan if name == "D" and self.D_has_hdim else heads]))
        if self.norm is not None:
            cut_parameter(self.norm, "weight", Cut(mesh, 0, [scan]))
        cut_parameter(self.out_proj, "weight", Cut(mesh, 1, [mlp, scan]))

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        y = super().forward(x, seq_idx, cu_seqlens)
        return self._sum(y) if self.fuses else y  # else _output has added it up

    def _enter(self, x: Tensor) -> Tensor:
        """The input projection of all tokens."""
        layer = self.in_proj
        for name in ("in_proj", "out_proj"):
            if type(getattr(self, name)) is not nn.Linear:
                raise ValueError(
                    f"{name}: got {type(getattr(self, name)).__name__}, wanted Linear; tensor-parallel layers take no "
                    "adapters and no quantised weights"
                )
        bias = None if layer.bias is None else self.group.summed(layer.bias)
        return self.group.enter_through(x, self.group.summed(layer.weight), bias)

    def _filters(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.group.summed(self.conv1d.weight).squeeze(1), self.conv1d.bias
        return weight, None if bias is None else self.group.summed(bias)

    def _sum(self, y: Tensor) -> Tensor:
        """The layer's output; each rank has added the bias, and one of them is enough."""
        bias = self.out_proj.bias
        if bias is not None and self.group.rank > 0:
            y = y - bias.detach().to(y.dtype)
        return self.group.leave(y)

    def _norms_sums(self) -> bool:
        """Whether the norm can wait for the projection: it divides all that is projected by one number a token."""
        weight, group = self.out_proj.weight, self.group
        fits = (autocast_dtype(weight.device) or weight.dtype) != torch.float16  # what is not normalised may be large
        return fits and self.d_mlp == 0 and group.by_token and self.spanning == group.size

    def _output(self, mlp: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """As one rank does it; where a norm's group spans several, with a mean square that they share."""
        norm, y, squares = self.norm, y.flatten(2), None
        if norm is not None and self.spanning > 1 and not norm.norm_before_gate:
            rows, squares = gate_with_squares(y.flatten(0, 1), z.flatten(0, 1))
            y = rows.view(y.shape)
        if norm is not None and squares is not None and self._norms_sums():
            weight = self.out_proj.weight * norm.weight
            return self.group.leave_normed(y, squares, weight, self.out_proj.bias, norm.eps)
        gain: Tensor | None = None
        if norm is not None and self.spanning > 1:
            y = _SharedNorm.apply(y, norm.eps, self.group.sharers(self.spanning))  # type: ignore[assignment]
            gain = norm.weight
            if norm.norm_before_gate:
                y = y * F.silu(z)
        elif norm is not None:
            y = norm(y, z)
        if self.d_mlp > 0:
            z0, x0 = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
            gain = None if gain is None else torch.cat([gain.new_ones(self.d_mlp), gain])
        weight = self.out_proj.weight
        if gain is not None:  # the norm's weight costs no pass over y
            weight = weight * gain
        return self.group.leave_through(y, weight, self.out_proj.bias)


class _ParallelMLP(GatedMLP):
    """A gated MLP of this rank's hidden channels."""

    group: TensorGroup

    def cut(self, group: TensorGroup) -> None:
        """Keep this rank's share of a whole MLP."""
        hidden = self.fc2.in_features
        if hidden % group.size:
            raise ValueError(
                f"got {hidden} hidden channels for {group.size} processes, wanted a multiple of that number; use fewer"
            )
        self.group = group
        for name in ("weight", "bias"):
            cut_parameter(self.fc1, name, Cut(group.mesh, 0, [Part(hidden), Part(hidden)]))
        cut_parameter(self.fc2, "weight", Cut(group.mesh, 1, [Part(hidden)]))
        keep_names(self)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(self.group.enter(x))
        if self.fc2.bias is not None and self.group.rank > 0:
            y = y - self.fc2.bias.detach().to(y.dtype)
        return self.group.leave(y)


class _ParallelNorm(AddNorm):
    """An addition and norm of this rank's tokens, or of all."""

    group: TensorGroup

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.group.by_token:
            return super().forward(x, residual)
        bias = None if self.bias is None else self.group.summed(self.bias)
        return self.normalise(x, residual, self.group.summed(self.weight), bias)


class _ParallelBlock(Block):
    """A block between whose layers tokens are shared out, also where it is computed again."""

    group: TensorGroup

    def _forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        with self.group.tokens_shared():
            return super()._forward(*args)


class _ParallelBackbone(Backbone):
    """A backbone between whose blocks tokens are shared out."""

    group: TensorGroup

    def forward(self, input_ids: Tensor, *, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """As ``Backbone.forward``: all tokens' hidden states, on every rank."""
        if input_ids.shape[1] % self.group.size:
            raise ValueError(
                f"input_ids: got {input_ids.shape[1]} tokens for {self.group.size} processes that share layers, wanted "
                "a multiple of that number; pad the sequences"
            )
        self.group.sum_together(self._held_by_several())
        x, residual = self.group.share_tokens(self.embedding(input_ids)), None
        for layer in self.layers:
            x, residual = layer(x, residual, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        with self.group.tokens_shared():
            return self.group.gather_tokens(self.norm_f(x, residual)[0])

    def _held_by_several(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradients ranks add up."""
        for module in self.modules():
            if isinstance(module, _ParallelNorm):
                yield from module.parameters()
            elif isinstance(module, _ParallelMamba2):
                yield from (p for p in module.parameters() if cut_of(p) is not None)


_PARALLEL = {Mamba2: _ParallelMamba2, GatedMLP: _ParallelMLP, AddNorm: _ParallelNorm, Block: _ParallelBlock,
             Backbone: _ParallelBackbone}  # fmt: skip


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> TensorGroup:
    """Shares the layers of a model out among processes, in place.

    Outputs, losses and, summed where they are shared, gradients are those of one process. The state dict has whole
    parameters under their names, saving and loading; all ranks must save together. Embedding and head stay whole;
    ``head_loss`` shares the head's work out by tokens. Gradients may be taken of ``forward`` alone, of a model
    whose blocks are ``core.block.Block``; sequences must have a number of tokens that ranks can share.

    Args:
        model: A ``MambaLM`` of Mamba-2 blocks, a part of one or a single layer, the same on all ranks: rank 0's
            numbers are taken. Optimisers and DDP come after it.
        mesh: The ranks, in one dimension.

    Raises:
        ValueError: For another mixer, or sizes that the ranks cannot share.
    """
    group = TensorGroup(mesh)
    for name, module in model.named_modules():
        if isinstance(module, Block) and type(module.mixer) is not Mamba2:
            raise ValueError(
                f"{name}: got {type(module.mixer).__name__}, wanted Mamba2, the one mixer whose heads can be shared out"
            )
    replicate(model.parameters(), mesh)
    for module in list(model.modules()):
        if (kind := _PARALLEL.get(type(module))) is not None:
            module.__class__ = kind
            module.group = group  # type: ignore[assignment]
            if isinstance(module, _ParallelMamba2 | _ParallelMLP):
                module.cut(group)
    return group


def group_of(net: nn.Module) -> TensorGroup | None:
    """The ranks that share a net's layers out; None: they are not shared."""
    for module in net.modules():
        if isinstance(module, _ParallelMamba2 | _ParallelMLP):
            return module.group
    return None


def head_loss(net: MambaLM, hidden: Tensor, wanted: Tensor, ignore_index: int = -100) -> Tensor:
    """The sum of a language model's losses; of a tensor-parallel one, each rank sees to its tokens.

    Args:
        net: The model, whose head is taken.
        hidden: (B, L, D) of its backbone.
        wanted: (B, L) int64, the token to predict at each place.
        ignore_index: Places with this target count for nothing.
    """
    group, weight = getattr(net.backbone, "group", None), net.lm_head.weight
    if group is None:
        return linear_cross_entropy(hidden, weight, wanted, ignore_index=ignore_index, reduction="sum")
    rows, targets = group.own_rows(hidden.flatten(0, 1)), group.own_rows(wanted.flatten())
    total = linear_cross_entropy(rows, spread(weight, group.mesh), targets, ignore_index=ignore_index, reduction="sum")
    return group.add_up(total)
