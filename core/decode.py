"""Decoding: one token a row and step, over a state that stays where it is, on NVIDIA GPUs as one CUDA graph.

The step of a Mamba or Mamba-2 layer is three kernels for a few rows and seven or five for many, see ``kernels.decode``;
other layers run their ``decode``.

Legend: B batch, D model width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.block import Block, start_stream
from core.lm import MambaLM
from core.mixers import Mamba, Mamba2
from core.mixers.mamba import MambaState, decay_rates
from core.mixers.mamba2 import Mamba2State
from core.prompt import copy_state, weights_key
from core.sampling import Sampling, penalize_repetition, sample
from kernels import conv_update
from kernels.decode import Conv, project, scan_step
from kernels.state_update import state_update

FEW_ROWS = 4  # up to here a projection with everything fused into it beats a matrix product between other kernels
KEPT_GRAPHS = 4  # a model


class PlainStep:
    """Any layer, through its mixer's ``decode``; the state changes in place."""

    def __init__(self, layer: Block, state: Any) -> None:
        self.layer, self.state = layer, state

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token through the block: (B, D) branch and residual stream, before and after."""
        x, stream = self.layer.norm(x.unsqueeze(1), None if residual is None else residual.unsqueeze(1))
        x, stream = self.layer.apply_mlp(self.layer.mixer.decode(x, self.state), stream)
        return x.squeeze(1), stream.squeeze(1)

    def refresh(self) -> None:
        """Works out anew what the step keeps of the parameters."""


class FusedStep(PlainStep):
    """A block whose projections are fused with what is around them.

    Args:
        layer: The block.
        state: Its mixer's state.
        few: Whether the rows are so few that this pays; else there are plain matrix products between the kernels.
    """

    def __init__(self, layer: Block, state: Any, few: bool) -> None:
        super().__init__(layer, state)
        self.few = few

    def project_in(
        self, x: Tensor, residual: Tensor | None, first: int, following: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """in_proj of the normalised sum, and the convolution's step on its outputs from ``first`` on.

        Returns:
            The outputs; the convolved ones; the residual stream; and parts of the projection ``following`` them.
        """
        norm, m = self.layer.norm, self.layer.mixer
        assert isinstance(m, Mamba | Mamba2)
        conv = Conv(m.conv1d.weight.squeeze(1), m.conv1d.bias, self.state.conv, first)
        channels = slice(first, first + conv.weight.shape[0])
        if self.few:
            both, stream, low = project(
                x, m.in_proj.weight, m.in_proj.bias, residual=residual, norm_weight=norm.weight, eps=norm.eps,
                conv=conv, following=following,
            )  # fmt: skip
            stream = start_stream(x, norm.residual_in_fp32) if stream is None else stream
            return both, both[:, channels], stream, low
        x, stream = norm(x, residual)
        both = m.in_proj(x)
        convolved = conv_update(both[:, None, channels], conv.state, conv.weight, conv.bias, activation="silu")[:, 0]
        return both, convolved, stream, None if following is None else F.linear(convolved, following).unsqueeze(1)


class DecayStep(FusedStep):
    """A block whose decay rates are kept."""

    def __init__(self, layer: Block, state: Any, few: bool) -> None:
        super().__init__(layer, state, few)
        assert isinstance(layer.mixer, Mamba | Mamba2)
        self.A = decay_rates(layer.mixer.A_log)

    def refresh(self) -> None:
        """Computes the decay rates again."""
        assert isinstance(self.layer.mixer, Mamba | Mamba2)
        self.A.copy_(decay_rates(self.layer.mixer.A_log))


class MambaStep(DecayStep):
    """A Mamba block in three kernels, or seven."""

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba behind RMSNorm."""
        return isinstance(layer.mixer, Mamba) and not layer.mixer.reverse and layer.norm.kind == "rms"

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        m = self.layer.mixer
        assert isinstance(m, Mamba)
        both, u, stream, low = self.project_in(x, residual, 0, m.x_proj.weight)
        assert low is not None
        z = both[:, m.d_inner :]
        if self.few:
            y = scan_step(low, u, z, m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, self.state.ssm)
            return self.layer.apply_mlp(project(y, m.out_proj.weight, m.out_proj.bias)[0], stream)
        dt, B, C = low.split([m.dt_rank, m.d_state, m.d_state], dim=-1)
        y = state_update(
            self.state.ssm, u.unsqueeze(1), F.linear(dt, m.dt_proj.weight), self.A, B.unsqueeze(1), C.unsqueeze(1),
            m.D, z.unsqueeze(1), m.dt_proj.bias,
        ).squeeze(1)  # fmt: skip
        return self.layer.apply_mlp(m.out_proj(y), stream)


