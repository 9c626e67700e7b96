"""Short prompts through a model as CUDA graphs.

Read eagerly, a short prompt takes as long as the CPU needs to launch some ten kernels a layer. The powers of two that
add up to its length give pieces that are each a graph, so that a few graphs serve prompts of all lengths.

Legend: B batch, L prompt length, D model width.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from core.lm import MambaLM
from core.mixers import Mamba, Mamba2

GRAPH_TOKENS = 2**14  # of all rows together; with more the GPU is slower than the CPU
KEPT_READERS = 4  # a model


class PromptReader:
    """Reads prompts of B rows, of one length each time. A piece's first use is eager, its second captures it.

    Args:
        model: The language model, of Mamba and Mamba-2 layers.
        batch: B.
    """

    @torch.no_grad()
    def __init__(self, model: MambaLM, batch: int) -> None:
        self._model = weakref.ref(model)  # the cache's key
        self.state = model.init_state(batch)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None] = {}
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The backbone's output (B, D) at the last token of ``input_ids`` (B, L), and the state after it.

        Both are valid until the next call.
        """
        start, last = 0, input_ids.new_empty(0)
        for size in pieces(input_ids.shape[1]):
            last = self._piece(input_ids[:, start : start + size], start == 0)
            start += size
        return last, self.state

    def _piece(self, ids: Tensor, first: bool) -> Tensor:
        key = (ids.shape[1], first)
        if key not in self._graphs:
            self._graphs[key] = None
            return self._read(ids, first)
        graph, given, last = self._graphs[key] = self._graphs[key] or self._capture(ids, first)
        given.copy_(ids)
        graph.replay()
        return last

    def _read(self, ids: Tensor, first: bool) -> Tensor:
        model = self._model()
        assert model is not None
        before = model.init_state(ids.shape[0]) if first else self.state
        last, state = model.backbone.forward_last(ids, before)
        copy_state(self.state, state)
        return last

    def _capture(self, ids: Tensor, first: bool) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given, graph = ids.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            last = self._read(given, first)
        self._pool = graph.pool()  # pieces run one after the other: they may share memory
        return graph, given, last


_readers: weakref.WeakKeyDictionary[MambaLM, OrderedDict[Any, PromptReader]] = weakref.WeakKeyDictionary()


def reader_for(model: MambaLM, batch: int, length: int) -> PromptReader | None:
    """What reads such prompts as graphs, kept from earlier calls; None where that does not pay or is not possible."""
    if batch * length > GRAPH_TOKENS or not all(type(k.mixer) in (Mamba, Mamba2) for k in model.backbone.layers):
        return None
    kept = _readers.setdefault(model, OrderedDict())
    key = (batch, weights_key(model))
    if key not in kept:
        kept[key] = PromptReader(model, batch)
    kept.move_to_end(key)
    while len(kept) > KEPT_READERS:
        kept.popitem(last=False)
    return kept[key]


def pieces(length: int) -> list[int]:
    """The powers of two that add up to ``length``, the longest first."""
    return [1 << bit for bit in reversed(range(length.bit_length())) if length >> bit & 1]


def weights_key(model: MambaLM) -> int:
    """Changes when parameters move: a graph reads them where they were."""
    return hash(tuple((p.data_ptr(), p.dtype) for p in model.parameters()))


def copy_state(target: Any, source: Any) -> None:
    """Copies a mixer's state, a nest of tuples of tensors, into another of the same shapes."""
    if isinstance(target, Tensor):
        target.copy_(source)
    else:
        for ours, given in zip(target, source, strict=True):
            copy_state(ours, given)
