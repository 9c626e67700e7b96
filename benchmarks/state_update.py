"""Times the decoding step on a GPU, beside the floor and, on request, mamba_ssm's kernel in the same run.

    python -m benchmarks.state_update [--peers] [--write] [--case NAME ...]

What is timed is the replay of a CUDA graph of 24 steps, each on a state of its own as in a model of 24 layers, divided
by 24: a step of one row is over in the time that a launch takes. The floor is the bytes that must move (the state there
and back; x, dt, B, C and y once) over the bandwidth of a copy, measured in the same run. A provider whose result
differs from the reference in float64 gets no row.

B batch, D channels (S6), H heads, P head dim, N state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import Row, Timing, floor, installed, measure, require_gpu, row, write
from kernels import state_update

STEPS = 24  # of a graph
Step = Callable[[Tensor], Tensor]  # updates a state, returns y


@dataclass(frozen=True)
class Case:
    """A step of one token in bfloat16 with D, dt bias and softplus; S6 of P channels where there are no heads."""

    B: int
    H: int | None = 24
    P: int = 64
    N: int = 128
    state: torch.dtype = torch.float32


CASES = {
    "target/B128_H24_P64_N128_bfloat16_state": Case(128, state=torch.bfloat16),
    "target/B128_H24_P64_N128_float32_state": Case(128),
    "target/B1_H24_P64_N128_bfloat16_state": Case(1, state=torch.bfloat16),
    "B1_H24_P64_N128_float32_state": Case(1),
    "B8_H24_P64_N128_float32_state": Case(8),
    "B64_H24_P64_N128_float32_state": Case(64),
    "B64_D1536_N16_float32_state": Case(64, None, 1536, 16),
    "B1_D1536_N16_float32_state": Case(1, None, 1536, 16),
}


def tensors(case: Case, device: str = "cuda") -> dict[str, Tensor]:
    """Random inputs of ``state_update``."""
    torch.manual_seed(0)
    inner = (case.P,) if case.H is None else (case.H, case.P)
    per_head = inner[:1]

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    rates = torch.linspace(1, 16, inner[0], device=device)
    return {
        "state": normal(case.B, *inner, case.N, dtype=case.state),
        "x": normal(case.B, 1, *inner),
        "dt": normal(case.B, 1, *per_head),
        "A": -(rates[:, None].expand(-1, case.N).contiguous() if case.H is None else rates),
        "B": normal(case.B, 1, 1, case.N),
        "C": normal(case.B, 1, 1, case.N),
        "D": normal(*per_head, dtype=torch.float32),
        "dt_bias": torch.full(per_head, -3.0, device=device),
    }


def ours(t: dict[str, Tensor]) -> Step:
    """The op of this project."""
    rest = {n: v for n, v in t.items() if n != "state"}
    return lambda state: state_update(state, **rest)


def peer(t: dict[str, Tensor]) -> Step:
    """mamba_ssm's kernel, whose tensors have no token axis; A, dt, D and dt_bias of a head are expanded views."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # type: ignore[import-not-found]

    x, dt, B, C = (t[n][:, 0] for n in ("x", "dt", "B", "C"))
    A, D, bias = t["A"], t["D"], t["dt_bias"]
    if x.ndim == 3:
        wide = x.shape[1:]
        dt, A = dt[:, :, None].expand(x.shape), A[:, None, None].expand(*wide, t["state"].shape[-1])
        D, bias = (v[:, None].expand(wide) for v in (D, bias))
    else:
        B, C = B[:, 0], C[:, 0]
    return lambda state: selective_state_update(state, x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)


def is_right(step: Step, t: dict[str, Tensor]) -> bool:
    """Whether y and the state agree with the definition in float64."""
    state = t["state"].clone()
    wide = {n: v.double() for n, v in t.items()}
    found = step(state).reshape(t["x"].shape), state
    truth = state_update(**wide, backend="reference"), wide["state"]
    errors = [((a - b).norm() / b.norm()).item() / torch.finfo(a.dtype).eps for a, b in zip(found, truth, strict=True)]
    return max(errors) < 4


def time_graph(step: Step, state: Tensor) -> Timing:
    """One step's time in a graph of ``STEPS`` of them, each with its own copy of the state."""
    states = [state.clone() for _ in range(STEPS)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(states[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in states:
            step(each)
    timing = measure(graph.replay)
    return Timing(timing.ms_p20 / STEPS, timing.ms_p50 / STEPS, timing.ms_p80 / STEPS, timing.peak_mib)


def measurements(name: str, case: Case, peers: bool) -> list[Row]:
    """The rows of a case."""
    t, rows = tensors(case), []
    moved = 2 * t["state"].nbytes + 2 * t["x"].nbytes + sum(t[n].nbytes for n in ("dt", "B", "C"))
    for provider, make in (("triscan", ours), *([("mamba_ssm", peer)] if peers else [])):
        step = make(t)
        if not is_right(step, t):
            print(f"{name} {provider}: differs from the reference, no row", file=sys.stderr)
            continue
        timing = time_graph(step, t["state"])
        rows.append(row("state_update", name, provider, "forward", torch.bfloat16, timing, floor(moved)))
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="time mamba_ssm's kernel too, if it is installed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/state_update.csv")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these shapes")
    options = parser.parse_args()
    require_gpu("state_update")
    peers = options.peers and installed("mamba_ssm")
    with torch.no_grad():
        found = [r for name in options.case for r in measurements(name, CASES[name], peers)]
    if options.write:
        print(write("state_update", found))


if __name__ == "__main__":
    main()
