"""Generates sound: ``python -m audio.generate``, or ``python -m audio.generate CHECKPOINT --num 8 --seconds 2``."""

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from audio.files import read_clip, to_mono, write_stream, write_wav
from audio.listen import add_players, spectrogram_png
from audio.sampling import Drawn, stream
from audio.sampling import generate as draw_levels
from audio.steppers import Guidance
from audio.trained import Trained, load_trained
from core import env
from core.cli import run
from core.errors import UserError
from core.generate import Sampling
from core.training.folder import RunFolder, named, numbered
from core.training.report import Report, write_atomically

RUNS = Path("runs/audio/generate")
STREAMED = 1600  # samples between two writes to standard output


def generate(
    checkpoint: str | None = None,
    num: int = 4,
    seconds: float = 1.0,
    classes: str | None = None,
    guidance: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    prompt: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
    precision: Literal["float32", "bfloat16"] = "float32",
    reject_low: float = 0.0,
    reject_high: float = 0.0,
    stdout: bool = False,
) -> None:
    """Writes clips as WAV files, their spectrograms as PNG files, and a page to listen to them, report.html.

    Beside each clip, and in clips.csv, stands its exact likelihood under the model, in bits per sample. With
    --reject_low or --reject_high more clips are drawn, and the least or most likely ones left out. With --stdout true
    one clip goes to standard output as WAV while it is drawn, and nothing is written:
    python -m audio.generate --stdout true | aplay

    The real-time factor that it prints is the time taken over the length of the sound: below 1 it is faster than
    playing.

    Args:
        checkpoint: A .ckpt or .safetensors file of audio.train, or the folder of its run; without one, the model of
            spoken digits that comes with the project.
        num: Number of clips.
        seconds: Length of what is generated for each, without the prompt.
        classes: What is said, for a model that was trained with labels: one of its classes or several, separated by
            commas, which take turns; 7 is all of 7_theo, 7_lucas and so on. Without it all classes take turns.
        guidance: How much more than once the class counts, by classifier-free guidance: 0 is not at all, above 0 takes
            twice the time. By default what the model was made for; for models trained with --data.untold.
        temperature: Divides the logits; 0 takes the most likely level.
        top_k: Draw from so many of the most likely levels; 0 is all.
        top_p: Draw from the most likely levels that together have this probability; 1 is all.
        seed: Of the random numbers; the same seed gives the same clips.
        prompt: A recording that every clip begins with, of any rate and number of channels.
        out: Folder to write to instead of the next one in runs/audio/generate.
        overwrite: Replace what an earlier generation has written to that folder.
        device: Where to run: cpu or cuda; auto is the GPU if there is one.
        precision: Of the weights; bfloat16 on a GPU only, where it streams one clip of a Mamba U-Net in real time.
        reject_low: Share of the drawn clips that is left out as the least likely: runaway noise is among them.
        reject_high: Share that is left out as the most likely: silence is among them. SaShiMi's protocol is 0.4 and
            0.05.
        stdout: Stream the first clip to standard output instead.
    """
    if stdout and sys.stdout.isatty():
        raise UserError("--stdout writes a WAV file, which a terminal cannot show; pipe it: ... --stdout true | aplay")
    drawn = _drawn(num, reject_low, reject_high)
    sampling, where = _check(num, seconds, temperature, top_k, top_p), env.find_device(device)
    trained = load_trained(None if checkpoint is None else Path(checkpoint).expanduser())
    if precision == "bfloat16" and where.type == "cpu":
        raise UserError("--precision is bfloat16, wanted float32 on a CPU; a GPU takes both")
    trained.net.to(where, getattr(torch, precision))
    starts = trained.starts(drawn, [name.strip() for name in classes.split(",")] if classes else ())
    start = None
    if prompt is not None:
        start = trained.codec.encode(to_mono(read_clip(Path(prompt).expanduser()), trained.sample_rate))
    guide = _guide(trained, guidance)
    wanted = Wanted(trained, starts, max(1, round(seconds * trained.sample_rate)), sampling, start, guide, seed)
    if stdout:
        _stream(wanted)
        return
    folder = numbered(RUNS) if out is None else _named(Path(out), overwrite)
    command = " ".join(["python -m audio.generate", *([checkpoint] if checkpoint else [])])
    options = {
        "checkpoint": checkpoint or "spoken digits, which come with the project",
        "codec": str(trained.codec), "rate": f"{trained.sample_rate} Hz",
        "guidance": guide.strength if guide else 0,
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "prompt": prompt or "none",
        "device": env.device_name(where),
        "precision": precision,
    }  # fmt: skip
    try:
        folder.mark({"status": "running", "command": command})
        metrics = _generate(folder, wanted, num, reject_high, options)
        folder.mark({"status": "finished", "command": command})
        folder.start()
    finally:
        folder.discard()
    print(
        f"{drawn} clips of {metrics['seconds']:.2f} s in {metrics['wall_seconds']:.1f} s: real-time factor "
        f"{metrics['real_time_factor']:.2f} for all of them, {metrics['stream_real_time_factor']:.2f} for each"
    )
    print(folder.path)


