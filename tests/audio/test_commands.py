"""The commands as a user runs them: what they write, and what they say of bad input."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio.codec import Codec
from audio.datasets import Batch
from audio.export import export
from audio.generate import generate
from audio.listen import mel_spectrogram
from audio.module import SoundModel, disturb
from audio.sashimi import SashimiConfig
from audio.train import LINKS
from audio.trained import load_trained
from core.cli import CONFIGS, main, run
from core.errors import UserError

SMALL = ["--model.config.d_model=4", "--model.config.pool=[2]", "--model.config.mixer_cfg={d_state: 2}"]
FEW = ["--model.config.n_layers=1", "--data.window=256", "--data.batch_size=4", "--model.report_seconds=0.02"]


def train(*options: str) -> None:
    main(
        "audio",
        "audio.module.SoundModel",
        "audio.datasets.AudioData",
        default_recipe="digits",
        links=LINKS,
        argv=["smoke", "fit", *options],
    )


def say(arguments: list[str]) -> None:
    run(generate, arguments, optional="checkpoint")


def recordings(root: Path, count: int = 5) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        t = np.arange(700 + 31 * i) / 8000
        tone = 0.5 * np.sin(2 * np.pi * (200 + 40 * i) * t)
        soundfile.write(root / f"{i}.wav", np.stack([tone, tone], axis=1), 8000, subtype="PCM_16")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on stereo recordings at 8 kHz, as a user's folder may hold them."""
    place = tmp_path_factory.mktemp("audio")
    root = recordings(place / "recordings")
    codec = ["--data.codec.scheme=linear", "--data.codec.normalize=peak", "--data.codec.levels=64"]
    train("--data.root", str(root), "--run_dir", str(place / "run"), *SMALL, *FEW, *codec)
    return place / "run"


