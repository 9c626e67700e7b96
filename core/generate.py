"""Generation from a language model: one parallel pass over the prompts, then one step a token over the state.

Legend: B batch, L prompt length, T generated length, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core.lm import MambaLM


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters apply in the order given here.

    Args:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep exactly this many tokens, of equal ones those with the smaller id; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches it (Holtzman et al. 2020); 1 keeps all.
        min_p: Keep tokens at least this likely relative to the most likely one (Nguyen et al. 2024); 0 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens of the prompt and of the text so
            far (Keskar et al. 2019, CTRL, section 4.1), before everything else; 1 changes nothing.

    Raises:
        ValueError: For a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number, at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 keeps all)"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 keeps all)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 changes nothing)"),
        ):
            if not fits:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted {wanted}")


class Step(NamedTuple):
    """One generated token a row."""

    tokens: Tensor  # (B,) int64; padding in rows that were finished before
    logits: Tensor  # (B, V) what the model said, before any filter
    finished: Tensor  # (B,) bool: the row has emitted an end token, now or before


class Generation(NamedTuple):
    """The generated continuations, without the prompts."""

    tokens: Tensor  # (B, T) int64, padded on the right
    lengths: Tensor  # (B,) int64 number of tokens of each row, its end token included


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Applies temperature, top-k, top-p and min-p.

    Args:
        logits: (B, V).
        sampling: What to apply; its temperature must not be 0.

    Returns:
        (B, V) float32 (float64 for float64 logits): logits of the distribution to draw from, -inf where excluded.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)  # stable: equal tokens by id
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        probability = ordered.masked_fill(~keep, -math.inf).double().softmax(dim=-1)
        # A token is needed while those before it fall short of top_p, by more than float32 logits can resolve.
        keep &= probability.cumsum(dim=-1) - probability < sampling.top_p - 1e-7
        keep[:, 0] = True
    if sampling.min_p:
        keep &= ordered >= ordered[:, :1] + math.log(sampling.min_p)
    return logits.masked_fill(~torch.zeros_like(keep).scatter(1, index, keep), -math.inf)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draws one token a row.

    Args:
        logits: (B, V).
        sampling: How.
        generator: Source of randomness, on the logits' device; the global one by default.

    Returns:
        (B,) int64.
    """
    if sampling.temperature == 0 or sampling.top_k == 1:
        return logits.argmax(dim=-1)
    probability = filter_logits(logits, sampling).softmax(dim=-1)
    return torch.multinomial(probability, 1, generator=generator).squeeze(1)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens less likely (penalty > 1) where ``seen (B, V)``; returns new logits (B, V)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def pad_prompts(
    prompts: Sequence[Sequence[int] | Tensor], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Lays prompts of unequal length into one batch.

    Args:
        prompts: Token ids of each prompt.
        device: Where the batch goes.

    Returns:
        input_ids (B, L) int64, padded with zeros on the right, and lengths (B,), as ``generate`` takes them.
    """
    rows = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


@torch.no_grad()
def stream(
    model: MambaLM,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    lengths: Tensor | None = None,
    eos_token_id: int | Collection[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Generates token by token and hands out each as soon as it is drawn.

    Args:
        model: The language model; its mode (train, eval) is left alone.
        input_ids: (B, L) int64 prompts, padded on the right where ``lengths`` says so.
        max_new_tokens: How many tokens at most.
        sampling: How tokens are drawn; plain sampling by default.
        lengths: (B,) number of tokens of each prompt, 1 to L; all L by default.
        eos_token_id: A row is finished when it emits this token, or one of these.
        pad_token_id: What finished rows emit; the end token by default.
        seed: Makes the draws repeatable.
        generator: Instead of a seed: the source of randomness, on the model's device.

    Yields:
        A ``Step`` a token, until every row is finished or ``max_new_tokens`` are reached.

    Raises:
        ValueError: For arguments out of range, at the first step.
    """
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    _check_request(model, input_ids, max_new_tokens, lengths, ends, pad_token_id)
    if seed is not None:
        if generator is not None:
            raise ValueError("seed and generator: got both, wanted one; a generator carries its own seed")
        generator = torch.Generator(input_ids.device).manual_seed(seed)
    end_tokens = torch.tensor(sorted(ends), dtype=torch.int64, device=input_ids.device)
    padding = pad_token_id if pad_token_id is not None else min(ends, default=0)
    seen = _seen(input_ids, lengths, model.config.vocab_size) if sampling.repetition_penalty != 1 else None

    hidden, state = model.backbone.forward_state(input_ids, model.init_state(input_ids.shape[0]), lengths)
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)
    hidden = hidden[:, -1] if lengths is None else hidden[rows, lengths - 1]
    finished = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        logits = model.lm_head(hidden)[:, : model.config.vocab_size]  # the head's padding rows are no tokens
        scores = logits if seen is None else penalize_repetition(logits, seen, sampling.repetition_penalty)
        tokens = sample(scores, sampling, generator).masked_fill(finished, padding)
        finished = finished | torch.isin(tokens, end_tokens)
        yield Step(tokens, logits, finished)
        if step + 1 == max_new_tokens or (ends and bool(finished.all())):
            return
        if seen is not None:
            seen[rows, tokens] = True
        hidden, state = model.backbone.forward_state(tokens[:, None], state)
        hidden = hidden[:, -1]


