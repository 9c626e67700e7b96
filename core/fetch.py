"""Files from a server: resumed where they broke off, checked by their sums."""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

from rich.progress import Progress

from core.errors import UserError

CHUNK = 1 << 20
Algorithm = Literal["md5", "sha256"]


def get(address: str, path: Path, wanted: str, algorithm: Algorithm = "md5") -> Path:
    """Fetch a file, going on from a part that is there, and check it.

    Args:
        address: Where from.
        path: Where to; ``<path>.part`` until it is whole and checked.
        wanted: Its sum, in hexadecimal.
        algorithm: Of the sum.

    Returns:
        The path.

    Raises:
        UserError: If the server cannot be reached or the sum is wrong; a part that was fetched stays, one whose sum is
            wrong goes.
    """
    name = "MD5" if algorithm == "md5" else "SHA-256"
    if path.is_file():
        if (found := digest(path, algorithm)) == wanted:
            return path
        raise UserError(f"{path} exists with another content ({name} sum {found}, wanted {wanted}); remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    begun = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer, Progress() as bar:
            resumed = begun and answer.status == 206
            total = int(answer.headers.get("Content-Length", 0)) + (begun if resumed else 0)
            task = bar.add_task(path.name, total=total or None, completed=begun if resumed else 0)
            with part.open("ab" if resumed else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.advance(task, len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is whole already: nothing is left to ask for
            raise UserError(f"{address} cannot be had ({error}); the part fetched so far stays in {part}") from None
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{address} broke off ({error}); the same command goes on from {part}") from None
    if (found := digest(part, algorithm)) != wanted:
        part.unlink()
        raise UserError(f"{address}: the {name} sum is {found}, wanted {wanted}; the file was removed, fetch it again")
    part.replace(path)
    return path


def digest(path: Path, algorithm: Algorithm = "md5") -> str:
    """Sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
