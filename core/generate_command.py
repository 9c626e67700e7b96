"""The command ``python -m core.generate``: text or token ids in, continuations out as they are drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from core.checkpoints import read_json
from core.errors import UserError
from core.generate import Step, log_likelihood, pad_prompts, stream
from core.published import find_folder, load_lm
from core.sampling import Sampling
from core.tokens import TOKENIZER, Tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def main(
    *,
    checkpoint: str,
    prompt: str | None = None,
    prompts: str | None = None,
    token_ids: list[int] | None = None,
    tokenizer: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: list[int] | None = None,
    seed: int | None = None,
    score: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Continue text with a language model.

    A single text is printed while it is drawn, several when all are done.

    Args:
        checkpoint: Folder of a model (this project's, mamba_ssm's or transformers' layout), or its name on the hub.
        prompt: The text to continue.
        prompts: Instead: a file with a text a line, which go through the model together.
        token_ids: Instead of a text: its token ids, such as --token_ids '[1, 2, 3]'.
        tokenizer: A tokenizer.json; by default the one in the checkpoint's folder.
        max_new_tokens: How many tokens at most.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep so many of the most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens that together reach this probability; 1 keeps all.
        min_p: Keep tokens at least this likely relative to the most likely one; 0 keeps all.
        repetition_penalty: Above 1 makes tokens less likely that were there before.
        stop: Token ids that end a text; by default what the checkpoint or its tokenizer say.
        seed: Makes the draws repeatable.
        score: Print the log-likelihood of each prompt's tokens after the first, instead of continuing it.
        device: Such as cuda or cpu; by default a GPU where there is one.
        dtype: float32, bfloat16 or float16; by default bfloat16 on a GPU and float32 on the CPU.
        output: A JSON file for prompts, token ids, and continuations or scores.
        overwrite: Replace the output file if it exists.
    """
    sources = (("prompt", prompt), ("prompts", prompts), ("token_ids", token_ids))
    given = [name for name, value in sources if value is not None]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"wanted one of --prompt TEXT, --prompts FILE and --token_ids '[1, 2]', got {got}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; wanted one of {', '.join(DTYPES)}")
    if output is not None:
        _prepare(Path(output), overwrite)
    folder = find_folder(checkpoint)
    texts = _lines(prompts) if prompts is not None else None if prompt is None else [prompt]
    text = _tokenizer(folder, tokenizer, needed=texts is not None)
    rows = [token_ids or []] if texts is None or text is None else [text.encode(one) for one in texts]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = DTYPES[dtype or ("bfloat16" if device.startswith("cuda") else "float32")]
    try:
        model = load_lm(folder, device=device, dtype=kind).eval()
        ids, lengths = pad_prompts(rows, device)
        if score:
            scores = log_likelihood(model, ids, lengths).log_probs.double().sum(1).tolist()
            for value, row in zip(scores, rows, strict=True):
                print(f"{value:.4f} nats, {len(row) - 1} tokens scored")
            _save(output, texts, rows, log_likelihood=scores)
            return
        ends = _ends(folder, text, model.config.vocab_size) if stop is None else stop
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        drawn: list[list[int]] = [[] for _ in rows]
        writer = _Writer(text) if len(rows) == 1 else None
        for step in stream(model, ids, max_new_tokens, sampling, lengths=lengths, eos_token_id=ends, seed=seed):
            _append(drawn, step, ends)
            if writer is not None:
                writer.show(drawn[0])
        if writer is not None:
            writer.finish(drawn[0])
    except (ValueError, RuntimeError) as error:  # of the arguments; and a device that is not there
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(str(error).splitlines()[0]) from error
    found = [None if text is None else text.decode(ids) for ids in drawn]
    if writer is None:
        for number, (ids, continuation) in enumerate(zip(drawn, found, strict=True), 1):
            print(f"[{number}] {' '.join(map(str, ids)) if continuation is None else continuation}")
    _save(output, texts, rows, text=found, ids=drawn)


def _lines(file: str) -> list[str]:
    """The prompts of a file."""
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: cannot read {file}: {error}") from error
    if not lines:
        raise UserError(f"--prompts: {file} is empty; wanted a prompt a line")
    return lines


def _tokenizer(folder: Path, file: str | None, needed: bool) -> Tokenizer | None:
    """The tokenizer given, or the checkpoint's; None where there is none and none is needed."""
    if file is None and not needed and not (folder / TOKENIZER).is_file():
        return None
    return load_tokenizer(folder if file is None else file, "--tokenizer FILE", ", or give --token_ids")


def _ends(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The end tokens of transformers' files, or the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ends = read_json(path).get("eos_token_id") if path.is_file() else None
        if ends is not None:
            found = ends if isinstance(ends, list) else [ends]
            if not all(isinstance(end, int) and 0 <= end < vocab_size for end in found):
                raise UserError(
                    f"{path}: eos_token_id is {ends!r}; wanted tokens from 0 to {vocab_size - 1}; else give --stop"
                )
            return found
    end = None if tokenizer is None else tokenizer.end
    return [] if end is None or end >= vocab_size else [end]


def _append(drawn: list[list[int]], step: Step, ends: list[int]) -> None:
    """Adds a step's tokens to the rows that had not ended."""
    for row, token in zip(drawn, step.tokens.tolist(), strict=True):
        if not (row and row[-1] in ends):
            row.append(token)


class _Writer:
    """Prints a text as it grows: only what no later token can change."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer, self.shown = tokenizer, ""

    def show(self, ids: list[int]) -> None:
        """Prints what the last token adds."""
        if self.tokenizer is None:
            sys.stdout.write(f"{ids[-1]} ")
        else:
            text = self.tokenizer.decode(ids).rstrip("\ufffd")  # the start of a character
            if text.startswith(self.shown):
                sys.stdout.write(text[len(self.shown) :])
                self.shown = text
        sys.stdout.flush()

    def finish(self, ids: list[int]) -> None:
        """Prints what was held back."""
        if self.tokenizer is not None:
            sys.stdout.write(self.tokenizer.decode(ids)[len(self.shown) :])
        print()


def _prepare(file: Path, overwrite: bool) -> None:
    """Makes the folder of a file that is to be written in the end, and raises where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write {file}: {error.strerror}") from error
    if file.is_dir():
        raise UserError(f"--output: {file} is a folder; wanted the name of a file")
    if file.is_file() and not overwrite:
        raise UserError(f"--output: {file} exists; name another file, or replace it with --overwrite true")


def _save(file: str | None, prompts: list[str] | None, rows: list[list[int]], **columns: Sequence[object]) -> None:
    """Writes an object a prompt, with an entry of each column, and prints the file's name."""
    if file is None:
        return
    found = [
        {"prompt": prompt, "prompt_ids": ids, **dict(zip(columns, values, strict=True))}
        for prompt, ids, *values in zip(prompts or [None] * len(rows), rows, *columns.values(), strict=True)
    ]
    Path(file).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(file)
