"""Times training steps on one GPU and on all, each model in the same run: what several GPUs are worth.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.scale_out [--write] [--case NAME ...] [--steps N] [--eager]

A step is forward, loss and backward under bfloat16 autocast, and AdamW. Every GPU gets what one GPU has alone: with
data parallelism a batch, with sequence parallelism as many tokens, so that N GPUs work on sequences N times as long;
with tensor parallelism they share the work of one. Efficiency is the speedup, in images or tokens a second, over N.
Rank 0 is timed three times: alone (``NAME/1``), while every GPU takes the same step and nothing is exchanged
(``NAME/apart``: what the machine costs), and together (``NAME/N``). Where the host's calls take longer than the GPU,
all three replay forward and backward as CUDA graphs, as commands do with ``--model.graph true``, unless ``--eager`` is
given. The peak of memory is that of the fullest GPU and holds weights, moments and all, but what graphs hold.
``--profile`` prints the kernels that take most of rank 0's time in steps together.
``--toy`` runs tiny models, on CPUs where there is no GPU; processes without a GPU of their own share one (by gloo).
``--write`` puts the rows in the place of those of the same cases.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import vision  # noqa: F401  registers the models
from benchmarks.common import RESULTS, Row, Timing, row, steps_in_a_row, write
from benchmarks.vision import PROFILED, print_profile
from core.lm import MambaConfig, MambaLM
from core.parallel.group import SequenceGroup, sequence_parallel
from core.parallel.tensor import head_loss, tensor_parallel
from core.training.graphs import capture, release
from genomics.models import build_lm

WARM = 3  # steps before those that are timed
Loss = Callable[[nn.Module], Tensor]  # of the model, perhaps wrapped


class Training(NamedTuple):
    """A model with its loss; ``inputs`` are those of the part that graphs replay, where they do."""

    model: nn.Module
    loss: Loss
    inputs: Tensor | None = None

    @property
    def part(self) -> nn.Module:
        """What graphs replay: of a language model all but the loss."""
        return self.model.backbone if isinstance(self.model, MambaLM) else self.model


@dataclass(frozen=True)
class Case:
    """A training, built on a device at full size or as a toy, and what its processes share."""

    kind: Literal["data", "sequence", "tensor"]
    build: Callable[[torch.device, bool], Training]


def vmamba(device: torch.device, toy: bool) -> Training:
    """VMamba-T on 128 images of 224 x 224."""
    sizes: dict[str, Any] = {"dims": 16, "depths": (1, 1, 1, 1)} if toy else {}
    model = timm.create_model("vmamba_tiny_s1l8", **sizes).to(device)
    batch, size = (2, 32) if toy else (128, 224)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    return Training(model, lambda model: F.cross_entropy(model(images), labels), images)


def bases(model: nn.Module, batch: int, length: int, device: torch.device) -> Training:
    """A model of DNA on random bases."""
    ids, wanted = torch.randint(7, 11, (2, batch, length), device=device)
    return Training(model.to(device), lambda model: F.cross_entropy(model(ids).float().flatten(0, 1), wanted.flatten()))


def genome_7m(device: torch.device, toy: bool) -> Training:
    """The 7 M model of the recipe hg38_7m, whose batches of 1,024 windows two GPUs share."""
    model = build_lm(d_model=16 if toy else 256, n_layer=2 if toy else 16)
    return bases(model, 2 if toy else 512, 64 if toy else 1024, device)


def long_mamba(width: int, layers: int, recompute: bool) -> Callable[[torch.device, bool], Training]:
    """A language model of Mamba blocks on a part of 2^20 tokens."""

    def build(device: torch.device, toy: bool) -> Training:
        model = build_lm(d_model=16 if toy else width, n_layer=2 if toy else layers)
        model.set_gradient_checkpointing(recompute)  # type: ignore[operator]
        return bases(model, 1, 256 if toy else 1 << 20, device)

    return build


def long_mamba2(device: torch.device, toy: bool) -> Training:
    """A language model of Mamba-2 blocks on a part of 2^20 tokens."""
    small = {"headdim": 8, "d_state": 8} if toy else {}
    config = MambaConfig(
        d_model=16 if toy else 256, n_layer=2 if toy else 8, vocab_size=12, ssm_cfg={"layer": "Mamba2", **small}
    )
    return bases(MambaLM(config), 1, 256 if toy else 1 << 20, device)


def long_caduceus(device: torch.device, toy: bool) -> Training:
    """A masked language model of bidirectional blocks on a part of 2^20 tokens."""
    model = build_lm(objective="masked", d_model=16 if toy else 128, n_layer=2 if toy else 4)
    return bases(model, 1, 256 if toy else 1 << 20, device)


def mamba2_780m(device: torch.device, toy: bool) -> Training:
    """The published 780 M model, 8 x 2048 tokens of text."""
    ssm = {"layer": "Mamba2", **({"headdim": 8, "d_state": 8} if toy else {})}
    config = MambaConfig(d_model=32 if toy else 1536, n_layer=2 if toy else 48, vocab_size=50277, ssm_cfg=ssm)
    ids = torch.randint(50277, (8, 33 if toy else 2049), device=device)

    def loss(model: nn.Module) -> Tensor:
        assert isinstance(model, MambaLM)
        return head_loss(model, model.backbone(ids[:, :-1]), ids[:, 1:]) / ids[:, 1:].numel()

    with device:
        return Training(MambaLM(config), loss, ids[:, :-1])


CASES = {
    "target/ddp_vmamba_t": Case("data", vmamba),
    "target/ddp_genome_7m": Case("data", genome_7m),
    "target/sequence_mamba_6x128": Case("sequence", long_mamba(128, 6, False)),
    "target/tensor_mamba2_780m": Case("tensor", mamba2_780m),
    "sequence_mamba_16x256_checkpointed": Case("sequence", long_mamba(256, 16, True)),
    "sequence_mamba2_8x256": Case("sequence", long_mamba2),
    "sequence_caduceus_4x128": Case("sequence", long_caduceus),
}


def step_of(model: nn.Module, loss: Loss, group: SequenceGroup | None, device: torch.device) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with sequence_parallel(group):
            with torch.autocast(device.type, torch.bfloat16):
                found = loss(model)
            with torch.autograd.set_multithreading_enabled(False):  # as TrainingModule does
                found.backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[], None], steps: int, device: torch.device) -> Timing:
    """Time of a step among others, and the peak of memory in MiB."""
    if device.type == "cuda":
        return steps_in_a_row(step, steps)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    low, middle, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(low, middle, high, 0.0)


def measure(
    case: Case, steps: int, device: torch.device, toy: bool, waiting: dist.ProcessGroup, eager: bool = False
) -> tuple[list[Timing], Callable[[], None], nn.Module]:
    """Timings of rank 0 alone, of all ranks at once without an exchange, and of all together.

    Args:
        case: What to time.
        steps: How many steps.
        device: This rank's.
        toy: Tiny sizes.
        waiting: A group in which ranks wait without touching a GPU.
        eager: Without graphs.

    Returns:
        The timings (none but on rank 0), the step that was timed last, and its model, whose graphs are to be released.
    """
    torch.manual_seed(0)
    training = case.build(device, toy)
    graph = training.inputs is not None and device.type == "cuda" and not eager
    step = step_of(training.model, training.loss, None, device)
    warm(step, training, graph)  # on every rank: each compiles its kernels
    dist.barrier(waiting)
    alone = milliseconds(step, steps, device) if dist.get_rank() == 0 else None
    dist.barrier(waiting)
    apart = milliseconds(step, steps, device)
    dist.barrier(waiting)
    del step  # and the moments
    release(training.model)
    step = step_of(*shared(case, training, device), device)
    warm(step, training, graph)
    together = milliseconds(step, steps, device)
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, together.peak_mib, group=waiting)
    together = Timing(together.ms_p20, together.ms_p50, together.ms_p80, max(peaks))
    return [] if alone is None else [alone, apart, together], step, training.model


def warm(step: Callable[[], None], training: Training, graph: bool) -> None:
    """The steps before those that are timed; makes the graph."""
    for _ in range(WARM):
        step()
    if graph and training.inputs is not None:
        with torch.autocast("cuda", torch.bfloat16):
            capture(training.part, training.inputs)
        for _ in range(WARM):
            step()


def shared(case: Case, training: Training, device: torch.device) -> tuple[nn.Module, Loss, SequenceGroup | None]:
    """The model as all ranks train it, its loss, and the ranks that share sequences."""
    model, loss, _ = training
    everyone: Any = dist.group.WORLD
    if case.kind == "tensor":
        tensor_parallel(model, init_device_mesh(device.type, (dist.get_world_size(),)))
        return model, loss, None
    places = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, places, gradient_as_bucket_view=True, static_graph=True)
    return wrapped, loss, SequenceGroup(everyone) if case.kind == "sequence" else None


def rows_of(name: str, timings: list[Timing], device: torch.device) -> list[Row]:
    """Rows of a case; prints what they say."""
    (alone, apart, together), size = timings, dist.get_world_size()
    dtype = torch.bfloat16
    found = [
        row("scale_out", f"{name}/{label}", "triscan", "training", dtype, timing, 0.0, device.type)
        for label, timing in ((1, alone), ("apart", apart), (size, together))
    ]
    ratio = alone.ms_p50 / together.ms_p50 / (size if CASES[name].kind == "tensor" else 1)
    memory = f", memory a GPU {together.peak_mib / alone.peak_mib - 1:+.1%}" if alone.peak_mib else ""
    print(f"    {name}: {size} GPUs {ratio * size:.2f} times one, efficiency {ratio:.1%}{memory}", flush=True)
    return found


def profile_together(step: Callable[[], None]) -> None:
    """Print what takes rank 0's time in steps that all ranks take."""
    if dist.get_rank() == 0:
        print_profile(step)
        return
    for _ in range(PROFILED):
        step()


