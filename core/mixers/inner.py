"""Sequence transformations without projections and gates, (B, L, E) -> (B, L, E): what H3, Mamba's block and S4's block
are built around. Table 1 of Gu & Dao 2023 crosses these with those.

Legend: B batch, L length, E channels, N state, M = N/2 complex states, R dt rank, T inputs seen before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core import hippo
from core.mixers.dss import DSSKernel
from core.mixers.hyena_filter import HyenaFilter, long_convolution
from core.mixers.mamba import decay_rates
from core.mixers.s4 import S4Kernel
from core.mixers.s4d import S4DKernel, StateSpace

InnerName = Literal["s4", "s4d", "dss", "s6", "hyena"]
PARTS = ("dt", "B", "C")


class Inner(Protocol):
    """A causal transformation of E channels whose state is one tensor, the batch first."""

    def run(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Runs (B, L, E) from a state, or from nothing: then the state afterwards may be left out."""
        ...

    def start(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The state before the first token."""
        ...

    def steps(self, u: Tensor, state: Tensor) -> Tensor:
        """Runs few tokens and leaves the state after them in the same tensor."""
        ...


class S6(nn.Module):
    """The selective state space of Mamba by itself (Gu & Dao 2023, algorithm 2), and its ablations.

    dt, B, C = x_proj(u); dt = softplus(dt_weight dt + dt_bias);
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t; y_t = <C_t, h_t> + D u_t.

    A part that is not selective is a parameter: dt one number a channel, B and C N numbers a channel (B of ones, C
    normal, as S4D begins). With none selective this is S4D-Real with Euler's rule for B.

    Args:
        channels: E.
        d_state: N.
        dt_rank: R; "auto" is ceil(E / 32), which is Mamba's ceil(D / 16) at its expansion of 2.
        selective: Which of "dt", "B", "C" depend on the input (Gu & Dao 2023, table 7).
        init: Of A: "real" A_n = -(n + 1), "constant" -1/2, or "random" -exp(normal) (Gu & Dao 2023, table 8).
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        device: Where the parameters live.
        dtype: Their dtype; A, D and constant B and C are float32 at least.

    Raises:
        ValueError: For an unknown name, or sizes that do not fit.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 16,
        dt_rank: int | str = "auto",
        selective: Collection[str] = PARTS,
        init: Literal["real", "constant", "random"] = "real",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wrong = set(selective) - set(PARTS)
        if wrong:
            raise ValueError(f"selective: got {sorted(wrong)}, wanted some of {', '.join(PARTS)}")
        if channels < 1 or d_state < 1:
            raise ValueError(f"channels and d_state: got {channels} and {d_state}, wanted at least 1")
        self.channels, self.d_state = channels, d_state
        self.selective = tuple(part for part in PARTS if part in selective)
        self.dt_rank = math.ceil(channels / 32) if isinstance(dt_rank, str) else dt_rank
        self.widths = [self.dt_rank if part == "dt" else d_state for part in self.selective]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        self.x_proj = nn.Linear(channels, sum(self.widths), bias=False, **factory) if self.selective else None
        self.dt_weight = nn.Parameter(torch.empty(channels, self.dt_rank, **factory)) if "dt" in selective else None
        self.dt_bias = nn.Parameter(torch.empty(channels, **wide))
        self.A_log = nn.Parameter(torch.empty(channels, d_state, **wide))
        self.D = nn.Parameter(torch.ones(channels, **wide))
        self.B = None if "B" in selective else nn.Parameter(torch.ones(channels, d_state, **wide))
        self.C = None if "C" in selective else nn.Parameter(torch.randn(channels, d_state, **wide))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self._reset(init, dt_min, dt_max)

    @torch.no_grad()
    def _reset(self, init: str, dt_min: float, dt_max: float) -> None:
        starts: dict[str, Callable[[], Tensor]] = {
            "real": lambda: torch.log(-hippo.s4d_real(self.d_state)),
            "constant": lambda: torch.full((self.d_state,), math.log(0.5)),
            "random": lambda: torch.randn(self.A_log.shape),
        }
        if init not in starts:
            raise ValueError(f"init: got {init!r}, wanted one of {', '.join(starts)}")
        self.A_log.copy_(starts[init]())
        self.dt_bias.copy_(hippo.inverse_softplus(hippo.log_uniform_dt(self.channels, dt_min, dt_max, floor=1e-4)))
        if self.dt_weight is not None:
            nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)

    def run(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Inner``; the state is (B, E, N)."""
        dt, B, C = self._parts(u)
        y, final, _ = torch.ops.triscan.selective_scan(
            u, dt, decay_rates(self.A_log), B, C, self.D, None, self.dt_bias, self.dt_weight, None, state, None, None,
            True, True, "sum", False, state is not None, "auto",
        )  # fmt: skip
        return y, None if state is None else final

    def steps(self, u: Tensor, state: Tensor) -> Tensor:
        """See ``Inner``."""
        y, final = self.run(u, state)
        assert final is not None
        state.copy_(final)
        return y

    def start(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See ``Inner``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.zeros(batch_size, self.channels, self.d_state, device=device, dtype=wide)

    def _parts(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before its bias, B and C, as the scan takes them."""
        found: dict[str, Tensor] = {}
        if self.x_proj is not None:
            found = dict(zip(self.selective, self.x_proj(u).split(self.widths, dim=-1), strict=True))
        dt = found["dt"] if "dt" in found else torch.zeros_like(u)
        B = found["B"].unsqueeze(2) if self.B is None else self.B
        C = found["C"].unsqueeze(2) if self.C is None else self.C
        return dt, B, C

    def extra_repr(self) -> str:
        return f"{self.channels}, d_state={self.d_state}, selective={self.selective}"


class TimeInvariant(nn.Module):
    """A time-invariant state space with a skip connection: y = kernel(u) + D u.

    Whole sequences are convolved with the system's kernel by FFT; from a state it runs as a recurrence in chunks.

    Args:
        channels: E.
        kernel: The ``StateSpace``.
        device: Where D lives.
        dtype: float64 gives a float64 D, all else float32.
    """

    def __init__(
        self, channels: int, kernel: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.channels, self.kernel = channels, kernel
        self.D = nn.Parameter(torch.randn(channels, device=device, dtype=wide))
        self.D._no_weight_decay = True  # type: ignore[attr-defined]

    @property
    def space(self) -> StateSpace:
        """The state space."""
        return self.kernel  # type: ignore[return-value]

    def run(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Inner``; the state is (B, E, M, 2)."""
        if state is None:
            y, after = long_convolution(u, self.space.taps(max(u.shape[1], 1)).t(), u.shape[1]), None
        else:
            y, after = self.space.run(u, state)
        return y + u * self.D.to(u.dtype), after

    def steps(self, u: Tensor, state: Tensor) -> Tensor:
        """See ``Inner``."""
        return self.space.steps(u, state) + u * self.D.to(u.dtype)

    def start(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See ``Inner``."""
        wide = torch.float64 if self.D.dtype == torch.float64 else torch.float32
        return torch.zeros(batch_size, self.channels, self.space.d_state // 2, 2, device=device, dtype=wide)


class LongConvolution(nn.Module):
    """Hyena's implicit long convolution by itself (Poli et al. 2023, section 3.3): y = h * u + b u, L up to ``l_max``.

    Args:
        channels: E.
        l_max: Longest sequence.
        filter_order: Width of the filter's network.
        emb_dim: Features of the position, odd.
        w: Initial frequency of the sines.
        device: Where the parameters live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        channels: int,
        l_max: int,
        filter_order: int = 64,
        emb_dim: int = 3,
        w: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.l_max = channels, l_max
        self.filter_fn = HyenaFilter(
            channels, l_max, emb_dim, filter_order, 1e-3, 1e-5, w, 0.0, True, 2, True, False, 0.3, 1.5, 1e-2, 0.0, 0.05,
            True, device=device, dtype=dtype,
        )  # fmt: skip

    def run(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``Inner``; the state is all inputs so far, (B, T, E).

        Raises:
            ValueError: Past ``l_max`` inputs.
        """
        joined = u if state is None else torch.cat([state.to(u.dtype), u], dim=1)
        if joined.shape[1] > self.l_max:
            raise ValueError(
                f"LongConvolution: got {joined.shape[1]:,} positions, wanted at most l_max = {self.l_max:,}: the "
                "filter is defined no further; cut the sequence, or build the layer with a longer l_max"
            )
        y = long_convolution(joined, self.filter_fn.filter(joined.shape[1]), u.shape[1])
        return self.filter_fn.add_bias(y, u, slice(None)), None if state is None else joined

    def steps(self, u: Tensor, state: Tensor) -> Tensor:
        """Not possible: the state grows."""
        raise ValueError("decode: a long convolution's state grows with each token; use forward_state")

    def start(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See ``Inner``."""
        return torch.zeros(batch_size, 0, self.channels, device=device, dtype=dtype)


# Name -> state space or transformation. A new one is a line.
SPACES: dict[str, Callable[..., nn.Module]] = {"s4": S4Kernel, "s4d": S4DKernel, "dss": DSSKernel}
OTHERS: dict[str, Callable[..., nn.Module]] = {"s6": S6, "hyena": LongConvolution}


def make_inner(
    name: str,
    channels: int,
    arguments: dict[str, Any] | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Inner:
    """A transformation by name: "s4", "s4d", "dss", "s6" or "hyena".

    Args:
        name: Which.
        channels: E.
        arguments: Its own arguments.
        device: Where its parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For an unknown name or argument.
    """
    known = {**SPACES, **OTHERS}
    if name not in known:
        raise ValueError(f"inner: got {name!r}, wanted one of {', '.join(known)}")
    given = dict(arguments or {})
    allowed = set(list(inspect.signature(known[name]).parameters)[1:]) - {"device", "dtype"}
    wrong = sorted(set(given) - allowed)
    if wrong:
        raise ValueError(f"inner_cfg: {name} has no {', '.join(wrong)}; wanted some of {', '.join(sorted(allowed))}")
    try:
        module = known[name](channels, **given, device=device, dtype=dtype)
    except TypeError as error:
        raise ValueError(f"inner_cfg: {name}: {error}") from error
    return TimeInvariant(channels, module, device, dtype) if name in SPACES else module  # type: ignore[return-value]
