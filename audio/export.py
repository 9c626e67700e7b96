"""Writes a trained net to a small file to pass on: ``python -m audio.export RUN FILE.safetensors``."""

from pathlib import Path
from typing import Literal

from audio.codec import Codec
from audio.files import read_clip, to_mono
from audio.judge import load_judge, save_judge
from audio.published import load_published
from audio.splits import split_files
from audio.trained import load_trained, save_trained
from core.cli import run
from core.errors import UserError


def export(
    source: str,
    file: str,
    reference: str | None = None,
    published: bool = False,
    scheme: Literal["mu-law", "linear"] = "mu-law",
    sample_rate: int = 16000,
) -> None:
    """Writes weights in float16, and what they mean, to one safetensors file, which all audio commands take.

    Args:
        source: A .ckpt file or the folder of a run, of audio.train, or of audio.classify if a reference is given.
        file: The file to write, which must not exist.
        reference: Folder of recordings, for a classifier: what it says of their training part goes into the file, so
            that audio.evaluate needs no recordings.
        published: The source is a SaShiMi that the repository of its authors wrote (.pt or .ckpt): it is converted.
        scheme: What the levels of such a one mean, which it does not say: mu-law for SC09 and YouTubeMix, linear for
            Beethoven.
        sample_rate: Its rate in Hz.
    """
    if published and reference is not None:
        raise UserError(
            "--published and --reference exclude each other: the one is for nets, the other for classifiers"
        )
    if sample_rate < 1:
        raise UserError(f"--sample_rate is {sample_rate}, wanted at least 1")
    path = Path(file).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: wanted a name that ends in .safetensors")
    if path.exists():
        raise UserError(f"{path} exists already; remove it, or give another name")
    if published:
        save_trained(load_published(Path(source).expanduser(), Codec(scheme), sample_rate), path)
    elif reference is None:
        save_trained(load_trained(Path(source).expanduser()), path)
    else:
        judge = load_judge(Path(source).expanduser())
        paths = split_files(Path(reference).expanduser(), {"val": 0.1, "test": 0.1})["train"]
        waves = [to_mono(read_clip(one), judge.sample_rate) for one in paths]
        save_judge(judge._replace(reference=judge.refer(waves)), path)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(export)