def generate(
    model: MambaLM,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    *,
    lengths: Tensor | None = None,
    eos_token_id: int | Collection[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Generates whole continuations; the arguments are those of ``stream``.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: For arguments out of range.
    """
    steps = [
        (step.tokens, step.finished)
        for step in stream(
            model, input_ids, max_new_tokens, sampling,
            lengths=lengths, eos_token_id=eos_token_id, pad_token_id=pad_token_id, seed=seed, generator=generator,
        )
    ]  # fmt: skip
    tokens, finished = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
    # A row's end token is where it turns finished: that one still counts.
    return Generation(tokens, (~finished).sum(dim=1) + finished.any(dim=1))


def _seen(input_ids: Tensor, lengths: Tensor | None, vocab_size: int) -> Tensor:
    """(B, V) bool: the tokens of each prompt, its padding left out."""
    seen = torch.zeros(input_ids.shape[0], vocab_size + 1, dtype=torch.bool, device=input_ids.device)
    if lengths is not None:  # padding goes to a column of its own
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        input_ids = input_ids.masked_fill(positions >= lengths[:, None], vocab_size)
    return seen.scatter(1, input_ids, True)[:, :vocab_size]


def _check_request(
    model: MambaLM,
    input_ids: Tensor,
    max_new_tokens: int,
    lengths: Tensor | None,
    ends: set[int],
    pad_token_id: int | None,
) -> None:
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids: got {input_ids.dtype} of shape {tuple(input_ids.shape)}, wanted integers (B, L) with "
            "B, L >= 1; begin an empty prompt with a start token"
        )
    if input_ids.device != model.lm_head.weight.device:
        raise ValueError(
            f"input_ids: got device {input_ids.device}, wanted {model.lm_head.weight.device} as the model; "
            "move them with .to(...)"
        )
    vocab_size = model.config.vocab_size
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        raise ValueError(
            f"input_ids: got tokens from {int(input_ids.min())} to {int(input_ids.max())}, wanted 0 to "
            f"{vocab_size - 1}; was the text encoded with the model's own vocabulary?"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, wanted at least 1")
    if lengths is not None and (
        lengths.shape != input_ids.shape[:1] or not 1 <= int(lengths.min()) <= int(lengths.max()) <= input_ids.shape[1]
    ):
        raise ValueError(
            f"lengths: got {lengths.tolist()}, wanted one number from 1 to {input_ids.shape[1]} for each of the "
            f"{input_ids.shape[0]} prompts"
        )
    for name, token in (*(("eos_token_id", end) for end in ends), ("pad_token_id", pad_token_id)):
        if token is not None and not 0 <= token < vocab_size:
            raise ValueError(f"{name}: got {token}, wanted a token from 0 to {vocab_size - 1}")
