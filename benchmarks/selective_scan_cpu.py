"""Times the selective scan on the CPU beside the ways in which it is usually written in PyTorch, in float32.

    python -m benchmarks.selective_scan_cpu [--peers] [--write] [--threads N] [--case NAME ...]

``torch_loop`` is the algorithm that mamba_ssm falls back to: the decays and inputs of all positions first, then one
Python step a position. ``torch_parallel`` scans these in log2 L rounds, as mamba.py does (Blelloch 1990), with a
backward that scans the gradients in reverse. Both are written here anew. With ``--peers`` the published ones run too:
``mamba_ssm``, whose ``selective_scan_ref`` is taken out of its sources (they need not be compiled: a folder with them
on ``PYTHONPATH`` is enough; its tensors lie as it wants them), and ``mambapy``. All compute the same: softplus of
dt + bias, the scan, D x, the gate. They take turns, so that a busy machine slows all. ``floor_ms`` is the time to read
the inputs and write the outputs once (forward_backward: and the same for the gradients) at the copy bandwidth of the
same run.

B batch, L tokens, D channels, N state.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, floor, installed, time_in_turns, write
from kernels import selective_scan

Function = Callable[..., Tensor]
PEERS = {"mamba_ssm": ("mamba_ssm", "einops"), "mambapy": ("mambapy",)}  # and what each needs
CASES = {  # B, D, L, N
    "target/B2_D384_L1024_N16": (2, 384, 1024, 16),
    "vim_tiny/B8_D384_L197_N16": (8, 384, 197, 16),
    "long/B1_D128_L4096_N16": (1, 128, 4096, 16),
    "memory/B1_D32_L131072_N16": (1, 32, 131072, 16),
}


def terms(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and inputs of the recurrence, both ``(B, L, D, N)``."""
    dt = F.softplus(dt + dt_bias)
    return torch.exp(dt[..., None] * A), (dt * x)[..., None] * B  # B has one group: (B, L, 1, N)


def loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """The scan step by step; the arguments are those of ``selective_scan``.

    ``unbind`` is kinder to it than the usual indexing, whose backward fills a whole ``(B, L, D, N)`` at each step.
    """
    decays, inputs = terms(x, dt, A, B, dt_bias)
    h, ys = x.new_zeros(x.shape[0], *A.shape), []
    for decay, step, c in zip(decays.unbind(1), inputs.unbind(1), C[:, :, 0].unbind(1), strict=True):
        h = decay * h + step
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return (torch.stack(ys, 1) + x * D) * F.silu(z)


def states(decays: Tensor, inputs: Tensor) -> Tensor:
    """All h_t = decays_t h_{t-1} + inputs_t, ``(B, L, ...)``: pairs are joined, scanned, and taken apart again."""
    length = decays.shape[1]
    if length == 1:
        return inputs
    even, odd = slice(0, length - 1, 2), slice(1, length, 2)
    joined = torch.addcmul(inputs[:, odd], decays[:, odd], inputs[:, even])
    h = torch.empty_like(inputs)
    h[:, odd] = states(decays[:, odd] * decays[:, even], joined)
    h[:, 0] = inputs[:, 0]
    torch.addcmul(inputs[:, 2::2], decays[:, 2::2], h[:, 1 : length - 1 : 2], out=h[:, 2::2])
    return h


