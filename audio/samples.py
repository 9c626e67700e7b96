"""Clips that a model says while it is trained: into the logger, the run's folder and its report."""

from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from audio.files import write_wav
from audio.listen import add_players, draw_spectrogram
from audio.module import SoundModel
from audio.sampling import generate_levels
from core.errors import UserError
from core.generate import Sampling
from core.training.report import Report


class SampleClips(Callback):
    """Generates clips after a validation, if enough steps went by since the last ones.

    They are written to ``samples/`` of the run's folder as WAV files and to TensorBoard as sound and spectrogram; the
    report has the first of each time. All clips of a run come from the same random numbers, so they show the training.

    Args:
        every_steps: Steps between two times, at least; clips are only generated after a validation.
        num: Clips each time; a model of classes takes turns between them.
        seconds: Their length.
        temperature: Divides the logits.
    """

    def __init__(self, every_steps: int = 1000, num: int = 4, seconds: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if every_steps < 1 or num < 1 or not seconds > 0 or not temperature >= 0:
            raise UserError(
                f"SampleClips: every_steps is {every_steps}, num {num}, seconds {seconds} and temperature {temperature}"
                "; wanted at least 1, 1, more than 0 and at least 0"
            )
        self.every_steps, self.num, self.seconds, self.temperature = every_steps, num, seconds, temperature
        self.last = 0
        self.kept: list[tuple[int, Tensor]] = []

    def state_dict(self) -> dict[str, int]:
        """Return the step of the last clips."""
        return {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from the step of the last clips."""
        self.last = state_dict["last"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, write and log, on rank 0."""
        step = trainer.global_step
        if trainer.sanity_checking or step - self.last < self.every_steps:
            return
        assert isinstance(pl_module, SoundModel)
        self.last = step
        own, whole = pl_module.net, pl_module.gather_net()  # in which every process takes part
        if not trainer.is_global_zero:
            return
        pl_module.net = whole
        clips = self.draw(pl_module)
        pl_module.net = own
        rate = pl_module.sample_rate
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        for i, clip in enumerate(clips):
            write_wav(folder / f"step_{step:07d}_{i + 1}.wav", clip, rate)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_audio(f"samples/{i + 1}", clip[None], step, rate)
                    logger.experiment.add_figure(f"samples/{i + 1}", draw_spectrogram(clip, rate), step)
        self.kept.append((step, clips[0]))

    def draw(self, module: SoundModel) -> list[Tensor]:
        """Generates clips (L,) float32 on the CPU; the random numbers of the training are left alone."""
        training = module.net.training
        module.net.eval()
        levels = generate_levels(
            module.sound_net, module.starts(self.num), self.num, max(1, round(self.seconds * module.sample_rate)),
            Sampling(temperature=self.temperature), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        module.net.train(training)
        return [module.codec.decode(clip) for clip in levels]

    def add_to_report(self, report: Report, module: SoundModel) -> None:
        """Add the first clip of each time."""
        if self.kept:
            clips = [(clip, f"after {step:,} steps") for step, clip in self.kept]
            add_players(report, "In training", clips, module.sample_rate, "The same random numbers each time.")
