"""Genomes to train on: ``python -m genomics.download`` lists them, ``... hg38 --fetch true`` gets one.

Genomes are UCSC's; their MD5 sums are read from the same server's ``md5sum.txt``, since UCSC replaces files at times.
The split of hg38 that DNA models are compared on is a BED file of Basenji's (Kelley et al. 2018), whose sum the storage
server states with the file.
"""

import base64
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from core.cli import run
from core.errors import UserError
from core.fetch import get

UCSC = "https://hgdownload.soe.ucsc.edu/goldenPath"
BASENJI = "https://storage.googleapis.com/basenji_barnyard2"


@dataclass(frozen=True)
class Source:
    """A genome, or a split of one, that can be had.

    Args:
        species: What it is.
        assembly: UCSC's name of the assembly.
        gigabytes: Size of the file, about.
        split: Name of Basenji's BED file; None is the assembly's FASTA file.
    """

    species: str
    assembly: str
    gigabytes: float
    split: str | None = None

    @property
    def folder(self) -> str:
        """Address of the folder."""
        return f"{UCSC}/{self.assembly}/bigZips" if self.split is None else BASENJI

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.split or f"{self.assembly}.fa.gz"


SOURCES = {
    "hg38": Source("human, GRCh38", "hg38", 0.98),
    "hg38_split": Source("its split, --data.bed", "hg38", 0.001, "sequences_human.bed"),
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
        name: hg38, hg38_split (the BED file of its 34,021 training windows, with validation and test), one of the great
            apes (human, chimpanzee, bonobo, gorilla, orangutan), great_apes for all five, or list for everything.
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
    address = f"{source.folder}/md5sum.txt" if source.split is None else f"{source.folder}/{source.file}"
    method = "GET" if source.split is None else "HEAD"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=60) as answer:
            lines, stated = answer.read().decode("ascii", "replace").splitlines(), answer.headers.get_all("x-goog-hash")
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{address} cannot be had ({error}); copy the file from elsewhere, and check it") from None
    for value in stated or ():
        if value.startswith("md5="):
            return base64.b64decode(value.removeprefix("md5=")).hex()
    for line in lines:
        words = line.split()
        if len(words) == 2 and words[1].lstrip("*./") == source.file:
            return words[0]
    raise UserError(f"{address} states no sum for {source.file}; the server's layout has changed")


if __name__ == "__main__":
    run(download, optional="name")