def others(name: str) -> list[Row]:
    """The rows of other cases that were written before."""
    path = RESULTS / "scale_out.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [Row(**fields) for fields in csv.DictReader(file) if fields["case"].rpartition("/")[0] != name]


def main() -> None:
    """Runs the benchmark in one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES, help="only these")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="the host's calls instead of graphs")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most time")
    parser.add_argument("--toy", action="store_true", help="tiny models, to see that all of it runs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/scale_out.csv")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("wanted several processes; start it with torchrun --nproc_per_node 2 -m benchmarks.scale_out")
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
        torch.cuda.set_device(device)
        backend = "nccl" if int(os.environ["WORLD_SIZE"]) <= gpus else "gloo"
    elif not options.toy:
        parser.error("found no GPU, wanted one for each process; --toy runs without")
    dist.init_process_group(backend)
    waiting: Any = dist.new_group(backend="gloo")
    for name in options.case:
        timings, step, model = measure(CASES[name], options.steps, device, options.toy, waiting, options.eager)
        if timings:
            rows = rows_of(name, timings, device)
            if options.write:  # as measured: a run that is cut keeps its rows
                write("scale_out", [*others(name), *rows])
        if options.profile and device.type == "cuda":
            profile_together(step)
        release(model)  # a graph that holds collectives would keep their group from ending
        del step, model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
