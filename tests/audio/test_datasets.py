"""Folders as windows: nothing dropped, nothing leaked between parts, SC09's lists, the embedded digits."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio.codec import Codec
from audio.datasets import EMBEDDED, PADDING, AudioData
from audio.files import stretched
from audio.splits import SC09_FOLDERS, split_files
from core.errors import UserError


def write(path: Path, length: int, rate: int = 16000, channels: int = 1, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (length, channels))
    soundfile.write(path, samples, rate, subtype="PCM_16")


def folder(root: Path, lengths: list[int]) -> Path:
    for i, length in enumerate(lengths):
        write(root / f"{i}.wav", length, seed=i)
    return root


def test_windows_hold_every_sample_once(tmp_path: Path) -> None:
    lengths = [1, 99, 100, 101, 250, 37, 400]
    data = AudioData(str(folder(tmp_path, lengths)), window=100, batch_size=3, val_fraction=0.2, test_fraction=0.2)
    data.setup("fit")
    assert sorted(len(clip) for part in data.parts.values() for clip in part.clips) == sorted(lengths)
    for loader, part in ((data.val_dataloader(), "val"), (data.test_dataloader(), "test")):
        seen = torch.cat([row[row != PADDING] for batch in loader for row in batch.targets])
        assert torch.equal(seen, torch.cat([clip.long() for clip in data.parts[part].clips]))
    trained = sum(int((batch.targets != PADDING).sum()) for batch in data.train_dataloader())
    assert trained == sum(len(clip) for clip in data.parts["train"].clips)


def test_inputs_are_the_targets_one_later_and_padding_is_masked(tmp_path: Path) -> None:
    data = AudioData(str(folder(tmp_path, [130, 250, 90, 10])), window=100, batch_size=8)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.test_dataloader()):
        for inputs, targets, samples in loader:
            assert samples == int((targets != PADDING).sum())
            assert bool((inputs[:, 0] == 128).all())
            real = targets[:, 1:] != PADDING
            assert torch.equal(inputs[:, 1:][real], targets[:, :-1][real])
            assert bool((inputs >= 0).all())
            assert bool((inputs < 256).all())
            assert int((targets != PADDING).sum(1).max()) == targets.shape[1]  # no column of padding alone


def test_training_windows_are_padded_to_one_shape_if_asked(tmp_path: Path) -> None:
    data = AudioData(str(folder(tmp_path, [30, 250, 90, 10, 80])), window=100, batch_size=2, pad="window")
    data.setup("fit")
    assert {batch.inputs.shape[1] for batch in data.train_dataloader()} == {100}
    trained = sum(int((batch.targets != PADDING).sum()) for batch in data.train_dataloader())
    assert trained == sum(len(clip) for clip in data.parts["train"].clips)
    longest = [max(len(clip) for clip in data.parts[part].clips) for part in ("val", "test")]
    loaders = (data.val_dataloader(), data.test_dataloader())
    assert [next(iter(loader)).inputs.shape[1] for loader in loaders] == [min(100, n) for n in longest]


def test_a_clip_is_normalised_as_a_whole(tmp_path: Path) -> None:
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", np.linspace(0, 0.3, 200), 16000, subtype="PCM_24")
    data = AudioData(str(tmp_path), window=100, codec=Codec("linear", "peak"))
    data.setup("fit")
    clip = data.parts["train"].clips[0]
    assert int(clip[-1]) == 255
    assert int(clip[99]) == pytest.approx(191, abs=1)


def test_conversions_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", 800, rate=8000)
    write(tmp_path / "b.flac", 4410, rate=44100, channels=2)
    write(tmp_path / "c.wav", 1600)
    write(tmp_path / "d.wav", 1600)
    data = AudioData(str(tmp_path), val_fraction=0.1, test_fraction=0.1, split_seed=0)
    data.setup("fit")
    text = data.facts()["conversions"]
    for words in ("resampled from 8000 to 16000", "resampled from 44100", "2 channels"):
        assert words in text
    assert sorted(len(clip) for part in data.parts.values() for clip in part.clips) == [1600] * 4


def test_parts_are_split_by_file_and_by_seed(tmp_path: Path) -> None:
    folder(tmp_path, [10] * 20)
    parts = split_files(tmp_path, {"val": 0.1, "test": 0.25}, 0)
    assert {part: len(files) for part, files in parts.items()} == {"train": 13, "val": 2, "test": 5}
    assert len({path for files in parts.values() for path in files}) == 20
    assert parts == split_files(tmp_path, {"val": 0.1, "test": 0.25}, 0)
    assert parts != split_files(tmp_path, {"val": 0.1, "test": 0.25}, 1)


def test_too_few_files_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, [10, 10])
    with pytest.raises(UserError, match="got 2 audio files, wanted at least 3"):
        split_files(tmp_path, {"val": 0.1, "test": 0.1}, 0)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder(tmp_path, [1000] * 4)
    path = tmp_path / "2.wav"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"2\.wav: the recording is cut off"):
        AudioData(str(tmp_path)).setup("fit")


def sc09(root: Path) -> Path:
    for i, name in enumerate((*SC09_FOLDERS, "bed", "_background_noise_")):
        for speaker in ("aa", "bb", "cc"):
            write(root / name / f"{speaker}_nohash_0.wav", 16000 - 500 * i, seed=i)
    (root / "validation_list.txt").write_text("\n".join(f"{n}/bb_nohash_0.wav" for n in (*SC09_FOLDERS, "bed")) + "\n")
    (root / "testing_list.txt").write_text("\r\n".join(f"{n}/cc_nohash_0.wav" for n in (*SC09_FOLDERS, "bed")))
    return root


def test_speech_commands_is_split_by_its_lists(tmp_path: Path) -> None:
    parts = split_files(sc09(tmp_path), {"val": 0.5, "test": 0.4}, 0)
    for part, speaker in (("train", "aa"), ("val", "bb"), ("test", "cc")):
        assert [path.relative_to(tmp_path).as_posix() for path in parts[part]] == [
            f"{name}/{speaker}_nohash_0.wav" for name in SC09_FOLDERS
        ]


def test_speech_commands_without_a_digit_is_refused(tmp_path: Path) -> None:
    root = sc09(tmp_path)
    for path in (root / "seven").iterdir():
        path.unlink()
    (root / "seven").rmdir()
    with pytest.raises(UserError, match="no folder seven/"):
        split_files(root, {}, 0)


def test_the_embedded_digits() -> None:
    data = AudioData()
    data.setup("fit")
    files = [path for paths in data.files.values() for path in paths]
    assert sorted(path.relative_to(EMBEDDED).as_posix() for path in files) == sorted(
        f"{language}/{digit}.flac" for language in ("en", "es", "fr", "it", "ru") for digit in range(10)
    )
    assert data.notes == []  # 16 kHz and mono as they are
    assert 31 < sum(len(clip) for part in data.parts.values() for clip in part.clips) / 16000 < 33
    assert sum(path.stat().st_size for path in EMBEDDED.parent.rglob("*")) < 2**20
    assert "CC BY-SA 3.0" in (EMBEDDED.parent / "SOURCE").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "--data.window is 0"), ({"val_fraction": 0.6, "test_fraction": 0.5}, "leave something")],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AudioData(**options)


def fsdd(root: Path) -> Path:
    for digit in (0, 7):
        for speaker in ("ann", "bob"):
            for take in (0, 4, 5, 7, 8, 10):
                write(root / f"{digit}_{speaker}_{take}.wav", 40 + take, rate=8000, seed=take)
    return root


def test_the_free_spoken_digits_are_split_by_their_takes(tmp_path: Path) -> None:
    parts = split_files(fsdd(tmp_path), {})
    found = {part: sorted({int(path.stem.split("_")[2]) for path in paths}) for part, paths in parts.items()}
    assert found == {"train": [8, 10], "val": [5, 7], "test": [0, 4]}
    assert all(len(paths) == 8 for paths in parts.values())
    held = split_files(tmp_path, {}, held_out="bob")
    assert {path.stem.split("_")[1] for path in held["test"]} == {"bob"}
    assert {path.stem.split("_")[1] for path in (*held["train"], *held["val"])} == {"ann"}
    assert (len(held["train"]), len(held["val"]), len(held["test"])) == (8, 4, 12)
    with pytest.raises(UserError, match="no file has 'eve' in its name"):
        split_files(tmp_path, {}, held_out="eve")


def test_ordered_files_are_split_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    for i in range(12):
        write(tmp_path / f"out{i}.wav", 10, seed=i)
    parts = split_files(tmp_path, {"val": 0.1, "test": 0.2}, layout="ordered")
    names = {part: [path.stem for path in paths] for part, paths in parts.items()}
    assert names == {"train": [f"out{i}" for i in range(9)], "val": ["out9"], "test": ["out10", "out11"]}


def test_every_sample_has_its_class(tmp_path: Path) -> None:
    data = AudioData(str(fsdd(tmp_path)), sample_rate=8000, window=30, labels="name", batch_size=4)
    assert data.class_names == ("0", "7")
    data.setup("fit")
    classes = []
    for batch in data.test_dataloader():
        assert torch.equal(batch.inputs // 256, batch.inputs[:, :1].expand_as(batch.inputs) // 256)
        real = batch.targets[:, 1:] != PADDING
        assert torch.equal((batch.inputs[:, 1:] % 256)[real], batch.targets[:, :-1][real])
        classes += (batch.inputs[:, 0] // 256).tolist()
    assert classes == [0] * 8 + [1] * 8  # two windows a recording, in the files' order
    assert "0, 7" in data.facts()["classes"]
    assert set(data.baselines()) >= {"unigram_bits_per_sample"}
    words = AudioData(str(sc09(tmp_path / "sc09")), labels="folder")
    assert words.class_names == SC09_FOLDERS


def test_training_may_leave_classes_out_and_play_slower(tmp_path: Path) -> None:
    options = {"sample_rate": 8000, "window": 4000, "labels": "name", "batch_size": 4}
    plain = AudioData(str(fsdd(tmp_path)), **options)
    data = AudioData(str(tmp_path), ratios=(1.0, 1.1), untold=0.5, **options)
    assert data.class_names == ("0", "7", "any")
    for each in (plain, data):
        each.setup("fit")
    before, after = plain.parts["train"].clips, data.parts["train"].clips
    assert [len(clip) for clip in after] == [round(len(clip) * r) for clip in before for r in (1, 1.1)]
    assert torch.equal(after[0], before[0])
    torch.manual_seed(0)
    told = torch.cat([batch.inputs[:, 0] // 256 for _ in range(4) for batch in data.train_dataloader()])
    assert 0.3 < float((told == 2).float().mean()) < 0.7
    assert not any((batch.inputs // 256 == 2).any() for batch in data.test_dataloader())
    for wrong in ({"untold": 1.0}, {"untold": 0.1, "labels": "none"}, {"ratios": ()}):
        with pytest.raises(UserError, match=r"--data\.(untold|ratios) is"):
            AudioData(str(tmp_path), **{**options, **wrong})


def test_slower_is_deeper() -> None:
    time = torch.arange(4000) / 8000
    slow = stretched(torch.sin(2 * torch.pi * 440 * time), 1.1)
    assert len(slow) == 4400
    torch.testing.assert_close(slow, torch.sin(2 * torch.pi * 400 * torch.arange(4400) / 8000), atol=1e-3, rtol=0)


def test_mp3_and_ogg_are_read(tmp_path: Path) -> None:
    wave = 0.4 * np.sin(np.arange(44100) * 0.05)
    for i, suffix in enumerate(("mp3", "ogg", "flac", "wav")):
        soundfile.write(tmp_path / f"{i}.{suffix}", wave, 44100)
    data = AudioData(str(tmp_path), sample_rate=16000)
    data.setup("fit")
    lengths = [len(clip) for part in data.parts.values() for clip in part.clips]
    assert len(lengths) == 4
    assert all(abs(length - 16000) < 800 for length in lengths)  # MP3 pads its ends
