"""An adapter for EleutherAI's lm-evaluation-harness: its requests answered by a model of ours.

    from core.harness import HarnessLM
    import lm_eval

    lm_eval.simple_evaluate(HarnessLM("state-spaces/mamba-130m", tokenizer="tokenizer.json"), tasks=["lambada_openai"])

The harness is optional; where it is installed (``pip install lm_eval``), the class is one of its own kind.

Legend: B batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.errors import UserError
from core.generate import log_likelihood, pad_prompts, stream
from core.lm import MambaLM
from core.published import find_folder, load_lm
from core.sampling import Sampling
from core.tokens import Tokenizer, load_tokenizer

if TYPE_CHECKING or importlib.util.find_spec("lm_eval") is None:
    Base = object
else:
    from lm_eval.api.model import LM as Base  # noqa: N811  a class


class HarnessLM(Base):
    """Answers the three kinds of requests of the harness.

    Args:
        pretrained: A model, its folder, or its name on the hub.
        tokenizer: A tokenizer, or its file; by default the one in the model's folder.
        batch_size: Requests that go through the model together.
        max_length: Tokens of a window of ``loglikelihood_rolling``; None: a text is read whole, whatever its length.
        device: Where the model runs; by default a GPU where there is one. Not for a model that is built already.
        dtype: Its dtype, likewise; bfloat16 on GPUs and float32 on the CPU by default.

    Raises:
        UserError: If the model or the tokenizer cannot be read.
    """

    def __init__(
        self,
        pretrained: MambaLM | str | Path,
        tokenizer: Tokenizer | str | Path | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, MambaLM):
            if tokenizer is None:
                raise UserError("tokenizer: got none, wanted one beside a model that is not read from a folder")
            self.model = pretrained
        else:
            folder = find_folder(pretrained)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
            self.model = load_lm(folder, device=device, dtype=dtype).eval()
            tokenizer = folder if tokenizer is None else tokenizer
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self.start = 0 if self.tokenizer.end is None else self.tokenizer.end  # what stands before a text

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one.

        Args:
            requests: Instances whose ``args`` are (context, continuation).
            disable_tqdm: Accepted; there is no bar.
        """
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, ``args`` are (text,); windows of ``max_length`` share no context."""
        found = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            size = self.max_length or max(1, len(ids))
            windows = [([ids[at - 1] if at else self.start], ids[at : at + size]) for at in range(0, len(ids), size)]
            found.append(sum(value for value, _ in self._score(windows)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the stop strings.

        Args:
            requests: Instances whose ``args`` are (context, options); options may hold until, max_gen_toks,
                temperature, top_k, top_p and do_sample.
            disable_tqdm: Accepted; there is no bar.
        """
        return [self._continuation(*request.args) for request in requests]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; spaces at the context's end belong to the continuation, as the harness does it."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return [self.start], self.tokenizer.encode(continuation)
        before, whole = self.tokenizer.encode(context), self.tokenizer.encode(context + continuation)
        return before, whole[len(before) :]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Sums over each pair's continuation; texts of about the same length go together."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        for batch in _chunks(order, self.batch_size):
            ids, lengths = pad_prompts([[*pairs[i][0], *pairs[i][1]] for i in batch], self.model.lm_head.weight.device)
            scores = log_likelihood(self.model, ids, lengths)
            for row, i in enumerate(batch):
                part = slice(len(pairs[i][0]) - 1, sum(map(len, pairs[i])) - 1)
                value = scores.log_probs[row, part].double().sum().item()
                found[i] = (value, bool(scores.greedy[row, part].all()))
        return [found[i] for i in range(len(pairs))]

    def _continuation(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampled = options.get("do_sample", options.get("temperature", 0) > 0)
        sampling = Sampling(
            options.get("temperature", 1.0) if sampled else 0.0, options.get("top_k", 0), options.get("top_p", 1.0)
        )
        ids = self.tokenizer.encode(context) or [self.start]
        ids, _ = pad_prompts([ids], self.model.lm_head.weight.device)
        drawn: list[int] = []
        limit = options.get("max_gen_toks", 256)
        for step in stream(self.model, ids, limit, sampling, eos_token_id=self.tokenizer.end):
            drawn.append(int(step.tokens[0]))
            if any(stop in self.tokenizer.decode(drawn) for stop in stops):
                break
        text = self.tokenizer.decode([token for token in drawn if token != self.tokenizer.end])
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _chunks(items: list[int], size: int) -> Iterable[list[int]]:
    return (items[at : at + size] for at in range(0, len(items), size))
