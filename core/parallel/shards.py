"""Weights of which every process keeps a share (FSDP2, Zhao et al. 2023), and files with all of them."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from core.parallel.cuts import MARKS

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
GIVEN = StateDictOptions(full_state_dict=True)


def shard_module(module: nn.Module, net: nn.Module, mesh: DeviceMesh) -> None:
    """Share a module's weights out among the processes: each block of its net, and the rest as one.

    Args:
        module: What holds the net; its steps run it.
        net: With blocks in lists.
        mesh: The processes, in one dimension.
    """
    for block in _blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in STEPS:
        register_fsdp_forward_method(module, name)


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists in a net that have weights; of stages, which have more, their blocks."""
    for child in net.children():
        if isinstance(child, nn.ModuleList):
            for member in child:
                inner = getattr(member, "blocks", member)
                if isinstance(inner, nn.ModuleList):
                    yield from _blocks(nn.ModuleList([inner]))
                elif any(True for _ in member.parameters()):
                    yield member
        else:
            yield from _blocks(child)


def empty_copy(net: nn.Module) -> nn.Module:
    """A copy whose parameters hold nothing yet, tied as they were; buffers are copied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in net.parameters()
    }
    found = copy.deepcopy(net, memo)
    copy_marks(net, found)
    return found


def copy_marks(source: nn.Module, target: nn.Module) -> None:
    """Mark parameters as those of another net are, such as those without weight decay."""
    own = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        for mark in MARKS:
            if hasattr(parameter, mark):
                setattr(own[name], mark, getattr(parameter, mark))


def whole_weights(net: nn.Module) -> dict[str, Any]:
    """The weights of a sharded net, on rank 0; every process must ask."""
    return get_model_state_dict(net, options=GATHERED)


def whole_moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state, numbered as a single process numbers it; on rank 0, every process must ask."""
    state: Any = get_optimizer_state_dict(model, optimizer, options=GATHERED)
    if not state:
        return {}
    groups, numbers = [], {}
    for group in state["param_groups"]:
        numbers |= {name: len(numbers) + i for i, name in enumerate(group["params"])}
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def load_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Put whole weights where they are kept."""
    set_model_state_dict(model, dict(weights), options=GIVEN)


def load_moments(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put an optimizer's whole state where it is kept."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [order[i] for i in group["params"]]} for group in state["param_groups"]]
    named = {"state": {order[i]: value for i, value in state["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, named, options=GIVEN)
