"""What the commands on images share: a run folder, progress, precision."""

import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal, TypeVar

import torch
from rich.progress import track

from core.errors import UserError
from core.training.folder import RunFolder, named, numbered

RUNS = Path("runs/vision")
Item = TypeVar("Item")
Precision = Literal["fp32", "bf16", "fp16"]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A context that computes in a precision; nothing for float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


@contextmanager
def output_folder(command: str, out: str | None, overwrite: bool) -> Iterator[Path]:
    """The folder of a command's files, ``runs/vision/<command>/<n>`` or ``out``; it goes again if the command fails.

    Its path is printed as the last line.

    Raises:
        UserError: If ``out`` holds something that must not be replaced.
    """
    folder = numbered(RUNS / command) if out is None else _named(Path(out), overwrite)
    line = shlex.join(["python", "-m", f"vision.{command}", *sys.argv[1:]])
    try:
        folder.mark({"status": "running", "command": line})
        yield folder.path
        folder.mark({"status": "finished", "command": line})
        folder.start()
    finally:
        folder.discard()
    print(folder.path)


def _named(path: Path, overwrite: bool) -> RunFolder:
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; name a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--out {path} is not empty; name another folder, or replace it with --overwrite true")
    return named(path, overwrite)


def steps(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Hands on ``items`` and shows how far it is: a live line in a terminal, elsewhere a line every ten seconds."""
    if sys.stdout.isatty():
        yield from track(items, what, total)
        return
    last = time.monotonic()
    for i, item in enumerate(items):
        yield item
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{what} {i + 1}/{total}", flush=True)
