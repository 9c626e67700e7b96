"""Times image models on a GPU, beside timm's on request: images a second, memory, and where the time goes.

    python -m benchmarks.vision [--peers] [--write] [--case NAME ...] [--how eager|graph|compile|reduce ...] [--profile]

``inference`` is a forward without gradients, ``training`` forward, cross-entropy and backward with the gradients
cleared before; autocast to bfloat16, float32 weights and images on the GPU. Steps run back to back, so that the host's
time counts where the GPU waits for it. Memory is the peak of everything, weights included. A provider ``NAME+graph``
replays the eager step as a CUDA graph, ``NAME+compile`` runs the model compiled, ``NAME+reduce`` compiled in the mode
reduce-overhead, which replays CUDA graphs too; ``--profile`` prints the kernels that take most of the time of a step,
eager or replayed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import nn

import vision  # noqa: F401  registers the models
from benchmarks.common import Row, Timing, require_gpu, row, steps_in_a_row, write

MODES = ("inference", "training")
HOW = ("eager", "graph", "compile", "reduce")
PROFILED = 3  # steps


@dataclass(frozen=True)
class Case:
    """A model at a batch and image size, the modes to time, and whose it is."""

    model: str
    batch: int = 128
    size: int = 224
    modes: tuple[str, ...] = MODES
    peer: bool = False


CASES = {
    "vmamba_t": Case("vmamba_tiny_s1l8"),
    "vmamba_t_v0": Case("vmamba_tiny_v0"),
    "vmamba_t_1024": Case("vmamba_tiny_s1l8", 8, 1024, ("inference",)),
    "vim_t": Case("vim_tiny_patch16_224"),
    "vim_s": Case("vim_small_patch16_224"),
    "vim_t_1248": Case("vim_tiny_patch16_224", 8, 1248, ("inference",)),
    "local_vim_t": Case("local_vim_tiny"),
    "local_vmamba_t": Case("local_vmamba_tiny"),
    "efficient_vmamba_t": Case("efficient_vmamba_tiny"),
    "plain_mamba_l1": Case("plain_mamba_l1"),
    "mamba_nd_2d_s": Case("mamba_nd_2d_small"),
    "vmamba_t_m2": Case("vmamba_tiny_m2"),
    "swin_t": Case("swin_tiny_patch4_window7_224", peer=True),
    "deit_t": Case("deit_tiny_patch16_224", peer=True),
    "deit_t_1248": Case("deit_tiny_patch16_224", 8, 1248, ("inference",), peer=True),
}


def create(case: Case) -> nn.Module:
    """The model of a case on the GPU."""
    kwargs = {"img_size": case.size} if case.size != 224 and ("vim" in case.model or "deit" in case.model) else {}
    return timm.create_model(case.model, **kwargs).cuda()


def step_of(model: nn.Module, run: Callable[..., torch.Tensor], case: Case, mode: str) -> Callable[[], object]:
    """One step of a mode; ``run`` is the model or its compiled form."""
    images = torch.randn(case.batch, 3, case.size, case.size, device="cuda")
    labels = torch.randint(1000, (case.batch,), device="cuda")
    model.train(mode == "training")

    def inference() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return run(images)

    def training() -> None:
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(run(images), labels)
        with torch.autograd.set_multithreading_enabled(False):  # as TrainingModule does
            loss.backward()

    return inference if mode == "inference" else training


def timed(step: Callable[[], object], runs: int = 15) -> Timing:
    """Milliseconds of a step among others, and the peak of memory in MiB."""
    for _ in range(3):
        step()
    return steps_in_a_row(step, runs)


def print_profile(step: Callable[[], object], rows: int = 22) -> None:
    """The kernels of ``PROFILED`` steps that take most of the GPU's time."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    print(f"    GPU {total / PROFILED / 1e3:.2f} ms a step, {sum(e.count for e in events) // PROFILED} kernels")
    for e in events[:rows]:
        print(f"    {e.self_device_time_total / PROFILED / 1e3:8.3f} ms {e.count // PROFILED:5d} x  {e.key[:150]}")


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph, which leaves the host's time out."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run_as(model: nn.Module, how: str) -> Callable[..., torch.Tensor]:
    """The model itself, or compiled if so asked for."""
    if how not in ("compile", "reduce"):
        return model
    return torch.compile(model, fullgraph=True, mode="reduce-overhead" if how == "reduce" else None)


def measure(name: str, case: Case, how: str, profile: bool) -> list[Row]:
    """Rows of one case."""
    found = []
    torch.manual_seed(0)
    model = create(case)
    for mode in case.modes:
        torch._dynamo.reset()
        started = time.time()
        step = step_of(model, run_as(model, how), case, mode)
        if how == "graph":
            step = graphed(step)
        timing = timed(step)
        provider = ("timm" if case.peer else "triscan") + ("" if how == "eager" else f"+{how}")
        key = name if case.peer else f"target/{name}"
        found.append(row("vision", key, provider, mode, torch.bfloat16, timing, 0.0))
        speed, seconds = 1000 * case.batch / timing.ms_p50, time.time() - started
        print(f"    {speed:.0f} img/s, {timing.peak_mib / 1024:.2f} GiB, {seconds:.1f} s in all", flush=True)
        if profile and how in ("eager", "graph"):
            print_profile(step)
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=CASES, help="cases to time; all by default")
    parser.add_argument("--peers", action="store_true", help="time timm's models too")
    parser.add_argument("--how", nargs="*", default=["eager"], choices=HOW, help="ways to run each model")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most time")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/vision.csv")
    args = parser.parse_args()
    require_gpu("vision")
    rows: list[Row] = []
    for name in args.case:
        case = CASES[name]
        for how in args.how if args.peers or not case.peer else ():
            try:
                rows += measure(name, case, how, args.profile)
                if args.write:  # as it goes: a run that is cut keeps its rows
                    write("vision", rows)
            except Exception as error:  # one model that fails leaves the others their rows
                print(f"{name} {how}: {type(error).__name__}: {str(error)[:600]}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
