"""Training of a model of raw sound: the next level's cross-entropy, in bits per sample.

Dimension letters: B batch, L samples, Q levels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.codec import Codec
from audio.datasets import PADDING, AudioData, Batch
from audio.listen import add_players
from audio.net import SoundNet
from audio.sampling import generate_levels
from audio.sashimi import SashimiConfig
from audio.trained import RECORD, Trained, record
from core.errors import UserError
from core.generate import Sampling
from core.parallel.group import active, mean_share
from core.training.graphs import capture, check_graphs
from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report


class SoundModel(TrainingModule):
    """A SaShiMi over levels, trained to predict the next one.

    Args:
        config: Sizes of the net.
        codec: What the levels mean; the data's.
        sample_rate: In Hz; the data's.
        class_names: What recordings are of, if the data are labelled; the data's.
        report_clips: Clips that are generated for the report.
        report_seconds: Their length.
        report_temperature: Divides the logits when they are drawn.
        input_noise: Standard deviation, in levels, of noise on the inputs in training; each window has its own, from 0
            to this. A net that only ever saw recordings takes the first deviations of its own for noise and goes on
            with noise (exposure bias); from disturbed inputs it learns to come back.
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile the net.
        graph: Replay the net's forward and backward as CUDA graphs, which leaves out the host's time: a deep and narrow
            net takes a fraction of it. Batches of fewer or shorter windows than the first full one run as they are, so
            it goes with ``--data.pad window``. Without a GPU it has no effect.

    Raises:
        UserError: For sizes of which no net can be made, and options that exclude each other.
    """

    headline = "test/bits_per_sample"
    item_name = "windows"
    cuts_sequences = True

    def __init__(
        self,
        config: SashimiConfig = SashimiConfig(),  # noqa: B008  frozen
        codec: Codec = Codec(),  # noqa: B008  frozen
        sample_rate: int = 16000,
        class_names: tuple[str, ...] = (),
        report_clips: int = 4,
        report_seconds: float = 1.0,
        report_temperature: float = 1.0,
        input_noise: float = 0.0,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
        graph: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        if graph and compile:
            raise UserError("--model.graph and --model.compile are both on, wanted one of them")
        self.graph_requested = graph
        self.config, self.codec, self.sample_rate = config, codec, sample_rate
        self.class_names = tuple(class_names)
        self.report_clips, self.report_seconds = report_clips, report_seconds
        for name, value in (("report_temperature", report_temperature), ("input_noise", input_noise)):
            if not value >= 0:
                raise UserError(f"--model.{name} is {value}, wanted at least 0")
        self.report_temperature, self.input_noise = report_temperature, input_noise
        try:
            self.net = SoundNet(config, codec.levels, len(class_names))
        except (TypeError, ValueError) as error:
            raise UserError(f"--model.config: {error}") from error

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats over the samples of a batch, padding left out."""
        inputs = batch.inputs
        if self.training and self.input_noise:
            inputs = disturb(inputs, self.input_noise, self.codec.levels)
        targets = batch.targets
        if (group := active()) is not None:
            frame = math.prod(self.config.pool)  # the samples of the innermost stage's steps stay together
            inputs, targets = group.shard(inputs, frame), group.shard(targets, frame)
        if self.training and self.graph_requested and inputs.is_cuda and self._steps_seen > 1:
            self._capture(inputs)  # not at the first step, whose FLOPs are counted
        logits = self.net(inputs).flatten(0, 1).float()
        total = F.cross_entropy(logits, targets.flatten(), ignore_index=PADDING, reduction="sum")
        return mean_share(total, (targets != PADDING).sum(), everywhere=self.training)

    def _capture(self, inputs: Tensor) -> None:
        """Makes the net's training step graphs as soon as a batch is full."""
        check_graphs(self)
        if inputs.shape == (self._data.batch_size, self._data.window):
            self.graph_requested = False
            capture(self.net, inputs)

    @torch.no_grad()
    def evaluate(self, batch: Batch, stage: str) -> None:
        """Log loss and bits per sample such that the epoch's value is the mean over all samples."""
        loss = self.loss(batch)
        for name, value in (("loss", loss), ("bits_per_sample", loss / math.log(2))):
            self.log_mean(f"{stage}/{name}", value, batch, self.batch_tokens(batch))

    def batch_tokens(self, batch: Batch) -> int:
        """Number of samples, padding left out."""
        return batch.samples

    def on_test_epoch_end(self) -> None:
        """Log the bits per sample of simple models on the same windows."""
        for name, bits in self._data.baselines().items():
            self.log(f"baseline/{name}", bits)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what the weights mean, so that generation needs nothing but the checkpoint."""
        checkpoint[RECORD] = record(self.config, self.codec, self.sample_rate, self.class_names)

    @torch.no_grad()
    def add_to_report(self, report: Report) -> None:
        """Add what was read, and clips: generated ones, and recordings of the test part as the codec leaves them."""
        report.facts("Recordings", self._data.facts())
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "add_to_report"):
                callback.add_to_report(report, self)
        count, length = self.report_clips, round(self.report_seconds * self.sample_rate)
        if not count or not length:
            return
        self.net.eval()
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(temperature=self.report_temperature)
        starts = self.starts(count)
        clips = generate_levels(self.sound_net, starts, count, length, sampling, generator=generator)
        words = [self.class_names[start // self.codec.levels] if self.class_names else "clip" for start in starts]
        heard = [(self.codec.decode(clip), f"{words[i]} {i + 1}") for i, clip in enumerate(clips)]
        how = f"temperature {self.report_temperature:g}, seed 0"
        add_players(
            report, "Generated", heard,
            self.sample_rate, f"Drawn sample by sample from the model, {how}; none was left out.",
        )  # fmt: skip
        recorded = [clip[:length].long() for clip in self._data.parts["test"].clips[:count]]
        names = [path.name for path in self._data.files["test"]]
        add_players(
            report, "Recorded", [(self.codec.decode(clip), name) for clip, name in zip(recorded, names, strict=False)],
            self.sample_rate, "Recordings of the test part through the codec: as good as the generated ones can get.",
        )  # fmt: skip

    @property
    def sound_net(self) -> SoundNet:
        """The net, as what it is."""
        assert isinstance(self.net, SoundNet)
        return self.net

    def starts(self, count: int) -> list[int]:
        """What ``count`` generated clips begin with: the classes take turns."""
        return Trained(self.sound_net, self.codec, self.sample_rate, self.class_names).starts(count)

    @property
    def _data(self) -> AudioData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, AudioData)
        return data


def disturb(inputs: Tensor, most: float, levels: int) -> Tensor:
    """Adds Gaussian noise to levels, of another strength in each window.

    Args:
        inputs: (B, L) int64 levels, with their class.
        most: Largest standard deviation, in levels; that of a window is uniform from 0 to this.
        levels: Number of levels Q; what leaves their range is clipped.

    Returns:
        (B, L) int64 levels.
    """
    strength = most * torch.rand(len(inputs), 1, device=inputs.device)
    noise = (strength * torch.randn(inputs.shape, device=inputs.device)).round().long()
    level = inputs % levels
    return inputs - level + (level + noise).clamp(0, levels - 1)
