"""Mamba-2, the layer of state space duality (Dao & Gu 2024, section 7 and figure 6).

Legend: B batch, L length, D model width, E inner width (expand * D), F = d_ssm channels of the scan, H heads, P head
dim, N state, G groups, W convolution width, C = F + 2 G N channels of the convolution, S packed sequences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels.mamba2_inner  # noqa: F401  registers torch.ops.triscan
from core import hippo
from core.mixers.gated_norm import GatedRMSNorm
from core.mixers.mamba import decay_rates, last_inputs
from core.parallel import sequence
from core.parallel.group import in_parts

torch.fx.wrap("decay_rates")  # a tracer has no dtypes to compare


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer remembers of the sequence so far."""

    conv: Tensor  # (B, W - 1, C): the last inputs of the convolution, oldest first
    ssm: Tensor  # (B, H, P, N): float32, float64 for a float64 layer


class Mamba2(nn.Module):
    """Mixes a sequence by gated state spaces with one decay a head, (B, L, D) -> (B, L, D).

    z, x, B, C, dt = in_proj(u); x, B, C = silu(conv1d(x, B, C)); dt = clamp(softplus(dt + dt_bias), dt_limit);
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T; y_t = h_t C_t + D x_t; out = out_proj(norm(y * silu(z))).

    With ``d_ssm`` < E the other E - d_ssm channels are a gated MLP beside the scan: silu(z0) * x0. Parameters have the
    published names and shapes. ``A_log``, ``D`` and ``dt_bias`` are float32 whatever ``dtype`` is; a later
    ``.to(dtype)`` casts them as it casts every parameter, and the layer computes with them in float32 again.

    Args:
        d_model: Width D of the input and output.
        d_state: State size N.
        d_conv: Width W of the causal convolution, at least 1.
        conv_init: The convolution's weights are uniform in [-conv_init, conv_init]; None: PyTorch's default.
        expand: E = expand * d_model, which must be whole.
        headdim: Channels P of a head, a divisor of d_ssm.
        d_ssm: Channels of the scan, at most E; None: all of them.
        ngroups: Groups G of heads that share B and C, a divisor of the number of heads.
        A_init_range: -A is drawn uniformly from it.
        D_has_hdim: Whether D is one number a channel, else one a head.
        rmsnorm: Whether y is normalised, in G groups of channels; else it is only gated.
        norm_before_gate: norm(y) * silu(z), else norm(y * silu(z)).
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        dt_init_floor: Initial time steps below it are raised to it.
        dt_limit: The time step is clamped between these two.
        bias: Whether in_proj and out_proj have biases.
        conv_bias: Whether the convolution has a bias.
        learnable_init_states: Whether the state before the first token is a parameter, zero at first.
        reverse: Anti-causal: every position sees itself and what follows it. Equal to flipping the input and the
            output of the causal layer.
        device: Where the parameters live.
        dtype: Their dtype (see above).

    Raises:
        ValueError: For sizes that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        *,
        learnable_init_states: bool = False,
        reverse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.D_has_hdim, self.reverse = D_has_hdim, reverse
        self.fuses = True  # whether one op may run everything behind the input projection
        self.dt_min, self.dt_max = float(dt_limit[0]), float(dt_limit[1])
        _check_sizes(self, expand, A_init_range)

        self.nheads = self.d_ssm // headdim
        self.d_mlp = self.d_inner - self.d_ssm
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        width = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=bias, device=device, dtype=dtype)
        # Holds weight (C, 1, W) and bias (C,); the convolution itself is kernels.causal_conv1d.
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias, device=device, dtype=dtype
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, device=device, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(self.nheads, device=device, dtype=wide))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device, dtype=wide))
        self.norm: GatedRMSNorm | None = None
        if rmsnorm:
            size = self.d_ssm // ngroups
            self.norm = GatedRMSNorm(self.d_ssm, size, norm_before_gate, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)
        self.init_states: nn.Parameter | None = None
        if learnable_init_states:
            shape = (self.nheads, headdim, d_state)
            self.init_states = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self._reset_ssm(A_init_range, dt_min, dt_max, dt_init_floor)
        for parameter in (self.dt_bias, self.A_log, self.D, self.init_states):
            if parameter is not None:  # a mark that optimisers of the wider ecosystem look for
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _reset_ssm(self, A_init_range: tuple[float, float], dt_min: float, dt_max: float, floor: float) -> None:
        """The published initialisation: softplus(dt_bias) log-uniform, -A uniform."""
        dt = hippo.log_uniform_dt(self.nheads, dt_min, dt_max, floor, device=self.dt_bias.device)
        self.dt_bias.copy_(hippo.inverse_softplus(dt))
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(*A_init_range).log())

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences.

        Args:
            x: (B, L, D).
            seq_idx: (B, L) integers; the layer starts afresh where they change, and -1 marks padding. Not with
                learnable initial states, which ``cu_seqlens`` gives to every sequence.
            cu_seqlens: (S + 1,) int32 offsets of S sequences laid end to end in a batch of one.

        Returns:
            (B, L, D) in x's dtype.
        """
        initial: Tensor | None = None
        if self.init_states is not None:
            if seq_idx is not None:
                raise ValueError("seq_idx: the initial states would reach the first sequence only; use cu_seqlens")
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            initial = self.init_states.expand(rows, -1, -1, -1)
        # An adapter or a quantised layer is more than a weight; a part of a sequence needs its neighbours in between.
        if not self.fuses or not isinstance(self.out_proj, nn.Linear) or in_parts():
            mlp, z, xbc, dt = self._project(x)
            xbc, _ = self._conv(xbc, None, cu_seqlens, seq_idx, False)
            y, _ = self._scan(xbc, z, dt, initial, cu_seqlens, seq_idx, False)
            return self._output(mlp, y, z)
        norm = self.norm
        weight, eps, first = (None, 0.0, False) if norm is None else (norm.weight, norm.eps, norm.norm_before_gate)
        y, _, _, _, _ = torch.ops.triscan.mamba2_inner(  # keeps less for the backward than the parts would
            self._enter(x), *self._filters(), self.dt_bias, decay_rates(self.A_log),
            self._skip(), weight, self.out_proj.weight, self.out_proj.bias, initial, cu_seqlens, seq_idx,
            self.headdim, self.ngroups, eps, first, self.dt_min, self.dt_max, self.reverse, False, "auto",
        )  # fmt: skip
        return y

    def forward_state(self, x: Tensor, state: Mamba2State, lengths: Tensor | None = None) -> tuple[Tensor, Mamba2State]:
        """Continues sequences from ``state``.

        A ``reverse`` layer runs from the right: feed it the last piece of the sequence first.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.
            lengths: (B,) number of real tokens of each right-padded row; each row then gives the numbers that it gives
                alone. Outputs at padding are arbitrary. Not for a ``reverse`` layer.

        Returns:
            (B, L, D) and the state after the last (real) token.
        """
        mlp, z, xbc, dt = self._project(x)
        if lengths is None:
            xbc, conv_state = self._conv(xbc, state.conv, None, None, True)
            y, ssm_state = self._scan(xbc, z, dt, state.ssm, None, None, True)
        else:
            if self.reverse:
                raise ValueError("lengths: a reverse layer cannot skip right padding; pass rows of one length each")
            # Causal: right padding cannot reach a real token, so only the states have to stop at the real end.
            conv_state = last_inputs(xbc, state.conv, lengths)
            seq_idx = -(torch.arange(x.shape[1], device=x.device) >= lengths[:, None]).to(torch.int32)
            xbc, _ = self._conv(xbc, state.conv, None, None, False)
            y, ssm_state = self._scan(xbc, z, dt, state.ssm, None, seq_idx, True)
        after = Mamba2State(conv_state.to(state.conv.dtype), ssm_state.to(state.ssm.dtype))
        return self._output(mlp, y, z), after

    @torch.no_grad()
    def decode(self, x: Tensor, state: Mamba2State) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or ``forward_state``; its tensors are updated in place.

        Returns:
            (B, L, D).
        """
        if self.reverse:
            raise ValueError("decode: a reverse layer sees what follows, there is nothing to decode; use forward_state")
        mlp, z, xbc, dt = self._project(x)
        xbc = torch.ops.triscan.conv_update(xbc, state.conv, *self._filters(), "silu", "auto")
        x, B, C = self._split(xbc)
        y = torch.ops.triscan.state_update(
            state.ssm, x, dt, decay_rates(self.A_log), B, C, self._skip(), self._scan_gate(z), self.dt_bias, None,
            True, self.dt_min, self.dt_max, "auto",
        )  # fmt: skip
        return self._output(mlp, y, z)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> Mamba2State:
        """The state before the first token: zeros, or the learnt initial states.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Of the convolution's part; the parameters' by default. The scan's part is float32 (or float64).
            max_length: Accepted; the size of the state does not depend on it.
        """
        device = self.in_proj.weight.device if device is None else device
        dtype = self.in_proj.weight.dtype if dtype is None else dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        conv = torch.zeros(batch_size, self.d_conv - 1, self.conv_dim, device=device, dtype=dtype)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        if self.init_states is not None:  # a copy: steps write into it
            return Mamba2State(conv, self.init_states.to(device, wide).expand(shape).clone())
        return Mamba2State(conv, torch.zeros(shape, device=device, dtype=wide))

    def _enter(self, x: Tensor) -> Tensor:
        """The input projection (B, L, E)."""
        return self.in_proj(x)

    def _filters(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's weight (C, W) and bias (C,)."""
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[z0, x0] (B, L, 2 (E - F)), z (B, L, F), the convolution's inputs (B, L, C) and dt (B, L, H)."""
        return self._parts(self._enter(x))

    def _parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = [2 * self.d_mlp, self.d_ssm, self.conv_dim, self.nheads]
        mlp, z, xbc, dt = torch.split(projected, sizes, dim=-1)
        return mlp, z, xbc, dt

    def _conv(
        self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, seq_idx: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        return sequence.causal_conv1d(
            x, *self._filters(), None, initial, cu_seqlens, seq_idx,
            "silu", self.reverse, keep, "auto",
        )  # fmt: skip

    def _split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, H, P), B and C (B, L, G, N) of the convolution's outputs."""
        size = self.ngroups * self.d_state
        x, B, C = torch.split(xbc, [self.d_ssm, size, size], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _skip(self) -> Tensor:
        """D (H,) or (H, P)."""
        return self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D

    def _scan_gate(self, z: Tensor | None) -> Tensor | None:
        """The gate (B, L, H, P) where it belongs to the scan: without a norm."""
        return None if self.norm is not None or z is None else z.unflatten(-1, (self.nheads, self.headdim))

    def _scan(
        self,
        xbc: Tensor,
        z: Tensor | None,
        dt: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        seq_idx: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        x, B, C = self._split(xbc)
        return sequence.ssd(
            x, dt, decay_rates(self.A_log), B, C, self._skip(), self._scan_gate(z), self.dt_bias,
            None, initial, cu_seqlens, seq_idx, True, self.dt_min, self.dt_max, "sum", self.reverse, keep, "auto",
        )  # fmt: skip

    def _output(self, mlp: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """out_proj of [silu(z0) x0, y], y normalised and gated."""
        y = y.flatten(2)
        if self.norm is not None:
            y = self.norm(y, z)
        if self.d_mlp > 0:
            z0, x0 = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        return self.out_proj(y)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, d_ssm={self.d_ssm}, "
            f"headdim={self.headdim}, ngroups={self.ngroups}, reverse={self.reverse}"
        )


def _check_sizes(layer: Mamba2, expand: float, A_init_range: tuple[float, float]) -> None:
    for name in ("d_model", "d_state", "d_conv", "headdim", "ngroups"):
        if getattr(layer, name) < 1:
            raise ValueError(f"{name}: got {getattr(layer, name)}, wanted at least 1")
    if layer.d_inner != expand * layer.d_model or expand <= 0:
        raise ValueError(f"expand: got {expand}, wanted a positive factor that makes expand * {layer.d_model} whole")
    if not 0 < layer.d_ssm <= layer.d_inner:
        raise ValueError(f"d_ssm: got {layer.d_ssm}, wanted 1 to expand * d_model = {layer.d_inner}")
    if layer.d_ssm % layer.headdim:
        raise ValueError(f"headdim: got {layer.headdim}, wanted a divisor of the scan's {layer.d_ssm} channels")
    heads = layer.d_ssm // layer.headdim
    if heads % layer.ngroups:
        raise ValueError(f"ngroups: got {layer.ngroups}, wanted a divisor of the {heads} heads")
    if not 0 < A_init_range[0] <= A_init_range[1]:
        raise ValueError(f"A_init_range: got {A_init_range}, wanted 0 < low <= high")
    if not layer.dt_min <= layer.dt_max:
        raise ValueError(f"dt_limit: got ({layer.dt_min}, {layer.dt_max}), wanted (low, high) with low <= high")
