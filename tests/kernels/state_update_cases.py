"""The cases that every implementation of the decoding step is held to, and how they are run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import Tensor

from kernels import state_update


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; S6 without heads. ``pool`` states are chosen from by ``rows``."""

    B: int = 2
    T: int = 1
    H: int | None = None
    P: int = 6
    G: int = 1
    N: int = 5
    tied: bool = True
    options: tuple[str, ...] = ("D", "z", "dt_bias")
    state: torch.dtype | None = None
    dt_softplus: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    pool: int | None = None
    rows: tuple[int, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors, drawn in float32 so that all dtypes see the same numbers, then rounded; parameters stay wide."""
        generator = torch.Generator().manual_seed(0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inner = (self.P,) if self.H is None else (self.H, self.P)
        tied = (self.H,) if self.H is not None and self.tied else inner
        full = (*inner, self.N) if self.H is None or not self.tied else tied
        shapes = {
            "state": ((self.pool or self.B, *inner, self.N), self.state or wide),
            "x": ((self.B, self.T, *inner), dtype),
            "dt": ((self.B, self.T, *tied), dtype),
            "A": (full, wide),
            "B": ((self.B, self.T, self.G, self.N), dtype),
            "C": ((self.B, self.T, self.G, self.N), dtype),
            "D": (tied, wide),
            "z": ((self.B, self.T, *inner), dtype),
            "dt_bias": (tied, wide),
        }
        found = {}
        for name, (shape, kind) in shapes.items():
            if name in ("D", "z", "dt_bias") and name not in self.options:
                continue
            t = torch.randn(shape, generator=generator)
            t = -t.exp() if name == "A" else F.softplus(t) if name == "dt" and not self.dt_softplus else t
            found[name] = t.to(device, kind)
        if self.rows:
            found["state_indices"] = torch.tensor(self.rows, device=device, dtype=torch.int32)
        return found

    def flags(self) -> dict[str, Any]:
        """The other arguments."""
        return {"dt_softplus": self.dt_softplus, "dt_limit": self.dt_limit}


CASES = {
    "s6": Case(),
    "s6_plain": Case(options=(), dt_softplus=False),
    "s6_groups": Case(B=3, T=2, P=12, G=3, N=16),
    "s6_indices": Case(B=3, T=3, pool=5, rows=(4, -1, 0)),
    "s6_one": Case(B=1, P=1, N=1),
    "ssd": Case(H=4, P=3, G=2),
    "ssd_plain": Case(H=3, P=8, N=16, options=()),
    "ssd_tokens": Case(B=2, T=3, H=4, P=9, G=2, N=33),
    "ssd_limits": Case(H=2, P=8, N=4, T=3, dt_limit=(0.3, 0.8)),
    "ssd_free": Case(H=4, P=3, G=2, T=2, tied=False),
    "ssd_free_plain": Case(H=2, P=5, tied=False, options=("z",)),
    "ssd_indices": Case(B=4, T=2, H=2, P=4, N=8, pool=7, rows=(6, 2, -1, 3)),
    "ssd_all_padding": Case(B=2, H=2, P=4, pool=3, rows=(-1, -1)),
    "ssd_wide": Case(B=1, H=1, P=37, N=256),
    "no_rows": Case(B=0, H=2),
    "no_tokens": Case(T=0, H=2),
}

ROUNDED = {
    name: Case(**{**CASES[case].__dict__, "state": state})
    for name, case, state in (
        ("s6", "s6", None), ("s6_low", "s6_groups", torch.bfloat16), ("ssd", "ssd_tokens", None),
        ("ssd_low", "ssd", torch.bfloat16), ("ssd_half", "ssd_indices", torch.float16),
        ("free_low", "ssd_free", torch.bfloat16),
    )
}  # fmt: skip


def run(
    case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", rounded: torch.dtype | None = None
) -> dict[str, Tensor]:
    """y and the state afterwards, of inputs that were first ``rounded``."""
    inputs = case.inputs(rounded or dtype, device)
    if rounded:
        inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    y = state_update(**inputs, **case.flags(), backend=backend)
    return {"y": y, "state": inputs["state"]}


def compare(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Holds a backend to the reference, judged by float64 on the same rounded inputs."""
    got, reference = run(case, dtype, backend, device), run(case, dtype, "reference", device)
    for name, truth in run(case, torch.float64, "reference", rounded=dtype).items():
        assert_as_accurate(name, got[name], reference[name], truth)
