"""What more GPUs would cost, worked out: ``python -m benchmarks.scale_model [--gpus N ...]``.

It prints the tables of docs/scaling_out.md. The time of a step and the memory on one GPU are measured; what travels
between GPUs follows from the sizes. A step of N GPUs takes that of one, and what of the communication no computation
hides:

- ``ddp``: gradients are summed, 2 (N - 1) / N of their bytes, beside the backward pass (two thirds of a step).
- ``fsdp2``: weights are gathered twice and gradients scattered, 3 (N - 1) / N of their bytes, beside all of the step.
- ``sequence``: as ``ddp``, and for each layer the states and edges of all parts, forward and backward, which everything
  waits for; the ends of parts are scanned twice, as far as a state remembers.
- ``tensor``: for each layer activations are gathered and scattered, forward and backward; one of the four travels
  beside the gradient of a weight, everything waits for the others; the gradients of what GPUs share are summed once a
  step; B and C are computed everywhere.

Each collective has a latency that grows with log2 N. Up to ``--node`` GPUs talk over NVLink; more over the network.
Speed and latency between two GPUs are what ``benchmarks.scale_links`` measured on H200s; the rest is assumed.
Where ``results/scale_out.csv`` has a row, its figures stand beside the model's.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.common import RESULTS

Strategy = Literal["ddp", "fsdp2", "sequence", "tensor"]
MOMENTS = 16  # bytes a parameter: weight, gradient and AdamW's two moments, in float32
WAITS = 3  # a layer's exchanges of activations that tensor parallelism waits for, of four
GRAPHS = "by CUDA graphs, the memory without"
SCANNED = 0.5  # share of a step that scans take, about


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them.

    Args:
        node: GPUs that NVLink joins.
        nvlink: Bytes a second and GPU that collectives reach there.
        network: The same between nodes.
        near: Seconds that a collective of two GPUs takes to start, within a node; half as much more for each doubling.
        far: The same between nodes.
    """

    node: int
    nvlink: float
    network: float
    near: float = 25e-6
    far: float = 40e-6

    def collective(self, gpus: int, size: float) -> float:
        """Seconds in which every GPU sends (N - 1) / N of ``size`` bytes."""
        inside = gpus <= self.node
        speed, latency = (self.nvlink, self.near) if inside else (self.network, self.far)
        return latency * (1 + math.log2(gpus)) / 2 + size * (gpus - 1) / gpus / speed


@dataclass(frozen=True)
class Model:
    """A model's sizes, and what a step takes on one GPU.

    Args:
        strategies: What to work out.
        case: Its name in ``results/scale_out.csv``.
        base: Milliseconds of a step on one GPU and MiB of activations, and where the two come from.
        parameters: How many.
        layers: Blocks.
        width: D.
        tokens: Of a step on one GPU.
        largest: Parameters of the largest block.
        state: Numbers of a layer's states and sums of time steps, a sequence.
        edge: Numbers of a layer's inputs of convolutions at an edge, a sequence.
        memory: Tokens that a state remembers.
        everywhere: Share of a step's work that tensor parallelism leaves on every GPU.
        kept: Parameters that it leaves on every GPU.
        fixed: GPUs share a sequence of ``tokens``, instead of having as many each.
    """

    strategies: tuple[Strategy, ...]
    case: str
    base: tuple[float, float, str]
    parameters: float
    layers: int
    width: int
    tokens: int
    largest: float = 0.0
    state: int = 0
    edge: int = 0
    memory: int = 0
    everywhere: float = 0.0
    kept: float = 0.0
    fixed: bool = False


