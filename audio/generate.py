"""Generates sound: ``python -m audio.generate``, or ``python -m audio.generate CHECKPOINT --num 8 --seconds 2``."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from audio.files import read_clip, to_mono, write_wav
from audio.listen import add_players, spectrogram_png
from audio.sampling import generate_levels
from audio.trained import Trained, load_trained
from core import env
from core.cli import run
from core.errors import UserError
from core.generate import Sampling
from core.training.folder import RunFolder, named, numbered
from core.training.report import Report, write_atomically

RUNS = Path("runs/audio/generate")


def generate(
    checkpoint: str | None = None,
    num: int = 4,
    seconds: float = 1.0,
    classes: str | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    prompt: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Writes clips as WAV files, their spectrograms as PNG files, and a page to listen to them, report.html.

    The real-time factor that it prints is the time taken over the length of the sound: below 1 it is faster than
    playing.

    Args:
        checkpoint: A .ckpt or .safetensors file of audio.train, or the folder of its run; without one, the model of
            spoken digits that comes with the project.
        num: Number of clips.
        seconds: Length of what is generated for each, without the prompt.
        classes: What is said, for a model that was trained with labels: one of its classes or several, separated by
            commas, which take turns; 7 is all of 7_theo, 7_lucas and so on. Without it all classes take turns.
        temperature: Divides the logits; 0 takes the most likely level.
        top_k: Draw from so many of the most likely levels; 0 is all.
        top_p: Draw from the most likely levels that together have this probability; 1 is all.
        seed: Of the random numbers; the same seed gives the same clips.
        prompt: A recording that every clip begins with, of any rate and number of channels.
        out: Folder to write to instead of the next one in runs/audio/generate.
        overwrite: Replace what an earlier generation has written to that folder.
        device: Where to run, such as cuda.
    """
    sampling = _check(num, seconds, temperature, top_k, top_p, device)
    trained = load_trained(None if checkpoint is None else Path(checkpoint).expanduser())
    starts = trained.starts(num, [name.strip() for name in classes.split(",")] if classes else ())
    start = None
    if prompt is not None:
        start = trained.codec.encode(to_mono(read_clip(Path(prompt).expanduser()), trained.sample_rate))
    length = max(1, round(seconds * trained.sample_rate))
    folder = numbered(RUNS) if out is None else _named(Path(out), overwrite)
    command = " ".join(["python -m audio.generate", *([checkpoint] if checkpoint else [])])
    try:
        folder.mark({"status": "running", "command": command})
        levels, taken = _draw(trained, starts, length, sampling, start, seed, device)
        metrics = _figures(taken, num, length, trained.sample_rate)
        options = {
            "checkpoint": checkpoint or "spoken digits, which come with the project",
            "codec": str(trained.codec), "rate": f"{trained.sample_rate} Hz",
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "prompt": prompt or "none",
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else env.cpu_name(),
        }  # fmt: skip
        _write(folder, trained, starts, levels, metrics, options)
        folder.mark({"status": "finished", "command": command})
        folder.start()
    finally:
        folder.discard()
    print(
        f"{num} clips of {metrics['seconds']:.2f} s in {taken:.1f} s: real-time factor "
        f"{metrics['real_time_factor']:.2f} for all of them, {metrics['stream_real_time_factor']:.2f} for each"
    )
    print(folder.path)


def _draw(
    trained: Trained,
    starts: list[int],
    length: int,
    sampling: Sampling,
    prompt: Tensor | None,
    seed: int,
    device: str,
) -> tuple[Tensor, float]:
    """Draws the clips; returns their levels, prompt included, and the seconds it took."""
    trained.net.to(device)
    generate_levels(trained.net, starts[0], 1, 1, sampling)  # compiles what was never run here
    begin = time.perf_counter()
    with _progress(length, trained.sample_rate) as progress:
        levels = generate_levels(
            trained.net, starts, len(starts), length, sampling, prompt=prompt,
            generator=torch.Generator().manual_seed(seed), progress=progress,
        )  # fmt: skip
    return levels, time.perf_counter() - begin


def _check(num: int, seconds: float, temperature: float, top_k: int, top_p: float, device: str) -> Sampling:
    """Refuses what cannot be generated, before anything is read."""
    if num < 1:
        raise UserError(f"--num is {num}, wanted at least 1")
    if not 0 < seconds < 3600:
        raise UserError(f"--seconds is {seconds}, wanted more than 0 and less than an hour")
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device is {device!r}, wanted cpu or cuda") from error
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but there is no CUDA device here; leave it out to generate on the CPU")
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
    starts: list[int],
    levels: Tensor,
    metrics: dict[str, float],
    options: dict[str, object],
) -> None:
    """Writes the sound, the pictures, the page and the figures."""
    clips = []
    for i, clip in enumerate(levels):
        wave, name = trained.codec.decode(clip), f"clip_{i + 1:03d}"
        write_wav(folder.path / f"{name}.wav", wave, trained.sample_rate)
        (folder.path / f"{name}.png").write_bytes(spectrogram_png(wave, trained.sample_rate))
        said = f": {trained.class_names[starts[i] // trained.codec.levels]}" if trained.class_names else ""
        clips.append((wave, f"{name}.wav{said}"))
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
