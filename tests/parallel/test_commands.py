"""Training commands of images and sound in two processes: the losses of one with the same batch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from launched import history, launch

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