class ParallelScan(torch.autograd.Function):
    """``states`` with the gradient of the recurrence: g_t = dh_t + decays_{t+1} g_{t+1}."""

    @staticmethod
    def forward(ctx: Any, decays: Tensor, inputs: Tensor) -> Tensor:
        h = states(decays, inputs)
        ctx.save_for_backward(decays, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        decays, h = ctx.saved_tensors
        following = torch.cat([torch.zeros_like(decays[:, :1]), decays[:, 1:].flip(1)], 1)
        g = states(following, grads[0].flip(1)).flip(1)
        return torch.cat([torch.zeros_like(g[:, :1]), g[:, 1:] * h[:, :-1]], 1), g


def parallel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """The scan in parallel rounds; the arguments are those of ``selective_scan``."""
    h = ParallelScan.apply(*terms(x, dt, A, B, dt_bias))
    return (torch.einsum("bldn,bln->bld", h, C[:, :, 0]) + x * D) * F.silu(z)


def ours(**tensors: Tensor) -> Tensor:
    """This project's scan."""
    return selective_scan(**tensors, backend="cpu")  # type: ignore[return-value, arg-type]


def mamba_ssm() -> Function:
    """mamba-ssm's ``selective_scan_ref``, executed alone: importing its module takes its CUDA extension."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    assert spec.origin is not None
    source = ast.parse((Path(spec.origin).parent / "ops/selective_scan_interface.py").read_text())
    source.body = [s for s in source.body if isinstance(s, ast.FunctionDef) and s.name == "selective_scan_ref"]
    einops = importlib.import_module("einops")
    names: dict[str, Any] = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    exec(compile(source, "selective_scan_ref", "exec"), names)
    scan = names["selective_scan_ref"]

    def function(**t: Tensor) -> Tensor:
        return scan(*t.values(), delta_softplus=True)

    return function


def mambapy() -> Function:
    """mamba.py's parallel scan with what its block computes before and behind it."""
    block = importlib.import_module("mambapy.mamba").MambaBlock

    def function(**t: Tensor) -> Tensor:
        dt, B, C = F.softplus(t["dt"] + t["dt_bias"]), t["B"][:, :, 0], t["C"][:, :, 0]
        return block.selective_scan(None, t["x"], dt, t["A"], B, C, t["D"]) * F.silu(t["z"])

    return function


def channels_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs as mamba-ssm wants them: tokens last, one group as none."""
    return {n: (t.detach() if t.ndim < 3 else t.detach().flatten(2).mT.contiguous()).requires_grad_()
            for n, t in inputs.items()}  # fmt: skip


def providers(peers: bool) -> dict[str, tuple[Function, bool]]:
    """Scans by name, and whether each wants ``channels_first``; peers that are not installed are named and left out."""
    found = {"triscan": (ours, False), "torch_loop": (loop, False), "torch_parallel": (parallel, False)}
    for name, make in (("mamba_ssm", mamba_ssm), ("mambapy", mambapy)) if peers else ():
        if all(installed(m) for m in PEERS[name]):
            found[name] = make(), name == "mamba_ssm"
        else:
            print(f"{name} is left out: needs {' and '.join(PEERS[name])}", file=sys.stderr)
    return found


def draw(B: int, D: int, L: int, N: int) -> dict[str, Tensor]:
    """Inputs of one case, float32."""
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(B, L, D),
        "dt": torch.randn(B, L, D),
        "A": -torch.arange(1.0, N + 1).expand(D, N).contiguous(),
        "B": torch.randn(B, L, 1, N),
        "C": torch.randn(B, L, 1, N),
        "D": torch.randn(D),
        "z": torch.randn(B, L, D),
        "dt_bias": torch.randn(D) - 4,
    }
    return {n: t.requires_grad_() for n, t in inputs.items()}


def check(function: Function, first: bool) -> None:
    """Holds a provider to the reference in float64, values and gradients, of an odd length; ``first``: as there."""
    inputs = draw(2, 3, 13, 4)
    exact = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    wanted = selective_scan(**exact, backend="reference")  # type: ignore[arg-type]
    given = channels_first(inputs) if first else inputs
    got = function(**given)
    grads = torch.autograd.grad((got.mT if first else got).square().sum(), list(given.values()))
    grads = [g.mT.reshape_as(t) if g.ndim > 2 and first else g for g, t in zip(grads, inputs.values(), strict=True)]
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(got.mT if first else got, wanted, **close)
    torch.testing.assert_close(grads, list(torch.autograd.grad(wanted.square().sum(), list(exact.values()))), **close)  # type: ignore


def measurements(case: str, peers: bool) -> list[Row]:
    """The rows of one case: each provider, forward and both passes."""
    inputs, rows = draw(*CASES[case]), []
    moved = sum(t.nbytes for t in inputs.values()) + inputs["x"].nbytes
    floors = {"forward": floor(moved, device="cpu"), "forward_backward": floor(3 * moved, device="cpu")}
    given = {}
    for name, (function, first) in providers(peers).items():
        wanted = channels_first(inputs) if first else inputs
        given[name] = functools.partial(function, **wanted), list(wanted.values())
    for mode, floor_ms in floors.items():
        made, times = time_in_turns("selective_scan", case, mode, given, floor_ms)
        rows += made
        for name, found in times.items():
            middle, least = (f(found) / f(times["triscan"]) for f in (np.median, min))
            print(f"{case} {mode}: {name} takes {middle:.1f} times as long as triscan (medians; minima {least:.1f}: "
                  f"{min(found):.2f} ms)", flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help=f"also time {' and '.join(PEERS)} where installed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/selective_scan_cpu.csv")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch and of the kernels (default: 2)")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these shapes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for function, first in providers(options.peers).values():
        check(function, first)
    found = [row for case in options.case for row in measurements(case, options.peers)]
    if options.write:
        print(write("selective_scan_cpu", found))


if __name__ == "__main__":
    main()
