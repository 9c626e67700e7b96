"""Bits per sample of long recordings against the length of the windows, at a constant number of samples a step.

    python -m benchmarks.sound_context LEVELS.npz benchmarks/results/sound_context.csv --steps 250

As figure 7 of the Mamba paper: a window is all the context there is, in training and in the test. Beside the mean over
all samples of the test windows, POSITIONS.csv gets the mean over those that have so many samples of their window before
them: what one net makes of context; and CROSSED.csv what each net has when tested on windows of the other lengths.
With --warm all nets of a seed go on from one that was trained on short windows: otherwise a short training shows that
few long windows a step teach the sound of a millisecond slower than many short ones, not what context is worth. For
the same reason --rate of what follows is lower. LEVELS.npz is what ``python -m benchmarks.pack_levels`` writes; the
last recording is the test part. A row is written as soon as it is measured, and rows that are there already are not
measured again.

Legend: B windows, L samples of a window.
"""

import csv
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audio.net import SoundNet
from audio.sashimi import SashimiConfig
from benchmarks.spoken_digits import LEVELS, SILENCE, Trainer, sizes, slower
from core.cli import run
from core.table import append_row

EDGES = (0, 64, 256, 1024, 4096, 16384, 65536)  # of positions in a window that are put together


class Study(NamedTuple):
    """What all nets of a study share."""

    train: list[Tensor]  # (L,) uint8 levels of each recording, at each speed
    test: Tensor  # (L,) uint8
    config: SashimiConfig
    samples: int  # B L of a step
    graphs: bool

    def fit(self, net: SoundNet, window: int, steps: int, lr: float, seed: int) -> float:
        """Trains on random windows of one recording each; returns the mean bits of the last tenth."""
        trainer = Trainer(net, lr, 0.1, 0.0, 0.5, self.graphs)
        draws, losses = torch.Generator().manual_seed(seed), []
        room = torch.tensor([max(0, len(recording) - window + 1) for recording in self.train])
        for step in range(steps):
            part = step / steps
            trainer.rate.fill_(lr * max(min(10 * part, 0.5 + 0.5 * math.cos(math.pi * (part - 0.1) / 0.9)), 1e-3))
            rows = []
            for i in torch.multinomial(room.double(), max(1, self.samples // window), True, generator=draws).tolist():
                begin = int(torch.randint(int(room[i]), (), generator=draws))
                rows.append(self.train[i][begin : begin + window])
            targets = torch.stack(rows).long()
            losses.append(trainer.step(F.pad(targets[:, :-1], (1, 0), value=SILENCE), targets).clone())
        return float(torch.stack(losses[-max(1, steps // 10) :]).mean()) / math.log(2)


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
    rate: float | None = None,
    ratios: tuple[float, ...] = (1.0,),
    graphs: bool = True,
    device: str = "cuda",
    positions: str | None = None,
    crossed: str | None = None,
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
        rate: Peak learning rate of what follows that training; ``lr`` by default.
        ratios: The training part has every recording played slower by each of these.
        graphs: Keep the step in CUDA graphs.
        device: Where to run.
        positions: CSV file of the bits by position in the window.
        crossed: CSV file of each net's bits in test windows of every length.
    """
    recordings, path, shared = _recordings(levels), Path(out), None
    train = [slower(recording.to(device), ratio) for recording in recordings[:-1] for ratio in ratios]
    study = Study(train, recordings[-1].to(device), sizes(config), samples, graphs)
    rate = lr if rate is None else rate
    done = _done(path)
    for window in windows:
        about = {"name": name, "window": window, "seed": seed, "steps": steps, "warm": warm}
        if tuple(about.values()) in done:
            continue
        begin = time.perf_counter()
        torch.manual_seed(seed)
        net = SoundNet(study.config, LEVELS).to(device)
        if warm and shared is None:
            study._replace(samples=samples // 2).fit(net, warm_window, warm, lr, seed + 1)
            shared = {key: value.clone() for key, value in net.state_dict().items()}
            print(f"the common beginning took {time.perf_counter() - begin:.0f} s", flush=True)
        if shared is not None:
            net.load_state_dict(shared)
        losses = study.fit(net, window, steps, rate, seed)
        bits, counts = bits_by_position(net, study.test, window)
        row = {
            **about, "samples": samples,
            "params": sum(p.numel() for p in net.parameters()),
            "test_bits": f"{float(bits.sum()) / len(study.test):.4f}",
            "train_bits": f"{losses:.4f}", "seconds": f"{time.perf_counter() - begin:.1f}",
            "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
            "lr": rate, "speeds": len(ratios),
        }  # fmt: skip
        append_row(path, row)
        print(json.dumps(row), flush=True)
        for low, high in pairwise(edge for edge in (*EDGES, window) if edge <= window) if positions else ():
            if high > low:
                mean = float(bits[low:high].sum() / counts[low:high].sum())
                append_row(Path(positions or ""), {**about, "from": low, "to": high, "test_bits": f"{mean:.4f}"})
        for tested in sorted(windows) if crossed else ():
            mean = float(bits_by_position(net, study.test, tested)[0].sum()) / len(study.test)
            append_row(Path(crossed or ""), {**about, "tested": tested, "test_bits": f"{mean:.4f}"})


def _recordings(levels: str) -> list[Tensor]:
    """(L,) uint8 levels of each recording of a packed file."""
    packed = np.load(levels)
    return list(torch.from_numpy(packed["levels"]).split(packed["meta"][:, 3].tolist()))


def _done(path: Path) -> set[tuple[str, int, int, int, int]]:
    """Name, window, seed, steps and warm steps of the rows of a file."""
    if not path.is_file():
        return set()
    with path.open() as file:
        return {
            (row["name"], *(int(row[key]) for key in ("window", "seed", "steps", "warm")))
            for row in csv.DictReader(file)
        }  # type: ignore[misc]


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