class Wanted(NamedTuple):
    """What is drawn, and by what."""

    trained: Trained
    starts: list[int]  # of each clip
    length: int  # samples of each
    sampling: Sampling
    prompt: Tensor | None  # (P,) levels that every clip begins with
    guidance: Guidance | None
    seed: int


class Heard(NamedTuple):
    """What is told of a clip."""

    said: str  # its class
    bits: float  # per sample, under the model


def _generate(
    folder: RunFolder, wanted: Wanted, num: int, reject_high: float, options: dict[str, object]
) -> dict[str, float]:
    """Draws the clips, writes those that are kept, and returns the figures."""
    trained, length, drawn = wanted.trained, wanted.length, len(wanted.starts)
    found, taken = _draw(wanted)
    bits = -found.log_likelihood / (length * math.log(2))
    kept = _kept(bits, num, reject_high)
    levels = found.levels[kept]
    if wanted.prompt is not None:
        levels = torch.cat([wanted.prompt.long().expand(num, -1), levels], dim=1)
    metrics = _figures(taken, drawn, length, trained.sample_rate)
    metrics |= {"clips": num, "drawn": drawn, "bits_per_sample": float(bits[kept].mean())}
    heard = [Heard(_said(trained, wanted.starts[i]), float(bits[i])) for i in kept]
    _write(folder, trained, heard, levels, metrics, options)
    return metrics


def _stream(wanted: Wanted) -> None:
    """Writes a clip to standard output while it is drawn."""
    trained = wanted.trained
    chunks = stream(
        trained.net, wanted.starts[0], 1, wanted.sampling, length=wanted.length, chunk=STREAMED, prompt=wanted.prompt,
        guidance=wanted.guidance, generator=torch.Generator().manual_seed(wanted.seed),
    )  # fmt: skip
    waves = (trained.codec.decode(chunk.levels[0]) for chunk in chunks)
    write_stream(sys.stdout.buffer, waves, wanted.length, trained.sample_rate)


def _draw(wanted: Wanted) -> tuple[Drawn, float]:
    """Draws the clips; returns their levels, without the prompt, and the seconds it took."""
    trained, starts = wanted.trained, wanted.starts
    draw_levels(trained.net, starts[0], 1, 1, wanted.sampling, guidance=wanted.guidance)  # compiles the step
    begin = time.perf_counter()
    with _progress(wanted.length, trained.sample_rate) as progress:
        drawn = draw_levels(
            trained.net, starts, len(starts), wanted.length, wanted.sampling, prompt=wanted.prompt,
            guidance=wanted.guidance, generator=torch.Generator().manual_seed(wanted.seed), progress=progress,
        )  # fmt: skip
    return drawn, time.perf_counter() - begin


def _guide(trained: Trained, strength: float | None) -> Guidance | None:
    if strength is not None and not 0 <= strength < math.inf:
        raise UserError(f"--guidance is {strength}, wanted at least 0")
    return trained.guide(strength)


