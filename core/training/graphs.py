"""A net's training step as CUDA graphs: for small nets the host's calls take longer than what the GPU does."""

import gc
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from core.errors import UserError
from core.parallel.group import active


def capture(net: nn.Module, *inputs: Tensor) -> None:
    """Makes the training forward of ``net`` and its backward CUDA graphs, for inputs of these shapes.

    Inputs of other shapes, arguments by name that are not None, and evaluation run as before. Autocast is taken over
    as it is here. Gradients are written to one place: they have to be used, or added up elsewhere, before the next
    backward.

    Args:
        net: The net, called with tensors by position.
        inputs: A batch's.
    """
    plain, shapes = net.forward, [x.shape for x in inputs]
    names, parameters = zip(*net.named_parameters(), strict=True)

    def call(*given: Tensor) -> Any:
        values = dict(zip(names, given[len(inputs) :], strict=True))
        return functional_call(net, values, given[: len(inputs)])

    # Parameters under other names: their own may still be in an earlier step's graph, tied to the stream it ran on.
    aliases = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
    for alias, parameter in zip(aliases, parameters, strict=True):
        vars(alias).update(vars(parameter))  # what layers look up, such as how processes share it
    on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
        replay: Any = torch.cuda.make_graphed_callables(call, (*(x.detach().clone() for x in inputs), *aliases))

    def forward(*given: Tensor, **named: Any) -> Any:
        same = [x.shape for x in given] == shapes and all(value is None for value in named.values())
        if same and net.training and torch.is_grad_enabled():
            return replay(*given, *parameters)
        return plain(*given, **named)

    forward.replays = True  # type: ignore[attr-defined]
    net.forward = forward


def release(module: nn.Module) -> None:
    """Takes calls again where ``capture`` made graphs, and frees them.

    Processes whose graphs hold collectives must before they part: NCCL waits for such graphs.

    Args:
        module: What holds the nets.
    """
    found = [part for part in module.modules() if hasattr(vars(part).get("forward"), "replays")]
    for part in found:
        del part.forward
    if found:
        gc.collect()  # the graphs hang on cycles


def check_graphs(module: LightningModule) -> None:
    """Refuses trainings whose step cannot be a graph.

    Raises:
        UserError: If gradients are accumulated, or sequences or weights shared by processes.
    """
    steps = module.trainer.accumulate_grad_batches
    if steps > 1:
        raise UserError(
            f"--model.graph: got --trainer.accumulate_grad_batches {steps}, wanted 1: a graph writes gradients to one "
            "place, batch after batch; or give --model.graph false"
        )
    if active() is not None:
        raise UserError("--model.graph is on and sequences are shared by processes, wanted --model.graph false")
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise UserError(
            "--model.graph is on and weights are shared by processes, which fetch them in each step, wanted "
            "--model.graph false, or --trainer.strategy ddp"
        )
