"""How much memory a training step needs, measured on a few tokens before the start.

Legend: B batch, L length.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 128  # tokens of the measurement


def saved_bytes(net: nn.Module, tokens: int = SAMPLE) -> float:
    """Bytes a token that the forward pass keeps for the backward pass, parameters left out.

    Args:
        net: A language model; it runs on the CPU.
        tokens: Length of the sequence it is measured on.
    """
    own = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *net.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    alive: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = net(torch.full((1, tokens), 7, dtype=torch.int64))
        logits.float().log_softmax(-1).sum()
    return sum(seen.values()) / tokens


def estimate(net: nn.Module, tokens: int, recompute: bool, narrow: bool) -> dict[str, float]:
    """Estimate the bytes of a training step.

    Args:
        net: The model, anywhere.
        tokens: Tokens of a step on one device.
        recompute: Blocks are computed again in the backward pass: one block's activations live at a time.
        narrow: Activations are 2 bytes wide, not 4.

    Returns:
        Bytes of ``weights`` (with gradients and AdamW's two moments) and ``activations``.
    """
    plain = copy.deepcopy(net).cpu().float().train()
    plain.set_gradient_checkpointing(False)  # type: ignore[operator]
    sample = min(SAMPLE, getattr(plain, "l_max", SAMPLE))
    each = saved_bytes(plain, sample)
    if recompute:
        plain.set_gradient_checkpointing(True)  # type: ignore[operator]
        layers = len(plain.backbone.layers)  # type: ignore[arg-type, union-attr]
        kept = saved_bytes(plain, sample)
        each = kept + (each - kept) / max(layers, 1)
    parameters = sum(p.numel() for p in net.parameters())
    return {"weights": 16.0 * parameters, "activations": each * tokens * (0.5 if narrow else 1.0)}


def describe_memory(net: nn.Module, tokens: int, recompute: bool, offload: bool, precision: str) -> str:
    """One line for the start of a run: what a step is expected to need."""
    found = estimate(net, tokens, recompute, precision.startswith(("bf16", "16")))
    where = " (kept in the computer's memory)" if offload else ""
    return (
        f"memory a step, estimated: {found['weights'] / 2**30:.2f} GiB for weights and optimizer, "
        f"{found['activations'] / 2**30:.2f} GiB for the activations of {tokens:,} tokens{where}"
    )
