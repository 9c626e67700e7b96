"""Bits per sample of long recordings against the length of the windows, at a constant number of samples a step.

    python -m benchmarks.sound_context LEVELS.npz benchmarks/results/sound_context.csv --steps 250

As figure 7 of the Mamba paper: a window is all the context there is, in training and in the test. Beside the mean over
all samples of the test windows, POSITIONS.csv gets the mean over those that have so many samples of their window before
them: what one net makes of context. With --warm all nets of a seed go on from one that was trained on short windows:
otherwise a short training shows that few long windows a step teach the sound of a millisecond slower than many short
ones, not what context is worth. LEVELS.npz is what ``python -m benchmarks.pack_levels`` writes; the last recording is
the test part. A row is written as soon as it is measured, and rows that are there already are not measured again.

Legend: B windows, L samples of a window.
"""

import csv
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audio.net import SoundNet
from benchmarks.spoken_digits import LEVELS, SILENCE, Trainer, sizes
from core.cli import run
from core.table import append_row

EDGES = (0, 64, 256, 1024, 4096, 16384, 65536)  # of positions in a window that are put together


def main(
    levels: str,
    out: str,
    windows: tuple[int, ...] = (8192, 262144, 32768, 131072, 16384, 65536),
    name: str = "mamba",
    config: str = '{"n_layers": 3, "pool": [16, 16]}',
    steps: int = 250,
    samples: int = 262144,
    lr: float = 2e-3,
    seed: int = 0,
    warm: int = 0,
    warm_window: int = 4096,
    graphs: bool = True,
    device: str = "cuda",
    positions: str | None = None,
) -> None:
    """Trains one net for each window and tests it.

    Args:
        levels: Packed levels.
        out: CSV file.
        windows: Lengths L, in the order in which they are measured.
        name: Of the net, in the file.
        config: Its sizes, SashimiConfig's fields as JSON.
        steps: Of each training.
        samples: B L of each step.
        lr: Peak learning rate; after a tenth of the training it falls to 0 as half a cosine.
        seed: Of everything random.
        warm: Steps, of half as many samples, of the training that the nets of a seed share; 0 for none.
        warm_window: Length L of its windows.
        graphs: Keep the step in CUDA graphs.
        device: Where to run.
        positions: CSV file of the bits by position in the window.
    """
    packed = np.load(levels)
    ends = np.cumsum(packed["meta"][:, 3])
    train = torch.from_numpy(packed["levels"][: ends[-2]]).to(device)
    test = torch.from_numpy(packed["levels"][ends[-2] : ends[-1]]).to(device)
    path, shared = Path(out), None
    done = _done(path)
    for window in windows:
        if (name, window, seed, steps, warm) in done:
            continue
        begin = time.perf_counter()
        torch.manual_seed(seed)
        net = SoundNet(sizes(config), LEVELS).to(device)
        if warm and shared is None:
            _train(Trainer(net, lr, 0.1, 0.0, 0.5, graphs), train, warm_window, warm, samples // 2, lr, seed + 1)
            shared = {key: value.clone() for key, value in net.state_dict().items()}
        if shared is not None:
            net.load_state_dict(shared)
        trainer = Trainer(net, lr, 0.1, 0.0, 0.5, graphs)
        losses = _train(trainer, train, window, steps, samples, lr, seed)
        bits, counts = bits_by_position(net, test, window)
        row = {
            "name": name, "window": window, "seed": seed, "steps": steps, "warm": warm, "samples": samples,
            "params": sum(p.numel() for p in net.parameters()),
            "test_bits": f"{float(bits.sum()) / len(test):.4f}",
            "train_bits": f"{losses:.4f}", "seconds": f"{time.perf_counter() - begin:.1f}",
            "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
        }  # fmt: skip
        append_row(path, row)
        print(json.dumps(row), flush=True)
        for low, high in pairwise(edge for edge in (*EDGES, window) if edge <= window) if positions else ():
            if high > low:
                mean = float(bits[low:high].sum() / counts[low:high].sum())
                about = {"name": name, "window": window, "seed": seed, "steps": steps, "warm": warm}
                append_row(Path(positions or ""), {**about, "from": low, "to": high, "test_bits": f"{mean:.4f}"})


def _done(path: Path) -> set[tuple[str, int, int, int, int]]:
    """Name, window, seed, steps and warm steps of the rows of a file."""
    if not path.is_file():
        return set()
    with path.open() as file:
        return {
            (row["name"], *(int(row[key]) for key in ("window", "seed", "steps", "warm")))
            for row in csv.DictReader(file)
        }  # type: ignore[misc]


def _train(trainer: Trainer, levels: Tensor, window: int, steps: int, samples: int, lr: float, seed: int) -> float:
    """Trains on random windows; returns the mean bits of the last tenth."""
    draws, count, losses = torch.Generator().manual_seed(seed), max(1, samples // window), []
    place = torch.arange(window, device=levels.device)
    for step in range(steps):
        part = step / steps
        trainer.rate.fill_(lr * max(min(10 * part, 0.5 + 0.5 * math.cos(math.pi * (part - 0.1) / 0.9)), 1e-3))
        begin = torch.randint(len(levels) - window + 1, (count, 1), generator=draws).to(levels.device)
        targets = levels[begin + place].long()
        inputs = F.pad(targets[:, :-1], (1, 0), value=SILENCE)
        losses.append(trainer.step(inputs, targets).clone())
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean()) / math.log(2)


@torch.no_grad()
def bits_by_position(net: SoundNet, levels: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Cuts a recording into windows, before which nothing is known.

    Returns:
        (L,) float64 bits of the samples at each position of a window, and how many samples there are.
    """
    net.eval()
    bits, counts = torch.zeros(2, window, dtype=torch.float64, device=levels.device)
    whole = len(levels) // window * window
    rows = [*levels[:whole].view(-1, window).split(max(1, 262144 // window)), levels[None, whole:]]
    for row in rows:
        if not row.numel():
            continue
        targets, size = row.long(), row.shape[1]
        with torch.autocast(levels.device.type, torch.bfloat16, enabled=levels.is_cuda):
            logits = net(F.pad(targets[:, :-1], (1, 0), value=SILENCE))
        nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        bits[:size] += nats.double().sum(0) / math.log(2)
        counts[:size] += len(row)
    net.train()
    return bits.cpu(), counts.cpu()


if __name__ == "__main__":
    run(main)
