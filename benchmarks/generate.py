"""Times generation from language models of 130M parameters, beside mamba_ssm's in the same run on request.

    python -m benchmarks.generate [--peers] [--write] [--case NAME ...]

Random weights, greedy, bfloat16. A time is that of a whole call, reading the prompt included, by the wall clock; tokens
a second count the new ones. The floor is that of the steps: weights, and each row's state read and written, once a
token over the bandwidth of a copy. The peer runs as its own benchmark runs it, ``generate(cg=True)``, and keeps its
states in bfloat16; ours are float32 unless the case says otherwise.

B rows.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Row, Timing, floor, installed, require_gpu, row, write
from core.decode_steps import narrowed
from core.generate import Sampling, generate
from core.lm import MambaConfig, MambaLM

CONFIG: dict[str, Any] = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "pad_vocab_size_multiple": 8}
LAYERS = {"mamba_130m": {"layer": "Mamba1"}, "mamba2_130m": {"layer": "Mamba2"}}
RUNS = 5


@dataclass(frozen=True)
class Case:
    """A model and a request."""

    model: str
    batch: int
    prompt: int
    new: int
    state_dtype: torch.dtype | None = None


CASES = {
    f"target/{model}_B{batch}_{prompt}_and_{new}": Case(model, batch, prompt, new)
    for model in LAYERS
    for batch, prompt, new in ((1, 128, 128), (64, 2048, 64))
} | {f"bfloat16_state/{model}_B64_2048_and_64": Case(model, 64, 2048, 64, torch.bfloat16) for model in LAYERS}


def measure(function: Callable[[], object]) -> Timing:
    """Wall-clock times of ``function``, warmed up, and the peak of memory above what was held before."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(RUNS):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return Timing(p20, p50, p80, (torch.cuda.max_memory_allocated() - before) / 2**20)


def ours(case: Case) -> tuple[Callable[[], object], float]:
    """The call, and the bytes that its steps move."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(**CONFIG, ssm_cfg=LAYERS[case.model]), device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(CONFIG["vocab_size"], (case.batch, case.prompt), device="cuda")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = [narrowed(layer, case.state_dtype) for layer in model.init_state(case.batch)]
    moved = sum(t.numel() * t.element_size() for layer in states for t in layer)
    greedy = Sampling(temperature=0)
    call = functools.partial(generate, model, ids, case.new, greedy, state_dtype=case.state_dtype)
    return call, case.new * (weights + 2.0 * moved)


def theirs(case: Case) -> Callable[[], Tensor]:
    """The peer's call."""
    from mamba_ssm.models.config_mamba import MambaConfig as Config
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    model = MambaLMHeadModel(Config(**CONFIG, ssm_cfg=LAYERS[case.model]), device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(CONFIG["vocab_size"], (case.batch, case.prompt), device="cuda")
    return lambda: model.generate(ids, case.prompt + case.new, top_k=1, cg=True)


def time_case(name: str, peers: bool) -> list[Row]:
    """The rows of a case."""
    case = CASES[name]
    function, moved = ours(case)
    peers = peers and case.state_dtype is None and installed("mamba_ssm")
    calls = {"triscan": function} | ({"mamba_ssm": theirs(case)} if peers else {})
    rows = []
    for provider, call in calls.items():
        timing = measure(call)
        rows.append(row("generate", name, provider, "forward", torch.bfloat16, timing, floor(moved)))
        print(f"{case.batch * case.new / timing.ms_p50 * 1e3:,.0f} tokens/s", flush=True)
    return rows


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="time mamba_ssm too, where it is installed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/generate.csv")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    arguments = parser.parse_args()
    require_gpu("generate")
    rows: list[Row] = []
    for name in arguments.case:
        rows += time_case(name, arguments.peers)
        if arguments.write:  # a run that is cut short keeps its rows
            print(write("generate", rows))


if __name__ == "__main__":
    main()