def _row(file: str, case: str, provider: str, mode: str, held: float) -> tuple[float, float, str]:
    """Milliseconds of a measured row, MiB without the bytes ``held`` by weights and gradients, and its GPU."""
    with (RESULTS / f"{file}.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            if (row["case"], row["provider"], row["mode"]) == (case, provider, mode):
                return float(row["ms_p50"]), float(row["peak_mib"]) - held / 2**20, f"measured, {row['gpu']}"
    raise LookupError(f"{file}.csv has no row of {case}, {provider}, {mode}; run benchmarks.{file} with --write")


def _alone(case: str, parameters: float, eager: float | None = None) -> tuple[float, float, str]:
    """The same of a case of ``scale_out`` on one GPU, where weights and gradients lie beside moments.

    Args:
        case: Its name.
        parameters: Of the model.
        eager: MiB of activations as ``--eager`` measured them, where graphs replay the step: theirs are not counted.
    """
    time, memory, source = _row("scale_out", f"{case}/1", "triscan", "training", MOMENTS * parameters)
    return (time, memory, source) if eager is None else (time, eager, f"{source}, {GRAPHS}")


def models() -> dict[str, Model]:
    """The models of the tables, by what a step reads."""
    long = _alone("target/sequence_mamba_6x128", 0.7e6)
    wide = _alone("target/ddp_genome_7m", 7.0e6)
    images = _alone("target/ddp_vmamba_t", 30.2e6, 6642)
    large = _alone("target/tensor_mamba2_780m", 780.1e6, 21408)
    text = _row("train_lm", "target/mamba_130m", "triscan", "forward_backward", 8 * 129.1e6)
    scan: dict[str, Any] = {"state": 256 * 17, "edge": 256 * 3, "memory": 1 << 15}
    return {
        "VMamba-T, 128 images a GPU": Model(
            ("ddp", "fsdp2"), "target/ddp_vmamba_t", images, 30.2e6, 15, 768, 128 * 3136, largest=6.2e6
        ),
        "Genome LM of 7 M (16 x 256), 512 windows of 1,024 bases a GPU": Model(
            ("ddp", "fsdp2"), "target/ddp_genome_7m", wide, 7.0e6, 16, 256, 1 << 19, largest=0.44e6
        ),
        "Mamba 130 M, 8 x 2,048 tokens a GPU": Model(
            ("ddp", "fsdp2"), "ddp_mamba_130m", text, 129.1e6, 24, 768, 8 * 2048, largest=3.8e6
        ),
        "Genome LM of 6 x 128, one sequence, 2^20 bases a GPU": Model(
            ("sequence",), "target/sequence_mamba_6x128", long, 0.7e6, 6, 128, 1 << 20, **scan
        ),
        "Genome LM of 6 x 128, one sequence of 2^20 bases in all": Model(
            ("sequence",), "sequence_mamba_6x128_fixed", long, 0.7e6, 6, 128, 1 << 20, **scan, fixed=True
        ),
        "Mamba-2 780 M, 8 x 2,048 tokens in all (tensor) or a GPU": Model(
            ("tensor", "ddp", "fsdp2"), "target/tensor_mamba2_780m", large, 780.1e6, 48, 1536, 8 * 2048,
            largest=14.6e6, everywhere=0.04, kept=77.2e6,
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step on N GPUs: bytes that a GPU sends, seconds, efficiency against one GPU, bytes of memory a GPU."""

    sent: float
    seconds: float
    efficiency: float
    memory: float


def step(model: Model, strategy: Strategy, gpus: int, machine: Machine) -> Step:
    """Work out a step on ``gpus`` GPUs."""
    alone, activations = model.base[0] / 1e3, model.base[1] * 2**20
    weights, share, moments = 4 * model.parameters, (gpus - 1) / gpus, MOMENTS * model.parameters
    summed = 2 * machine.collective(gpus, weights)  # gradients
    if strategy == "ddp":
        seconds = alone + max(0.0, summed - alone * 2 / 3)
        return Step(2 * share * weights, seconds, alone / seconds, moments + activations)
    if strategy == "fsdp2":
        moved = 3 * model.layers * machine.collective(gpus, weights / model.layers)
        seconds, gathered = max(alone, moved), 2 * 4 * model.largest
        return Step(3 * share * weights, seconds, alone / seconds, moments / gpus + gathered + activations)
    if strategy == "sequence":
        parts = gpus if model.fixed else 1
        work, numbers = alone / parts, 4 * (model.state + model.edge)
        waiting = 2 * 2 * model.layers * machine.collective(gpus, gpus * numbers / 2)
        twice = work * SCANNED * min(1.0, model.memory * parts / model.tokens)
        seconds = work + twice + waiting + max(0.0, summed - work * 2 / 3)
        sent = 2 * share * weights + 2 * (gpus - 1) * numbers * model.layers
        return Step(sent, seconds, work / seconds, moments + activations / parts)
    size = 2 * model.tokens * model.width  # bfloat16
    work = alone * ((1 - model.everywhere) / gpus + model.everywhere)
    once = 2 * machine.collective(gpus, 4 * model.kept)
    seconds = work + model.layers * WAITS * machine.collective(gpus, size) + once
    shared = MOMENTS * (model.kept + (model.parameters - model.kept) / gpus) + activations / gpus
    sent = share * (4 * size * model.layers + 8 * model.kept)
    return Step(sent, seconds, alone / gpus / seconds, shared)


def measured() -> dict[str, tuple[float, float]]:
    """Milliseconds and MiB in ``results/scale_out.csv``, by case and number of GPUs; none before it is written."""
    path = RESULTS / "scale_out.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {row["case"]: (float(row["ms_p50"]), float(row["peak_mib"])) for row in csv.DictReader(file)}


def table(name: str, model: Model, gpus: list[int], machine: Machine) -> list[str]:
    """The lines of a model's table."""
    alone, activations, source = model.base
    real = measured()
    lines = [
        f"{name}: {alone:.0f} ms a step and {activations / 1024:.1f} GiB of activations on one GPU ({source}).",
        "",
        "| strategy | GPUs | a GPU sends, MiB a step | step, ms | efficiency | memory a GPU, GiB | measured |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for strategy in model.strategies:
        for count in gpus:
            s = step(model, strategy, count, machine)
            kind = model.case.removeprefix("target/").startswith(strategy)
            found = real.get(f"{model.case}/{count}") if kind else None
            beside = "-" if found is None else f"{found[0]:.1f} ms"
            if found is not None and not source.endswith(GRAPHS):
                beside += f", {found[1] / 1024:.1f} GiB"
            lines.append(
                f"| {strategy} | {count} | {s.sent / 2**20:,.1f} | {1e3 * s.seconds:.1f} | {s.efficiency:.0%} | "
                f"{s.memory / 2**30:.1f} | {beside} |"
            )
    return [*lines, ""]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 8, 64, 512])
    parser.add_argument("--node", type=int, default=8, help="GPUs that NVLink joins")
    parser.add_argument("--nvlink", type=float, default=240.0, help="GB/s a GPU within a node, as collectives reach it")
    parser.add_argument("--network", type=float, default=40.0, help="GB/s a GPU between nodes")
    options = parser.parse_args()
    if min(options.gpus) < 1 or options.node < 1 or min(options.nvlink, options.network) <= 0:
        parser.error("wanted at least one GPU, one a node, and more than 0 GB/s")
    machine = Machine(options.node, 1e9 * options.nvlink, 1e9 * options.network)
    for name, model in models().items():
        print("\n".join(table(name, model, options.gpus, machine)))


if __name__ == "__main__":
    main()