def _drawn(num: int, low: float, high: float) -> int:
    """How many clips have to be drawn so that ``num`` are left."""
    for name, share in (("reject_low", low), ("reject_high", high)):
        if not 0 <= share < 1:
            raise UserError(f"--{name} is {share}, wanted at least 0 and less than 1")
    if low + high >= 1:
        raise UserError(f"--reject_low {low} and --reject_high {high} leave nothing, wanted less than 1 together")
    return math.ceil(num / (1 - low - high) - 1e-9)


def _kept(bits: Tensor, num: int, high: float) -> list[int]:
    """The clips that are left, in the order in which they were drawn."""
    if num == len(bits):
        return list(range(num))
    first = min(round(high * len(bits)), len(bits) - num)
    return sorted(bits.argsort()[first : first + num].tolist())


def _said(trained: Trained, start: int) -> str:
    """The class of a clip, "" for a model without classes."""
    return trained.class_names[start // trained.codec.levels] if trained.class_names else ""


def _check(num: int, seconds: float, temperature: float, top_k: int, top_p: float) -> Sampling:
    """Refuses what cannot be generated, before anything is read."""
    if num < 1:
        raise UserError(f"--num is {num}, wanted at least 1")
    if not 0 < seconds < 3600:
        raise UserError(f"--seconds is {seconds}, wanted more than 0 and less than an hour")
    try:
        return Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def _named(path: Path, overwrite: bool) -> RunFolder:
    """The folder that --out names, which is not replaced silently."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; name a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--out {path} is not empty; name another folder, or replace it with --overwrite true")
    return named(path, overwrite)


def _figures(taken: float, num: int, length: int, sample_rate: int) -> dict[str, float]:
    seconds = length / sample_rate
    return {
        "clips": num,
        "seconds": seconds,
        "wall_seconds": taken,
        "real_time_factor": taken / (num * seconds),
        "stream_real_time_factor": taken / seconds,
        "samples_per_second": num * length / taken,
    }


def _write(
    folder: RunFolder,
    trained: Trained,
    heard: list[Heard],
    levels: Tensor,
    metrics: dict[str, float],
    options: dict[str, object],
) -> None:
    """Writes the sound, the pictures, the page and the figures."""
    clips, rows = [], [("file", "class", "bits_per_sample")]
    for i, (clip, (said, bits)) in enumerate(zip(levels, heard, strict=True)):
        wave, name = trained.codec.decode(clip), f"clip_{i + 1:03d}"
        write_wav(folder.path / f"{name}.wav", wave, trained.sample_rate)
        (folder.path / f"{name}.png").write_bytes(spectrogram_png(wave, trained.sample_rate))
        clips.append((wave, f"{name}.wav: {said}{', ' if said else ''}{bits:.3f} bits per sample"))
        rows.append((f"{name}.wav", said, f"{bits:.6f}"))
    with (folder.path / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    report = Report(
        "audio generate", f"{metrics['real_time_factor']:.2f}", "seconds taken per second of sound, over all clips"
    )
    caption = "The clips begin with the prompt." if options["prompt"] != "none" else ""
    add_players(report, "Clips", clips, trained.sample_rate, caption)
    report.facts("Generation", {**options, **metrics})
    report.write(folder.path / "report.html")
    write_atomically(folder.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")


@contextmanager
def _progress(length: int, sample_rate: int) -> Iterator[Callable[[int], None]]:
    """Shows how far the drawing is: a live line in a terminal, elsewhere a line every ten seconds."""
    begin = last = time.perf_counter()

    def line(done: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= 10 and done < length:
            last = now
            left = (now - begin) / done * (length - done)
            print(f"{done / sample_rate:.2f} of {length / sample_rate:.2f} s, {left:.0f} s to go", flush=True)

    if not sys.stdout.isatty():
        yield line
        return
    with Progress() as bar:
        task = bar.add_task("samples of each clip", total=length)
        yield lambda done: bar.update(task, completed=done)


if __name__ == "__main__":
    run(generate, optional="checkpoint")
