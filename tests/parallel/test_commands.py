"""Training commands of images, genomes and sound in two processes: the figures of one with the same batch."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from launched import history, launch
from PIL import Image

from audio.train import LINKS
from core.cli import main

COMMON = (
    "--trainer.accelerator", "cpu", "--threads", "1", "--seed_everything", "1", "--trainer.precision", "32-true",
    "--trainer.max_epochs", "-1", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2",
    "--trainer.check_val_every_n_epoch", "null", "--trainer.log_every_n_steps", "1", "--test_after_fit", "false",
    "--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "2", "--trainer.enable_progress_bar",
    "false", "--model.optimizer.name", "sgd", "--model.optimizer.lr", "0.01", "--model.schedule.name", "constant",
)  # fmt: skip


def vision(batch: int, *options: str) -> None:
    """``python -m vision.train smoke`` in this process."""
    links = {"data.num_classes": "model.num_classes"}
    # Turned and shifted by nothing: batches of other sizes draw other numbers.
    still = (
        "--data.init_args.max_shift=0",
        "--data.init_args.max_rotation=0",
    )
    argv = ["smoke", *COMMON, f"--data.init_args.batch_size={batch}", *still, *options]
    main("vision", "vision.module.Classifier", "vision.data.ImageData", choose_data=True, links=links, argv=argv)


def audio(batch: int, *options: str) -> None:
    """``python -m audio.train smoke`` in this process."""
    small = ("--model.config.d_model=4", "--model.config.pool=[2]", "--model.config.n_layers=1", "--data.window=256")
    more = ("--data.root", "sounds", f"--data.batch_size={batch}", "--model.config.mixer_cfg={d_state: 2}")
    argv = ["smoke", "fit", *small, *more, *COMMON, "--model.report_seconds=0.02", *options]
    main(
        "audio", "audio.module.SoundModel", "audio.datasets.AudioData", default_recipe="digits", links=LINKS, argv=argv
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("command", [vision, audio])
def test_two_processes_have_the_losses_of_one(
    command: Callable[..., None],
    strategy: str,
    place: Path,
) -> None:
    (place / "sounds").mkdir()
    for i in range(8):
        soundfile.write(place / f"sounds/{i}.wav", 0.5 * np.sin(np.arange(2100 + i) * (0.2 + 0.03 * i)), 8000)
    own = ("--ema_decay", "null") if strategy == "fsdp2" else ()
    command(8, "--run_dir", "one", *own)
    two = ("--run_dir", "two", "--trainer.devices", "2", "--trainer.strategy", strategy, *own)
    assert launch(2, command, 4, *two) == [0, 0]
    one, other = history("one"), history("two")
    assert len(one) == len(other) > 4
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=2e-5)


SHORT = (
    "--trainer.accelerator", "cpu", "--threads", "1", "--trainer.precision", "32-true",
    "--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0",
)  # fmt: skip
STEPS = ("--trainer.max_epochs", "-1", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2",
         "--trainer.check_val_every_n_epoch", "null", "--model.schedule.name", "constant",
         "--model.schedule.warmup_epochs", "0", "--model.schedule.warmup_steps", "0")  # fmt: skip


def images(stage: str, batch: int, *options: str) -> None:
    """``python -m vision.train smoke`` of a model with stages in this process."""
    links = {"data.num_classes": "model.num_classes"}
    argv = ["smoke", stage, "--model.name", "test_vmamba", "--model.kwargs", "{in_chans: 1}", *SHORT]
    main(
        "vision", "vision.module.Classifier", "vision.data.ImageData", choose_data=True, links=links,
        argv=[*argv, f"--data.init_args.batch_size={batch}", "--ema_decay", "null", *options],
    )  # fmt: skip


def segment(stage: str, batch: int, *options: str) -> None:
    """``python -m vision.segment masks`` in this process."""
    small = ("--data.img_size", "32", "--data.num_workers", "0", "--model.name", "test_vmamba", "--model.kwargs", "{}")
    data = ("--data.root", "pictures", "--data.batch_size", str(batch), "--model.head_dim", "16")
    main(
        "vision", "vision.segmenter.Segmenter", "vision.masks.MaskFolder", command="segment", folder="vision/segment",
        links={"data.num_classes": "model.num_classes"}, argv=["masks", stage, *small, *data, *SHORT, *options],
    )  # fmt: skip


def species(stage: str, batch: int, *options: str) -> None:
    """``python -m genomics.classify`` in this process."""
    net = ("--model.d_model", "8", "--model.n_layer", "1", "--model.d_state", "4", "--data.read_length", "64")
    reads = ("--data.train_reads", "64", "--data.val_reads", "21", "--data.test_reads", "23", "--data.panel", "8")
    argv = ["great_apes", stage, *net, *reads, "--data.batch_size", str(batch), "--data.unseen", "8", *SHORT, *options]
    main(
        "genomics", "genomics.classifier.SpeciesClassifier", "genomics.species.SpeciesData", command="classify",
        links={"data.num_classes": "model.num_classes"}, argv=argv,
    )  # fmt: skip


def words(stage: str, batch: int, *options: str) -> None:
    """``python -m audio.classify fsdd`` in this process."""
    data = ("--data.root", "sounds", "--data.batch_size", str(batch), "--data.layout", "random")
    parts = ("--data.val_fraction", "0.3", "--data.test_fraction", "0.3", "--model.width", "4")
    main(
        "audio", "audio.classifier.SpokenClassifier", "audio.clips.LabelledClips", command="classify",
        default_recipe=None, folder="audio_classify",
        links={f"data.{name}": f"model.{name}" for name in ("sample_rate", "length", "class_names")},
        argv=["fsdd", stage, *data, *parts, *SHORT, *options],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("command", [images, segment, species, words])
def test_two_processes_test_a_model_as_one_does(command: Callable[..., None], strategy: str, place: Path) -> None:
    rng = np.random.default_rng(0)
    (place / "sounds").mkdir()
    for i in range(30):
        soundfile.write(place / f"sounds/{i % 3}_{i}.wav", rng.normal(0, 0.1, 4000), 8000)
    for part, count in (("train", 9), ("val", 7)):
        for kind, shape in (("images", (40, 48, 3)), ("masks", (40, 48))):
            folder = place / "pictures" / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 2, shape, np.uint8)).save(folder / f"{i}.png")
    two = ("--trainer.devices", "2", "--trainer.strategy", strategy)
    assert launch(2, command, "fit", 4, "--run_dir", "trained", *two, *STEPS) == [0, 0]
    saved = ("--ckpt_path", "trained/checkpoints/last.ckpt", "--run_dir")
    command("test", 4, *saved, "one")
    assert launch(2, command, "test", 4, *saved, "two", *two) == [0, 0]
    trained, one, other = (json.loads(Path(run, "metrics.json").read_text()) for run in ("trained", "one", "two"))
    assert any(name.startswith("val/") for name in trained)
    assert one.keys() == other.keys()
    measured = {name: value for name, value in one.items() if name.startswith("test/")}
    assert len(measured) > 1
    assert {name: other[name] for name in measured} == pytest.approx(measured, rel=2e-5)
    files = [sorted(p.name for p in Path(run).iterdir() if p.is_file()) for run in ("one", "two")]
    assert files[0] == files[1]
