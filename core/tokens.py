"""Text to token ids and back: bytes, or a ``tokenizer.json`` of the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from core.errors import UserError

TOKENIZER = "tokenizer.json"
BYTES = {"type": "bytes"}  # what a tokenizer.json of ours says where tokens are bytes


class Tokenizer(Protocol):
    """What encodes and decodes text."""

    vocab_size: int
    end: int | None  # the token that ends a text, if there is one

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """The same as an array of integers, which takes less memory than a list."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are tokens 0 to 255, and 256 ends a text."""

    vocab_size = 257
    end: int | None = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def encode_array(self, text: str) -> np.ndarray:
        """The same as uint8."""
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; what is no whole character becomes U+FFFD, the end token nothing."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library (GPT-NeoX's, Llama's and most others).

    Args:
        path: The file.
        otherwise: See ``load_tokenizer``.

    Raises:
        UserError: If the library is missing, or the file is none of its own.
    """

    def __init__(self, path: Path, otherwise: str = "") -> None:
        try:
            from tokenizers import Tokenizer as Library  # pyright: ignore[reportMissingImports]  optional
        except ImportError as error:
            raise UserError(f"{path} needs the tokenizers library; run `pip install tokenizers`{otherwise}") from error
        try:
            self._tokenizer: Any = Library.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"{path} is not a file of the tokenizers library: {error}") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        ends = [self._tokenizer.token_to_id(name) for name in ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")]
        self.end: int | None = next((end for end in ends if end is not None), None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """The same as int32."""
        return np.array(self.encode(text), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids))


def load_tokenizer(path: str | Path, option: str = "the argument tokenizer", otherwise: str = "") -> Tokenizer:
    """Reads a tokenizer's file, or the one in a model's folder.

    Args:
        path: ``tokenizer.json`` or the folder that holds it.
        option: How the user names a file, for messages.
        otherwise: What the user can do instead, for messages: such as ", or leave it out".

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    path = Path(path)
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"tokenizer: no file {file}; give one with {option}{otherwise}")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"tokenizer: {file} is not a JSON file") from error
    return ByteTokenizer() if described == BYTES else FileTokenizer(file, otherwise)


def save_byte_tokenizer(folder: str | Path) -> None:
    """Marks a model's folder as one whose tokens are bytes."""
    (Path(folder) / TOKENIZER).write_text(json.dumps(BYTES) + "\n")
