"""Times a training step of a language model on a GPU, beside mamba_ssm's own model: tokens a second, peak of memory.

    python -m benchmarks.train_lm [--peers] [--write] [--case NAME ...]

A step is forward, loss of the next token and backward under bfloat16 autocast, without an optimiser: the sizes of the
published 130M models, vocabulary 50,280, tied embeddings, 8 x 2048 tokens. The peak is all that the step holds, the
model's weights and gradients included. mamba_ssm's head gives logits, whose cross-entropy is PyTorch's; ours takes
``core.loss.linear_cross_entropy``. Initial losses of both are printed: near ln 50,280 = 10.8. Ours is timed call by
call (mode ``forward_backward``) and with the backbone as CUDA graphs (``forward_backward_graph``), as ``core.pretrain``
runs it with ``--model.graph true``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Row, Timing, installed, require_gpu, row, write
from core.lm import MambaConfig, MambaLM
from core.loss import linear_cross_entropy
from core.training.graphs import capture

BATCH, LENGTH, STEPS = 8, 2048, 20
CASES: dict[str, dict[str, Any]] = {"target/mamba_130m": {"layer": "Mamba1"}, "target/mamba2_130m": {"layer": "Mamba2"}}
Loss = Callable[[Tensor], Tensor]  # of token ids (B, L)


def ours(ssm: dict[str, Any]) -> tuple[nn.Module, Loss]:
    """This project's model and its loss."""
    model = MambaLM(MambaConfig(d_model=768, n_layer=24, vocab_size=50277, ssm_cfg=ssm), device="cuda")

    def loss(ids: Tensor) -> Tensor:
        hidden = model.backbone(ids)
        return linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, ids[:, 1:])

    return model, loss


def graphed(ssm: dict[str, Any]) -> tuple[nn.Module, Loss]:
    """``ours`` with the backbone as CUDA graphs."""
    model, loss = ours(ssm)

    def captured(ids: Tensor) -> Tensor:
        if "forward" not in vars(model.backbone):
            capture(model.get_submodule("backbone"), ids)
        return loss(ids)

    return model, captured


def published(ssm: dict[str, Any]) -> tuple[nn.Module, Loss]:
    """mamba_ssm's model, and cross-entropy of its logits."""
    from mamba_ssm.models.config_mamba import MambaConfig as Config  # type: ignore[import-not-found]
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # type: ignore[import-not-found]

    model = MambaLMHeadModel(Config(d_model=768, n_layer=24, vocab_size=50277, ssm_cfg=ssm), device="cuda")

    def loss(ids: Tensor) -> Tensor:
        logits = model(ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return model, loss


WAYS = {
    "triscan": ("triscan", "forward_backward", ours),
    "triscan as a graph": ("triscan", "forward_backward_graph", graphed),
    "mamba_ssm": ("mamba_ssm", "forward_backward", published),
}


def measure(case: str, name: str) -> Row:
    """The row of one of ``WAYS``; prints tokens a second and the peak too."""
    provider, mode, make = WAYS[name]
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    before, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    model, loss = make(CASES[case])
    ids = torch.randint(0, 50277, (BATCH, LENGTH), device="cuda")

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            found = loss(ids)
        with torch.autograd.set_multithreading_enabled(False):  # as TrainingModule does
            found.backward()
        return found.detach()

    for _ in range(3):
        first = step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() - before
    if mode.endswith("graph"):  # a graph keeps its memory, of which none is allocated
        peak = torch.cuda.max_memory_reserved() - held
    peak /= 2**20
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    rate = BATCH * LENGTH / p50 * 1e3
    print(f"{name}: {rate:,.0f} tokens/s, {peak / 1024:.1f} GiB, loss {first.item():.2f}", flush=True)
    return row("train_lm", case, provider, mode, torch.bfloat16, Timing(p20, p50, p80, peak), 0.0)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also time mamba_ssm where it is installed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/train_lm.csv")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these models")
    options = parser.parse_args()
    require_gpu("train_lm")
    rows = []
    for case in options.case:
        for name in WAYS:
            if name != "mamba_ssm" or (options.peers and installed(name)):
                rows.append(measure(case, name))
        if options.write:  # a run that is cut short keeps its rows
            print(write("train_lm", rows))


if __name__ == "__main__":
    main()
