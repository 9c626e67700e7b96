"""The scoring commands end to end on constructed sounds: tones of ten pitches stand for ten words."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio.classifier import DigitNet, LogMel, SpokenClassifier, augment, mel_filters
from audio.clips import LabelledClips, fitted
from audio.codec import Codec
from audio.evaluate import evaluate
from audio.judge import Judge, load_judge, save_judge
from audio.likelihood import clip_bits, log_likelihood, recording_bits
from audio.metrics import am_score
from audio.net import SoundNet
from audio.ranking import most_trusted
from audio.sashimi import SashimiConfig
from audio.trained import Trained, load_trained, save_trained
from core.errors import UserError

RATE = 8000


def tone(digit: int, seed: int, length: int = 3000) -> np.ndarray:
    draws = np.random.default_rng(seed)
    wave = 0.5 * np.sin(2 * np.pi * (300 + 350 * digit) * (1 + 0.01 * draws.normal()) * np.arange(length) / RATE)
    return wave + 0.01 * draws.normal(size=length)


def tones(folder: Path, digits: list[int], takes: range, speaker: str = "ann") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for digit in digits:
        for take in takes:
            soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", tone(digit, 100 * digit + take), RATE)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier of tones, trained here, and the recordings that it was trained on."""
    root = tones(tmp_path_factory.mktemp("tones"), list(range(10)), range(14))
    data = LabelledClips(str(root), seconds=0.4, batch_size=32)
    data.setup("fit")
    torch.manual_seed(0)
    net = DigitNet(RATE, 10, width=4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2)
    for epoch in range(60):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - epoch / 60)
        for waves, classes in data.train_dataloader():
            loss = torch.nn.functional.cross_entropy(net(waves), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    made = Judge(net.eval(), RATE, data.length, data.class_names)
    waves = [wave.float() for wave, _ in data.parts["train"]]
    path = root.parent / "judge.safetensors"
    save_judge(made._replace(reference=made.refer(waves)), path)
    return path, root


def test_the_picture_does_not_depend_on_gain_and_has_the_bands_of_its_definition() -> None:
    wave = torch.from_numpy(tone(3, 0)).float()[None]
    mel = LogMel(RATE)
    picture = mel(wave)
    torch.testing.assert_close(mel(0.01 * wave), picture, atol=2e-3, rtol=0)
    assert picture.shape == (1, 40, 1 + 3000 // 128)
    assert 0 <= float(picture.min()) <= float(picture.max()) == pytest.approx(1, abs=1e-4)
    hz = 700 * (10 ** (np.linspace(2595 * math.log10(1 + 60 / 700), 2595 * math.log10(1 + 4000 / 700), 42) / 2595) - 1)
    assert abs(hz[1 + int(picture[0].mean(1).argmax())] - 1350) < 120
    assert mel_filters(RATE, 256, 40).shape == (40, 129)
    assert augment(torch.randn(3, 1000)).shape == (3, 1000)
    assert fitted(torch.tensor([0.1, -0.2]), 4).tolist() == pytest.approx([0.5, -1, 0, 0])
    assert fitted(torch.zeros(0), 2).tolist() == [0, 0]


def test_a_judge_is_the_same_after_saving(judge: tuple[Path, Path]) -> None:
    known = load_judge(judge[0])
    features, shares = known([torch.from_numpy(tone(digit, 999)) for digit in range(10)])
    assert shares.argmax(1).tolist() == list(range(10))
    assert features.shape == (10, 16)
    assert known.reference is not None
    assert known.reference.clips == 60  # 14 takes less 5 to test and 3 to validate on
    with pytest.raises(UserError, match="no classifier at"):
        load_judge(judge[0].parent / "nothing")
    broken = judge[0].parent / "broken.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(UserError, match="no file of weights"):
        load_judge(broken)


def test_good_collapsed_and_noisy_clips_are_told_apart(judge: tuple[Path, Path], tmp_path: Path) -> None:
    path, root = judge
    good = tones(tmp_path / "good", list(range(10)), range(50, 56))
    collapsed = tones(tmp_path / "collapsed", [4], range(50, 110))
    noise = tmp_path / "noise"
    noise.mkdir()
    for i in range(20):
        soundfile.write(noise / f"{i}.wav", 0.3 * np.random.default_rng(i).normal(size=3000), RATE)
    found = {}
    for folder in (good, collapsed, noise):
        out = tmp_path / f"scores_{folder.name}"
        evaluate(str(folder), classifier=str(path), players=3, out=str(out), published_scores=True)
        found[folder.name] = json.loads((out / "metrics.json").read_text())
        assert "<audio" in (out / "report.html").read_text()
    good_scores, bad_scores = found["good"], found["collapsed"]
    assert good_scores["fid"] < 0.2 * bad_scores["fid"]
    assert good_scores["fid"] < 0.2 * found["noise"]["fid"]
    assert good_scores["inception_score"] > 5 > 2 > bad_scores["inception_score"]
    assert good_scores["am_score"] < 0.5 * bad_scores["am_score"]
    with (tmp_path / "scores_good" / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(row["file"][0] == row["predicted"] for row in rows) >= 57
    evaluate(str(good), reference=str(root), classifier=str(path), players=0, out=str(tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["fid"] == pytest.approx(good_scores["fid"], rel=0.05)  # the same recordings, by way of the folder


def test_likelihoods_are_exact_and_of_whole_recordings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SoundNet(SashimiConfig(d_model=8, n_layers=1, pool=(2,), mixer_cfg={"d_state": 2}), 256, classes=2).eval()
    codec = Codec(normalize="none")
    save_trained(Trained(net, codec, RATE, ("0", "7")), tmp_path / "net.safetensors")
    trained = load_trained(tmp_path / "net.safetensors")
    assert trained.class_names == ("0", "7")
    folder = tones(tmp_path / "clips", [0, 7], range(1))
    paths = sorted(folder.iterdir())
    each = []
    for path in paths:
        levels = codec.encode(torch.from_numpy(soundfile.read(path, dtype="float32")[0]))
        with torch.no_grad():
            logits = trained.net(torch.cat([torch.tensor([128]), levels[:-1]]) + torch.tensor([[0], [256]]))
        picked = logits.log_softmax(-1).gather(2, levels.expand(2, -1)[..., None]).double().sum((1, 2)) / math.log(2)
        assert log_likelihood(trained, levels, 128 + 256) == pytest.approx(float(picked[1]), rel=1e-6)
        each.append(picked)
    marginal = torch.stack([-(torch.logsumexp(x * math.log(2), 0) / math.log(2) - 1) / 3000 for x in each])
    torch.testing.assert_close(clip_bits(trained, paths), marginal, atol=1e-6, rtol=1e-6)
    told = -(each[0][0] + each[1][1]) / 6000
    assert recording_bits(trained, paths, "name") == pytest.approx(float(told), rel=1e-6)
    with pytest.raises(UserError, match="which the model does not know"):
        recording_bits(trained, paths, "folder")
    with pytest.raises(UserError, match=r"wanted one of the model's \(0, 7\)"):
        trained.start("3")


@pytest.mark.parametrize("reject", ["tuned", "published"])
def test_unlikely_clips_are_rejected(reject: str, judge: tuple[Path, Path], tmp_path: Path) -> None:
    net = SoundNet(SashimiConfig(d_model=8, n_layers=1, pool=(2,), mixer_cfg={"d_state": 2})).eval()
    save_trained(Trained(net, Codec(normalize="none"), RATE), tmp_path / "net.safetensors")
    folder = tones(tmp_path / "clips", [1, 2], range(10))
    out = tmp_path / "out"
    evaluate(
        str(folder), classifier=str(judge[0]), model=str(tmp_path / "net.safetensors"), reject=reject, players=0,  # type: ignore
        out=str(out),
    )  # fmt: skip
    rows = (out / "clips.csv").read_text().splitlines()[1:]
    assert len(rows) == 5 if reject == "published" else 2 <= len(rows) <= 10
    assert reject in (out / "report.html").read_text()


def test_players_take_turns_between_classes() -> None:
    shares = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.3, 0.7]])
    assert most_trusted(shares, 2) == [2, 3]
    assert most_trusted(shares, 3) == [2, 0, 3]
    assert am_score(shares, shares) > 0


def test_mistakes_have_one_message(judge: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tones(tmp_path / "one", [1], range(1))
    with pytest.raises(UserError, match="wanted at least 2"):
        evaluate(str(folder), classifier=str(judge[0]), out=str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="needs likelihoods"):
        evaluate(str(folder), reject="tuned")
    with pytest.raises(UserError, match="all files are of one class"):
        LabelledClips(str(tones(tmp_path / "same", [1], range(14))))
    with pytest.raises(UserError, match="needs labels"):
        LabelledClips(str(folder), labels="none")
    with pytest.raises(UserError, match=r"--model\.width"):
        SpokenClassifier(class_names=("a", "b"), width=0)


def test_classes_are_asked_for_by_word_or_by_word_and_speaker() -> None:
    net = SoundNet(SashimiConfig(d_model=4, n_layers=1, pool=(2,), mixer_cfg={"d_state": 2}), classes=4)
    trained = Trained(net, Codec(), RATE, ("3_ann", "3_bob", "7_ann", "7_bob"))

    def said(count: int, *names: str) -> list[str]:
        return [trained.class_names[start // 256] for start in trained.starts(count, names)]

    assert sorted(said(4)) == sorted(trained.class_names)
    assert said(3, "7_bob") == ["7_bob"] * 3
    turns = said(4, "7", "3_ann")
    assert turns[1::2] == ["3_ann"] * 2
    assert sorted(turns[::2]) == ["7_ann", "7_bob"]
    with pytest.raises(UserError, match="the class is '9'"):
        said(2, "9")
    with pytest.raises(UserError, match=r"--data\.untold"):
        trained.guide(1.0)
    guided = trained._replace(class_names=("3_ann", "3_bob", "7_ann", "any"), guidance=2.0)
    assert {start // 256 for start in guided.starts(7)} == {0, 1, 2}
    assert guided.guide() == (2.0, guided.start("any"))
    assert guided.guide(0.0) is None
