"""The models of the synthetic tasks: the language model's blocks around any mixer.

Legend: B batch, L length, D width, V vocabulary, A answers of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.lm import MambaConfig, MambaLM
from core.mixers import (
    DSS,
    H3,
    S4,
    S4D,
    S5,
    Attention,
    GatedBlock,
    Hyena,
    LinearAttention,
    Mamba,
    Mamba2,
    Mamba3,
    Mixer,
    Retention,
    UngatedBlock,
)
from core.synthetics.tasks import Batch

FEW = 64  # tokens of a vocabulary whose gradient is a matrix product


class _Lookup(torch.autograd.Function):
    """Rows of a table, whose gradient is a product with the one-hot matrix of the tokens.

    torch's own adds one token's rows up in few threads: where nearly all tokens are one blank, as in selective copying,
    that takes three quarters of a step.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        """Looks up tokens (...) in a table (V, D), (..., D)."""
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The table's gradient."""
        (tokens,), (grad,) = ctx.saved_tensors, grads
        hot = tokens.flatten()[:, None] == torch.arange(ctx.rows, device=tokens.device)
        return hot.to(grad.dtype).t() @ grad.flatten(0, -2), None


class FewTokens(nn.Embedding):
    """The embedding of a small vocabulary, with a gradient that is fast whatever the tokens are."""

    def forward(self, input: Tensor) -> Tensor:
        """Tokens (...) to vectors (..., D)."""
        return _Lookup.apply(self.weight, input)  # type: ignore[no-any-return]  a function of autograd has no type


class SequenceModel(MambaLM):
    """A small language model whose blocks hold any of the mixers, by name in ``ssm_cfg["layer"]``."""

    mixers: ClassVar[dict[str, Callable[..., Mixer]]] = {
        "Mamba": Mamba,
        "Mamba2": Mamba2,
        "Mamba3": Mamba3,
        "Attention": partial(Attention, causal=True),
        "LinearAttention": LinearAttention,
        "Retention": Retention,
        "Hyena": Hyena,
        "H3": H3,
        "S4": S4,
        "S4D": S4D,
        "S5": S5,
        "DSS": DSS,
        "GatedBlock": GatedBlock,
        "UngatedBlock": UngatedBlock,
    }

    def answers(self, tokens: Tensor, where: Tensor) -> Tensor:
        """Scores of the tokens at some positions, (B, A, padded V), of whole sequences.

        Args:
            tokens: (B, L) int64.
            where: (B, A) int64 positions.
        """
        return self.lm_head(_at(self.backbone(tokens), where))

    def answers_in_pieces(self, tokens: Tensor, where: Tensor, piece: int) -> Tensor:
        """The same from ``piece`` tokens at a time, whose state is carried on: memory does not grow with L."""
        state = self.init_state(tokens.shape[0])
        found = torch.zeros(*where.shape, self.config.d_model, device=tokens.device)
        for start in range(0, tokens.shape[1], piece):
            hidden, state = self.backbone.forward_state(tokens[:, start : start + piece], state)
            here = (where >= start) & (where < start + hidden.shape[1])
            found = torch.where(here[..., None], _at(hidden, (where - start).clamp(0, hidden.shape[1] - 1)), found)
        return self.lm_head(found)

    def count_right(self, batch: Batch, piece: int | None) -> Tensor:
        """How many answers are right, () int64; in pieces if ``piece`` says how long they are."""
        scores = (
            self.answers(batch.tokens, batch.where)
            if piece is None
            else self.answers_in_pieces(batch.tokens, batch.where, piece)
        )
        return (scores.argmax(dim=-1) == batch.answers).sum()

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers, in nats."""
        return F.cross_entropy(self.answers(batch.tokens, batch.where).flatten(0, 1).float(), batch.answers.flatten())


def build(entry: dict[str, Any], d_model: int, n_layer: int, vocab_size: int, d_intermediate: int = 0) -> SequenceModel:
    """A model of a recipe, with untied embeddings in float32.

    Args:
        entry: ``layer``, a name of ``SequenceModel.mixers``, and the mixer's arguments.
        d_model: D.
        n_layer: Number of blocks.
        vocab_size: V.
        d_intermediate: Hidden width of a gated MLP in each block; 0 is without.

    Raises:
        ValueError: For a layer or an argument that does not exist, or sizes that do not fit.
    """
    config = MambaConfig(
        d_model=d_model, n_layer=n_layer, vocab_size=vocab_size, d_intermediate=d_intermediate, ssm_cfg=dict(entry),
        tie_embeddings=False,
    )  # fmt: skip
    model = SequenceModel(config)
    if config.padded_vocab_size <= FEW:
        table = model.get_parameter("backbone.embedding.weight").detach()
        model.backbone.embedding = FewTokens.from_pretrained(table, freeze=False)
    return model


def longest(model: nn.Module) -> int | None:
    """The longest sequence that a model takes: that of its shortest filter; None without a bound."""
    bounds = [module.l_max for module in model.modules() if isinstance(getattr(module, "l_max", None), int)]
    return min(bounds, default=None)  # type: ignore[type-var]  the list holds integers only


def carries_state(model: SequenceModel) -> bool:
    """Whether the state's size is bounded, so that long sequences can be read in pieces."""
    return longest(model) is None and not model.has_attention


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Parameter groups with the marks of the layers obeyed: no decay on vectors and where ``_no_weight_decay`` is set,
    and the learning rate of ``_optim`` where that is lower than the run's (S4 and Hyena ask for it)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        marks = getattr(parameter, "_optim", {})
        free = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        decay = 0.0 if free else marks.get("weight_decay", weight_decay)
        groups.setdefault((min(lr, marks.get("lr", lr)), decay), []).append(parameter)
    for (rate, decay), parameters in groups.items():
        yield {"params": parameters, "lr": rate, "weight_decay": decay}


def _at(hidden: Tensor, where: Tensor) -> Tensor:
    """Vectors (B, A, D) of hidden (B, L, D) at positions (B, A)."""
    return hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[2]))
