"""A classifier of spoken digits: the judge of generated clips, and what the scores of ``audio.metrics`` look through.

Dimension letters: B clips, L samples, M mel bands, T frames, F features, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from audio.clips import LabelledClips
from core.errors import UserError
from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report

BANDS, RANGE_DB, LOWEST_HZ = 40, 50.0, 60.0


class LogMel(nn.Module):
    """Waveforms to log-mel pictures: (B, L) -> (B, M, T), frames of 32 ms every 16 ms.

    Decibels below the loudest cell of the clip, down to 50, mapped to 1 ... 0: the picture doesn't depend on the gain,
    and the quantisation noise of 256 levels lies below it.

    Args:
        sample_rate: In Hz.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.frame = 2 ** round(math.log2(0.032 * sample_rate))
        self.register_buffer("filters", mel_filters(sample_rate, self.frame, BANDS), persistent=False)
        self.register_buffer("window", torch.hann_window(self.frame), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """Maps (B, L) float32 to (B, M, 1 + 2 L / frame) in [0, 1]."""
        spectrum = torch.stft(
            wave, self.frame, self.frame // 2, window=self.window, pad_mode="constant", return_complex=True
        )
        level = 10 * torch.log10(self.filters @ spectrum.abs().square() + 1e-10)
        return ((level - level.amax((1, 2), keepdim=True)) / RANGE_DB + 1).clamp(min=0)


def mel_filters(sample_rate: int, frame: int, bands: int) -> Tensor:
    """Triangles with corners equally spaced in mel = 2595 log10(1 + f / 700), from 60 Hz to half the rate.

    Returns:
        (bands, frame / 2 + 1) float32.
    """

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    corners = 700 * (10 ** (torch.linspace(mel(LOWEST_HZ), mel(sample_rate / 2), bands + 2).double() / 2595) - 1)
    hz = torch.arange(frame // 2 + 1, dtype=torch.float64) * sample_rate / frame
    rise = (hz - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    fall = (corners[2:, None] - hz) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp(min=0).float()


class DigitNet(nn.Module):
    """Four convolutions over the log-mel picture, their mean as F features, and a linear head.

    Args:
        sample_rate: In Hz.
        num_classes: K.
        width: Channels of the first convolution; the features are four times as many.
        dropout: Probability, on the features.
    """

    def __init__(self, sample_rate: int = 8000, num_classes: int = 10, width: int = 24, dropout: float = 0.3) -> None:
        super().__init__()
        self.mel = LogMel(sample_rate)
        sizes = (1, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for i in range(4):
            convolution = nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(sizes[i + 1]), nn.ReLU()]
            if i < 3:
                layers.append(nn.MaxPool2d(2))
        self.convolutions = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(sizes[-1], num_classes)

    def features(self, wave: Tensor) -> Tensor:
        """Maps waveforms (B, L) to (B, F)."""
        return self._features(self.mel(wave))

    def _features(self, picture: Tensor) -> Tensor:
        return self.convolutions(picture[:, None]).mean((2, 3))

    def forward(self, wave: Tensor) -> Tensor:
        """Maps waveforms (B, L), of a peak of 1, to logits (B, K)."""
        return self.head(self.dropout(self.features(wave)))

    def forward_masked(self, wave: Tensor) -> Tensor:
        """``forward`` with a random span of bands and one of frames silenced (Park et al. 2019, SpecAugment)."""
        picture = self.mel(wave)
        for axis, most in ((1, 8), (2, 12)):
            size = picture.shape[axis]
            span = torch.randint(0, most + 1, (len(wave), 1), device=wave.device)
            begin = (torch.rand(len(wave), 1, device=wave.device) * (size - span)).long()
            place = torch.arange(size, device=wave.device)
            hidden = (place >= begin) & (place < begin + span)
            picture = picture.masked_fill(hidden[:, :, None] if axis == 1 else hidden[:, None], 0)
        return self.head(self.dropout(self._features(picture)))


def augment(wave: Tensor) -> Tensor:
    """Varies clips (B, L): the batch's speed and pitch by up to 15 %, each clip's place by 0.1 L, and adds noise.

    The noise of a clip lies 15 to 60 dB below its peak.
    """
    length = wave.shape[1]
    speed = 0.85 + 0.3 * float(torch.rand(()))
    wave = F.interpolate(wave[:, None], size=round(length / speed), mode="linear")[:, 0, :length]
    room = length // 10
    wave = F.pad(wave, (room, length - wave.shape[1] + room))
    begin = torch.randint(room // 2, 2 * room + 1, (len(wave), 1), device=wave.device)
    wave = wave.gather(1, begin + torch.arange(length, device=wave.device))
    loudness = 10 ** (-(15 + 45 * torch.rand(len(wave), 1, device=wave.device)) / 20)
    return wave + loudness * torch.randn_like(wave)


class SpokenClassifier(TrainingModule):
    """What is said in a clip? Cross-entropy on log-mel pictures.

    Args:
        sample_rate: In Hz; the data's.
        length: Samples of a clip; the data's.
        class_names: The classes; the data's.
        width: Channels of the first convolution.
        dropout: Probability, on the features.
        label_smoothing: Part of the target that is spread over all classes.
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile the net.
    """

    headline = "test/accuracy"
    item_name = "clips"

    def __init__(
        self,
        sample_rate: int = 8000,
        length: int = 8000,
        class_names: tuple[str, ...] = (),
        width: int = 24,
        dropout: float = 0.3,
        label_smoothing: float = 0.05,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        if width < 1 or not 0 <= dropout < 1 or not 0 <= label_smoothing < 1:
            raise UserError(
                f"--model.width is {width}, --model.dropout {dropout} and --model.label_smoothing {label_smoothing}; "
                "wanted a width of at least 1, and parts of 1"
            )
        self.sample_rate, self.length, self.class_names = sample_rate, length, tuple(class_names)
        self.width, self.label_smoothing = width, label_smoothing
        self.net = DigitNet(sample_rate, len(self.class_names), width, dropout)
        self.confusion = MulticlassConfusionMatrix(len(self.class_names))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of varied clips (B, L) with their classes (B,)."""
        waves, classes = batch
        return F.cross_entropy(
            self.net.forward_masked(augment(waves)),  # type: ignore[operator]
            classes,
            label_smoothing=self.label_smoothing,
        )

    @torch.no_grad()
    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        """Log the loss of the clips as they are, and count right and wrong answers."""
        waves, classes = batch
        logits = self.net(waves)
        self.log_mean(f"{stage}/loss", F.cross_entropy(logits, classes), batch)
        self.log_mean(f"{stage}/accuracy", (logits.argmax(1) == classes).float().mean(), batch)
        if stage == "test":
            self.confusion.update(logits, classes)

    def predict(self, batch: tuple[Tensor, Tensor]) -> list[dict[str, object]]:
        """Return class, prediction and its probability of each clip."""
        shares, guesses = self.net(batch[0]).softmax(1).max(1)
        rows = zip(batch[1].tolist(), guesses.tolist(), shares.tolist(), strict=True)
        names = self.class_names
        return [{"class": names[c], "predicted": names[g], "probability": round(p, 4)} for c, g, p in rows]

    def on_test_epoch_start(self) -> None:
        """Start counting afresh."""
        self.confusion.reset()

    def on_test_epoch_end(self) -> None:
        """Count what all processes have seen, for the report."""
        self.confusion.compute()

    def add_to_report(self, report: Report) -> None:
        """Add what was read, and the confusion matrix."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LabelledClips)
        report.facts("Recordings", data.facts())
        if int(self.confusion.confmat.sum()):
            figure, axes = self.confusion.plot(labels=list(self.class_names), cmap="Blues")
            axes.set(xlabel="predicted", ylabel="true")
            report.figure("Confusion matrix", figure, "Of the test part; rows are the true classes.")
