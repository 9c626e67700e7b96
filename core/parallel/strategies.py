"""How a run spreads over devices, for Lightning's trainer: ``fsdp2``, and sequences cut across processes."""

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from core.errors import UserError
from core.parallel.group import SequenceGroup, sequence_parallel, set_data_ranks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
MARKS = ("_no_weight_decay", "_no_reinit")


class _Mesh:
    """What both strategies share: the mesh of the processes, and steps in which sequences are cut.

    The mesh has the dimensions ``data`` and ``sequence``; consecutive processes share a sequence.
    """

    sequence: int = 1
    mesh: DeviceMesh | None = None
    _group: SequenceGroup | None = None

    def join(self, world: int, device: torch.device) -> None:
        """Make the mesh, once the processes know each other."""
        if world % self.sequence:
            raise UserError(
                f"--sequence_parallel is {self.sequence}, which does not divide the {world} processes; give a "
                "divisor, or other --trainer.devices"
            )
        sizes = (world // self.sequence, self.sequence)
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("data", "sequence"))
        set_data_ranks(self.mesh["data"].get_local_rank(), sizes[0])
        self._group = SequenceGroup(self.mesh["sequence"]) if self.sequence > 1 else None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step on this process's part."""
        with sequence_parallel(self._group):
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step on this process's part."""
        with sequence_parallel(self._group):
            return super().validation_step(*args, **kwargs)  # type: ignore[misc]

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step on this process's part."""
        with sequence_parallel(self._group):
            return super().test_step(*args, **kwargs)  # type: ignore[misc]

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass, in which blocks may be computed again."""
        with sequence_parallel(self._group):
            return super().backward(*args, **kwargs)  # type: ignore[misc]


class SequenceDDP(_Mesh, DDPStrategy):
    """Every process has all weights; ``sequence`` of them share each sequence.

    Args:
        sequence: Processes that share a sequence, a divisor of their number.
    """

    def __init__(self, sequence: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sequence = sequence

    def setup_environment(self) -> None:
        """Join the processes, then make the mesh."""
        super().setup_environment()
        self.join(self.world_size, self.root_device)


class FSDP2(_Mesh, ModelParallelStrategy):
    """Every process keeps a share of weights, gradients and moments, and gathers a block's weights when it runs.

    Checkpoints are the files that one process writes and reads. On CPUs the ops run on plain PyTorch operators.

    Args:
        sequence: Processes that share a sequence, a divisor of their number.
    """

    strategy_name = "fsdp2"

    def __init__(self, sequence: int = 1, **kwargs: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **kwargs)
        self.sequence = sequence

    def setup_environment(self) -> None:
        """Join the processes, then make the mesh."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        self.join(self.world_size, self.root_device)
        if self.root_device.type == "cpu":  # NumPy's views, which the CPU's kernels take, keep memory from being freed
            os.environ.setdefault("TRISCAN_BACKEND", "torch")

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, numbered as a single process numbers it; on rank 0, elsewhere empty."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        assert self.model is not None
        state: Any = get_optimizer_state_dict(self.model, optimizer, options=WHOLE)
        if not state:
            return {}
        groups, numbers = [], {}
        for group in state["param_groups"]:
            numbers |= {name: len(numbers) + i for i, name in enumerate(group["params"])}
            groups.append({**group, "params": [numbers[name] for name in group["params"]]})
        return {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file; weights and moments go to where they are kept."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            set_optimizer_state_dict(self.model, optimizer, _by_name(self.model, optimizer, state), options=options)
        return checkpoint


StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded data parallel, the second of its kind")


def _by_name(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with names for numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [order[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[i]: value for i, value in state["state"].items()}, "param_groups": groups}


def shard_module(module: LightningModule, mesh: DeviceMesh) -> None:
    """Share a module's weights out among the processes: each block of its net, and the rest as one.

    Args:
        module: With ``net``; what runs it are its steps.
        mesh: The processes, in one dimension.
    """
    marks = {name: [m for m in MARKS if hasattr(p, m)] for name, p in module.named_parameters()}
    for block in _blocks(module.net):  # type: ignore[arg-type]
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in STEPS:
        register_fsdp_forward_method(module, name)
    for name, parameter in module.named_parameters():
        for mark in marks[name]:
            setattr(parameter, mark, True)


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists in a net that have weights."""
    for child in net.children():
        if isinstance(child, nn.ModuleList):
            for member in child:
                if isinstance(member, nn.ModuleList):
                    yield from _blocks(nn.ModuleList([member]))
                elif any(True for _ in member.parameters()):
                    yield member
        else:
            yield from _blocks(child)


def empty_copy(net: nn.Module) -> nn.Module:
    """A copy whose parameters hold nothing yet, tied as they were; buffers are copied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in net.parameters()
    }
    return copy.deepcopy(net, memo)


def whole_weights(net: nn.Module) -> dict[str, Any]:
    """The weights of a sharded net, on rank 0; every process must ask."""
    return get_model_state_dict(net, options=WHOLE)
