"""A net's training step as CUDA graphs: for small nets the host's calls take longer than what the GPU does."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from core.errors import UserError
from core.parallel.group import active


def capture(net: nn.Module, *inputs: Tensor) -> None:
    """Makes the training forward of ``net`` and its backward CUDA graphs, for inputs of these shapes.

    Inputs of other shapes, and evaluation, run as before. Autocast is taken over as it is here. Gradients are written
    to one place: they have to be used, or added up elsewhere, before the next backward.

    Args:
        net: The net, called with tensors by position.
        inputs: A batch's.
    """
    plain: Any = net.forward
    shapes = [x.shape for x in inputs]
    on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
        torch.cuda.make_graphed_callables(net, tuple(x.detach().clone() for x in inputs))
    replay: Any = net.forward

    def forward(*given: Tensor) -> Any:
        return replay(*given) if [x.shape for x in given] == shapes else plain(*given)

    net.forward = forward


def check_graphs(module: LightningModule) -> None:
    """Refuses trainings whose step cannot be a graph.

    Raises:
        UserError: If gradients are accumulated, or sequences shared by processes.
    """
    steps = module.trainer.accumulate_grad_batches
    if steps > 1:
        raise UserError(
            f"--model.graph: got --trainer.accumulate_grad_batches {steps}, wanted 1: a graph writes gradients to one "
            "place, batch after batch; or give --model.graph false"
        )
    if active() is not None:
        raise UserError("--model.graph is on and sequences are shared by processes, wanted --model.graph false")
