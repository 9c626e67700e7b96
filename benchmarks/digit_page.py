"""What docs/audio_digits.md shows of the digits' model that ships: scores, sound and spectrograms.

    python -m benchmarks.digit_page FOLDER --num 60

FOLDER holds the recordings of the Free Spoken Digit Dataset. The first ten clips go to OUT/audio_digits.ogg, and above
recordings of the same words to OUT/audio_digits.png; rows of the table of scores are printed.
"""

from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from torch import Tensor

from audio.evaluate import Judged, scores
from audio.files import find_audio, read_clip, to_mono
from audio.judge import Judge, load_judge
from audio.listen import mel_spectrogram
from audio.sampling import generate_levels
from audio.splits import FSDD_NAME
from audio.trained import load_trained
from core.cli import run
from core.env import find_device

SHOWN, PAUSE, TEST_TAKES = 10, 0.25, 5


class Said(NamedTuple):
    """Clips and what they are of, such as 7_theo."""

    words: list[str]
    waves: list[Tensor]


def main(
    folder: str,
    num: int = 60,
    seconds: float = 0.7,
    seed: int = 0,
    guidance: float | None = None,
    checkpoint: str | None = None,
    out: str | None = None,
    device: str = "auto",
) -> None:
    """Generates clips, scores them beside recordings and noise, and shows ten.

    Args:
        folder: The recordings.
        num: Clips that are generated; the words take turns.
        seconds: Length of each.
        seed: Of the random numbers.
        guidance: Strength; by default the model's own.
        checkpoint: Another model than the one that ships.
        out: Folder for sound and picture; null writes none.
        device: cpu, cuda or auto.
    """
    trained, judge, where = (
        load_trained(None if checkpoint is None else Path(checkpoint)),
        load_judge(),
        find_device(device),
    )
    trained.net.to(where)
    starts = trained.starts(num)
    levels = generate_levels(
        trained.net, starts, num, round(seconds * trained.sample_rate), guidance=trained.guide(guidance),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    words = [trained.class_names[start // trained.codec.levels] for start in starts]
    drawn = Said(words, [trained.codec.decode(clip) for clip in levels])
    recorded = _recordings(Path(folder))
    noise = torch.randn(100, 8000, generator=torch.Generator().manual_seed(seed))
    hiss = Said([f"{i % 10}_" for i in range(len(noise))], list(noise))
    for name, said in ((f"{num} generated", drawn), ("test recordings", recorded), ("100 of white noise", hiss)):
        print(_row(name, said, judge))
    if out is not None:
        _show(drawn, recorded, trained.sample_rate, Path(out))


def _recordings(folder: Path) -> Said:
    """The test part."""
    words, waves = [], []
    for path in find_audio(folder):
        name = FSDD_NAME.fullmatch(path.stem)
        if name and int(name[3]) < TEST_TAKES:
            wave = to_mono(read_clip(path), 8000)
            words.append(f"{name[1]}_{name[2]}")
            waves.append(wave / wave.abs().max())
    return Said(words, waves)


def _row(name: str, said: Said, judge: Judge) -> str:
    """A row of the table: FID, the inception score and the modified one, AM, confidence, and words heard as meant."""
    features, shares = judge(said.waves)
    assert judge.reference is not None
    found = scores(Judged([], [], features, shares, None), judge.reference)
    heard = [judge.class_names[i] for i in shares.argmax(1).tolist()]
    right = sum(word[0] == digit for word, digit in zip(said.words, heard, strict=True)) / len(heard)
    figures = f"{found['fid']:.2f} | {found['inception_score']:.2f} | {found['modified_inception_score']:.3g}"
    return f"| {name} | {figures} | {found['am_score']:.2f} | {found['confidence']:.2f} | {right:.0%} |"


def _show(drawn: Said, recorded: Said, rate: int, out: Path) -> None:
    """Writes the first clips one after the other, and their spectrograms above those of recordings."""
    from matplotlib.figure import Figure

    first = drawn.waves[:SHOWN]
    pause = torch.zeros(round(PAUSE * rate))
    sound = torch.cat([part for wave in first for part in (wave, pause)])
    soundfile.write(out / "audio_digits.ogg", sound.numpy(), rate, format="OGG", subtype="VORBIS")
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(2, SHOWN, sharex=True, sharey=True)
    for i, (word, wave) in enumerate(zip(drawn.words, first, strict=False)):
        other = recorded.waves[recorded.words.index(word)][: len(wave)]
        other = torch.cat([other, other.new_zeros(len(wave) - len(other))])
        for axis, clip in zip(axes[:, i], (wave, other), strict=True):
            axis.imshow(
                mel_spectrogram(clip, rate).numpy(), origin="lower", aspect="auto", cmap="magma",
                extent=(0, len(wave) / rate, 0, 1),
            )  # fmt: skip
            axis.set_yticks([])
            axis.tick_params(labelsize=6)
        axes[0, i].set_title(word.replace("_", ", "), fontsize=7)
    for axis, label in zip(axes[:, 0], ("generated", "recorded"), strict=True):
        axis.set_ylabel(label, fontsize=8)
    figure.supxlabel("s", fontsize=7)
    figure.savefig(out / "audio_digits.png", dpi=100)


if __name__ == "__main__":
    run(main)