def fails(capsys: pytest.CaptureFixture[str], command: object, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        command()  # type: ignore[operator]
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    return message


def test_what_a_run_leaves(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 < metrics["test/bits_per_sample"] < 8
    assert metrics["test/bits_per_sample"] == pytest.approx(metrics["test/loss"] / np.log(2), rel=1e-5)
    assert {"baseline/unigram_bits_per_sample", "baseline/markov1_bits_per_sample"} <= metrics.keys()
    page = (trained / "report.html").read_text()
    for words in ("5 files resampled from 8000", "5 files of 2 channels", "data:audio/wav;base64", "linear, 64 levels"):
        assert words in page


def test_a_checkpoint_knows_its_codec(trained: Path) -> None:
    net, codec, rate, *_ = load_trained(trained)
    assert codec == Codec("linear", "peak", 64)
    assert rate == 16000
    assert net.config == SashimiConfig(4, 1, (2,), mixer_cfg={"d_state": 2})


def test_the_test_counts_every_sample(trained: Path) -> None:
    from audio.datasets import PADDING, AudioData

    net, codec, *_ = load_trained(trained)
    data = AudioData(str(trained.parent / "recordings"), window=256, batch_size=1, codec=codec)
    data.setup("test")
    bits, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets, _ in data.test_dataloader():
            log_p = net(inputs).log_softmax(-1)
            real = targets != PADDING
            bits -= float(log_p[real].gather(1, targets[real][:, None]).sum()) / np.log(2)
            count += int(real.sum())
    assert count == sum(len(clip) for clip in data.parts["test"].clips)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["test/bits_per_sample"] == pytest.approx(bits / count, rel=1e-5)


def test_disturbed_levels_differ_as_much_as_was_asked() -> None:
    torch.manual_seed(0)
    levels = torch.full((400, 500), 128)
    moved = disturb(levels, 8.0, 256) - levels
    spread = moved.double().std(dim=1)
    assert 7 < float(spread.max()) < 8.6
    assert float(spread.min()) < 1
    assert 3.7 < float(spread.mean()) < 4.3  # uniform from 0 to 8
    assert abs(float(moved.double().mean())) < 0.05
    ends = disturb(torch.tensor([[0, 255]]).expand(50, 2), 8.0, 256)
    assert (int(ends.min()), int(ends.max())) == (0, 255)


def test_only_training_is_disturbed() -> None:
    model = SoundModel(SashimiConfig(4, 1, (2,), mixer_cfg={"d_state": 2}), Codec(levels=64), input_noise=6.0)
    levels = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(0))
    batch = Batch(levels, levels, levels.numel())
    with torch.no_grad():
        assert float(model.train().loss(batch)) != float(model.loss(batch))
        assert float(model.eval().loss(batch)) == float(model.loss(batch))


def test_generation(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clips"
    say([str(trained), "--num=2", "--seconds=0.05", "--top_k=20", "--top_p=0.9", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "real-time factor" in printed
    assert printed.strip().endswith(str(out))
    for i in (1, 2):
        samples, rate = soundfile.read(out / f"clip_00{i}.wav")
        assert (len(samples), rate) == (800, 16000)
        assert 0 < np.abs(samples).max() <= 1
        assert (out / f"clip_00{i}.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "report.html").read_text()
    assert page.count("data:audio/wav;base64") == 2
    assert "http" not in page
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["real_time_factor"] == pytest.approx(metrics["wall_seconds"] / 0.1, rel=0.01)
    fails(capsys, lambda: say([str(trained), "--out", str(out)]), "not empty", "--overwrite")
    say([str(trained), "--num=1", "--seconds=0.01", "--out", str(out), "--overwrite", "true"])
    assert sorted(path.name for path in out.glob("*.wav")) == ["clip_001.wav"]


def test_generation_goes_on_from_a_recording(trained: Path, tmp_path: Path) -> None:
    prompt = trained.parent / "recordings" / "0.wav"
    out = tmp_path / "clips"
    options = ["--prompt", str(prompt), "--num=1", "--seconds=0.02", "--temperature=0", "--out", str(out)]
    say([str(trained / "checkpoints" / "last.ckpt"), *options])
    samples, _ = soundfile.read(out / "clip_001.wav")
    assert len(samples) == 1400 + 320
    tone = np.sin(2 * np.pi * 200 * np.arange(1400) / 16000)
    assert np.corrcoef(samples[100:1300], tone[100:1300])[0, 1] > 0.99


def test_a_model_of_classes_says_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "words"
    root.mkdir()
    for i in range(8):
        soundfile.write(root / f"{'yes' if i % 2 else 'no'}_{i}.wav", 0.5 * np.sin(np.arange(600) * 0.1 * i), 8000)
    sampled = "{class_path: audio.samples.SampleClips, init_args: {every_steps: 1, num: 2, seconds: 0.01}}"
    rate = ["--data.labels=name", "--data.sample_rate=8000", f"--trainer.callbacks=[{sampled}]"]
    train("--data.root", str(root), "--run_dir", str(tmp_path / "run"), *SMALL, *FEW, *rate)
    written = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert len(written) == 2
    assert all(name.endswith(("_1.wav", "_2.wav")) for name in written)
    assert "In training" in (tmp_path / "run" / "report.html").read_text()
    file = tmp_path / "net.safetensors"
    export(str(tmp_path / "run"), str(file))
    trained = load_trained(file)
    assert trained.class_names == ("no", "yes")
    assert sorted(set(trained.starts(3))) == [128, 384]
    assert trained.starts(2, ["yes"]) == [384, 384]
    say([str(file), "--num=3", "--classes=yes", "--seconds=0.01", "--out", str(tmp_path / "clips")])
    page = (tmp_path / "clips" / "report.html").read_text()
    rows = [line.split(",") for line in (tmp_path / "clips" / "clips.csv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["file", "class"], *([f"clip_00{i}.wav", "yes"] for i in (1, 2, 3))]
    assert all(f"{name}: yes, {float(bits):.3f} bits" in page for name, _, bits in rows[1:])
    fails(capsys, lambda: say([str(file), "--classes=perhaps"]), "'perhaps'", "no, yes")
    fails(capsys, lambda: say([str(file), "--precision=bfloat16", "--device=cpu"]), "bfloat16", "float32 on a CPU")
    fails(capsys, lambda: say([str(file), "--guidance=1"]), "guidance", "untold")
    fails(capsys, lambda: say([str(file), "--guidance=-1"]), "guidance", "at least 0")
    with pytest.raises(UserError, match="exists already"):
        export(str(tmp_path / "run"), str(file))


def test_checkpoints_of_other_models_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"net.weight": torch.zeros(2)}, "hyper_parameters": {"name": "vim"}}, other)
    fails(capsys, lambda: say([str(other)]), "other.ckpt", "another model")
    broken = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    broken["state_dict"].pop("net.head.bias")
    torch.save(broken, other)
    fails(capsys, lambda: say([str(other)]), "head.bias")
    other.write_text("no checkpoint at all")
    fails(capsys, lambda: say([str(other)]), "no checkpoint of a training run")
    fails(capsys, lambda: say([str(tmp_path / "absent.ckpt")]), "no checkpoint at")


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--num=0"], "--num is 0"), (["--seconds=-1"], "--seconds is -1"), (["--temperature=-1"], "temperature"),
     (["--top_p=0"], "top_p"), (["--prompt=absent.wav"], "absent.wav"), (["--device=tpus"], "--device"),
     (["--tempo=1"], "--temperature")],
)  # fmt: skip
def test_options_that_make_no_sense(
    trained: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str
) -> None:
    fails(capsys, lambda: say([str(trained), *options]), word)


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def on(root: Path) -> object:
        return lambda: train("--data.root", str(root), "--run_dir", str(tmp_path / "run"), *SMALL, *FEW)

    fails(capsys, on(tmp_path / "absent"), "absent", "wanted a folder")
    (tmp_path / "empty").mkdir()
    fails(capsys, on(tmp_path / "empty"), "no audio files")
    root = recordings(tmp_path / "text")
    (root / "2.wav").write_text("not sound")
    fails(capsys, on(root), "2.wav", "not a readable recording")
    root = recordings(tmp_path / "cut")
    (root / "3.wav").write_bytes((root / "3.wav").read_bytes()[:999])
    fails(capsys, on(root), "3.wav", "cut off", "copy it again")
    root = recordings(tmp_path / "nothing")
    (root / "1.wav").write_bytes(b"")
    fails(capsys, on(root), "1.wav", "not a readable recording")
    soundfile.write(root / "1.wav", np.zeros((0, 2)), 8000)
    fails(capsys, on(root), "1.wav", "is empty", "remove it")
    fails(capsys, on(recordings(tmp_path / "two", 2)), "at least 3")
    assert not (tmp_path / "run").exists()


def test_prompts_that_cannot_be_read_leave_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (recordings(tmp_path / "sound") / "0.wav").read_bytes()
    for content, words in ((whole[:500], "cut off"), (b"a text", "not a readable"), (b"", "not a readable")):
        (tmp_path / "prompt.wav").write_bytes(content)
        options = ["--prompt", str(tmp_path / "prompt.wav"), "--out", str(tmp_path / "clips")]
        fails(capsys, lambda options=options: say([str(trained), *options]), "prompt.wav", words)
        assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["digitz"], ["unknown recipe 'digitz'", "did you mean digits", "sc09", "smoke"]),
     (["smoke", "fti"], ["unknown stage 'fti'", "did you mean fit"]),
     (["smoke", "--data.windw=9"], ["--data.windw", "did you mean --data.window"]),
     (["smoke", "--data.window=long"], ["--data.window", "'long'", "int"]),
     (["smoke", "--model.input_noise=-1"], ["--model.input_noise is -1", "at least 0"])],
)  # fmt: skip
def test_recipes_and_options_that_do_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str],
    words: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    links = {"data.codec": "model.codec", "data.sample_rate": "model.sample_rate"}
    place = "audio.module.SoundModel", "audio.datasets.AudioData"
    fails(capsys, lambda: main("audio", *place, default_recipe="digits", links=links, argv=argv), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_net_that_cannot_be_built_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    option = "--model.config.mixer_cfg={d_states: 4}"
    fails(capsys, lambda: train("--run_dir", str(tmp_path / "run"), option), "d_states")
    fails(capsys, lambda: train("--run_dir", str(tmp_path / "run"), "--model.config.mixer=mambo"), "mamba")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIGS / "audio").glob("*.yaml")))
