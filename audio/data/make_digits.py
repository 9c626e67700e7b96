"""Makes the spoken digits of this folder from Debian's packages of the Asterisk telephone prompts.

Usage, with ffmpeg (for the G.722 decoder) and dpkg-deb on the path::

    apt-get download asterisk-core-sounds-{en,es,fr,it,ru}-g722
    python audio/data/make_digits.py FOLDER_OF_THE_DEB_FILES

The prompts are 16 kHz G.722; they are decoded and stored as 16 bit FLAC, sample for sample, without any processing.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile

LANGUAGES = ("en", "es", "fr", "it", "ru")
SAMPLE_RATE = 16000


def decode_g722(path: Path) -> np.ndarray:
    """Decodes a raw G.722 file (64 kbit/s) to int16 samples (L,) at 16 kHz."""
    command = ["ffmpeg", "-v", "error", "-f", "g722", "-i", str(path), "-f", "s16le", "-ac", "1", "-"]
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, dtype="<i2")


def make(packages: Path, target: Path) -> None:
    """Writes ``target/<language>/<digit>.flac`` for the digits 0 to 9 of every language.

    Args:
        packages: Folder of the downloaded ``.deb`` files.
        target: Where the digits go.
    """
    for language in LANGUAGES:
        package = next(packages.glob(f"asterisk-core-sounds-{language}-g722_*.deb"))
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
            for digit in range(10):
                source = next(Path(folder).glob(f"usr/share/asterisk/sounds/*/digits/{digit}.g722"))
                (target / language).mkdir(parents=True, exist_ok=True)
                soundfile.write(target / language / f"{digit}.flac", decode_g722(source), SAMPLE_RATE, "PCM_16")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the .deb files")
    make(parser.parse_args().packages, Path(__file__).parent / "digits")
