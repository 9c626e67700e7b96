"""Generation from a language model: the prompts in parallel chunks, then one step a token over the state.

Also a command: ``python -m core.generate --checkpoint DIR --prompt TEXT``.

Legend: B batch, L prompt length, T generated length, V vocabulary, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from core.decode import decoder_for
from core.lm import MambaLM
from core.mixers import Mamba, Mamba2
from core.prompt import reader_for
from core.sampling import PLAIN, Sampling, filter_logits, penalize_repetition, sample
from kernels.selective_scan.exactness import between_pieces

__all__ = [
    "Generation",
    "Sampling",
    "Scores",
    "Step",
    "filter_logits",
    "generate",
    "log_likelihood",
    "pad_prompts",
    "penalize_repetition",
    "prefill",
    "sample",
    "stream",
]

PREFILL_TOKENS = 2**17  # of all rows together, that go through the model at once
ROOM = 512  # attention's caches hold a multiple of it, so that a graph serves prompts of about the same length
SCORED_LOGITS = 2**27  # values of the logits that ``log_likelihood`` holds at once


class Step(NamedTuple):
    """One generated token a row."""

    tokens: Tensor  # (B,) int64; padding in rows that were finished before
    logits: Tensor  # (B, V) what the model said, before any filter
    finished: Tensor  # (B,) bool: the row has emitted an end token, now or before


class Generation(NamedTuple):
    """The generated continuations, without the prompts."""

    tokens: Tensor  # (B, T) int64, padded on the right
    lengths: Tensor  # (B,) int64 number of tokens of each row, its end token included


class Scores(NamedTuple):
    """How likely a model finds each token of a text, given those before it."""

    log_probs: Tensor  # (B, L - 1) float32: of tokens 1 to L - 1; 0 at padding
    greedy: Tensor  # (B, L - 1) bool: the token is the most likely one; True at padding


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
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: got an empty one, wanted at least one token each; begin with a start token")
    rows = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


@torch.no_grad()
def prefill(
    model: MambaLM, input_ids: Tensor, lengths: Tensor | None = None, *, chunk: int | None = None, room: int = 0,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Any, ...]]:  # fmt: skip
    """Reads prompts of any length, a chunk at a time; the memory needed is that of a chunk.

    Args:
        model: The language model.
        input_ids: (B, L) int64, padded on the right where ``lengths`` says so.
        lengths: (B,) number of tokens of each prompt, 1 to L; all L by default.
        chunk: Tokens of a row that go through the model at once; by default as many as 131,072 for all rows allow.
        room: Tokens that attention's caches must hold.
        state_dtype: What scans' states will be rounded to anyhow, so that they may leave their kernels in it.

    Returns:
        The backbone's output (B, D) at each row's last token, and the state after it.
    """
    batch = input_ids.shape[0]
    size = max(64, PREFILL_TOKENS // batch) if chunk is None else chunk
    state, last = _before(model, batch, max(room, input_ids.shape[1]), lengths is not None), None
    for start in range(0, input_ids.shape[1], size):
        ids = input_ids[:, start : start + size]
        if lengths is None:
            ends = start + size >= input_ids.shape[1]  # between pieces states keep all their digits
            last, state = model.backbone.forward_last(ids, state, state_dtype if ends else None)
            continue
        here = (lengths - start).clamp(0, ids.shape[1])
        hidden, state = model.backbone.forward_state(ids, state, here)
        at = (here - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
        found = hidden.gather(1, at).squeeze(1)
        last = found if last is None else torch.where((here > 0)[:, None], found, last)
    assert last is not None
    return last, state


@torch.no_grad()
def stream(
    model: MambaLM,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    *,
    lengths: Tensor | None = None,
    padding_side: Literal["right", "left"] = "right",
    eos_token_id: int | Collection[int] | None = None,
    pad_token_id: int | None = None,
    allowed_tokens: Sequence[int] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
    state_dtype: torch.dtype | None = None,
    graph: bool | None = None,
    keep_logits: bool = True,
) -> Iterator[Step]:
    """Generates token by token and hands out each as soon as it is drawn.

    Args:
        model: The language model; its mode (train, eval) is left alone.
        input_ids: (B, L) int64 prompts, padded where ``lengths`` says so.
        max_new_tokens: How many tokens at most.
        sampling: How tokens are drawn; plain sampling by default.
        lengths: (B,) number of tokens of each prompt, 1 to L; all L by default.
        padding_side: On which side shorter prompts are padded.
        eos_token_id: A row is finished when it emits this token, or one of these.
        pad_token_id: What finished rows emit; the end token by default.
        allowed_tokens: The only tokens that are drawn; all by default.
        seed: Makes the draws repeatable.
        generator: Instead of a seed: the source of randomness, on the model's device.
        prefill_chunk: See ``prefill``.
        state_dtype: Of the scans' states of Mamba and Mamba-2 layers between steps; float32 by default. bfloat16 halves
            the memory that many rows move, and loses increments below 1/256 of a state; long prompts then go at the
            speed of a scan whose final state nobody wants.
        graph: Replay each step, and short prompts, as CUDA graphs. None: on NVIDIA GPUs, without a ``generator``.
        keep_logits: Whether a step's logits stay as they are; else the next step writes over them.

    Yields:
        A ``Step`` a token, until every row is finished or ``max_new_tokens`` are reached.

    Raises:
        ValueError: For arguments out of range, at the first step.
    """
    ends = frozenset({eos_token_id} if isinstance(eos_token_id, int) else eos_token_id or ())
    allowed = () if allowed_tokens is None else tuple(allowed_tokens)
    _check_request(model, input_ids, max_new_tokens, lengths, ends, pad_token_id, padding_side)
    _check_allowed(allowed_tokens, model.config.vocab_size)
    if seed is not None and generator is not None:
        raise ValueError("seed and generator: got both, wanted one; a generator carries its own seed")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, wanted a number of 64 bits")
    if graph and (generator is not None or not input_ids.is_cuda):
        raise ValueError("graph: got True, wanted a model on an NVIDIA GPU and a seed instead of a generator")
    if state_dtype is not None and not state_dtype.is_floating_point:
        raise ValueError(f"state_dtype: got {state_dtype}, wanted a floating-point one, such as torch.bfloat16")
    if lengths is not None and padding_side == "left":
        input_ids = _to_the_left(input_ids, lengths)
    padding = pad_token_id if pad_token_id is not None else min(ends, default=0)
    seen = _seen(input_ids, lengths, model.config.vocab_size) if sampling.repetition_penalty != 1 else None
    room = -(-(input_ids.shape[1] + max_new_tokens) // ROOM) * ROOM if model.has_attention else 0
    if graph is None:
        graph = input_ids.is_cuda and torch.version.hip is None and generator is None
    same = graph and lengths is None and prefill_chunk is None
    reader = reader_for(model, *input_ids.shape) if same else None
    if reader is None:
        narrow = state_dtype is not None and state_dtype.itemsize < 4  # which is rounded more than it could be off by
        with _as_in_training(model.lm_head.weight) if narrow else contextlib.nullcontext():
            hidden, state = prefill(model, input_ids, lengths, chunk=prefill_chunk, room=room, state_dtype=state_dtype)
    else:
        hidden, state = reader(input_ids)
    decoder = decoder_for(model, input_ids.shape[0], sampling, ends, padding, room, allowed, state_dtype, graph=graph)
    if generator is None:
        generator = decoder.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
    decoder.busy = True
    try:
        drawn = decoder.begin(hidden, state, seen, generator)
        for step in range(max_new_tokens):
            yield Step(
                drawn.tokens.clone(),
                drawn.logits.clone() if keep_logits else drawn.logits,
                drawn.finished.clone() if ends else drawn.finished,
            )
            if step + 1 == max_new_tokens or (ends and bool(drawn.finished.all())):
                return
            drawn = decoder.step()
    finally:
        decoder.busy = False


def generate(
    model: MambaLM,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    *,
    on_step: Callable[[Step], object] | None = None,
    **options: Any,
) -> Generation:
    """Generates whole continuations.

    Args:
        model: See ``stream``, as all that follow.
        input_ids: (B, L) int64.
        max_new_tokens: How many tokens at most.
        sampling: How tokens are drawn.
        on_step: Called with each ``Step`` as soon as it is drawn.
        options: Further arguments of ``stream``, by name.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: For arguments out of range.
    """
    steps = []
    for step in stream(model, input_ids, max_new_tokens, sampling, **{"keep_logits": on_step is not None, **options}):
        steps.append((step.tokens, step.finished))
        if on_step is not None:
            on_step(step)
    tokens, finished = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
    # A row's end token is where it turns finished: that one still counts.
    return Generation(tokens, (~finished).sum(dim=1) + finished.any(dim=1))


@torch.no_grad()
def log_likelihood(
    model: MambaLM, input_ids: Tensor, lengths: Tensor | None = None, *, chunk: int | None = None
) -> Scores:
    """Scores texts of any length, a chunk at a time.

    Args:
        model: The language model.
        input_ids: (B, L) int64 with L >= 2, padded on the right where ``lengths`` says so.
        lengths: (B,) number of tokens of each text, 1 to L; all L by default.
        chunk: Tokens of a row at once; by default what keeps the logits under half a gigabyte.

    Raises:
        ValueError: For arguments out of range.
    """
    _check_request(model, input_ids, 1, lengths, frozenset(), None, "right")
    (batch, length), vocabulary = input_ids.shape, model.config.vocab_size
    size = max(1, SCORED_LOGITS // (batch * vocabulary)) if chunk is None else chunk
    state, found, greedy = model.init_state(batch, max_length=length), [], []
    for start in range(0, length - 1, size):
        ids = input_ids[:, start : min(start + size, length - 1)]
        wanted = input_ids[:, start + 1 : start + 1 + ids.shape[1], None]
        here = None if lengths is None else (lengths - start).clamp(0, ids.shape[1])
        hidden, state = model.backbone.forward_state(ids, state, here)
        logits = model.lm_head(hidden)[:, :, :vocabulary]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        index = wide.argmax(dim=-1, keepdim=True)
        found.append((wide.gather(2, wanted) - wide.logsumexp(dim=-1, keepdim=True)).squeeze(2).float())
        greedy.append((index == wanted).squeeze(2))
    if not found:
        return Scores(torch.zeros(batch, 0, device=input_ids.device), input_ids[:, :0].bool())
    log_probs, matches = torch.cat(found, dim=1), torch.cat(greedy, dim=1)
    if lengths is None:
        return Scores(log_probs, matches)
    padding = torch.arange(1, length, device=input_ids.device) >= lengths[:, None]
    return Scores(log_probs.masked_fill(padding, 0), matches | padding)


def _before(model: MambaLM, batch: int, room: int, padded: bool) -> tuple[Any, ...]:
    """The layers' states before the prompts: None where a layer reads on from nothing without zeros in memory."""
    late = not padded and model.backbone.takes_late()
    return tuple(
        None if late and type(layer.mixer) in (Mamba, Mamba2) else layer.mixer.init_state(batch, max_length=room)
        for layer in model.backbone.layers
    )


