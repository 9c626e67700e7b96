"""The cases that every implementation of the causal convolution is held to, and how they are run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accuracy import assert_as_accurate
from torch import Tensor

from kernels import causal_conv1d

ROUTES = {
    "even": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1, 0]]),
    "padded": torch.tensor([[-1, 3, 0, -1, -1, 1, 8, 2, 4, 5, -1], [7, -1, 1, 2, 3, 6, -1, 0, 8, 4, 5]]),
    "partial": torch.tensor([[4, 0, 8], [-1, 2, -1], [1, 3, 5]]),
    "nowhere": torch.full((2, 4), -1),
}
SEQ_IDX = torch.tensor([[0, 0, -1, 0, 1, 1, 2, -1, -1], [-1, -1, 4, 4, -1, 5, 4, 4, 9]])


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; ``route`` names one of ``ROUTES``."""

    B: int = 2
    L: int = 9
    D: int = 5
    W: int = 4
    activation: str | None = "silu"
    bias: bool = True
    state: bool = True
    reverse: bool = False
    route: str | None = None
    per_route: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    seq_idx: tuple[tuple[int, ...], ...] | None = None

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """The differentiable inputs, drawn in float32 so that all dtypes see the same numbers, then rounded."""
        generator = torch.Generator().manual_seed(seed)
        K = () if self.route is None else (ROUTES[self.route].shape[0],)
        S = self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        shapes = {
            "x": (self.B, self.L, *(K if self.per_route else ()), self.D),
            "weight": (*K, self.D, self.W),
            "bias": (*K, self.D) if self.bias else None,
            "initial_state": (S, *K, self.W - 1, self.D) if self.state else None,
        }
        return {
            name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
            for name, shape in shapes.items()
            if shape is not None
        }

    def options(self, device: str = "cpu") -> dict[str, object]:
        """The other arguments."""
        return {
            "activation": self.activation,
            "reverse": self.reverse,
            "route": None if self.route is None else ROUTES[self.route].to(device),
            "cu_seqlens": None if self.cu_seqlens is None else torch.tensor(self.cu_seqlens, device=device),
            "seq_idx": None if self.seq_idx is None else torch.tensor(self.seq_idx, device=device),
        }


def _rows(table: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


_PACKED = (0, 0, 3, 3, 4, 9, 9)
CASES = {
    "plain": Case(activation=None, bias=False, state=False),
    "silu": Case(state=False),
    "state": Case(),
    "reverse": Case(reverse=True),
    "width_1": Case(W=1),
    "width_2": Case(W=2, D=1),
    "wider_than_long": Case(W=12, L=3),
    "long": Case(L=141, D=67, W=3),
    "one_token": Case(L=1, D=3),
    "empty": Case(L=0),
    "no_batch": Case(B=0),
    "packed": Case(B=1, cu_seqlens=_PACKED),
    "packed_reverse": Case(B=1, cu_seqlens=_PACKED, reverse=True),
    "packed_zeros": Case(B=1, cu_seqlens=_PACKED, state=False, activation=None),
    "packed_wide": Case(B=1, cu_seqlens=(0, 1, 2, 2, 9), W=7),
    "seq_idx": Case(seq_idx=_rows(SEQ_IDX)),
    "seq_idx_reverse": Case(seq_idx=_rows(SEQ_IDX), reverse=True),
    "seq_idx_zeros": Case(seq_idx=_rows(SEQ_IDX), state=False),
    "all_padding": Case(seq_idx=((0,) * 9, (-1,) * 9)),
    "route_even": Case(route="even"),
    "route_padded": Case(route="padded"),
    "route_padded_reverse": Case(route="padded", reverse=True, bias=False),
    "route_partial": Case(route="partial", W=2),
    "route_nowhere": Case(route="nowhere"),
    "route_inputs": Case(route="padded", per_route=True),
    "route_inputs_reverse": Case(route="even", per_route=True, reverse=True, state=False),
    "route_seq_idx": Case(route="padded", seq_idx=_rows(SEQ_IDX)),
    "route_seq_idx_reverse": Case(route="padded", per_route=True, seq_idx=_rows(SEQ_IDX), reverse=True),
}

ROUNDED = (
    "state",
    "reverse",
    "packed",
    "seq_idx",
    "route_padded",
    "route_inputs",
    "long",
)  # also run in lower precision


def run(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> dict[str, Tensor]:
    """Outputs and gradients (of a loss over y and the final state) by name."""
    inputs = case.inputs(dtype, device)
    y, state = causal_conv1d(**inputs, **case.options(device), return_final_state=True, backend=backend)
    weights = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=weights).to(device, y.dtype)
    dstate = torch.randn(state.shape, generator=weights).to(device, state.dtype)
    outputs = [t for t in (y, state) if t.requires_grad]
    douts = [g for t, g in ((y, dy), (state, dstate)) if t.requires_grad]
    grads = torch.autograd.grad(outputs, list(inputs.values()), douts, allow_unused=True)
    named = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(inputs.items(), grads, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def compare(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Holds a backend to the reference, judged by float64 on the same rounded inputs."""
    got, reference = run(case, dtype, backend, device), run(case, dtype, "reference", device)
    for name, truth in exact(case, dtype).items():
        if truth.numel():
            assert_as_accurate(name, got[name], reference[name], truth)
        else:
            assert (got[name].shape, got[name].dtype) == (truth.shape, reference[name].dtype), name


def exact(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference in float64 on the inputs and output gradients as ``dtype`` rounds them."""
    rounded = {n: t.detach().double().requires_grad_() for n, t in case.inputs(dtype).items()}
    y, state = causal_conv1d(**rounded, **case.options(), return_final_state=True, backend="reference")
    weights = torch.Generator().manual_seed(7)
    douts = [torch.randn(t.shape, generator=weights).to(dtype).double() for t in (y, state)]
    pairs = [(t, g) for t, g in zip((y, state), douts, strict=True) if t.requires_grad]
    grads = torch.autograd.grad([t for t, _ in pairs], list(rounded.values()), [g for _, g in pairs], allow_unused=True)
    named = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(rounded.items(), grads, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}
