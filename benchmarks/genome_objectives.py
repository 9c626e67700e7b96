"""What a classifier of a panel learns soonest from: ``python -m benchmarks.genome_objectives [--steps 800]``.

64 loci of 320 bases of the excerpt of four great apes, reads of 256 bases, two layers of 64: the species alone, with
the next base beside it, from few loci first, from the likelihoods of the reads, and from 8-mers beside bases. Accuracy
on 1,024 reads of unseen individuals, after so many training reads.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from genomics.generative import build_classifier
from genomics.reads import Reads
from genomics.species import SpeciesData

RESULTS = Path(__file__).parent / "results" / "genome_objectives.csv"
SIZES: dict[str, Any] = {"d_model": 64, "n_layer": 2, "d_state": 4, "d_conv": 12}
BATCH, RATE, WARM = 32, 2e-3, 50
GROW_BELOW = 0.5  # nats, of the panel that grows
KINDS: dict[str, dict[str, Any]] = {
    "species": {},
    "species and next base": {"language": 1.0},
    "species, growing panel": {},
    "likelihood of each species": {"goal": "generative"},
    "species, from 8-mers": {"kmer": 8, "kmer_width": 16},
}


def batches(data: SpeciesData, steps: int, device: str) -> tuple[Reads, Any]:
    """Training reads, and what yields them with their species."""
    reads = data.reads("train", count=steps * BATCH)
    assert isinstance(reads, Reads)
    loader = DataLoader(reads, BATCH, shuffle=True, drop_last=True)
    return reads, ((ids.to(device), species.to(device)) for ids, species, _ in loader)


@torch.inference_mode()
def accuracy(net: Any, ids: Tensor, species: Tensor) -> float:
    """Share of right answers; both strands are read."""
    net.eval()
    right = sum(int((net(i).argmax(1) == s).sum()) for i, s in zip(ids.split(128), species.split(128), strict=True))
    net.train()
    return right / len(species)


def train(name: str, data: SpeciesData, steps: int, looks: list[int], device: str) -> list[dict[str, Any]]:
    """Rows of one kind."""
    torch.manual_seed(0)
    options = {"goal": "discriminative", **KINDS[name]}
    net = build_classifier(options.pop("goal"), 4, **options, **SIZES).to(device).train()
    tests, species = (torch.from_numpy(a).long().to(device) for a in data.reads("test", count=1024).arrays())
    optimizer = torch.optim.AdamW(net.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    reads, stream = batches(data, steps, device)
    grows, losses = "growing" in name, []
    if grows:
        reads.in_use.fill_(8)
    rows, start = [], time.perf_counter()
    for step, (ids, wanted) in enumerate(stream, 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(step / WARM, 1)
        loss = net.loss(ids, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if grows and step % 10 == 0 and float(sum(losses[-10:])) / 10 < GROW_BELOW:
            reads.in_use.fill_(min(int(reads.in_use * 1.5), len(reads.loci)))
        if step in looks:
            found = accuracy(net, tests, species)
            seconds = round(time.perf_counter() - start, 1)
            rows.append({"learns": name, "reads": step * BATCH, "accuracy": round(found, 4), "seconds": seconds})
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    """Prints a row a kind and number of reads, and writes ``results/genome_objectives.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    data = SpeciesData(panel=64, unseen=50, locus_length=320, read_length=256, individuals=64)
    looks = [n for n in (50, 100, 200, 400, 800, 1600) if n <= arguments.steps]
    rows: list[dict[str, Any]] = []
    for name in KINDS:
        rows += train(name, data, arguments.steps, looks, arguments.device)
        with RESULTS.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
