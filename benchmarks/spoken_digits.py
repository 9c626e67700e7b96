"""Trains models of sound on packed levels of spoken digits, to compare layers and to make the one that ships.

    python -m benchmarks.spoken_digits LEVELS.npz OUT --steps 3000 --config '{"n_layers": 4, "mixer": "mamba"}'

LEVELS.npz holds ``levels`` (uint8, mu-law of 8 kHz, clips laid end to end) and ``meta`` (clips, 4): digit, speaker,
take, length, as ``python -m benchmarks.pack_levels FOLDER LEVELS.npz`` writes it. Takes 0 to 4 are the test part.
Unlike ``audio.train`` it has no data loaders, and keeps the training step in CUDA graphs, one for each length of rows.

Legend: B rows, L samples of a row, Q levels.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from audio.codec import Codec
from audio.files import stretched
from audio.net import SoundNet
from audio.sashimi import SashimiConfig
from core.cli import run

LEVELS, SILENCE, DIGITS, SPEAKERS = 256, 128, 10, 6
LENGTHS = (2560, 3584, 4608, 6144, 8192)  # of rows: a clip goes to the shortest with room for it and for the tail
TAIL = 400  # samples of silence at least behind a clip, from which the net learns to end
TEST_TAKES = 5


class Clips(NamedTuple):
    """Clips of one length of rows."""

    inputs: Tensor  # (clips, L) int64: silence, then the levels but for the last; all of them with the clip's class
    targets: Tensor  # (clips, L) int64: the levels, then silence
    lengths: Tensor  # (clips,) samples of the recordings themselves


def read(
    path: Path, device: str, speakers: bool = False, ratios: tuple[float, ...] = (1.0,)
) -> tuple[list[Clips], list[Clips]]:
    """Reads packed levels; returns the rows of the training and of the test part, one entry a length.

    The class is the digit, or digit * 6 + speaker. The training part has every recording once for each of ``ratios``,
    played slower by it.
    """
    packed = np.load(path)
    levels, meta = torch.from_numpy(packed["levels"]), packed["meta"]
    parts: tuple[list[Clips], list[Clips]] = ([], [])
    ends = np.cumsum(meta[:, 3])
    for part, chosen in enumerate((meta[:, 2] >= TEST_TAKES, meta[:, 2] < TEST_TAKES)):
        rows: dict[int, list[tuple[Tensor, int, int]]] = {length: [] for length in LENGTHS}
        for i in np.flatnonzero(chosen):
            said = int(meta[i, 0] * SPEAKERS + meta[i, 1]) if speakers else int(meta[i, 0])
            for ratio in ratios if part == 0 else (1.0,):
                clip = slower(levels[ends[i] - meta[i, 3] : ends[i]], ratio)[: LENGTHS[-1] - TAIL]
                length = next(length for length in LENGTHS if length >= len(clip) + TAIL)
                rows[length].append((F.pad(clip, (0, length - len(clip)), value=SILENCE), said, len(clip)))
        for found in rows.values():
            if found:
                targets = torch.stack([row for row, _, _ in found]).long().to(device)
                said = torch.tensor([said for _, said, _ in found], device=device)
                inputs = F.pad(targets[:, :-1], (1, 0), value=SILENCE) + LEVELS * said[:, None]
                parts[part].append(Clips(inputs, targets, torch.tensor([n for _, _, n in found], device=device)))
    return parts


def slower(levels: Tensor, ratio: float) -> Tensor:
    """Levels (n,) of a recording played slower by ``ratio``, (round(n ratio),)."""
    if ratio == 1:
        return levels
    codec = Codec(normalize="none")
    return codec.encode(stretched(codec.decode(levels.long()), ratio).clamp(-1, 1)).to(levels.dtype)


def disturb(inputs: Tensor, most: float) -> Tensor:
    """Adds noise of up to ``most`` levels' deviation, of another strength in each row; the classes stay."""
    strength = most * torch.rand(len(inputs), 1, device=inputs.device)
    noise = (strength * torch.randn(inputs.shape, device=inputs.device)).round().long()
    level = inputs % LEVELS
    return inputs - level + (level + noise).clamp(0, LEVELS - 1)


