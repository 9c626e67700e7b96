"""Recordings to train on: ``python -m audio.download`` lists them, ``... sc09 --fetch true`` gets and unpacks one."""

import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from core.cli import run
from core.errors import UserError
from core.fetch import get

GOOGLE = "http://download.tensorflow.org/data"
HUB = "https://huggingface.co/datasets/krandiash"


@dataclass(frozen=True)
class Source:
    """Recordings that can be had.

    Args:
        title: What it is.
        licence: Its licence, as its page states it.
        megabytes: Size of what is fetched, about.
        address: Of the archive, or of a git repository.
        recipe: The training command, after ``python -m audio.train``.
        sha256: Sum of the archive; "" where the server states it (the Hugging Face Hub), or git checks for itself.
    """

    title: str
    licence: str
    megabytes: int
    address: str
    recipe: str
    sha256: str = ""


SOURCES = {
    "fsdd": Source(
        "Free Spoken Digit Dataset: 3,000 clips of 6 speakers, 8 kHz", "CC BY-SA 4.0", 25,
        "https://github.com/Jakobovski/free-spoken-digit-dataset.git", "fsdd --data.root {folder}/recordings",
    ),
    "sc09": Source(
        "Speech Commands v0.02, whose ten digits are SC09, 16 kHz", "CC BY 4.0", 2428,
        f"{GOOGLE}/speech_commands_v0.02.tar.gz", "sc09 --data.root {folder}",
        "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
    ),
    "sc09_v1": Source(
        "Speech Commands v0.01, the smaller first version", "CC BY 4.0", 1489,
        f"{GOOGLE}/speech_commands_v0.01.tar.gz", "sc09 --data.root {folder}",
        "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
    ),
    "youtubemix": Source(
        "YouTubeMix: 4 hours of solo piano, 16 kHz", "not stated", 400,
        f"{HUB}/youtubemix/resolve/main/youtubemix.zip", "youtubemix --data.root {folder}",
    ),
    "beethoven": Source(
        "Beethoven: 10 hours of piano sonatas, 16 kHz", "not stated", 900,
        f"{HUB}/beethoven/resolve/main/beethoven.zip", "beethoven --data.root {folder}",
    ),
}  # fmt: skip


def download(name: str = "list", folder: str = "recordings", fetch: bool = False) -> None:
    """Prints where recordings are, and with fetch brings and unpacks them: resumed where they broke off, and checked.

    Args:
        name: fsdd, sc09, sc09_v1, youtubemix, beethoven, or list for all there is.
        folder: Where the files go: each set to a folder of its own name in it.
        fetch: Get the files; otherwise their addresses are only printed.
    """
    names = list(SOURCES) if name == "list" else [name]
    if unknown := [one for one in names if one not in SOURCES]:
        raise UserError(f"no recordings {unknown[0]!r}; wanted one of {', '.join(SOURCES)} or list")
    for one in names:
        source = SOURCES[one]
        print(f"{one:<11} {source.title}\n{'':<11} {source.megabytes:,} MB, {source.licence}: {source.address}")
    if not fetch:
        print(f"to get {'one' if name == 'list' else 'it'}: python -m audio.download {names[0]} --fetch true")
        return
    if name == "list":
        raise UserError(f"--fetch takes one set at a time; give its name, one of {', '.join(SOURCES)}")
    target = Path(folder).expanduser() / name
    fetch_source(SOURCES[name], target)
    print(f"train with: python -m audio.train {SOURCES[name].recipe.format(folder=target)}")


def fetch_source(source: Source, target: Path) -> None:
    """Gets a set and unpacks it to a folder, which appears when it is whole.

    Raises:
        UserError: If the folder exists, the server cannot be reached, or what came is not what was wanted.
    """
    if target.exists():
        raise UserError(f"{target} exists already; remove it to fetch it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if source.address.endswith(".git"):
        _clone(source.address, part)
    else:
        archive = target.parent / source.address.rpartition("/")[2]
        get(source.address, archive, source.sha256 or stated_sum(source.address), "sha256")
        unpack(archive, part)
        archive.unlink()
    part.replace(target)


def stated_sum(address: str) -> str:
    """The SHA-256 sum that the Hugging Face Hub states of a file.

    Raises:
        UserError: If the server cannot be reached, or does not say.
    """

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:  # the sum is in the first answer, not in the storage's
            return None

    request = urllib.request.Request(address, method="HEAD")
    try:
        answer = urllib.request.build_opener(Stay).open(request, timeout=60)
        headers = answer.headers
    except urllib.error.HTTPError as error:
        if not 300 <= error.code < 400:
            raise UserError(f"{address} cannot be had ({error}); copy the file from elsewhere") from None
        headers = error.headers
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{address} cannot be had ({error}); copy the file from elsewhere") from None
    found = (headers.get("X-Linked-ETag") or "").strip('"')
    if len(found) != 64:
        raise UserError(f"{address}: the server states no SHA-256 sum; fetch the file by hand, and check it")
    return found


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .tar.gz or .zip file; a single folder at its top is left out.

    Raises:
        UserError: If it is no such archive, or would write outside the folder.
    """
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)  # drops absolute paths and .. by itself
        else:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{archive} cannot be unpacked ({error}); remove it, and fetch it again") from error
    inside = [path for path in folder.iterdir() if path.name != "__MACOSX"]
    if len(inside) == 1 and inside[0].is_dir():
        spare = folder.with_name(folder.name + ".top")
        inside[0].replace(spare)
        shutil.rmtree(folder)
        spare.replace(folder)


def _clone(address: str, folder: Path) -> None:
    if shutil.which("git") is None:
        raise UserError(f"{address} is a git repository, and there is no git here; install it, or copy the folder")
    done = subprocess.run(
        ["git", "clone", "--quiet", "--depth", "1", address, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        said = done.stderr.strip().splitlines()[-1:] or ["git failed"]
        raise UserError(f"{address} cannot be had ({said[0]}); copy the folder from elsewhere")


if __name__ == "__main__":
    run(download, optional="name")
