"""How a run spreads over devices, for Lightning's trainer: data, sequences and layers shared out, and FSDP2."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from core.errors import UserError
from core.parallel import shards
from core.parallel.cuts import load_pieces, whole_state
from core.parallel.group import SequenceGroup, sequence_parallel, set_data_ranks
from core.parallel.tensor import group_of, tensor_parallel


class _Mesh:
    """What both strategies share: the mesh of the processes, and steps in which sequences are cut.

    Its dimensions are ``data``, ``sequence`` and ``tensor``; consecutive processes share a sequence, or layers.
    """

    sequence: int = 1
    tensor: int = 1
    mesh: DeviceMesh | None = None
    _group: SequenceGroup | None = None

    @property
    def shares_weights(self) -> bool:
        """Whether no process has all weights, so that all must take part where they are read."""
        return False

    def join(self, world: int, device: torch.device) -> None:
        """Make the mesh, once the processes know each other."""
        for option, count in (("sequence_parallel", self.sequence), ("tensor_parallel", self.tensor)):
            if world % count:
                raise UserError(
                    f"--{option} is {count}, which does not divide the {world} processes; give a divisor, or other "
                    "--trainer.devices"
                )
        sizes = (world // self.sequence // self.tensor, self.sequence, self.tensor)
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("data", "sequence", "tensor"))
        set_data_ranks(self.mesh["data"].get_local_rank(), sizes[0])
        self._group = SequenceGroup(self.mesh["sequence"]) if self.sequence > 1 else None

    def setup(self, trainer: Trainer) -> None:
        """Prepare a stage, whose evaluation runs without gradients but not in inference mode.

        Tensors made in inference mode have no version counter, which shared weights and DTensor's views need. Lightning
        leaves the mode out for gloo alone.
        """
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        super().setup(trainer)  # type: ignore[misc]

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


class MeshDDP(_Mesh, DDPStrategy):
    """Data parallelism; ``sequence`` processes share each sequence, or ``tensor`` of them the layers.

    Args:
        sequence: Processes that share a sequence, a divisor of their number.
        tensor: Processes that share the layers of the module's net, likewise.
    """

    def __init__(self, sequence: int = 1, tensor: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sequence, self.tensor = sequence, tensor

    @property
    def shares_weights(self) -> bool:
        """Whether no process has all weights."""
        return self.tensor > 1

    def setup_environment(self) -> None:
        """Join the processes, then make the mesh."""
        super().setup_environment()
        self.join(self.world_size, self.root_device)
        if self.tensor > 1 and self.mesh is not None:
            self._ddp_kwargs["process_group"] = self.mesh["data"].get_group()

    def setup(self, trainer: Trainer) -> None:
        """Prepare a stage; where nothing is trained, DDP would give every process the weights of the first."""
        module: Any = self.lightning_module
        own = "_ddp_params_and_buffers_to_ignore"
        if self.tensor > 1 and trainer.state.fn != TrainerFn.FITTING:
            setattr(module, own, [name for name, _ in module.named_parameters()])
        super().setup(trainer)
        if hasattr(module, own):
            delattr(module, own)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap the model on the stream of its steps; Lightning takes another, for which every gradient would wait."""
        return DistributedDataParallel(model, self.determine_ddp_device_ids(), **self._ddp_kwargs)

    def model_to_device(self) -> None:
        """Move the model, and share its layers out."""
        super().model_to_device()
        module: Any = self.lightning_module
        if self.tensor > 1 and self.mesh is not None and group_of(module.net) is None:
            module.remember_net()
            try:
                tensor_parallel(module.net, self.mesh["tensor"])
            except ValueError as error:
                raise UserError(f"--tensor_parallel: {error}") from error

    def whole_weights(self, net: nn.Module) -> dict[str, Any]:
        """All weights of the net; every process must ask."""
        return net.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state for whole parameters; every process must ask."""
        state = super().optimizer_state(optimizer)
        return whole_state(optimizer, state) if self.tensor > 1 else state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over the states in a checkpoint."""
        if self.tensor > 1:
            states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
            checkpoint = {"optimizer_states": [load_pieces(optimizer, state) for optimizer, state in states]}
        super().load_optimizer_state_dict(checkpoint)


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

    @property
    def shares_weights(self) -> bool:
        """Whether no process has all weights."""
        return True

    def setup_environment(self) -> None:
        """Join the processes, then make the mesh."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        self.join(self.world_size, self.root_device)
        if self.root_device.type == "cpu":  # NumPy's views, which the CPU's kernels take, keep memory from being freed
            os.environ.setdefault("TRISCAN_BACKEND", "torch")
        module: Any = self.lightning_module
        module.configure_model = self._share  # which Lightning asks for, and calls once

    def _share(self) -> None:
        """Share the weights out."""
        module: Any = self.lightning_module
        if not module.shares_weights:
            module.remember_net()
            shards.shard_module(module, module.net, self.device_mesh["data_parallel"])

    def model_to_device(self) -> None:
        """Move the model, which makes new parameters of those that are shared out."""
        super().model_to_device()
        module: Any = self.lightning_module
        shards.copy_marks(module.remembered_net, module.net)

    def whole_weights(self, net: nn.Module) -> dict[str, Any]:
        """All weights of the net on rank 0; every process must ask."""
        return shards.whole_weights(net)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, numbered as a single process numbers it; on rank 0, elsewhere empty."""
        assert self.model is not None
        return shards.whole_moments(self.model, getattr(optimizer, "_optimizer", optimizer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file; weights and moments go to where they are kept."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        assert self.model is not None
        shards.load_weights(self.model, checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            shards.load_moments(self.model, optimizer, state)
        return checkpoint


def choose_strategy(name: Any, sequence: int, tensor: int, module: Any, averages: bool) -> Any:
    """What ``--trainer.strategy`` stands for.

    Args:
        name: Its value, a name or a strategy.
        sequence: Processes that share a sequence.
        tensor: Processes that share the layers.
        module: The ``TrainingModule``, which tells whether it can be shared out like that.
        averages: Whether the weights are averaged.

    Raises:
        UserError: If the options do not go together, or the module cannot do it.
    """
    if (name == "fsdp2" or tensor > 1) and averages:
        raise UserError(
            "--ema_decay keeps a second net on every device, which fsdp2 and --tensor_parallel avoid; give null"
        )
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(name, str) and name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--trainer.strategy is {name!r}{hint}; wanted auto, ddp, fsdp2, or another of Lightning's")
    if sequence == tensor == 1 and name != "ddp":
        return name
    for option, count, able, takes in (
        ("sequence_parallel", sequence, module.cuts_sequences, "takes whole sequences"),
        ("tensor_parallel", tensor, module.shares_layers, "has no layers to share out"),
    ):
        if count < 1 or (count > 1 and not able):
            wanted = "at least 1" if count < 1 else f"1: {type(module).__name__} {takes}"
            raise UserError(f"--{option} is {count}; wanted {wanted}")
    if sequence > 1 and tensor > 1:
        raise UserError("--sequence_parallel and --tensor_parallel are both given; take one of the two")
    if name not in ("auto", "ddp", "fsdp2") or (name == "fsdp2" and tensor > 1):
        wanted = "ddp" if tensor > 1 else "ddp or fsdp2"
        option = "tensor_parallel" if tensor > 1 else "sequence_parallel"
        raise UserError(f"--trainer.strategy is {name}; with --{option} it must be {wanted}")
    return FSDP2(sequence) if name == "fsdp2" else MeshDDP(sequence, tensor)


StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded data parallel, the second of its kind")
