"""Genomes to train on: ``python -m genomics.download`` lists them, ``... hg38 --fetch true`` gets one.

Files are UCSC's; their MD5 sums are read from the same server's ``md5sum.txt``, since UCSC replaces files at times.
"""

import hashlib
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from core.cli import run
from core.errors import UserError

UCSC = "https://hgdownload.soe.ucsc.edu/goldenPath"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A genome that can be had.

    Args:
        species: What it is.
        assembly: UCSC's name of the assembly.
        gigabytes: Size of the gzipped FASTA file, about.
    """

    species: str
    assembly: str
    gigabytes: float

    @property
    def folder(self) -> str:
        """Address of the folder."""
        return f"{UCSC}/{self.assembly}/bigZips"

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{self.assembly}.fa.gz"


SOURCES = {
    "hg38": Source("human, GRCh38", "hg38", 0.98),
    "human": Source("human, T2T-CHM13", "hs1", 0.97),
    "chimpanzee": Source("chimpanzee", "panTro6", 0.97),
    "bonobo": Source("bonobo", "panPan3", 0.97),
    "gorilla": Source("gorilla", "gorGor6", 0.95),
    "orangutan": Source("Sumatran orangutan", "ponAbe3", 0.97),
}
APES = ("human", "chimpanzee", "bonobo", "gorilla", "orangutan")


def download(name: str = "list", folder: str = "genomes", fetch: bool = False) -> None:
    """Prints where genomes are, and with fetch brings them: resumed where they broke off, checked by their MD5 sums.

    Args:
        name: hg38, one of the great apes (human, chimpanzee, bonobo, gorilla, orangutan), great_apes for all five, or
            list for everything there is.
        folder: Where the files go.
        fetch: Get the files; otherwise their addresses are only printed.
    """
    names = {"list": list(SOURCES), "great_apes": list(APES)}.get(name, [name])
    if unknown := [one for one in names if one not in SOURCES]:
        raise UserError(f"no genome {unknown[0]!r}; wanted one of {', '.join(SOURCES)}, great_apes or list")
    for one in names:
        source = SOURCES[one]
        print(f"{one:<12}{source.species:<22}{source.gigabytes:>6.2f} GB  {source.folder}/{source.file}")
    if not fetch:
        print(f"to get them: python -m genomics.download {name} --fetch true, or: curl -C - -O ADDRESS")
        return
    for one in names:
        source = SOURCES[one]
        print(get(f"{source.folder}/{source.file}", Path(folder) / source.file, checksum(source)), flush=True)


def checksum(source: Source) -> str:
    """Return the MD5 sum that the server states.

    Raises:
        UserError: If the server cannot be reached, or does not say.
    """
    address = f"{source.folder}/md5sum.txt"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            lines = answer.read().decode("ascii", "replace").splitlines()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{address} cannot be had ({error}); copy the file from elsewhere, and check it") from None
    for line in lines:
        words = line.split()
        if len(words) == 2 and words[1].lstrip("*./") == source.file:
            return words[0]
    raise UserError(f"{address} states no sum for {source.file}; the server's layout has changed")


def get(address: str, path: Path, md5: str) -> Path:
    """Fetch a file, going on from a part that is there, and check it.

    Args:
        address: Where from.
        path: Where to; ``<path>.part`` until it is whole and checked.
        md5: Its MD5 sum, in hexadecimal.

    Returns:
        The path.

    Raises:
        UserError: If the server cannot be reached or the sum is wrong; a part that was fetched stays, one whose sum is
            wrong goes.
    """
    if path.is_file():
        if digest(path) == md5:
            return path
        raise UserError(f"{path} exists with another content (MD5 sum {digest(path)}, wanted {md5}); remove it")
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
    if (found := digest(part)) != md5:
        part.unlink()
        raise UserError(f"{address}: the MD5 sum is {found}, wanted {md5}; the file was removed, fetch it again")
    part.replace(path)
    return path


def digest(path: Path) -> str:
    """MD5 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


if __name__ == "__main__":
    run(download)
