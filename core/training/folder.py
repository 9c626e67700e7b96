"""The folder of a run: ``runs/<domain>/<recipe>/<n>``, or one that is named."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.training.report import write_atomically

MARK = "run.json"  # what tells a run folder from any other; holds how the run was started and how it ended


class RunFolder:
    """One run's folder, which is cleared away again if nothing ran in it.

    Args:
        path: The folder.
        replaced: Where the earlier run that stood there was put aside.
        resumed: The folder belongs to a run that goes on: it is never removed.
    """

    def __init__(self, path: Path, replaced: Path | None = None, resumed: bool = False) -> None:
        self.path = path
        self.resumed = resumed
        self._replaced = replaced
        self._created = [] if resumed else _make(path)
        self.started = resumed

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints go."""
        return self.path / "checkpoints"

    def mark(self, facts: dict[str, Any]) -> None:
        """Write down how the run was started or ended."""
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        write_atomically(self.path / MARK, json.dumps({**owner, **facts}, indent=2) + "\n")

    def start(self) -> None:
        """Something ran: the folder stays, the one it replaces goes."""
        self.started = True
        if self._replaced is not None:
            shutil.rmtree(self._replaced)
            self._replaced = None

    def discard(self) -> None:
        """Remove the folder if nothing ran in it, and put back the one it was to replace."""
        if self.started or self.resumed:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self._replaced is not None:
            self._replaced.replace(self.path)
            self._replaced = None
        for folder in self._created:  # runs/<domain>/<recipe>, as far as they were made for this run alone
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def numbered(root: Path) -> RunFolder:
    """Create the next ``root/<n>``; two runs that start together get two numbers."""
    number = max((n for n, _ in _numbers(root)), default=0) + 1
    while True:
        try:
            return RunFolder(root / str(number))
        except FileExistsError:
            number += 1


def named(path: Path, overwrite: bool) -> RunFolder:
    """Create the folder that the user named.

    Args:
        path: The folder; it may exist if it is empty.
        overwrite: Replace an earlier run's folder, once the new run has started.

    Raises:
        UserError: If it holds something that must not be replaced.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--run_dir {path} is a file; name a folder that does not exist yet")
    if not path.is_dir():
        return RunFolder(path)
    if not any(path.iterdir()):
        path.rmdir()
        return RunFolder(path)
    if not overwrite:
        raise UserError(
            f"--run_dir {path} is not empty; name another folder, or replace the run in it with --overwrite true"
        )
    if not (path / MARK).is_file():
        raise UserError(
            f"--run_dir {path} holds no run (no {MARK} in it), so --overwrite does not touch it; name another folder"
        )
    if _alive(path):
        raise UserError(f"the run in {path} is still going on; stop it first, or name another folder")
    aside = path.with_name(f".{path.name}.replaced")
    if aside.exists():
        shutil.rmtree(aside)
    path.replace(aside)
    return RunFolder(path, replaced=aside)


def find_checkpoint(wanted: str, root: Path, run_dir: Path | None) -> Path:
    """Return the file that ``--ckpt_path`` means.

    Args:
        wanted: ``best``, ``last`` or a file.
        root: Folder of the recipe's numbered runs.
        run_dir: Folder named by ``--run_dir``, which is then looked into instead.

    Raises:
        UserError: If there is none.
    """
    if wanted not in ("best", "last"):
        path = Path(wanted)
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}; --ckpt_path takes a .ckpt file, 'last' or 'best'")
        return path
    runs = [run_dir] if run_dir is not None else [path for _, path in sorted(_numbers(root), reverse=True)]
    for run in runs:
        found = sorted((run / "checkpoints").glob(f"{wanted}*.ckpt"), key=lambda p: p.stat().st_mtime)
        if found:
            return found[-1]
    where = run_dir or root
    raise UserError(f"--ckpt_path {wanted}: no run in {where} has a {wanted}.ckpt; train first, or name a file")


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in, or None."""
    folder = checkpoint.resolve().parent.parent
    return folder if checkpoint.parent.name == "checkpoints" and (folder / MARK).is_file() else None


def _make(path: Path) -> list[Path]:
    """Create a folder that must not exist yet, and return what was created, from the inside out."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir()
    return missing


def _numbers(root: Path) -> list[tuple[int, Path]]:
    found = root.iterdir() if root.is_dir() else ()
    return [(int(path.name), path) for path in found if path.name.isdigit() and path.is_dir()]


def _alive(path: Path) -> bool:
    """Tell whether the process that writes a run still exists, as far as this machine can know."""
    facts = json.loads((path / MARK).read_text(encoding="utf-8"))
    if facts.get("status") != "running" or facts.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(facts["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(facts["pid"]) != os.getpid()