def test_recipes_are_understood(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(
            "audio",
            SoundModel,
            "audio.datasets.AudioData",
            links=LINKS,
            argv=[recipe, "fit", "--print_config"],
        )
    assert stopped.value.code == 0
    assert "window:" in capsys.readouterr().out
    assert (CONFIGS / "audio" / f"{recipe}.yaml").read_text().startswith("# ")


def test_spectrograms_show_the_pitch() -> None:
    rate = 16000
    low, high = (
        mel_spectrogram(torch.sin(2 * np.pi * pitch * torch.arange(rate) / rate), rate).mean(1).argmax()
        for pitch in (300, 3000)
    )
    assert low < high
    assert mel_spectrogram(torch.zeros(3), rate).isfinite().all()


@pytest.mark.slow
def test_the_smoke_recipe_learns(tmp_path: Path) -> None:
    train("--run_dir", str(tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/bits_per_sample"] < 8


@pytest.mark.slow
def test_the_digits_recipe_beats_the_markov_models(tmp_path: Path) -> None:
    main(
        "audio", "audio.module.SoundModel", "audio.datasets.AudioData", default_recipe="digits",
        links=LINKS,
        argv=["--run_dir", str(tmp_path / "run")],
    )  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    baselines = [value for name, value in metrics.items() if name.startswith("baseline/")]
    assert len(baselines) == 3
    assert metrics["test/bits_per_sample"] < min(baselines)


def test_a_stream_is_the_clip(trained: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    how = [str(trained), "--num", "1", "--seconds", "0.3", "--seed", "3"]
    say([*how, "--out", str(tmp_path / "clips")])
    capfdbinary.readouterr()
    say([*how, "--stdout", "true"])
    streamed, rate = soundfile.read(io.BytesIO(capfdbinary.readouterr().out))
    written, _ = soundfile.read(tmp_path / "clips" / "clip_001.wav")
    assert rate == 16000
    assert len(streamed) == round(0.3 * rate)
    np.testing.assert_allclose(streamed, written, atol=1.5 / 32768)


def test_a_terminal_gets_no_sound(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    fails(capsys, lambda: say(["--stdout", "true"]), "--stdout", "pipe it")


def test_unlikely_clips_are_left_out(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = [str(trained), "--seconds", "0.01", "--seed", "1"]
    say([*how, "--num", "8", "--out", str(tmp_path / "all")])
    say([*how, "--num", "4", "--out", str(tmp_path / "kept"), "--reject_low", "0.25", "--reject_high", "0.25"])
    every, kept = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("all", "kept"))
    assert (kept["clips"], kept["drawn"], every["drawn"]) == (4, 8, 8)
    page = (tmp_path / "all" / "report.html").read_text()
    bits = sorted(float(found) for found in set(re.findall(r"clip_00\d.wav: ([\d.]+) bits", page)))
    assert kept["bits_per_sample"] == pytest.approx(sum(bits[2:6]) / 4, abs=1e-3)
    fails(capsys, lambda: say([*how, "--reject_low", "0.6", "--reject_high", "0.4"]), "reject_low", "less than 1")