class Trainer:
    """A net, its optimizer and its training step.

    Args:
        net: The net.
        lr: Peak learning rate.
        decay: Weight decay of matrices.
        noise: See ``disturb``.
        untold: Part of the rows that get the class behind the others, which is any of them.
        clip: Largest norm of the gradient.
        graphs: Keep the step in CUDA graphs.
    """

    def __init__(
        self, net: SoundNet, lr: float, decay: float, noise: float, clip: float, graphs: bool, untold: float = 0.0
    ) -> None:
        self.net, self.noise, self.clip, self.graphs, self.untold = net, noise, clip, graphs, untold
        device = net.embedding.weight.device
        self.cuda = device.type == "cuda"
        self.rate = torch.tensor(lr, device=device)
        params = list(net.parameters())
        kept = [p for p in params if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
        names = {id(p) for p in kept}
        groups = [
            {"params": kept, "weight_decay": 0.0},
            {"params": [p for p in params if id(p) not in names], "weight_decay": decay},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=True, capturable=self.cuda)
        self.steps: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step on rows (B, L); returns the loss in nats, still on the device."""
        length = inputs.shape[1]
        if length not in self.steps:
            self.steps[length] = self._captured(inputs, targets) if self.cuda and self.graphs else self._step
        return self.steps[length](inputs, targets)

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        noisy = disturb(inputs, self.noise) if self.noise else inputs
        if self.untold:
            told = torch.rand(len(inputs), 1, device=inputs.device) >= self.untold
            noisy = torch.where(told, noisy, noisy % LEVELS + LEVELS * (self.net.classes - 1))
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.cuda):
            logits = self.net(noisy)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip, foreach=True)
        self.optimizer.step()
        return loss.detach()

    def _captured(self, inputs: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The step on rows of one shape as a CUDA graph, or as it is where it cannot be captured."""
        inputs, targets = inputs.clone(), targets.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(inputs, targets)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                loss = self._step(inputs, targets)
        except RuntimeError as error:
            print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
            return self._step

        def replay(x: Tensor, y: Tensor) -> Tensor:
            inputs.copy_(x)
            targets.copy_(y)
            graph.replay()
            return loss

        return replay


@torch.no_grad()
def bits_per_sample(net: SoundNet, part: list[Clips]) -> float:
    """Mean over all samples of the recordings, the silence behind them left out."""
    net.eval()
    bits, count = 0.0, 0
    for clips in part:
        for i in range(0, len(clips.inputs), 16):
            inputs, targets = clips.inputs[i : i + 16], clips.targets[i : i + 16]
            inside = torch.arange(inputs.shape[1], device=inputs.device) < clips.lengths[i : i + 16, None]
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
                logits = net(inputs)
            nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
            bits += float(nats[inside].double().sum()) / math.log(2)
            count += int(inside.sum())
    net.train()
    return bits / count


class Budget(NamedTuple):
    """How long a training is: in steps, or where those are 0 in seconds."""

    steps: int
    seconds: float = 0.0


def fit(
    trainer: Trainer, train: list[Clips], budget: Budget, lr: float, samples: int, seed: int, warmup: float = 0.05
) -> Iterator[dict[str, float]]:
    """Trains; yields figures every 200 steps.

    Args:
        trainer: Net and optimizer.
        train: Rows to train on.
        budget: Length of the training.
        lr: Peak learning rate; after the warm-up it falls to 0 as half a cosine.
        samples: Of one step.
        seed: Of the order of the rows.
        warmup: Part of the training.
    """
    draws, begin, step, losses = np.random.default_rng(seed), time.perf_counter(), 0, []
    share = np.array([clips.targets.numel() for clips in train], float)
    order = [np.empty(0, np.int64) for _ in train]
    while True:
        done = step / budget.steps if budget.steps else (time.perf_counter() - begin) / budget.seconds
        if done >= 1:
            return
        factor = min(1.0, done / warmup, 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup)))
        trainer.rate.fill_(lr * max(factor, 1e-3))
        which = int(draws.choice(len(train), p=share / share.sum()))
        clips = train[which]
        rows = min(samples // clips.targets.shape[1], len(clips.targets))
        if len(order[which]) < rows:
            order[which] = draws.permutation(len(clips.targets))
        chosen = torch.from_numpy(order[which][:rows]).to(clips.inputs.device)
        order[which] = order[which][rows:]
        losses.append(trainer.step(clips.inputs[chosen], clips.targets[chosen]).clone())
        step += 1
        if step % 200 == 0:
            loss = float(torch.stack(losses).mean()) / math.log(2)
            losses.clear()
            yield {"step": step, "train_bits": round(loss, 4), "seconds": round(time.perf_counter() - begin, 1)}


def main(
    levels: str,
    out: str,
    config: str = "{}",
    steps: int = 0,
    seconds: float = 0.0,
    lr: float = 2e-3,
    weight_decay: float = 0.1,
    noise: float = 0.0,
    samples: int = 98304,
    seed: int = 0,
    init: str | None = None,
    speakers: bool = False,
    ratios: tuple[float, ...] = (1.0,),
    untold: float = 0.0,
    graphs: bool = True,
    device: str = "cuda",
) -> None:
    """Trains one net; writes net.safetensors (float16) and, as it goes, metrics.jsonl.

    Args:
        levels: Packed levels.
        out: Folder to write to.
        config: Sizes of the net, SashimiConfig's fields as JSON.
        steps: Length of the training; 0 for as many as ``seconds`` allow.
        seconds: Length of the training, without its start.
        lr: Peak learning rate.
        weight_decay: Of matrices.
        noise: Largest deviation of the noise on the inputs, in levels.
        samples: Of one step.
        seed: Of everything random.
        init: Weights to begin from.
        speakers: The class is digit and speaker, not the digit alone.
        ratios: The training part has every recording played slower by each of these.
        untold: Part of the rows that are trained without their class: the net has one class more, which is any.
        graphs: Keep the step in CUDA graphs.
        device: Where to run.
    """
    torch.manual_seed(seed)
    classes = (DIGITS * SPEAKERS if speakers else DIGITS) + bool(untold)
    net = SoundNet(sizes(config), LEVELS, classes).to(device)
    if init is not None:
        _load(net, init)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = read(Path(levels), device, speakers, ratios)
    trainer = Trainer(net, lr, weight_decay, noise, 0.5, graphs, untold)
    said = -math.inf
    with (folder / "metrics.jsonl").open("a") as log:

        def note(figures: dict[str, Any]) -> None:
            line = json.dumps(figures)
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        note({"seed": seed, "params": sum(p.numel() for p in net.parameters())})
        for figures in fit(trainer, train, Budget(steps, seconds), lr, samples, seed):
            if figures["seconds"] - said > 60:
                said = figures["seconds"]
                figures["test_bits"] = round(bits_per_sample(net, test), 4)
                _save(net, folder)
            note(figures)
        _save(net, folder)
        note({"final": True, "test_bits": round(bits_per_sample(net, test), 4)})


def sizes(config: str) -> SashimiConfig:
    """Reads the sizes of a net from JSON."""
    fields: dict[str, Any] = json.loads(config)
    return SashimiConfig(**{**fields, "pool": tuple(fields.get("pool", (4, 4)))})


def _load(net: SoundNet, path: str) -> None:
    """Begins from the weights of a net with as many classes, fewer or none."""
    weights = {name: value.to(net.head.weight) for name, value in load_file(path).items()}
    known = weights.pop("class_embedding.weight", None)
    missing, unknown = net.load_state_dict(weights, strict=False)
    assert not unknown, f"{path}: {unknown}"
    assert set(missing) <= {"class_embedding.weight"}, f"{path}: no {missing}"
    if known is not None and net.class_embedding is not None:
        with torch.no_grad():
            net.class_embedding.weight[: len(known)] = known
            net.class_embedding.weight[len(known) :] = known.mean(0)


def _save(net: SoundNet, folder: Path) -> None:
    save_file(
        {k: v.detach().half().cpu().contiguous() for k, v in net.state_dict().items()}, folder / "net.safetensors"
    )


if __name__ == "__main__":
    run(main)
