"""Decoding: one token a row and step, over a state that stays where it is, on NVIDIA GPUs as one CUDA graph.

A Mamba layer's step is three kernels for a few rows and six for many, see ``kernels.decode``; other layers run their
``forward_state``.

Legend: B batch, D model width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from core.block import Block, start_stream
from core.lm import MambaLM
from core.mixers import Mamba
from core.sampling import Sampling, penalize_repetition, sample
from kernels.decode import Conv, conv_step, project, scan_step

FEW_ROWS = 4  # up to here a projection with everything fused into it beats a matrix product between other kernels
KEPT_GRAPHS = 4  # a model


class LayerStep(Protocol):
    """One token through a block, (B, D) branch and residual stream to (B, D) branch and residual stream."""

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the step from and to the state that this object holds."""
        ...

    def load(self, state: Any) -> None:
        """Continues from another state."""
        ...


class PlainStep:
    """Any layer, through its ``forward_state``.

    Args:
        layer: The block.
        state: Its mixer's state.
        in_place: Whether what the state becomes is copied to where it was; a state that grows cannot.
    """

    def __init__(self, layer: Block, state: Any, in_place: bool) -> None:
        self.layer, self.state, self.in_place = layer, state, in_place

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, stream, after = self.layer.forward_state(x.unsqueeze(1), _unsqueezed(residual), self.state)
        self.load(after)
        return x.squeeze(1), stream.squeeze(1)

    def load(self, state: Any) -> None:
        if self.in_place:
            copy_state(self.state, state)
        else:
            self.state = state


