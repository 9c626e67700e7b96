"""Text files as packed windows of token ids, and the data module that splits and serves them.

Legend: B batch, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
from core.tokens import ByteTokenizer, Tokenizer, load_tokenizer
from core.training.rng import ResumableLoader

PARTS = ("train", "val", "test")
SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".html", ".tex")


class Windows(Dataset):
    """Consecutive windows of a stream of tokens, each with the token that follows it.

    Args:
        tokens: The stream.
        length: L.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = torch.from_numpy(tokens), length

    def __len__(self) -> int:
        return max(0, -(-(len(self.tokens) - 1) // self.length))

    def __getitem__(self, index: int) -> Tensor:
        """Return (L + 1,) int64; -1 pads the last window on the right."""
        piece = self.tokens[index * self.length : (index + 1) * self.length + 1].long()
        return torch.nn.functional.pad(piece, (0, self.length + 1 - len(piece)), value=-1)


class TextData(LightningDataModule):
    """Text files for next-token training, laid end to end with an end token after each and cut into windows.

    A folder with subfolders train, val (or valid, validation) and test is taken as it is split. Otherwise each file
    gives its last parts to validation and test, so that small corpora of few files work too.

    Args:
        root: A text file, or a folder of them (read with its subfolders, in the order of their names).
        tokenizer: A tokenizer.json of the tokenizers library; None is bytes.
        window: Tokens of a window, L.
        suffixes: Names that end so are read.
        val_share: Share of each file that is held out for validation.
        test_share: Share of each file that is held out for the test.
        batch_size: Windows per step and device.
        num_workers: Processes that cut windows, per device.

    Raises:
        UserError: If a file or an option does not fit.
    """

    def __init__(
        self,
        root: str,
        tokenizer: str | None = None,
        window: int = 2048,
        suffixes: Sequence[str] = SUFFIXES,
        val_share: float = 0.05,
        test_share: float = 0.05,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("window", window), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"--data.{name} is {value}; wanted at least 1")
        if not (0 < val_share < 1 and 0 < test_share < 1 and val_share + test_share < 1):
            raise UserError(
                f"--data.val_share, test_share are {val_share}, {test_share}; wanted both above 0, below 1 in all"
            )
        self.tokenizer: Tokenizer = ByteTokenizer()
        if tokenizer is not None:
            self.tokenizer = load_tokenizer(tokenizer, "--data.tokenizer FILE", ", or leave it out for bytes")
        self.tokenizer_file = tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        self.window, self.batch_size, self.num_workers = window, batch_size, num_workers
        self.texts = _read(Path(root), tuple(suffixes), val_share, test_share)
        self.bytes = {part: sum(len(text.encode()) for text in self.texts[part]) for part in PARTS}
        self.windows = {part: Windows(self._tokens(self.texts[part]), window) for part in PARTS}
        if len(self.windows["train"]) < batch_size:
            raise UserError(
                f"{root}: got {len(self.windows['train'])} windows of {window:,} tokens to train on, wanted a batch of "
                f"{batch_size}; give a shorter --data.window, a smaller --data.batch_size or more text"
            )
        for part in ("val", "test"):
            if not len(self.windows[part]):
                raise UserError(f"{root}: got no text for the {part} part, wanted some; enlarge --data.{part}_share")

    def _tokens(self, texts: list[str]) -> np.ndarray:
        end = np.array([] if self.tokenizer.end is None else [self.tokenizer.end], np.int32)
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.int32  # a large corpus should fit in memory
        arrays = [array for text in texts for array in (self.tokenizer.encode_array(text), end)]
        return np.concatenate(arrays, dtype=dtype, casting="unsafe") if arrays else np.zeros(0, dtype)

    def train_dataloader(self) -> DataLoader:
        """Shuffled; the last, smaller batch is left out."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return self._loader("test")

    def _loader(self, part: str, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        return ResumableLoader(
            self.windows[part],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            shuffle=shuffle,
            drop_last=drop_last,
        )


def _read(root: Path, suffixes: tuple[str, ...], val_share: float, test_share: float) -> dict[str, list[str]]:
    """The texts of each part."""
    if not root.exists():
        raise UserError(f"--data.root: no {root}; wanted a text file or a folder of them")
    folders = {part: next((root / name for name in names if (root / name).is_dir()), None) for part, names in FOLDERS}
    if all(folder is not None for folder in folders.values()):
        return {part: [_text(file) for file in _files(folder, suffixes)] for part, folder in folders.items() if folder}
    if folders["train"] is not None and (folders["val"] or folders["test"]) is not None:  # it would be trained on
        missing = "val" if folders["val"] is None else "test"
        raise UserError(
            f"--data.root: {root} has a folder {folders['train'].name} and one to hold out, but no folder {missing}; "
            f"add {missing}, or give --data.root {folders['train']}"
        )
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for text in map(_text, [root] if root.is_file() else _files(root, suffixes)):
        test = len(text) - int(len(text) * test_share)
        val = test - int(len(text) * val_share)
        for part, piece in zip(PARTS, (text[:val], text[val:test], text[test:]), strict=True):
            parts[part] += [piece] if piece else []
    return parts


FOLDERS = (("train", ("train",)), ("val", ("val", "valid", "validation")), ("test", ("test",)))


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(suffixes))
    if not files:
        raise UserError(f"{folder}: no text files, wanted some that end in {', '.join(suffixes)} (--data.suffixes)")
    return files


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # without the mark that some editors begin files with
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); convert it, or leave it out") from error
