"""Audio files of every kind: what is converted, and what is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio.files import conversions, find_audio, read_clip, to_mono, write_wav
from core.errors import UserError

TONE = (0.4 * np.sin(2 * np.pi * 440 * np.arange(8001) / 8000)).astype(np.float32)


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_U8"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("ogg", "VORBIS"),
     ("aiff", "PCM_16")],
)  # fmt: skip
def test_reads_whole_files_and_refuses_cut_ones(tmp_path: Path, suffix: str, subtype: str) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, TONE, 8000, subtype=subtype)
    clip = read_clip(path)
    assert (clip.samples.shape, clip.sample_rate, clip.channels) == ((8001, 1), 8000, 1)
    assert float(np.abs(clip.samples[:, 0] - TONE).max()) < (0.1 if suffix == "ogg" else 0.01)
    whole = path.read_bytes()
    for share in (0.3, 0.7, 0.99):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=f"cut.{suffix}"):
            read_clip(cut)


def test_a_wav_written_to_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "piped.wav"
    soundfile.write(path, TONE, 8000, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # sizes unknown when the header was written
    path.write_bytes(data)
    assert len(read_clip(path).samples) == 8001


@pytest.mark.parametrize("content", [b"", b"hello, this is a text\n" * 100, b"RIFF\x00\x00\x00\x00WAVE"])
def test_other_files_named_wav_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.wav"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"text\.wav: not a readable recording"):
        read_clip(path)


@pytest.mark.parametrize("suffix", ["wav", "aiff"])
def test_recordings_without_a_sample_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty.{suffix}"
    soundfile.write(path, TONE[:0], 8000, subtype="PCM_16")
    with pytest.raises(UserError, match=rf"empty\.{suffix}: the recording is empty, wanted at least one sample"):
        read_clip(path)


def test_samples_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.wav"
    soundfile.write(path, np.array([0.0, np.nan, 0.1], np.float32), 8000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"nan\.wav.*NaN"):
        read_clip(path)


def test_folders_without_audio_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got nothing there"):
        find_audio(tmp_path / "absent")
    with pytest.raises(UserError, match="no audio files in it, got nothing"):
        find_audio(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt"):
        find_audio(tmp_path)
    with pytest.raises(UserError, match="got a file"):
        find_audio(tmp_path / "notes.txt")


def test_finds_files_in_folders_in_order_and_skips_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/2.WAV", "a/1.flac", ".hidden/3.wav", "a/._1.flac", "c.ogg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in find_audio(tmp_path)] == ["a/1.flac", "b/2.WAV", "c.ogg"]


def test_stereo_is_averaged_and_rates_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([TONE, 0.5 * TONE], axis=1), 8000, subtype="FLOAT")
    clip = read_clip(path)
    torch.testing.assert_close(to_mono(clip, 8000), torch.from_numpy(0.75 * TONE))
    doubled = to_mono(clip, 16000)
    assert doubled.shape == (16002,)
    expected = 0.75 * 0.4 * np.sin(2 * np.pi * 440 * np.arange(16002) / 16000)
    # a 440 Hz tone stays one; the ends ring
    torch.testing.assert_close(doubled[500:-500], torch.from_numpy(expected[500:-500]).float(), atol=2e-3, rtol=0)
    assert conversions([(8000, 2), (16000, 1)], 16000) == [
        "1 files resampled from 8000 to 16000 Hz",
        "1 files of 2 channels mixed down to one",
    ]


def test_wav_round_trip(tmp_path: Path) -> None:
    wave = torch.tensor([-2.0, -1.0, 0.0, 0.5, 3.0])
    write_wav(tmp_path / "x.wav", wave, 8000)
    back = torch.from_numpy(read_clip(tmp_path / "x.wav").samples[:, 0])
    torch.testing.assert_close(back, wave.clamp(-1, 1), atol=1e-4, rtol=0)
