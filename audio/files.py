"""Audio files: found, read whole, mixed to one channel and one rate, and refused by name if they are damaged.

Dimension letters: L samples.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from core.errors import UserError

EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
STREAMED = (0, 0xFFFFFFFF)  # sizes that programs put in a WAV header when they write to a pipe


class Clip(NamedTuple):
    """One recording, as it was found."""

    samples: np.ndarray  # (L, channels) float32, in [-1, 1] except for floating-point files
    sample_rate: int  # Hz
    channels: int


def find_audio(root: Path) -> list[Path]:
    """Lists the audio files below a folder by name; hidden ones are left out.

    Raises:
        UserError: If there is no such folder, or no audio file in it.
    """
    if not root.is_dir():
        got = "a file" if root.is_file() else "nothing"
        raise UserError(f"{root}: got {got} there, wanted a folder of recordings ({', '.join(EXTENSIONS)})")
    inside = (path.relative_to(root) for path in root.rglob("*"))
    found = sorted(
        path
        for path in inside
        if path.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in path.parts)
    )
    paths = [root / path for path in found if (root / path).is_file()]
    if not paths:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise UserError(f"{root}: no audio files in it, got {there}; wanted {', '.join(EXTENSIONS)}")
    return paths


def read_clip(path: Path) -> Clip:
    """Reads a whole recording.

    Raises:
        UserError: If it cannot be read to its end, is empty or holds samples that are not finite; the message names
            the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, wanted a recording ({', '.join(EXTENSIONS)})")
    try:
        with soundfile.SoundFile(path) as file:
            samples = file.read(dtype="float32", always_2d=True)
            promised, rate, container = file.frames, file.samplerate, file.format
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        reason = str(error).split(": ", 1)[-1].strip()
        raise UserError(
            f"{path}: not a readable recording ({reason}); remove it, or convert it to WAV or FLAC"
        ) from error
    missing = _missing(path, container, promised, len(samples))
    if missing:
        raise UserError(f"{path}: the recording is cut off ({missing}); copy it again, or remove it")
    if not len(samples):
        raise UserError(f"{path}: the recording is empty, wanted at least one sample; record it again, or remove it")
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: holds samples that are NaN or infinite; write it again, or remove it")
    return Clip(samples, rate, samples.shape[1])


def to_mono(clip: Clip, sample_rate: int) -> Tensor:
    """Averages the channels and resamples to ``sample_rate`` (windowed sinc, torchaudio).

    Returns:
        (L,) float32.
    """
    wave = torch.from_numpy(clip.samples.mean(axis=1, dtype=np.float32))
    if clip.sample_rate == sample_rate:
        return wave
    from torchaudio.functional import resample  # takes a second, and most folders do not need it

    return resample(wave, clip.sample_rate, sample_rate)


def stretched(wave: Tensor, ratio: float) -> Tensor:
    """A recording (L,) played slower by ``ratio``, (round(L ratio),): its spectrum is cut off or padded."""
    if ratio == 1:
        return wave
    length = round(len(wave) * ratio)
    return torch.fft.irfft(torch.fft.rfft(wave), length) * (length / len(wave))


def conversions(clips: Iterable[tuple[int, int]], sample_rate: int) -> list[str]:
    """Says in words what was done to a set of files.

    Args:
        clips: Rate in Hz and number of channels of each file.
        sample_rate: The rate they were brought to.
    """
    rates: dict[int, int] = {}
    channels: dict[int, int] = {}
    for rate, count in clips:
        rates[rate] = rates.get(rate, 0) + 1
        channels[count] = channels.get(count, 0) + 1
    done = [f"{n} files resampled from {rate} to {sample_rate} Hz" for rate, n in rates.items() if rate != sample_rate]
    return done + [f"{n} files of {count} channels mixed down to one" for count, n in channels.items() if count > 1]


def write_wav(path: Path, wave: Tensor, sample_rate: int) -> None:
    """Writes samples (L,) in [-1, 1] as 16 bit WAV."""
    soundfile.write(path, wave.clamp(-1, 1).cpu().numpy(), sample_rate, subtype="PCM_16")


def write_stream(out: BinaryIO, waves: Iterable[Tensor], length: int, sample_rate: int) -> None:
    """Writes 16 bit WAV to a stream, piece by piece, as soon as each is there.

    Args:
        out: A binary stream that cannot be rewound; a reader that hangs up ends the writing.
        waves: Pieces (n,) in [-1, 1].
        length: Samples of all pieces together: the header says it before they are there.
        sample_rate: In Hz.
    """
    size = 2 * length
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    try:
        out.write(struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + form + struct.pack("<4sI", b"data", size))
        for wave in waves:
            out.write((wave.clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy().astype("<i2").tobytes())
            out.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # else Python complains once more when it exits


def _missing(path: Path, container: str, promised: int, got: int) -> str:
    """Says what a file's header promises and its body lacks, or nothing; libsndfile reads such files in silence."""
    if got < promised:
        return f"{got} of {promised} samples"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(max(0, size - 65307))  # the longest Ogg page there is
        tail = file.read()
    if head[:4] in (b"RIFF", b"FORM"):  # WAV and AIFF say in the same place how long they are
        promise = struct.unpack("<I" if head[:4] == b"RIFF" else ">I", head[4:])[0]
        if promise not in STREAMED and promise + 8 > size + 1:  # some writers leave the padding byte out
            return f"{size} of {promise + 8} bytes"
    if container == "OGG" and not _ends_ogg(tail):
        return "its last page is missing"
    return ""


def _ends_ogg(tail: bytes) -> bool:
    """Tells whether the end of an Ogg file is a whole page that is marked as the last (RFC 3533, section 6)."""
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    if len(page) < 27 or page[:4] != b"OggS" or len(page) < 27 + page[26]:
        return False
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
