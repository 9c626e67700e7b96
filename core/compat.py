"""``MambaLMHeadModel`` with the signature of mamba_ssm, and beside it the layers of ``core.compat_*``.

Existing code switches by an import; parameters, checkpoints and results are the same. Beyond the original, a cache
accepts several tokens at a time, and a decoding step has gradients.

Legend: B batch, L length, V vocabulary, T generated length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from core import generate, lm, published
from core.compat_layers import InferenceParams, Mamba, Params
from core.compat_mamba3 import Mamba3
from core.compat_mha import MHA
from core.compat_mixers import Mamba2, Mamba2Simple
from core.lm import MambaConfig
from core.mixers import Mixer
from kernels.backend import warn_once

__all__ = [
    "MHA",
    "InferenceParams",
    "Mamba",
    "Mamba2",
    "Mamba2Simple",
    "Mamba3",
    "MambaConfig",
    "MambaLMHeadModel",
]


class CausalLMOutput(NamedTuple):
    """What ``MambaLMHeadModel`` returns."""

    logits: Tensor  # (B, L, padded V)


class GenerateOutput(NamedTuple):
    """What ``MambaLMHeadModel.generate`` returns with ``return_dict_in_generate``."""

    sequences: Tensor  # (B, L + T), the prompts included
    scores: tuple[Tensor, ...] | None  # T times (B, V), with ``output_scores``


class MambaLMHeadModel(lm.MambaLM):
    """The Mamba language model with mamba_ssm's arguments; see ``core.lm.MambaLM``.

    Args:
        config: Sizes and options.
        initializer_cfg: ``initializer_range``, the embedding's standard deviation; nothing else is in use.
        device: Where the parameters live.
        dtype: Their dtype.
    """

    mixers: ClassVar[dict[str, Callable[..., Mixer]]] = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}
    attention: ClassVar[Callable[..., Mixer]] = MHA

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype, **(initializer_cfg or {}))
        for index, layer in enumerate(self.backbone.layers):
            cast(Any, layer.mixer).layer_idx = index

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Params | None = None,
        num_last_tokens: int = 0,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> CausalLMOutput:
        """Scores every next token.

        Args:
            input_ids: (B, L) int64.
            position_ids: Accepted; the model has no positions.
            inference_params: Caches to continue from and to update in place.
            num_last_tokens: Logits of the last so many positions only; 0 gives all.
            seq_idx: See ``MambaLM.forward``. With ``inference_params``, accepted beside ``cu_seqlens``.
            cu_seqlens: Likewise. With ``inference_params`` at ``seqlen_offset`` 0: prompts laid end to end, each of
                which becomes a row of the caches.
        """
        if inference_params is None:
            hidden = self.backbone(input_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        elif seq_idx is not None and cu_seqlens is None:
            raise ValueError("seq_idx: got it with inference_params, wanted cu_seqlens too: where the rows begin")
        else:
            hidden = self._forward_cached(input_ids, inference_params, cu_seqlens)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:]))

    def _forward_cached(self, input_ids: Tensor, params: Params, cu_seqlens: Tensor | None) -> Tensor:
        x, residual = self.backbone.embedding(input_ids), None
        for layer in self.backbone.layers:
            mixer = cast(Any, layer.mixer)
            if cu_seqlens is not None and not isinstance(mixer, Mamba | Mamba2):
                raise ValueError(
                    f"cu_seqlens: got packed prompts for the cache of {type(mixer).__name__}, wanted a row each"
                )
            x, stream = layer.norm(x, residual)
            packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
            x, residual = layer.apply_mlp(mixer(x, inference_params=params, **packed), stream)
        return self.backbone.norm_f(x, residual)[0]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """One cache a layer; see ``Mamba.allocate_inference_cache``. ``kwargs`` are accepted, as in the original."""
        return {
            index: cast(Any, layer.mixer).allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)
            for index, layer in enumerate(self.backbone.layers)
        }

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        *,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        teacher_outputs: Tensor | None = None,
        vocab_size: int | None = None,
        cg: bool = False,
        enable_timing: bool = False,
        streamer: Any = None,
    ) -> Tensor | GenerateOutput:
        """Generates until ``max_length`` tokens, the prompt included.

        Rows end on their own: after its end token a row is padded with it. ``min_p`` compares probabilities after the
        temperature, as its paper does.

        Args:
            input_ids: (B, L) int64.
            max_length: Of prompt and continuation together.
            top_k: 1 is greedy, 0 keeps all.
            top_p: 0 keeps all, as 1 does.
            min_p: 0 keeps all.
            temperature: Divides the logits.
            return_dict_in_generate: Return a ``GenerateOutput`` instead of the sequences.
            output_scores: Whether it holds the logits, (B, vocab_size) each; of teacher_outputs (B, padded V) unless
                vocab_size is given.
            repetition_penalty: 1 changes nothing.
            eos_token_id: Ends a row.
            teacher_outputs: (B, L') tokens to take instead of drawing any, prompt included.
            vocab_size: Draw only from so many first tokens; by default all but the padding.
            cg: Accepted: on GPUs steps are CUDA graphs anyway.
            enable_timing: Accepted; warns once that nothing is timed.
            streamer: An object with ``put(tokens)`` and ``end()``, as transformers' streamers.
        """
        if enable_timing:
            warn_once("MambaLMHeadModel.generate: enable_timing has no effect here; nothing is timed")
        if not 1 <= (vocab_size or self.config.vocab_size) <= self.config.vocab_size:
            raise ValueError(f"vocab_size: got {vocab_size}, wanted 1 to {self.config.vocab_size}, the configuration's")
        if teacher_outputs is not None:
            sequences, logits = self._follow(input_ids, teacher_outputs[:, :max_length])
            scores = logits[..., :vocab_size].unbind(1) if output_scores else None
            return GenerateOutput(sequences, scores) if return_dict_in_generate else sequences
        sampling = generate.Sampling(temperature, top_k, top_p or 1.0, min_p, repetition_penalty)
        pieces, scores = [input_ids], []
        if streamer is not None:
            streamer.put(input_ids.cpu())
        new_tokens = max_length - input_ids.shape[1]
        allowed = None if vocab_size in (None, self.config.vocab_size) else range(vocab_size)
        for step in generate.stream(
            self, input_ids, new_tokens, sampling, eos_token_id=eos_token_id, allowed_tokens=allowed
        ):
            pieces.append(step.tokens[:, None])
            if output_scores:
                scores.append(step.logits[:, :vocab_size])
            if streamer is not None:
                streamer.put(step.tokens.cpu())
        if streamer is not None:
            streamer.end()
        sequences = torch.cat(pieces, dim=1)
        if not return_dict_in_generate:
            return sequences
        return GenerateOutput(sequences, tuple(scores) if output_scores else None)

    @torch.no_grad()
    def _follow(self, input_ids: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's tokens after a prompt, and what the model says of them, token by token (B, T, padded V)."""
        length = input_ids.shape[1]
        hidden, state = generate.prefill(self, input_ids, room=teacher.shape[1])
        found = [hidden]
        for token in teacher[:, length:-1].unbind(1):
            hidden, state = self.backbone.forward_state(token[:, None], state)
            found.append(hidden[:, -1])
        return torch.cat([input_ids, teacher[:, length:]], dim=1), self.lm_head(torch.stack(found, dim=1))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaLMHeadModel:
        """Reads a model from a local folder, or by its name on the Hugging Face hub.

        Args:
            pretrained_model_name: A folder, or a name such as "state-spaces/mamba-130m".
            device: Where the model goes.
            dtype: Its dtype.

        Raises:
            UserError: If there is no such model, or it is of another kind.
        """
        return published.load_lm(pretrained_model_name, device=device, dtype=dtype, model_class=cls)

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = True) -> None:
        """Writes ``config.json`` and ``model.safetensors`` to a folder, as mamba_ssm does over what was there."""
        published.save_lm(self, save_directory, overwrite=overwrite)
