"""Perplexity against context length: ``python -m genomics.scaling`` fills a table of short runs, one row a run.

The table is the state: a run that is in it is not done again, so that the command can be stopped and started, on one
machine or another, until all rows are there. Redraws figure 5 of Gu & Dao 2023 on the data at hand.

Legend: B batch, L bases of a window.
"""

import csv
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from core.cli import run
from core.errors import UserError
from core.table import append_row, read_rows
from core.training.module import OptimizerOptions, create_optimizer
from genomics.datasets import IGNORED, GenomeData, targets
from genomics.models import MixerName, build_lm

SIZES: dict[str, dict[str, int]] = {
    "mamba": {"d_model": 128, "n_layer": 12},
    "mamba2": {"d_model": 128, "n_layer": 12},
    "mamba3": {"d_model": 128, "n_layer": 12},
    "hyena": {"d_model": 128, "n_layer": 6},
    "attention": {"d_model": 128, "n_layer": 6},
}
MARKOV = "markov"  # the baseline's name in the table
RATES = {"mamba": 8e-3, "mamba2": 8e-3, "mamba3": 8e-3, "hyena": 1e-3, "attention": 2e-3}  # the paper's
KEY = ("data", "mixer", "context", "seed", "tokens", "tokens_per_step", "lead", "rate")
AT_ONCE = 1 << 17  # bases that go through a model at a time; the gradients of a step add up
COLUMNS = (*KEY, "parameters", "perplexity", "seconds", "device", "date")


def scaling(
    fasta: str | None = None,
    mixers: tuple[MixerName, ...] = ("mamba", "mamba2", "hyena"),
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144, 1048576),
    tokens: int = 25_000_000,
    tokens_per_step: int = 1 << 17,
    lead: float = 0.8,
    test_tokens: int = 1 << 21,
    rates: dict[str, float] | None = None,
    d_model: int | None = None,
    n_layer: int | None = None,
    seed: int = 0,
    most_runs: int | None = None,
    recompute: bool = False,
    device: str = "auto",
    table: str = "runs/genomics/scaling.csv",
) -> None:
    """Trains each mixer at each context on equal tokens and writes its test perplexity as a row of the table.

    The first row is that of the best Markov chain of order 0 to 10 on the same parts. Contexts longer than the
    training, validation or test part of the sequence are left out, with a message. Beside the table stands its
    picture, of the same name with .png.

    Args:
        fasta: Genome file; null is the excerpt that comes with the package.
        mixers: Which layers to compare: mamba, mamba2, mamba3, hyena, attention.
        contexts: Bases of a window.
        tokens: Bases that each run trains on.
        tokens_per_step: Bases of a step. Windows longer than this are steps of one, and few: see ``lead``.
        lead: Of a context longer than a step, the share of the bases that is trained in windows as long as a step
            first, as HyenaDNA's and Mamba's lengths warm up. Else long contexts would have fewer steps than short ones.
        test_tokens: Bases of the test, at most.
        rates: Peak learning rates by mixer instead of the paper's: --rates.hyena 2e-3.
        d_model: Width instead of that of 1.3 to 1.4 M parameters, for trials.
        n_layer: Number of blocks instead of that of 1.3 to 1.4 M parameters, for trials.
        seed: Of weights and order.
        most_runs: Stop after so many new rows; null is none.
        recompute: Compute activations again at all lengths, for a third of the memory and a quarter more time; on a
            GPU, windows of more than 2^17 bases do in any case.
        device: cpu, cuda, or auto.
        table: The table, which is made or gone on with.
    """
    if not 0 <= lead < 1:
        raise UserError(f"--lead is {lead}; wanted a share from 0 to below 1")
    path = Path(table)
    done = read_table(path)
    name = Path(fasta).name if fasta else "excerpt"
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    new = 0
    if not any(row[:2] == (name, MARKOV) for row in done):
        append_row(path, markov_row(fasta, name))
    for mixer in mixers:
        rate = (rates or {}).get(mixer, RATES[mixer])
        for context in contexts:
            if tuple(map(str, (name, mixer, context, seed, tokens, tokens_per_step, lead, rate))) in done:
                continue
            if most_runs is not None and new >= most_runs:
                break
            sizes = {**SIZES[mixer], **{k: v for k, v in (("d_model", d_model), ("n_layer", n_layer)) if v}}
            try:
                data = GenomeData(fasta, window=context, batch_size=1, pad=True)
            except UserError as error:
                print(f"{mixer} at {context:,}: left out: {error}")
                continue
            if any(max(map(len, data.windows[part])) < context for part in ("train", "test")):
                print(f"{mixer} at {context:,}: left out: no stretch of training or test sequence is that long")
                continue
            budget = (tokens, tokens_per_step, lead, test_tokens, seed, rate)
            row = one_run(data, mixer, context, sizes, *budget, recompute, place)
            found = {"data": name, **row}
            append_row(path, {column: found[column] for column in COLUMNS})
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            new += 1
    if path.is_file():
        draw(path).savefig(path.with_suffix(".png"), dpi=144)
        print(path)