class Mamba2Step(DecayStep):
    """A Mamba-2 block in three kernels, or five."""

    @staticmethod
    def supports(layer: Block) -> bool:
        """Whether this class knows the layer: a causal Mamba-2 without MLP channels, behind RMSNorm."""
        m = layer.mixer
        return isinstance(m, Mamba2) and not m.reverse and not m.d_mlp and layer.norm.kind == "rms"

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        m = self.layer.mixer
        assert isinstance(m, Mamba2)
        both, convolved, stream, _ = self.project_in(x, residual, m.d_ssm, None)
        size = m.ngroups * m.d_state
        z, dt = both[:, : m.d_ssm], both[:, -m.nheads :]
        u, B, C = convolved.split([m.d_ssm, size, size], dim=-1)
        heads, groups = (1, m.nheads, m.headdim), (1, m.ngroups, m.d_state)
        D = m.D.unflatten(0, (m.nheads, m.headdim)) if m.D_has_hdim else m.D
        y = state_update(
            self.state.ssm, u.unflatten(1, heads), dt.unsqueeze(1), self.A, B.unflatten(1, groups),
            C.unflatten(1, groups), D, None if m.norm else z.unflatten(1, heads), m.dt_bias,
            dt_limit=(m.dt_min, m.dt_max),
        ).flatten(1)  # fmt: skip
        if m.norm is None:
            x = project(y, m.out_proj.weight, m.out_proj.bias)[0] if self.few else m.out_proj(y)
        elif self.few:
            x, _, _ = project(
                y, m.out_proj.weight, m.out_proj.bias, gate=z, norm_weight=m.norm.weight, groups=m.ngroups,
                norm_before_gate=m.norm.norm_before_gate, eps=m.norm.eps,
            )  # fmt: skip
        else:
            x = m.out_proj(m.norm(y, z))
        return self.layer.apply_mlp(x, stream)


def narrowed(state: Any, dtype: torch.dtype | None) -> Any:
    """A layer's state with the scan's part in ``dtype``, if it is a Mamba or Mamba-2 layer's."""
    if dtype is None or not isinstance(state, MambaState | Mamba2State):
        return state
    return state._replace(ssm=state.ssm.to(dtype))


def layer_step(layer: Block, state: Any, batch: int, fused: bool) -> PlainStep:
    """The way to step a layer that fits it best."""
    for kind in (MambaStep, Mamba2Step) if fused else ():
        if kind.supports(layer):
            return kind(layer, state, batch <= FEW_ROWS)
    return PlainStep(layer, state)


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
        self.few = fused and batch <= FEW_ROWS and model.backbone.norm_f.kind == "rms"
        vocabulary = model.config.vocab_size
        new: dict[str, Any] = {"device": head.device}
        self.tokens = torch.zeros(batch, dtype=torch.int64, **new)
        self.finished = torch.zeros(batch, dtype=torch.bool, **new)
        self.logits = torch.zeros(batch, vocabulary, dtype=head.dtype, **new)
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
        self.logits.copy_(self.model.lm_head(hidden)[:, : self.logits.shape[1]])
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
