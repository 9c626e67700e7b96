"""Parameters of which each process holds a piece: how they are cut, put together again, and told their gradients.

A fused weight is cut part by part, so that a process holds its rows of each. A part that fewer pieces are made of than
there are processes is held by several, next to each other, which add up its gradient (``TensorGroup.summed``).

Legend: R ranks of the group.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

MARKS = ("_no_weight_decay", "_no_reinit")  # what optimisers and initialisers read off a parameter


@dataclass(frozen=True)
class Part:
    """Rows of a weight, in the whole one.

    Args:
        size: Their number.
        shared: How many neighbouring ranks hold the same piece.
    """

    size: int
    shared: int = 1


class Cut:
    """A way to cut a tensor along one dimension, part by part.

    Args:
        mesh: The ranks, in one dimension.
        dim: The dimension.
        parts: What lies along it.
        sharers: The ranks that hold the same pieces as this one, where parts are shared.
    """

    def __init__(
        self, mesh: DeviceMesh, dim: int, parts: Sequence[Part], sharers: dist.ProcessGroup | None = None
    ) -> None:
        self.mesh, self.dim, self.parts, self.sharers = mesh, dim, [p for p in parts if p.size], sharers
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()

    def _sizes(self) -> list[int]:
        """Rows of each part that a rank holds."""
        return [part.size * part.shared // self.ranks for part in self.parts]

    def piece(self, whole: Tensor) -> Tensor:
        """This rank's piece, a copy."""
        parts = whole.split([part.size for part in self.parts], self.dim)
        pieces = [
            t.narrow(self.dim, self.rank // part.shared * size, size)
            for t, part, size in zip(parts, self.parts, self._sizes(), strict=True)
        ]
        return torch.cat(pieces, self.dim)

    @torch.no_grad()
    def whole(self, piece: Tensor) -> Tensor:
        """The whole tensor; all ranks must ask."""
        rows = DTensor.from_local(piece.contiguous(), self.mesh, [Shard(self.dim)], run_check=False).full_tensor()
        pieces = rows.unflatten(self.dim, (self.ranks, -1)).split(self._sizes(), self.dim + 1)
        kept = [t[(slice(None),) * self.dim + (slice(None, None, part.shared),)] for t, part in self._with(pieces)]
        return torch.cat([t.flatten(self.dim, self.dim + 1) for t in kept], self.dim)

    def shared_rows(self, t: Tensor) -> list[Tensor]:
        """Views of those rows of a piece that other ranks hold too."""
        return [t for t, part in self._with(t.split(self._sizes(), self.dim)) if part.shared > 1]

    def square(self, grad: Tensor) -> Tensor:
        """This rank's share of the sum of squares of a whole gradient."""
        pieces = self._with(grad.split(self._sizes(), self.dim))
        return torch.stack([t.float().square().sum() / part.shared for t, part in pieces]).sum()

    def _with(self, pieces: Iterable[Tensor]) -> Iterable[tuple[Tensor, Part]]:
        return zip(pieces, self.parts, strict=True)


def cut_of(parameter: Tensor) -> Cut | None:
    """How a parameter is cut; None: every rank has all of it."""
    return getattr(parameter, "_cut", None)


def cut_parameter(module: nn.Module, name: str, cut: Cut) -> None:
    """Put this rank's piece in the place of a parameter, which may be None."""
    whole = getattr(module, name)
    if whole is None:
        return
    own = nn.Parameter(cut.piece(whole.detach()), whole.requires_grad)
    own._cut = cut  # type: ignore[attr-defined]
    for mark in MARKS:
        if hasattr(whole, mark):
            setattr(own, mark, getattr(whole, mark))
    setattr(module, name, own)


def keep_names(module: nn.Module) -> None:
    """Let the state dict of a module hold whole parameters, and take them; all ranks must save together."""
    module.register_state_dict_post_hook(_gather)
    module.register_load_state_dict_pre_hook(_take_pieces)


def _gather(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters():
        if (cut := cut_of(parameter)) is not None and prefix + name in state:
            state[prefix + name] = cut.whole(state[prefix + name])


def _take_pieces(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters():
        cut, given = cut_of(parameter), state.get(prefix + name)
        if cut is None or given is None:
            continue
        if list(given.shape) == _whole_shape(parameter):  # another shape is for PyTorch to refuse
            state[prefix + name] = cut.piece(given)


def gradient_norm(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> Tensor:
    """The 2-norm of all gradients, those of whole parameters.

    Args:
        parameters: Some with pieces of their gradients, some with all of it, which is the same on all ranks.
        mesh: The ranks; all must ask.
    """
    total: Any = 0.0
    for parameter in parameters:
        if parameter.grad is not None:
            cut = cut_of(parameter)
            square = parameter.grad.float().square().sum() / mesh.size() if cut is None else cut.square(parameter.grad)
            total = total + square
    dist.all_reduce(total, group=mesh.get_group())
    return total.sqrt()


def replicate(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Give all ranks the numbers of rank 0."""
    for parameter in parameters:
        dist.broadcast(parameter.detach(), group_src=0, group=mesh.get_group())


def whole_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with numbers for whole parameters; all ranks must ask.

    Raises:
        ValueError: If it keeps tensors of which a piece says nothing about the whole.
    """
    return _moments(optimizer, state, lambda cut, t: cut.whole(t), lambda p: list(p.shape))


def load_pieces(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict for whole parameters with the numbers of this rank's pieces."""
    return _moments(optimizer, state, lambda cut, t: cut.piece(t), _whole_shape)


def _moments(
    optimizer: Any, state: dict[str, Any], change: Callable[[Cut, Tensor], Tensor], shape: Callable[[Tensor], list[int]]
) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {}
    for index, values in state["state"].items():
        cut = cut_of(parameters[index])
        found[index] = dict(values)
        for name, value in values.items():
            if cut is None or not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if list(value.shape) != shape(parameters[index]):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name} of shape {tuple(value.shape)} for a shared parameter, "
                    "wanted the parameter's shape; take adamw, sgd or another elementwise optimizer"
                )
            found[index][name] = change(cut, value)
    return {**state, "state": found}


def _whole_shape(piece: Tensor) -> list[int]:
    shape, cut = list(piece.shape), cut_of(piece)
    if cut is not None:
        shape[cut.dim] = sum(part.size for part in cut.parts)
    return shape