def one_run(
    data: GenomeData, mixer: MixerName, context: int, sizes: dict[str, int], tokens: int, per_step: int,
    lead: float, test_tokens: int, seed: int, rate: float, recompute: bool, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Train and test one model; returns its row without the data's name."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    net = build_lm(mixer, l_max=context + 2, **sizes).to(device)  # type: ignore[arg-type]
    optimizer = create_optimizer(net, OptimizerOptions(lr=rate, betas=(0.9, 0.95), weight_decay=0.1))
    plan = stages(context, tokens, per_step, lead)
    seen, total = 0, sum(size for _, size in plan)
    for length, size in plan:
        net.set_gradient_checkpointing(recompute or (device.type == "cuda" and length > AT_ONCE))
        rows = min(max(per_step // length, 1), max(sum(len(i) // length for i in data.parts["train"]), 1))
        data.stage_of = lambda at=(length, rows): at
        for batch in itertools.islice(endless(data), max(size // (length * rows), 1)):
            seen += length * rows
            share = min(10 * seen / total, max(1 - seen / total, 0.0) / 0.9, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            batch = batch.to(device)
            count = (targets(batch) != IGNORED).sum().clamp(min=1)
            for part in batch.split(max(AT_ONCE // length, 1)):
                (summed(net, part)[0] / count).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    data.batch_size = max(AT_ONCE // context, 1)
    perplexity = test(net, data, test_tokens, device)
    return {
        "mixer": mixer, "context": context, "seed": seed, "tokens": tokens, "tokens_per_step": per_step, "lead": lead,
        "rate": rate, "parameters": sum(p.numel() for p in net.parameters()), "perplexity": f"{perplexity:.5f}",
        "seconds": f"{time.perf_counter() - start:.1f}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def markov_row(fasta: str | None, name: str) -> dict[str, Any]:
    """The row of the best Markov chain, which has no context, steps or rate."""
    start = time.perf_counter()
    data = GenomeData(fasta, window=1024, pad=True, batch_size=1)
    best = data.baselines()["markov_best_perplexity"]
    return {
        **dict.fromkeys(COLUMNS, 0), "data": name, "mixer": MARKOV, "tokens": sum(map(len, data.parts["train"])),
        "perplexity": f"{best:.5f}", "seconds": f"{time.perf_counter() - start:.1f}", "device": "cpu",
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def stages(context: int, tokens: int, per_step: int, lead: float) -> list[tuple[int, int]]:
    """Bases of a window, and of all windows, of the parts of a run: contexts longer than a step get a first part."""
    first = int(lead * tokens)
    return [(context, tokens)] if context <= per_step or not first else [(per_step, first), (context, tokens - first)]


def endless(data: GenomeData) -> Iterator[torch.Tensor]:
    """Batches of the training part, one epoch after another."""
    while True:
        yield from data.train_dataloader()


def summed(net: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss in nats of windows (B, L + 1), and how many bases it is over; in bfloat16 on a GPU."""
    wanted = targets(batch)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        logits = net(batch[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (wanted != IGNORED).sum()


@torch.inference_mode()
def test(net: torch.nn.Module, data: GenomeData, most: int, device: torch.device) -> float:
    """Perplexity a base on the test's first windows."""
    nats = count = 0.0
    for batch in data.test_dataloader():
        one, bases = summed(net, batch.to(device))
        nats, count = nats + float(one), count + int(bases)
        if count >= most:
            break
    return float(torch.tensor(nats / max(count, 1)).exp())


def read_table(path: Path) -> set[tuple[str, ...]]:
    """Which runs a table holds: data, mixer, context, seed, tokens, tokens a step, lead and rate of each row.

    Raises:
        UserError: If the file is no such table.
    """
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        if tuple(next(csv.reader(file), ())) != COLUMNS:
            raise UserError(f"{path} is no table of this command; wanted the columns {', '.join(COLUMNS)}")
    return {tuple(row[key] for key in KEY) for row in read_rows(path)}


def draw(path: Path) -> Figure:
    """Draw perplexity against context, a panel a data set and a line a mixer (the best of its learning rates)."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in read_rows(path):
        points = found.setdefault(row["data"], {}).setdefault(row["mixer"], {})
        context, value = int(row["context"]), float(row["perplexity"])
        points[context] = min(points.get(context, value), value)
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axis, (data, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for value in lines.pop(MARKOV, {}).values():
            axis.axhline(value, color="grey", linestyle="--", label="best Markov chain")
        for label, points in lines.items():
            x, y = zip(*sorted(points.items()), strict=True)
            axis.plot(x, y, marker="o", label=label)
        axis.set_title(data)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("context (bases)")
        axis.set_ylabel("test perplexity a base")
        axis.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    run(scaling)
