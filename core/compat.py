"""``Mamba``, ``MambaLMHeadModel`` and ``MambaConfig`` with the signatures of mamba_ssm.

Existing code switches by an import; parameters, checkpoints and results are the same. Beyond the original, a cache
accepts several tokens at a time, and a decoding step has gradients.

Legend: B batch, L length, D model width, E inner width, N state, W convolution width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from core import checkpoints, generate, lm
from core.compat_mamba3 import Mamba3
from core.compat_mha import MHA
from core.compat_mixers import Mamba2, Mamba2Simple
from core.lm import MambaConfig
from core.mixers import Mixer, mamba
from kernels.backend import warn_once

__all__ = ["MHA", "Mamba", "Mamba2", "Mamba2Simple", "Mamba3", "MambaConfig", "MambaLMHeadModel"]


class InferenceParams(Protocol):
    """What callers hand over to decode: mamba_ssm's ``InferenceParams`` or anything with these fields."""

    seqlen_offset: int
    key_value_memory_dict: dict[Any, Any]


class Mamba(mamba.Mamba):
    """The Mamba block with mamba_ssm's arguments and caches.

    Args:
        arguments: As in ``core.mixers.mamba.Mamba``, whose order is mamba_ssm's.
        use_fast_path: Accepted; there is one path, and it is the fast one.
        layer_idx: Key of this layer's cache in ``inference_params``.
        options: As ``arguments``, by name; an unknown one is a TypeError.
    """

    def __init__(
        self, *arguments: Any, use_fast_path: bool = True, layer_idx: int | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.layer_idx = layer_idx

    # The arguments by name: for help(), and for the language model, which checks its configuration against them.
    __signature__: ClassVar[inspect.Signature] = inspect.Signature(
        [
            *inspect.signature(mamba.Mamba).parameters.values(),
            *(p for p in inspect.signature(__init__).parameters.values() if p.kind is p.KEYWORD_ONLY),
        ]
    )

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: InferenceParams | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mixes (B, L, D); with ``inference_params`` it continues from this layer's cache and updates it in place.

        At ``seqlen_offset`` 0 the cache is started afresh. After that any number of tokens may follow.
        """
        if inference_params is None:
            return super().forward(hidden_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        if self.layer_idx is None:
            raise ValueError("layer_idx: got None, wanted the key of this layer's cache; pass it to the constructor")
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(hidden_states.shape[0], 0)
        conv_state, ssm_state = caches[self.layer_idx]
        if inference_params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        return self._continue(hidden_states, conv_state, ssm_state)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes one token.

        Args:
            hidden_states: (B, 1, D).
            conv_state: (B, E, W), updated in place; the newest input last.
            ssm_state: (B, E, N), updated in place.

        Returns:
            The output (B, 1, D) and the two states.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step: got {hidden_states.shape[1]} tokens, wanted 1; forward takes any number")
        return self._continue(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """A cache of zeros: conv_state (B, E, W) and ssm_state (B, E, N).

        Args:
            batch_size: B.
            max_seqlen: Accepted; the size of the state does not depend on it.
            dtype: Of both. By default that of the parameters, and for the scan float32, in which it is computed.
        """
        weight = self.conv1d.weight
        ssm_dtype = dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or weight.dtype)
        return conv_state, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=ssm_dtype)

    def _continue(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Runs x (B, L, D) from the two states and updates them in place."""
        # Copies: the backward pass needs the states as they were.
        conv = conv_state[:, :, 1:].mT.clone(memory_format=torch.contiguous_format)
        ssm = ssm_state.to(torch.promote_types(ssm_state.dtype, torch.float32), copy=True)
        before = mamba.MambaState(conv, ssm)
        y, after = self.forward_state(x, before)
        with torch.no_grad():
            # The cache has one column more than the layer needs: the input W tokens back, never read again.
            length = x.shape[1]
            if length < self.d_conv:
                oldest = conv_state[:, :, length].clone()
            else:
                oldest = self.in_proj(x[:, length - self.d_conv])[:, : self.d_inner]
            conv_state[:, :, 0] = oldest
            conv_state[:, :, 1:] = after.conv.mT
            ssm_state.copy_(after.ssm)
        return y


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

    mixers: ClassVar[dict[str, Callable[..., Mixer]]] = {"Mamba1": Mamba}

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype, **(initializer_cfg or {}))
        for index, layer in enumerate(self.backbone.layers):
            cast(Mamba, layer.mixer).layer_idx = index

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
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
            seq_idx: See ``MambaLM.forward``; not together with ``inference_params``.
            cu_seqlens: Likewise.
        """
        if inference_params is None:
            hidden = self.backbone(input_ids, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        elif seq_idx is not None or cu_seqlens is not None:
            raise ValueError("inference_params: got seq_idx or cu_seqlens too, wanted one sequence a row in a cache")
        else:
            hidden = self._forward_cached(input_ids, inference_params)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:]))

    def _forward_cached(self, input_ids: Tensor, inference_params: InferenceParams) -> Tensor:
        x, residual = self.backbone.embedding(input_ids), None
        for layer in self.backbone.layers:
            x, stream = layer.norm(x, residual)
            x, residual = layer.apply_mlp(cast(Mamba, layer.mixer)(x, inference_params), stream)
        return self.backbone.norm_f(x, residual)[0]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """One cache a layer; see ``Mamba.allocate_inference_cache``."""
        return {
            index: cast(Mamba, layer.mixer).allocate_inference_cache(batch_size, max_seqlen, dtype)
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
            output_scores: Whether it holds the logits.
            repetition_penalty: 1 changes nothing.
            eos_token_id: Ends a row.
            vocab_size: Accepted if it is the configuration's; padding tokens are never drawn.
            cg: Accepted; warns once that no CUDA graph is captured.
            enable_timing: Accepted; warns once that nothing is timed.
            streamer: An object with ``put(tokens)`` and ``end()``, as transformers' streamers.
        """
        if cg or enable_timing:
            warn_once("MambaLMHeadModel.generate: cg and enable_timing have no effect here; results are the same")
        if vocab_size not in (None, self.config.vocab_size):
            raise ValueError(f"vocab_size: got {vocab_size}, wanted {self.config.vocab_size}, the configuration's")
        sampling = generate.Sampling(temperature, top_k, top_p or 1.0, min_p, repetition_penalty)
        pieces, scores = [input_ids], []
        if streamer is not None:
            streamer.put(input_ids.cpu())
        new_tokens = max_length - input_ids.shape[1]
        for step in generate.stream(self, input_ids, new_tokens, sampling, eos_token_id=eos_token_id):
            pieces.append(step.tokens[:, None])
            if output_scores:
                scores.append(step.logits)
            if streamer is not None:
                streamer.put(step.tokens.cpu())
        if streamer is not None:
            streamer.end()
        sequences = torch.cat(pieces, dim=1)
        if not return_dict_in_generate:
            return sequences
        return GenerateOutput(sequences, tuple(scores) if output_scores else None)

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
        folder = Path(pretrained_model_name)
        if not folder.is_dir():
            folder = checkpoints.download(str(pretrained_model_name))
        model = checkpoints.load_lm(folder, device=device, dtype=dtype, model_class=cls)
        assert isinstance(model, cls)
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` to a folder, over what was there, as mamba_ssm does."""
        checkpoints.save_lm(self, save_directory, overwrite=True)
