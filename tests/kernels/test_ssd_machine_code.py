"""``ssd``'s kernels as compiled for Hopper GPUs, which needs none.

ptxas 12.8 took the upper half of narrow tiles' addresses from wrong registers: their machine code has no such sum.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import machine_code
import pytest
import torch
from ssd_cases import Case, run

from kernels.backend import interpreting
from kernels.plans import Plans
from kernels.ssd import gated, gluon_gated, triton_backward, triton_plan, triton_sizes
from kernels.ssd.triton_sizes import Sizes

pytestmark = [
    pytest.mark.skipif(not machine_code.DISASSEMBLER.exists(), reason="this Triton comes without a disassembler"),
    pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: nothing is compiled"),
]


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, machine_code.Launch]:
    """Collects launches as they would be on a Hopper GPU."""
    found: dict[str, machine_code.Launch] = {}
    monkeypatch.setattr(triton_plan, "launch_named", machine_code.collector(found))
    monkeypatch.setattr(triton_sizes, "is_hopper", lambda device: True)
    for module in (triton_sizes, triton_backward):
        monkeypatch.setattr(module, "cores", lambda device: 132)
    monkeypatch.setattr(Sizes, "product_dtype", torch.bfloat16)
    monkeypatch.setattr(Sizes, "roomy", True)
    return found


def launches(monkeypatch: pytest.MonkeyPatch, case: Case) -> dict[str, machine_code.Launch]:
    """What the op would launch on a Hopper GPU, forward and backward, by the kernel's name."""
    op = sys.modules["kernels.ssd"]
    found = on_hopper(monkeypatch)
    for name in ("_plans", "_backward_plans"):
        monkeypatch.setattr(op, name, Plans())
    monkeypatch.setattr(op, "_resolve", lambda problem, backend: "triton")
    run(case, torch.bfloat16, "triton")
    return found


def faults(monkeypatch: pytest.MonkeyPatch, folder: Path, case: Case, *names: str) -> list[str]:
    """The faulty sums in these kernels."""
    found = launches(monkeypatch, case)
    code = {name: machine_code.instructions(machine_code.compiled(*found[name]), folder) for name in names}
    assert any("HGMMA" in line for lines in code.values() for line in lines), "no tile is read by its address"
    return [f"{name}: {fault}" for name, lines in code.items() for fault in machine_code.faulty_sums(lines)]


def full(state: int, head_dim: int) -> Case:
    """A case all of whose tiles are full, so that they are copied in boxes."""
    return Case(B=2, L=256, H=4, P=head_dim, N=state, without="z", state=False)


SIZES = [(n, p) for n in (16, 32, 64, 128, 256) for p in (32, 64)]
QUICK = (16, 64)  # where the sums were


@pytest.mark.parametrize(
    ("state", "head_dim"), [s if s == QUICK else pytest.param(*s, marks=pytest.mark.slow) for s in SIZES]
)
def test_no_sum_is_faulty(state: int, head_dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("forward_kernel", "states_kernel", "chunks_kernel")
    assert not faults(monkeypatch, tmp_path, full(state, head_dim), *names)


def routed(monkeypatch: pytest.MonkeyPatch, side: int) -> Case:
    """A stage of VMamba on SSD, with maps of this side."""
    monkeypatch.setattr(triton_plan.Plan, "tokens", property(lambda plan: torch.zeros(*plan.tables, 64).int()))
    return Case(B=2, L=side * side, H=6, P=16, N=64, K=4, wide_d=True, without="z", state=False)


@pytest.mark.parametrize("side", [pytest.param(7, marks=pytest.mark.slow), 28])
def test_no_sum_is_faulty_of_narrow_heads_along_routes(
    side: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not faults(monkeypatch, tmp_path, routed(monkeypatch, side), "forward_kernel", "chunks_kernel")


@pytest.mark.slow
def test_no_sum_is_faulty_where_rows_are_shared_evenly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case(B=3, L=640, H=96, P=64, N=64, without="z", state=False)
    assert launches(monkeypatch, case)["forward_kernel"][2]["SHARED"]
    assert not faults(monkeypatch, tmp_path, case, "forward_kernel")


def test_a_faulty_sum_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton_sizes, "NARROWEST", 16)
    assert faults(monkeypatch, tmp_path, full(*QUICK), "chunks_kernel")


@pytest.mark.slow
@pytest.mark.parametrize("without", ["", "z", "z D"], ids=["gated", "plain", "without_D"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_fit_into_shared_memory(head_dim: int, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, launch in launches(monkeypatch, replace(full(128, head_dim), without=without)).items():
        assert machine_code.compiled(*launch).metadata.shared <= 227 << 10, name


@pytest.mark.parametrize("state", [128, *(pytest.param(n, marks=pytest.mark.slow) for n in (32, 64))])
def test_two_programs_of_the_gated_scan_fit(state: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, low = on_hopper(monkeypatch), torch.bfloat16
    rows, keys = torch.empty(2, 128, 4, 64, dtype=low), torch.empty(2, 128, 1, state, dtype=low)
    each = torch.empty(4)
    problem = gated._problem(rows, rows[..., 0], each, keys, keys, each, rows, each, None, (0.0, 1.0), "auto")
    gluon_gated.forward(problem, torch.empty(256, dtype=low), low)
    kernel = machine_code.compiled(*found["gated_kernel"])
    code = machine_code.instructions(kernel, tmp_path)
    assert not machine_code.faulty_sums(code)
    assert not any(line.startswith(("LDL", "STL")) for line in code)  # registers that were spilled
    assert kernel.metadata.shared <= 113 << 10