class MambaStep:
    """A Mamba block in few kernels; its state changes in place."""

    def __init__(self, layer: Block, state: Any, few: bool) -> None:
        assert isinstance(layer.mixer, Mamba)
        self.layer, self.mixer, self.state, self.few = layer, layer.mixer, state, few

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba behind RMSNorm."""
        return type(layer.mixer).forward_state is Mamba.forward_state and layer.norm.kind == "rms"

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        m, norm = self.mixer, self.layer.norm
        weight, bias = m.conv1d.weight.squeeze(1), m.conv1d.bias
        if self.few:
            conv = Conv(weight, bias, self.state.conv, 0)
            both, stream, low = project(
                x, m.in_proj.weight, m.in_proj.bias, residual=residual, norm_weight=norm.weight, eps=norm.eps,
                conv=conv, following=m.x_proj.weight,
            )  # fmt: skip
            stream = start_stream(x, norm.residual_in_fp32) if stream is None else stream
            u, z = both.chunk(2, dim=-1)
        else:
            x, stream = norm(x, residual)
            u, z = m.in_proj(x).chunk(2, dim=-1)
            u = conv_step(u, weight, bias, self.state.conv)
            low = m.x_proj(u).unsqueeze(1)
        assert low is not None
        y = scan_step(low, u, z, m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, self.state.ssm)
        x = project(y, m.out_proj.weight, m.out_proj.bias)[0] if self.few else m.out_proj(y)
        return self.layer.apply_mlp(x, stream)

    def load(self, state: Any) -> None:
        copy_state(self.state, state)


def layer_step(layer: Block, state: Any, batch: int, fused: bool, in_place: bool) -> LayerStep:
    """The way to step a layer that fits it best."""
    if fused and MambaStep.supports(layer):
        return MambaStep(layer, state, batch <= FEW_ROWS)
    return PlainStep(layer, state, in_place)


def fixed_size(model: MambaLM) -> bool:
    """Whether no layer's state grows with the sequence, so that a graph can hold the step."""
    return all(isinstance(layer.mixer, Mamba) for layer in model.backbone.layers)


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
        fused: Use fused kernels for the layers that have them; by default on GPUs.
        graph: Capture the step in a CUDA graph.
    """

    def __init__(
        self,
        model: MambaLM,
        batch: int,
        sampling: Sampling,
        ends: frozenset[int] = frozenset(),
        padding: int = 0,
        *,
        fused: bool | None = None,
        graph: bool = False,
    ) -> None:
        head = model.lm_head.weight
        self._model = weakref.ref(model)  # the model's cache holds this object
        self.sampling, self.padding, self.ends = sampling, padding, ends
        self.generator = torch.Generator(head.device)
        fused = head.is_cuda if fused is None else fused
        self.steps = [
            layer_step(layer, state, batch, fused, in_place=graph)
            for layer, state in zip(model.backbone.layers, model.init_state(batch), strict=True)
        ]
        self.few = fused and batch <= FEW_ROWS and model.backbone.norm_f.kind == "rms"
        vocabulary = model.config.vocab_size
        new: dict[str, Any] = {"device": head.device}
        self.tokens = torch.zeros(batch, dtype=torch.int64, **new)
        self.finished = torch.zeros(batch, dtype=torch.bool, **new)
        self.logits = torch.zeros(batch, vocabulary, dtype=head.dtype, **new)
        self.end_tokens = torch.tensor(sorted(ends), dtype=torch.int64, **new)
        penalised = sampling.repetition_penalty != 1
        self.seen = torch.zeros(batch, vocabulary, dtype=torch.bool, **new) if penalised else None
        self.busy = False  # with somebody's rows: the state is theirs until they are done
        self.graph = self._capture() if graph else None

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
            step.load(given)
        self.finished.zero_()
        if self.seen is not None and seen is not None:
            self.seen.copy_(seen)
        self.logits.copy_(self.model.lm_head(hidden)[:, : self.logits.shape[1]])
        self._draw()
        return Drawn(self.tokens, self.logits, self.finished)

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
        x, residual = model.backbone.embedding(self.tokens), None
        for step in self.steps:
            x, residual = step(x, residual)
        if self.few:
            logits, _, _ = project(x, model.lm_head.weight, residual=residual, norm_weight=norm.weight, eps=norm.eps)
        else:
            logits = model.lm_head(norm(x, residual)[0])
        self.logits.copy_(logits[:, : self.logits.shape[1]])  # the head's padding rows are no tokens

    def _draw(self) -> None:
        penalty = self.sampling.repetition_penalty
        scores = self.logits if self.seen is None else penalize_repetition(self.logits, self.seen, penalty)
        tokens = sample(scores, self.sampling, self.generator)
        if self.ends:
            tokens = tokens.masked_fill(self.finished, self.padding)
            self.finished |= (tokens[:, None] == self.end_tokens).any(dim=1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.tokens.copy_(tokens)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; compiled and warmed up on states that ``begin`` replaces."""
        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph


_decoders: weakref.WeakKeyDictionary[MambaLM, OrderedDict[Any, Decoder]] = weakref.WeakKeyDictionary()


def decoder_for(
    model: MambaLM, batch: int, sampling: Sampling, ends: frozenset[int], padding: int, *, graph: bool
) -> Decoder:
    """A decoder that is not busy; with a graph one that may have served before: capturing takes long."""
    if not graph:
        return Decoder(model, batch, sampling, ends, padding)
    kept = _decoders.setdefault(model, OrderedDict())
    weights = hash(tuple((p.data_ptr(), p.dtype) for p in model.parameters()))  # a graph reads them where they were
    key = (batch, sampling, ends, padding, weights)
    if key not in kept:
        kept[key] = Decoder(model, batch, sampling, ends, padding, graph=True)
    if kept[key].busy:
        return Decoder(model, batch, sampling, ends, padding)
    kept.move_to_end(key)
    while len(kept) > KEPT_GRAPHS:
        kept.popitem(last=False)
    return kept[key]


def copy_state(target: Any, source: Any) -> None:
    """Copies a mixer's state, a nest of tuples of tensors, into another of the same shapes."""
    if isinstance(target, Tensor):
        target.copy_(source)
    else:
        for ours, given in zip(target, source, strict=True):
            copy_state(ours, given)


def _unsqueezed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.unsqueeze(1)
