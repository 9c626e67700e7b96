"""Kinds of layers in one U-Net at equal parameters, steps and data: bits per sample on spoken digits.

    python -m benchmarks.sound_layers LEVELS.npz benchmarks/results/sound_layers.csv --steps 400

As tables 4 and 5 of the Mamba paper at a reduced scale: which layers stand in the outer stages, which in the centre.
With --clips, as many are drawn of each net, the digits in turn, and scored by the project's own classifier.
LEVELS.npz is what ``python -m benchmarks.pack_levels`` writes of the Free Spoken Digit Dataset. A row is written as
soon as it is measured, and rows that are there already are not measured again.
"""

import csv
import json
import time
from pathlib import Path
from typing import Any

import torch

from audio.codec import Codec
from audio.evaluate import Judged, scores
from audio.judge import load_judge
from audio.net import SoundNet
from audio.sampling import generate_levels
from benchmarks.spoken_digits import DIGITS, LEVELS, Budget, Trainer, bits_per_sample, fit, read, sizes
from core.cli import run
from core.table import append_row

S4D = {"mixer": "s4d", "mlp": 2}
ATTENTION = {"centre": "attention", "centre_cfg": {"num_heads": 8, "rotary_emb_dim": 32}, "centre_mlp": 1}  # MHA + MLP
LAYERS = {
    "mamba": {"mixer": "mamba"},
    "s4d+mlp": S4D,
    "s4d+mlp outside, mamba in the centre": {**S4D, "centre": "mamba", "centre_cfg": {}, "centre_mlp": 0},
    "mamba outside, s4d+mlp in the centre": {"mixer": "mamba", "centre": "s4d", "centre_cfg": {}, "centre_mlp": 2},
    "s4d+mlp outside, attention in the centre": {**S4D, **ATTENTION},
    "mamba outside, attention in the centre": {"mixer": "mamba", **ATTENTION},
}

SCORES = ("clips", "as_asked", "fid", "inception_score", "modified_inception_score", "am_score", "confidence")


def main(
    levels: str,
    out: str,
    names: tuple[str, ...] = tuple(LAYERS),
    seeds: tuple[int, ...] = (0, 1, 2),
    config: str = '{"n_layers": 2}',
    steps: int = 400,
    samples: int = 49152,
    lr: float = 2e-3,
    noise: float = 0.0,
    clips: int = 0,
    graphs: bool = True,
    device: str = "cuda",
) -> None:
    """Trains and tests each net with each seed.

    Args:
        levels: Packed levels.
        out: CSV file.
        names: Which layers, keys of LAYERS.
        seeds: Of weights and order; all nets of a seed see the same rows.
        config: Sizes that all nets share, SashimiConfig's fields as JSON.
        steps: Of each training.
        samples: Of one step.
        lr: Peak learning rate.
        noise: Largest deviation of the noise on the inputs, in levels.
        clips: Clips that are drawn of each net and scored; 0 for none.
        graphs: Keep the step in CUDA graphs.
        device: Where to run.
    """
    train, test = read(Path(levels), device)
    path, done = Path(out), set()
    if path.is_file():
        with path.open() as file:
            done = {
                (row["name"], int(row["seed"]), int(row["steps"]), float(row["noise"])) for row in csv.DictReader(file)
            }
    for seed in seeds:
        for name in names:
            if (name, seed, steps, noise) in done:
                continue
            begin = time.perf_counter()
            torch.manual_seed(seed)
            net = SoundNet(sizes(json.dumps({**json.loads(config), **LAYERS[name]})), LEVELS, DIGITS).to(device)
            trainer = Trainer(net, lr, 0.1, noise, 0.5, graphs)
            figures = {}
            for figures in fit(trainer, train, Budget(steps), lr, samples, seed):
                print(name, seed, json.dumps(figures), flush=True)
            row = {
                "name": name, "seed": seed, "recordings": sum(len(one.inputs) for one in train), "steps": steps,
                "samples": samples,
                "params": sum(p.numel() for p in net.parameters()), "test_bits": f"{bits_per_sample(net, test):.4f}",
                "train_bits": figures.get("train_bits", ""), "noise": noise,
                "seconds": f"{time.perf_counter() - begin:.1f}",
                "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
                **judged(net, clips, seed),
            }  # fmt: skip
            append_row(path, row)
            print(json.dumps(row), flush=True)


def judged(net: SoundNet, clips: int, seed: int) -> dict[str, Any]:
    """Draws clips of 0.6 s and scores them against the classifier's recordings; empty values without clips."""
    if not clips:
        return dict.fromkeys(SCORES, "")
    judge, codec = load_judge(), Codec(normalize="peak")
    judge.net.to(net.embedding.weight.device)
    assert judge.reference is not None
    starts = [codec.start + LEVELS * (i % DIGITS) for i in range(clips)]
    net.eval()
    drawn = generate_levels(net, starts, clips, 4800, generator=torch.Generator().manual_seed(seed))
    net.train()
    features, shares = judge([codec.decode(clip) for clip in drawn])
    right = float((shares.argmax(1) == torch.arange(clips) % DIGITS).float().mean())
    found = Judged([], [], features, shares, None)
    values = {"as_asked": right, **scores(found, judge.reference)}
    return {"clips": clips, **{name: f"{values[name]:.3f}" for name in SCORES[1:]}}


if __name__ == "__main__":
    run(main)
