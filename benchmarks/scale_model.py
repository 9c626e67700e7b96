"""What more GPUs are worth, worked out: ``python -m benchmarks.scale_model [--gpus N ...]``.

It prints the tables of docs/scaling_out.md. The time of a step and the memory on one GPU are measured
(``results/scale_out.csv``); what travels between GPUs follows from the sizes. A step of N GPUs takes that of one, and
what of the communication no computation hides:

- ``ddp``: gradients are summed in rings, 2 (N - 1) / N of their bytes, beside the backward pass (two thirds of a step).
- ``fsdp2``: weights are gathered twice and gradients scattered, 3 (N - 1) / N of their bytes, beside all of the step.
- ``sequence``: as ``ddp``, and for each layer the states and edges of all parts, forward and backward, which everything
  waits for; the edges of parts are scanned twice.
- ``tensor``: for each layer activations are gathered and scattered, forward and backward, which everything waits for;
  what is not shared out (B and C, the embedding) is computed on every GPU.

A ring's steps have a latency each. Up to ``--node`` GPUs talk over NVLink; rings over more are as fast as the network.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from typing import Literal

from benchmarks.common import RESULTS

Strategy = Literal["ddp", "fsdp2", "sequence", "tensor"]
MOMENTS = 16  # bytes a parameter: weight, gradient and AdamW's two moments, in float32


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them: bytes a second and GPU, as collectives reach it, and seconds a step of a ring."""

    node: int
    nvlink: float
    network: float
    near: float = 6e-6
    far: float = 15e-6

    def ring(self, gpus: int, size: float, rounds: int = 1) -> float:
        """Seconds of a collective that sends (N - 1) / N of ``size`` bytes ``rounds`` times around."""
        speed, latency = (self.nvlink, self.near) if gpus <= self.node else (self.network, self.far)
        steps = rounds * (gpus - 1)
        return steps * min(latency, 1e-3 / gpus) + rounds * size * (gpus - 1) / gpus / speed


@dataclass(frozen=True)
class Model:
    """A model's sizes and what a step of it takes on one GPU.

    Args:
        case: Its name in ``results/scale_out.csv``.
        parameters: How many.
        layers: Blocks.
        width: D.
        tokens: Of a step on one GPU.
        state: Numbers of a layer's states and sums of time steps, a sequence.
        edge: Numbers of a layer's edges of convolutions, a sequence.
        largest: Parameters of the largest block.
        everywhere: Share of a step's work that tensor parallelism does not share out.
        kept: Parameters that it does not share out.
        window: Tokens of a part that are scanned twice.
    """

    case: str
    parameters: float
    layers: int
    width: int
    tokens: int
    state: int = 0
    edge: int = 0
    largest: float = 0.0
    everywhere: float = 0.0
    kept: float = 0.0
    window: int = 0