@contextlib.contextmanager
def _as_in_training(weight: Tensor) -> Iterator[None]:
    """Scans with the GPU's own exponentials, and time steps rounded to the 16 bits of the model, as under autocast."""
    low = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
    with between_pieces(), torch.autocast("cuda", weight.dtype if low else None, enabled=low):
        yield


def _to_the_left(input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Prompts that were padded on the left, padded on the right."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    at = positions + (input_ids.shape[1] - lengths)[:, None]
    return input_ids.gather(1, at.clamp(max=input_ids.shape[1] - 1))


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
    ends: frozenset[int],
    pad_token_id: int | None,
    padding_side: str,
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
    if padding_side not in ("right", "left"):
        raise ValueError(f'padding_side: got {padding_side!r}, wanted "right" or "left"')
    for name, token in (*(("eos_token_id", end) for end in ends), ("pad_token_id", pad_token_id)):
        if token is not None and not 0 <= token < vocab_size:
            raise ValueError(f"{name}: got {token}, wanted a token from 0 to {vocab_size - 1}")


def _check_allowed(tokens: Sequence[int] | None, vocab_size: int) -> None:
    if tokens is not None and (not tokens or not 0 <= min(tokens) <= max(tokens) < vocab_size):
        raise ValueError(
            f"allowed_tokens: got {list(tokens)}, wanted one or more tokens from 0 to {vocab_size - 1}, or None for all"
        )


if __name__ == "__main__":
    from core.cli import run
    from core.generate_command import main

    run(main)
