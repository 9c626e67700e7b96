"""Sequences cut across processes, for Lightning's trainer."""

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from core.errors import UserError
from core.parallel.group import SequenceGroup, sequence_parallel, set_data_ranks


class SequenceDDP(DDPStrategy):
    """Every process has all weights; ``sequence`` of them share each sequence.

    The mesh of the processes has the dimensions ``data`` and ``sequence``; consecutive processes share a sequence.

    Args:
        sequence: Processes that share a sequence, a divisor of their number.
    """

    def __init__(self, sequence: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sequence = sequence
        self.mesh: DeviceMesh | None = None
        self._group: SequenceGroup | None = None

    def setup_environment(self) -> None:
        """Join the processes, then make the mesh."""
        super().setup_environment()
        self.join(self.world_size, self.root_device)

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
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step on this process's part."""
        with sequence_parallel(self._group):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step on this process's part."""
        with sequence_parallel(self._group):
            return super().test_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass, in which blocks may be computed again."""
        with sequence_parallel(self._group):
            return super().backward(*args, **kwargs)