MODELS: dict[str, tuple[Model, tuple[Strategy, ...]]] = {
    "VMamba-T, 128 images": (
        Model("target/ddp_vmamba_t", 30.2e6, 15, 768, 128 * 3136, largest=4e6), ("ddp", "fsdp2")
    ),
    "genome LM of 7 M, 512 x 1,024 bases": (
        Model("target/ddp_genome_7m", 7.0e6, 16, 256, 512 * 1024, largest=0.44e6), ("ddp", "fsdp2")
    ),
    "genome LM of 6 x 128, 2^20 bases a GPU": (
        Model("target/sequence_mamba_6x128", 0.69e6, 6, 128, 1 << 20, state=256 * 17, edge=256 * 3, window=1 << 16),
        ("sequence",),
    ),
    "Mamba-2 780 M, 8 x 2,048 tokens": (
        Model(
            "target/tensor_mamba2_780m", 780e6, 48, 1536, 8 * 2048, largest=14.6e6, everywhere=0.04, kept=77.2e6
        ),
        ("ddp", "fsdp2", "tensor"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step on N GPUs: bytes that a GPU sends, seconds, efficiency against one GPU, bytes of memory a GPU."""

    sent: float
    seconds: float
    efficiency: float
    memory: float


def step(model: Model, strategy: Strategy, gpus: int, alone: float, peak: float, machine: Machine) -> Step:
    """Model a step on ``gpus`` GPUs from its seconds and peak of memory on one."""
    weights, share = 4 * model.parameters, (gpus - 1) / gpus
    activations = max(0.0, peak - MOMENTS * model.parameters)
    memory = peak
    if strategy == "ddp":
        sent = 2 * share * weights
        seconds = alone + max(0.0, machine.ring(gpus, weights, 2) - alone * 2 / 3)
    elif strategy == "fsdp2":
        sent = 3 * share * weights
        seconds = max(alone, machine.ring(gpus, weights / model.layers, 3) * model.layers)
        memory = activations + MOMENTS * model.parameters / gpus + 2 * 4 * model.largest
    elif strategy == "sequence":
        numbers = 4 * (2 * model.state + 2 * model.edge) * model.layers  # forward and backward
        sent = 2 * share * weights + (gpus - 1) * numbers
        waiting = machine.ring(gpus, gpus * numbers / model.layers / 4) * 4 * model.layers
        twice = alone * min(1.0, model.window / model.tokens) / 2
        seconds = alone + twice + waiting + max(0.0, machine.ring(gpus, weights, 2) - alone * 2 / 3)
    else:
        size = 2 * model.tokens * model.width  # bfloat16
        sent = 4 * share * size * model.layers
        work = alone * ((1 - model.everywhere) / gpus + model.everywhere)
        seconds = work + 4 * machine.ring(gpus, size) * model.layers
        shared = model.parameters - model.kept
        memory = activations / gpus + MOMENTS * (model.kept + shared / gpus)
        return Step(sent, seconds, alone / gpus / seconds, memory)
    return Step(sent, seconds, alone / seconds, memory)


def measured() -> dict[str, tuple[float, float]]:
    """Seconds and bytes of the rows of ``results/scale_out.csv``, by case and number of GPUs."""
    with (RESULTS / "scale_out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["case"]: (float(row["ms_p50"]) / 1e3, float(row["peak_mib"]) * 2**20) for row in rows}


def table(name: str, gpus: list[int], machine: Machine) -> list[str]:
    """The lines of a model's table."""
    model, strategies = MODELS[name]
    found = measured()
    alone, peak = found[f"{model.case}/1"]
    kind = next(s for s in strategies if model.case.removeprefix("target/").startswith(s))
    lines = [f"{name}: {1e3 * alone:.0f} ms a step and {peak / 2**30:.1f} GiB on one GPU.", ""]
    lines += ["| strategy | GPUs | sent by a GPU, MiB | step, ms | efficiency | memory a GPU, GiB |",
              "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for strategy in strategies:
        for count in gpus:
            s = step(model, strategy, count, alone, peak, machine)
            texts = [f"{1e3 * s.seconds:.0f}", f"{s.efficiency:.0%}", f"{s.memory / 2**30:.1f}"]
            if strategy == kind and (real := found.get(f"{model.case}/{count}")) is not None:
                efficiency = alone / real[0] / (count if kind == "tensor" else 1)
                figures = (f"{1e3 * real[0]:.0f}", f"{efficiency:.0%}", f"{real[1] / 2**30:.1f}")
                texts = [f"{text} (measured {figure})" for text, figure in zip(texts, figures, strict=True)]
            lines.append(f"| {strategy} | {count} | {s.sent / 2**20:,.0f} | {' | '.join(texts)} |")
    return [*lines, ""]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 8, 64, 512])
    parser.add_argument("--node", type=int, default=8, help="GPUs that NVLink joins")
    parser.add_argument("--nvlink", type=float, default=300.0, help="GB/s a GPU within a node, as collectives reach it")
    parser.add_argument("--network", type=float, default=40.0, help="GB/s a GPU between nodes")
    options = parser.parse_args()
    machine = Machine(options.node, 1e9 * options.nvlink, 1e9 * options.network)
    for name in MODELS:
        print("\n".join(table(name, options.gpus, machine)))


if __name__ == "__main__":
    main()
