"""Cuts the excerpt in this folder from files of aligned blocks: ``python -m genomics.data.cut FOLDER [OUT]``.

FOLDER holds ``<species>.chr22blocks.fa.gz``: one record a block, the same name in every species, in the order of human
chromosome 22, the human coordinates (``hg19:chr22:...``) last in the header. Blocks without N or other ambiguous bases
and of moderate length in all four species are thinned evenly over the chromosome.
"""

import gzip
from pathlib import Path

from core.cli import run
from core.errors import UserError
from genomics.species import APES

SHORTEST, LONGEST = 1024, 4096  # bases
TOTAL = 1_480_000  # bases a species
LINE = 100


def cut(folder: str, out: str = str(Path(__file__).parent)) -> None:
    """Write ``<species>.fa.gz`` for the four great apes.

    Args:
        folder: Folder with ``<species>.chr22blocks.fa.gz``.
        out: Where the excerpt goes.
    """
    genomes = {species: read_blocks(Path(folder) / f"{species}.chr22blocks.fa.gz") for species in APES}
    names = [name for name in genomes["human"] if all(fits(genome[name][1]) for genome in genomes.values())]
    mean = sum(len(genomes["human"][name][1]) for name in names) / len(names)
    count = min(len(names), round(TOTAL / mean))
    chosen = [names[i * len(names) // count] for i in range(count)]
    for species, genome in genomes.items():
        lines = []
        for name in chosen:
            place, bases = genome[name]
            lines += [f">{name} {place}", *(bases[i : i + LINE] for i in range(0, len(bases), LINE))]
        # No time and no file name in the header: the same blocks give the same bytes.
        with (Path(out) / f"{species}.fa.gz").open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
            file.write(("\n".join(lines) + "\n").encode())
    total = sum(len(genomes["human"][name][1]) for name in chosen)
    print(f"{count} blocks of {len(names)} that fit, {total:,} bases of human")


def read_blocks(path: Path) -> dict[str, tuple[str, str]]:
    """Return name, human coordinates and upper-case bases of each block."""
    if not path.is_file():
        raise UserError(f"no file {path}; wanted a folder with <species>.chr22blocks.fa.gz for {', '.join(APES)}")
    blocks: dict[str, tuple[str, str]] = {}
    for record in gzip.decompress(path.read_bytes()).decode().split(">")[1:]:
        header, _, bases = record.partition("\n")
        blocks[header.split()[0]] = (header.split()[-1], bases.replace("\n", "").upper())
    return blocks


def fits(bases: str) -> bool:
    """Tell whether a block is of moderate length and holds nothing but A, C, G and T."""
    return SHORTEST <= len(bases) <= LONGEST and not set(bases) - set("ACGT")


if __name__ == "__main__":
    run(cut)
