"""Which recordings are trained on, validated on and tested on, and what is said in them, by the layouts there are."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from audio.files import find_audio
from core.errors import UserError

PARTS = ("train", "val", "test")
SC09_LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
SC09_FOLDERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FSDD_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)")  # digit, speaker, take
FSDD_TAKES = {"test": range(5), "val": range(5, 8)}  # takes 0 to 4 are the published test part; the rest is ours

ANY = "any"  # the class of recordings whose class a model is not told

Layout = Literal["auto", "random", "ordered", "sc09", "fsdd"]
Labels = Literal["none", "folder", "name", "speaker"]


def split_files(
    root: Path, fractions: dict[str, float], seed: int = 0, layout: Layout = "auto", held_out: str | None = None
) -> dict[str, list[Path]]:
    """Divides the audio files of a folder into train, val and test; a file goes to one part as a whole.

    Args:
        root: The folder.
        fractions: Of the files, for val and test; for the layouts ``random`` and ``ordered``.
        seed: Of the random split.
        layout: ``sc09`` is Speech Commands (Warden 2018): its ten digits, by its ``validation_list.txt`` and
            ``testing_list.txt``. ``fsdd`` is the Free Spoken Digit Dataset: takes 0 to 4 of each digit and speaker are
            tested on, as published, 5 to 7 validated on. ``random`` splits by seed. ``ordered`` takes the files in the
            order of their names, numbers as numbers: first those to train on, then val, then test, as published for
            YouTubeMix and Beethoven (Goel et al. 2022). ``auto`` sees which of the first two it is, or is ``random``.
        held_out: Test on the files with this word in their name, such as a speaker's, and on no others: no other part
            has any of them, and what the layout would test on is trained on.

    Raises:
        UserError: If the folder has another layout, or too few files for three parts.
    """
    if layout == "auto":
        layout = detect(root)
    if layout == "sc09":
        files = _split_sc09(root)
    elif layout == "fsdd":
        files = _split_fsdd(root)
    else:
        files = _split_by_fraction(root, fractions, seed, ordered=layout == "ordered")
    return files if held_out is None else _hold_out(root, files, held_out)


def detect(root: Path) -> Literal["sc09", "fsdd", "random"]:
    """Tells a folder's layout: by the lists of Speech Commands, or by the names of the Free Spoken Digit Dataset."""
    if all((root / name).is_file() for name in SC09_LISTS.values()):
        return "sc09"
    return "fsdd" if all(FSDD_NAME.fullmatch(path.stem) for path in find_audio(root)) else "random"


def label_of(path: Path, labels: Labels) -> str:
    """What a recording says: its folder's name, or its own up to the first underscore, or up to the last one."""
    if labels == "speaker":
        return path.stem.rpartition("_")[0] or path.stem
    return path.parent.name if labels == "folder" else path.stem.partition("_")[0]


def class_names(paths: Sequence[Path], labels: Labels) -> list[str]:
    """The labels of recordings in a fixed order: the digits' for Speech Commands, otherwise the alphabet's."""
    if labels == "none":
        return []
    found = {label_of(path, labels) for path in paths}
    return [name for name in SC09_FOLDERS if name in found] if found <= set(SC09_FOLDERS) else sorted(found)


def _split_sc09(root: Path) -> dict[str, list[Path]]:
    listed = {}
    for part, name in SC09_LISTS.items():
        if not (root / name).is_file():
            raise UserError(f"{root}: no {name}, wanted the folder of Speech Commands with both of its lists")
        lines = (root / name).read_text(encoding="utf-8").split("\n")
        listed.update({line.strip(): part for line in lines if line.strip()})
    files: dict[str, list[Path]] = {part: [] for part in PARTS}
    for folder in SC09_FOLDERS:
        if not (root / folder).is_dir():
            raise UserError(
                f"{root}: no folder {folder}/, though the lists of Speech Commands are there; wanted the ten digits "
                f"{', '.join(SC09_FOLDERS)}"
            )
        for path in find_audio(root / folder):
            files[listed.get(path.relative_to(root).as_posix(), "train")].append(path)
    for part, paths in files.items():
        if not paths:
            name = SC09_LISTS.get(part, "neither list")
            raise UserError(f"{root}: no file for {part} ({name}); wanted lines such as zero/0a2b400e_nohash_0.wav")
    return files


def _split_fsdd(root: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {part: [] for part in PARTS}
    for path in find_audio(root):
        name = FSDD_NAME.fullmatch(path.stem)
        if name is None:
            raise UserError(f"{path}: the Free Spoken Digit Dataset names its files such as 7_jackson_32.wav")
        take = int(name[3])
        files[next((part for part, takes in FSDD_TAKES.items() if take in takes), "train")].append(path)
    for part, paths in files.items():
        if not paths:
            raise UserError(
                f"{root}: no file for {part}; wanted takes 0 to 49 of the Free Spoken Digit Dataset, or --data.layout "
                "random for a part of it"
            )
    return files


def _split_by_fraction(root: Path, fractions: dict[str, float], seed: int, ordered: bool) -> dict[str, list[Path]]:
    paths = find_audio(root)
    if len(paths) < len(PARTS):
        raise UserError(
            f"{root}: got {len(paths)} audio files, wanted at least 3: parts are split by file, one each for train, "
            "val and test; cut the recording into several files"
        )
    counts = {part: max(1, round(fraction * len(paths))) for part, fraction in fractions.items()}
    first, second = counts["test"], counts["test"] + counts["val"]
    if second >= len(paths):
        raise UserError(f"{root}: {len(paths)} files less {counts} leave none to train on; give smaller fractions")
    if ordered:
        paths = sorted(paths, key=natural)[::-1]
        chosen = {"train": paths[second:], "val": paths[first:second], "test": paths[:first]}
        return {part: found[::-1] for part, found in chosen.items()}
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    picked = {"train": order[second:], "val": order[first:second], "test": order[:first]}
    return {part: [paths[i] for i in sorted(indices)] for part, indices in picked.items()}


def _hold_out(root: Path, files: dict[str, list[Path]], word: str) -> dict[str, list[Path]]:
    def named(path: Path) -> bool:
        return word in path.stem.split("_")

    out = [path for paths in files.values() for path in paths if named(path)]
    rest = {part: [path for path in paths if not named(path)] for part, paths in files.items()}
    if not out:
        words = sorted({piece for paths in files.values() for p in paths for piece in p.stem.split("_")[1:]})
        raise UserError(f"{root}: no file has {word!r} in its name, got such as {', '.join(words[:8]) or 'none'}")
    if not rest["train"] or not rest["val"]:
        raise UserError(f"{root}: without the files of {word!r} there are none left to train or to validate on")
    return {"train": rest["train"] + rest["test"], "val": rest["val"], "test": out}


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts numbers in names by their value: out2 before out10."""
    pieces = re.split(r"(\d+)", path.as_posix())
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]
