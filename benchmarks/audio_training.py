"""Training steps on raw sound, samples a second and memory: ``python -m benchmarks.audio_training --batch 4``.

Nets of about equal size: the Mamba U-Net of SC09 and SaShiMi with S4D or S4 and MLPs. A step is forward, cross-entropy
and backward, without an optimizer, under bfloat16 autocast as in the recipes or in float32; as it is written, or with
the net's part replayed as CUDA graphs, as ``--model.graph true`` does. Memory with graphs is all that is reserved:
what they hold for themselves counts as free between steps.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time

import torch
import torch.nn.functional as F

from audio.net import SoundNet
from audio.sashimi import SashimiConfig
from core.training.graphs import capture

CONFIGS = {
    "mamba": SashimiConfig(),
    "s4d": SashimiConfig(mixer="s4d", mixer_cfg={"n_ssm": 1}, mlp=2),
    "s4": SashimiConfig(mixer="s4", mixer_cfg={"n_ssm": 1}, mlp=2),
}


def case(name: str, batch: int, length: int, autocast: bool, graphs: bool, repeats: int) -> list[object]:
    """Parameters, milliseconds of a step, samples a second, and the most memory in MiB."""
    torch.manual_seed(0)
    net = SoundNet(CONFIGS[name]).cuda()
    x = torch.randint(0, 256, (batch, length + 1), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = net(x[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten()).backward()
        net.zero_grad()

    step()
    if graphs:
        torch.cuda.empty_cache()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            capture(net, x[:, :-1])
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    seconds = sorted(times)[len(times) // 2]
    peak = (torch.cuda.memory_reserved() if graphs else torch.cuda.max_memory_allocated()) / 2**20
    count = sum(p.numel() for p in net.parameters())
    return [count, f"{1e3 * seconds:.2f}", f"{batch * length / seconds:.0f}", f"{peak:.0f}"]


def main() -> None:
    """Prints one row of CSV for each case, as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=16000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--how", nargs="+", default=["eager", "graph"], choices=["eager", "graph"])
    a = parser.parse_args()
    writer = csv.writer(sys.stdout)
    head = ["net", "precision", "how", "batch", "length", "parameters", "ms", "samples_per_second", "mib", "gpu"]
    writer.writerow(head)
    for name, precision, how in itertools.product(a.nets, a.precisions, a.how):
        row = case(name, a.batch, a.length, precision == "bfloat16", how == "graph", a.repeats)
        writer.writerow([name, precision, how, a.batch, a.length, *row, torch.cuda.get_device_name()])
        sys.stdout.flush()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
