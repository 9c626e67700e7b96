"""How much memory a training step needs, measured on a few tokens before the start.

Legend: B batch, L length.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 256  # tokens of the longer of two measurements
IN_FLIGHT = 0.6  # gradients in a block's backward, as a share of its activations: 0.2 (Hyena) to 1.6 (Mamba-2) on a GPU


def saved_bytes(net: nn.Module, tokens: int, narrow: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters left out.

    Args:
        net: A language model; it runs on the CPU.
        tokens: Length of the sequence it is measured on.
        narrow: Under autocast to bfloat16, which narrows products but not the residual stream.
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
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logits = net(torch.full((1, tokens), 7, dtype=torch.int64))
        logits.float().log_softmax(-1).sum()
    return sum(seen.values())


def bytes_a_token(net: nn.Module, narrow: bool) -> float:
    """What a token adds to ``saved_bytes``: narrow copies of the weights do not grow with the sequence."""
    long = min(SAMPLE, getattr(net, "l_max", SAMPLE))
    short = max(long // 2, 1)
    return (saved_bytes(net, long, narrow) - saved_bytes(net, short, narrow)) / max(long - short, 1)


def estimate(net: nn.Module, tokens: int, recompute: bool, narrow: bool) -> dict[str, float]:
    """Estimate the bytes of a training step.

    Args:
        net: The model, anywhere.
        tokens: Tokens of a step on one device.
        recompute: Blocks are computed again in the backward pass: one block's activations live at a time.
        narrow: Under autocast to 2 bytes.

    Returns:
        Bytes of ``weights`` (with gradients and AdamW's two moments) and ``activations``.
    """
    plain = copy.deepcopy(net).cpu().float().train()
    plain.set_gradient_checkpointing(False)  # type: ignore[operator]
    each = bytes_a_token(plain, narrow)
    plain.set_gradient_checkpointing(True)  # type: ignore[operator]
    kept = bytes_a_token(plain, narrow)
    block = (each - kept) / max(len(plain.backbone.layers), 1)  # type: ignore[arg-type, union-attr]
    each = (kept + block if recompute else each) + IN_FLIGHT * block
    parameters = sum(p.numel() for p in net.parameters())
    return {"weights": 16.0 * parameters, "activations": each * tokens}


def describe_memory(net: nn.Module, tokens: int, recompute: bool, offload: bool, precision: str) -> str:
    """One line for the start of a run: what a step is expected to need."""
    found = estimate(net, tokens, recompute, precision.startswith(("bf16", "16")))
    where = " (kept in the computer's memory)" if offload else ""
    return (
        f"memory a step, estimated: {found['weights'] / 2**30:.2f} GiB for weights and optimizer, "
        f"{found['activations'] / 2**30:.2f} GiB for the activations of {tokens:,} tokens{where}"
    )
