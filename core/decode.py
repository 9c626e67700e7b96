"""Decoding: one token a row and step, over a state that stays where it is, on NVIDIA GPUs as one CUDA graph.

What a layer's step is made of, ``core.decode_steps`` says.

Legend: B batch, D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.decode_steps import FEW_ROWS, FusedStep, layer_step, narrowed
from core.lm import MambaLM
from core.prompt import copy_state, weights_key
from core.sampling import Sampling, penalize_repetition, sample
from kernels.decode import project
from kernels.decode.many import Pending

KEPT_GRAPHS = 4  # a model


class Drawn(NamedTuple):
    """What a step leaves; the next step writes over it."""

    tokens: Tensor  # (B,) int64
    logits: Tensor  # (B, V)
    finished: Tensor  # (B,) bool


class Decoder:
    """Draws token after token for B rows.

    Args:
        model: The language model.
        batch: B.
        sampling: How tokens are drawn.
        ends: Tokens that finish a row.
        padding: What finished rows emit.
        room: Tokens that attention's caches must hold, prompts included.
        allowed: The only tokens that are drawn; none is all.
        state_dtype: Of the scans' states in Mamba and Mamba-2 layers; by default the layers' own, float32.
        fused: Use fused kernels for the layers that have them; by default on GPUs.
        graph: Capture the step in a CUDA graph.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: MambaLM,
        batch: int,
        sampling: Sampling,
        ends: frozenset[int] = frozenset(),
        padding: int = 0,
        room: int = 0,
        allowed: tuple[int, ...] = (),
        state_dtype: torch.dtype | None = None,
        *,
        fused: bool | None = None,
        graph: bool = False,
    ) -> None:
        head = model.lm_head.weight
        self._model = weakref.ref(model)  # the model's cache holds this object
        self.sampling, self.padding, self.ends = sampling, padding, ends
        self.generator = torch.Generator(head.device)
        fused = head.is_cuda if fused is None else fused
        states = [narrowed(state, state_dtype) for state in model.init_state(batch, max_length=room)]
        self.steps = [
            layer_step(layer, state, batch, fused) for layer, state in zip(model.backbone.layers, states, strict=True)
        ]
        for step, behind in itertools.pairwise(self.steps):
            if isinstance(step, FusedStep):
                step.precede(behind)
        self.few = fused and batch <= FEW_ROWS and model.backbone.norm_f.kind == "rms"
        vocabulary = model.config.vocab_size
        new: dict[str, Any] = {"device": head.device}
        self.tokens = torch.zeros(batch, dtype=torch.int64, **new)
        self.finished = torch.zeros(batch, dtype=torch.bool, **new)
        self._scores = torch.zeros(batch, head.shape[0], dtype=head.dtype, **new)
        self.logits = self._scores[:, :vocabulary]  # the head's padding rows are no tokens
        self.end_tokens = torch.tensor(sorted(ends), dtype=torch.int64, **new)
        self.allowed = torch.tensor(allowed, dtype=torch.int64, **new) if allowed else None
        penalised = sampling.repetition_penalty != 1
        self.seen = torch.zeros(batch, vocabulary, dtype=torch.bool, **new) if penalised else None
        self.busy = False  # with somebody's rows: the state is theirs until they are done
        self.graph = self._capture() if graph else None

    @torch.no_grad()
    def begin(self, hidden: Tensor, state: Any, seen: Tensor | None, generator: torch.Generator) -> Drawn:
        """Draws the first token after a prompt.

        Args:
            hidden: (B, D) the backbone's output at the last token of each prompt.
            state: The model's state after the prompts.
            seen: (B, V) tokens of the prompts; wanted with a repetition penalty.
            generator: Source of randomness; a graph needs ``self.generator``.
        """
        assert self.graph is None or generator is self.generator
        self.generator = generator
        for step, given in zip(self.steps, state, strict=True):
            copy_state(step.state, given)
            step.refresh()
        self.finished.zero_()
        if self.seen is not None and seen is not None:
            self.seen.copy_(seen)
        self._scores.copy_(self.model.lm_head(hidden))
        self._draw()
        return Drawn(self.tokens, self.logits, self.finished)

    @torch.no_grad()
    def step(self) -> Drawn:
        """Runs the model on the last tokens and draws the next."""
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return Drawn(self.tokens, self.logits, self.finished)

    @property
    def model(self) -> MambaLM:
        """The language model, which must outlive this object."""
        model = self._model()
        assert model is not None
        return model

    def _step(self) -> None:
        self._advance()
        self._draw()

    def _advance(self) -> None:
        model, norm = self.model, self.model.backbone.norm_f
        x: Tensor | Pending = model.backbone.embedding(self.tokens)
        residual: Tensor | None = None
        for step in self.steps:
            x, residual = step(x, residual)
        assert isinstance(x, Tensor)
        if self.few:
            logits, _, _ = project(x, model.lm_head.weight, residual=residual, norm_weight=norm.weight, eps=norm.eps)
            self._scores.copy_(logits)
        elif type(model.lm_head) is nn.Linear and model.lm_head.bias is None:
            torch.mm(norm(x, residual)[0], model.lm_head.weight.T, out=self._scores)
        else:  # an adapter, or a quantised layer
            self._scores.copy_(model.lm_head(norm(x, residual)[0]))

    def _draw(self) -> None:
        penalty = self.sampling.repetition_penalty
        scores = self.logits if self.seen is None else penalize_repetition(self.logits, self.seen, penalty)
        if self.allowed is None:
            tokens = sample(scores, self.sampling, self.generator)
        else:
            tokens = self.allowed[sample(scores[:, self.allowed], self.sampling, self.generator)]
        if self.ends:
            tokens = tokens.masked_fill(self.finished, self.padding)
            self.finished |= (tokens[:, None] == self.end_tokens).any(dim=1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.tokens.copy_(tokens)

    @torch.no_grad()
    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; compiled and warmed up on states that ``begin`` replaces."""
        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self.sampling.draws:  # each replay sets the generator's place
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph


_decoders: weakref.WeakKeyDictionary[MambaLM, OrderedDict[Any, Decoder]] = weakref.WeakKeyDictionary()


def decoder_for(
    model: MambaLM,
    batch: int,
    sampling: Sampling,
    ends: frozenset[int],
    padding: int,
    room: int,
    allowed: tuple[int, ...] = (),
    state_dtype: torch.dtype | None = None,
    *,
    graph: bool,
) -> Decoder:
    """A decoder that is not busy; with a graph one that may have served before: capturing takes long."""
    if not graph:
        return Decoder(model, batch, sampling, ends, padding, room, allowed, state_dtype)
    kept = _decoders.setdefault(model, OrderedDict())
    key = (batch, sampling, ends, padding, room, allowed, state_dtype, weights_key(model))
    if key not in kept:
        kept[key] = Decoder(model, batch, sampling, ends, padding, room, allowed, state_dtype, graph=True)
    if kept[key].busy:
        return Decoder(model, batch, sampling, ends, padding, room, allowed, state_dtype)
    kept.move_to_end(key)
    while len(kept) > KEPT_GRAPHS:
        kept.popitem(last=False)
    return kept[key]
