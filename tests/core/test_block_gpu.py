"""What long sequences keep on a GPU: blocks computed again piece by piece, activations that are forgotten."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.lm import MambaConfig, MambaLM

pytestmark = pytest.mark.gpu


def model() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=64, n_layer=3, vocab_size=12))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 12, (batch, length + 1), generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, ids: Tensor, autocast: bool) -> list[Tensor]:
    """Of the mean of the next tokens' cross entropy, by parameter."""
    net.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logits = net(ids[:, :-1])
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    F.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [p.grad.detach().double().cpu() for p in net.parameters()]  # type: ignore[union-attr]


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_pieces_have_the_whole_blocks_gradients(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float64 than twice what whole blocks are; the last piece is shorter."""
    ids, net = tokens(2, 1500), model()
    exact = gradients(copy.deepcopy(net).double(), ids, False)
    net, ids = net.cuda(), ids.cuda()
    whole = worst(gradients(net, ids, autocast), exact)
    net.set_gradient_checkpointing()
    again = worst(gradients(net, ids, autocast), exact)
    monkeypatch.setattr("core.block.PIECE", 512)
    pieces = worst(gradients(net, ids, autocast), exact)
    print(f"error against float64: whole {whole:.1e}, checkpointed {again:.1e}, piece by piece {pieces:.1e}")
    assert again <= 1.01 * whole
    assert pieces <= 2 * whole


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_forgotten_comes_back(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of a norm's sum: its kernel has other tiles where there is no residual to add."""
    ids, net = tokens(2, 1500).cuda(), model().cuda()
    kept = gradients(net, ids, autocast)
    again = worst(gradients(net, ids, autocast), kept)
    monkeypatch.setattr("core.block.FORGET_FROM", 1)
    forgetful = worst(gradients(net, ids, autocast), kept)
    print(f"relative difference: kept twice {again:.1e}, forgotten {forgetful:.1e}")
    assert forgetful <= (1e-3 if autocast else 1e-6)


def test_memory_of_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting saves two convolutions and an input, pieces most of what a block that is computed again needs."""
    ids, net = tokens(1, 1 << 17).cuda(), model().cuda()

    def peak() -> float:
        gradients(net, ids, True)
        net.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients(net, ids, True)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    found = {"whole": peak()}
    monkeypatch.setattr("core.block.FORGET_FROM", 1)
    found["forgetful"] = peak()
    net.set_gradient_checkpointing()
    found["checkpointed"] = peak()
    monkeypatch.setattr("core.block.PIECE", 1 << 14)
    found["pieces"] = peak()
    print(", ".join(f"{name} {mib:.0f} MiB" for name, mib in found.items()))
    # At the peak the last block's are there again, and the first block's input has no sum to be computed from.
    assert found["whole"] - found["forgetful"] >= 2 * 32 + 16
    assert found["checkpointed"] < 0.75 * found["forgetful"]
    assert found["pieces"] < 0.75 * found["checkpointed"]
