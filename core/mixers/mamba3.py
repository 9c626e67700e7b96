"""Mamba-3: trapezoidal steps, rotating states, decays that depend on the input, and states written by several inputs.

Legend: B batch, L length, D model width, E inner width (expand * D), H heads, P head dim, N state, G groups, R rank (1
without MIMO), S rotated pairs, K packed sequences.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from core import hippo
from core.mixers import mamba3_scan as scan
from core.mixers.gated_norm import GatedRMSNorm
from core.mixers.rotary import sequence_numbers
from core.parallel.group import refuse


class Mamba3State(NamedTuple):
    """What a Mamba-3 layer remembers of the sequence so far."""

    angle: Tensor  # (B, H, S), in [0, 2 pi): float32, float64 for a float64 layer, as the next
    ssm: Tensor  # (B, H, P, N)
    k: Tensor  # (B, R, H, N): the last keys, rotated
    v: Tensor  # (B, H, P): the last values


class Mamba3(nn.Module):
    """Mixes a sequence by rotating, gated state spaces, (B, L, D) -> (B, L, D).

    z, x, B, C, dt, A, l, angle = in_proj(u); dt = softplus(dt + dt_bias); A = -max(f(A), A_floor); l = sigmoid(l);
    k, q = rotate(norm(B) + B_bias), rotate(norm(C) + C_bias) by the running sum of tanh(angle) pi dt;
    h_t = exp(A_t dt_t) (h_{t-1} + (1 - l_t) dt_t k_{t-1} x_{t-1}^T) + l_t dt_t k_t x_t^T; y_t = h_t q_t + D x_t;
    out = out_proj(y * silu(z)), with ``is_outproj_norm`` out_proj(norm(y) * silu(z)).

    With ``is_mimo`` a step has R keys, queries, values x * mimo_x_r and gates z * mimo_z_r that share one state, and
    the output is the sum of y_r * mimo_o_r.

    Parameters have the published names and shapes; all but projections and norms are float32 whatever ``dtype`` is.
    The published code computes in bfloat16 whatever it is given; here float32 and float64 are what they say.

    Args:
        d_model: Width D of the input and output.
        d_state: State size N.
        expand: E = expand * d_model, which must be whole.
        headdim: Channels P of a head, a divisor of E.
        ngroups: Groups G of heads that share B and C, a divisor of the number of heads.
        rope_fraction: Part of the state that rotates, in (0, 1].
        dt_min: Smallest initial time step.
        dt_max: Largest initial time step.
        dt_init_floor: Initial time steps below it are raised to it.
        A_floor: Decay rates below it are raised to it.
        is_outproj_norm: Whether heads are normalised before the gate.
        is_mimo: Whether a step writes R inputs to its state. Pairs (i, i + N / 2) rotate then, else (2i, 2i + 1).
        mimo_rank: R where ``is_mimo``.
        a_activation: f above. "heavy_tail": 1 + x for x >= 0, 1 / (1 - x) below, the published code since June 2026;
            "softplus", what it was before. Neither weights nor configuration tell which one they were trained with.
        device: Where the parameters live.
        dtype: Their dtype (see above).

    Raises:
        ValueError: For sizes that do not fit, or an unknown a_activation.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        *,
        a_activation: Literal["heavy_tail", "softplus"],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.A_floor, self.is_mimo, self.a_activation = A_floor, is_mimo, a_activation
        self.rank = mimo_rank if is_mimo else 1
        self.pairs = int(d_state * rope_fraction) // 2
        _check_sizes(self, expand, rope_fraction)

        self.nheads = self.d_inner // headdim
        self.bc_dim = d_state * ngroups * self.rank
        width = 2 * self.d_inner + 2 * self.bc_dim + 3 * self.nheads + self.pairs
        self.in_proj = nn.Linear(d_model, width, bias=False, device=device, dtype=dtype)
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        dt = hippo.log_uniform_dt(self.nheads, dt_min, dt_max, dt_init_floor, device=device)
        self.dt_bias = nn.Parameter(hippo.inverse_softplus(dt).to(wide["dtype"]))
        self.B_bias = nn.Parameter(torch.ones(self.nheads, self.rank, d_state, **wide))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, self.rank, d_state, **wide))
        self.B_norm = GatedRMSNorm(d_state, d_state, True, device=device, dtype=dtype)
        self.C_norm = GatedRMSNorm(d_state, d_state, True, device=device, dtype=dtype)
        if is_mimo:
            ones = torch.ones(self.nheads, self.rank, headdim, **wide)
            self.mimo_x, self.mimo_o = nn.Parameter(ones / self.rank), nn.Parameter(ones / self.rank)
            self.mimo_z = nn.Parameter(ones)
        self.D = nn.Parameter(torch.ones(self.nheads, **wide))
        self.norm: GatedRMSNorm | None = None
        if is_outproj_norm:
            self.norm = GatedRMSNorm(self.d_inner, headdim, True, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False, device=device, dtype=dtype)
        for parameter in (self.dt_bias, self.D):  # a mark that optimisers of the wider ecosystem look for
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mixes whole sequences.

        Args:
            x: (B, L, D).
            seq_idx: (B, L) integers; the layer starts afresh where they change, and -1 marks padding.
            cu_seqlens: (K + 1,) int32 offsets of K sequences laid end to end in a batch of one.

        Returns:
            (B, L, D) in x's dtype.
        """
        refuse("Mamba3")
        last = None
        if seq_idx is not None or cu_seqlens is not None:
            numbers = sequence_numbers(x.shape[1], x.device, seq_idx, cu_seqlens)
            last = F.pad(numbers.diff(dim=1) != 0, (0, 1), value=True)
        inner = self._project(x, None, last)
        packing = (
            None if cu_seqlens is None else cu_seqlens * self.rank,
            None if seq_idx is None else seq_idx.repeat_interleave(self.rank, 1),
        )
        y, _ = self._scan(inner, None, *packing, False)
        return self._output(inner, y)

    def forward_state(self, x: Tensor, state: Mamba3State, lengths: Tensor | None = None) -> tuple[Tensor, Mamba3State]:
        """Continues sequences from ``state``.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.
            lengths: (B,) number of real tokens of each right-padded row; each row then gives the numbers that it gives
                alone. Outputs at padding are arbitrary.

        Returns:
            (B, L, D) and the state after the last (real) token.
        """
        if x.shape[1] == 0:
            return self.out_proj(x.new_zeros(x.shape[0], 0, self.d_inner)), state
        last = seq_idx = None
        if lengths is not None:
            token = torch.arange(x.shape[1], device=x.device)
            last = token == lengths[:, None] - 1
            seq_idx = -(token >= lengths[:, None]).to(torch.int32).repeat_interleave(self.rank, 1)
        inner = self._project(x, state, last)
        seed = self._seed(inner, state)
        if lengths is not None:  # a row without tokens has no next step
            seed = torch.where(lengths[:, None, None, None] > 0, seed, 0)
        y, ssm = self._scan(inner, state.ssm.to(seed.dtype) + seed, None, seq_idx, True)
        return self._output(inner, y), self._after(inner, ssm, state, lengths)

    @torch.no_grad()
    def decode(self, x: Tensor, state: Mamba3State) -> Tensor:
        """Decodes a few tokens and leaves the state after them in ``state``; see ``Mixer.decode``.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or ``forward_state``; its tensors are updated in place.

        Returns:
            (B, L, D).
        """
        inner = self._project(x, state, None)
        state.ssm.add_(self._seed(inner, state))
        p = inner.positions
        y = torch.ops.triscan.state_update(
            state.ssm, p.x, p.dt, self._decay(p), p.B, p.C, self.D, None, None, None, False, 0.0, math.inf, "auto"
        )
        after = self._after(inner, state.ssm, state, None)
        for old, new in ((state.angle, after.angle), (state.k, after.k), (state.v, after.v)):
            old.copy_(new)
        return self._output(inner, y)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int | None = None,
    ) -> Mamba3State:
        """The state before the first token: zeros.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Of the last keys and values; the parameters' by default. The rest is float32 (or float64).
            max_length: Accepted; the size of the state does not depend on it.
        """
        device = self.in_proj.weight.device if device is None else device
        dtype = self.in_proj.weight.dtype if dtype is None else dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Mamba3State(
            torch.zeros(batch_size, self.nheads, self.pairs, device=device, dtype=wide),
            torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, device=device, dtype=wide),
            torch.zeros(batch_size, self.rank, self.nheads, self.d_state, device=device, dtype=dtype),
            torch.zeros(batch_size, self.nheads, self.headdim, device=device, dtype=dtype),
        )

    def _project(self, u: Tensor, state: Mamba3State | None, last: Tensor | None) -> _Inner:
        """Everything that the scan and what follows it need; ``last`` (B, L) marks tokens that end a sequence."""
        sizes = [self.d_inner, self.d_inner, self.bc_dim, self.bc_dim, *[self.nheads] * 3, self.pairs]
        z, x, B, C, dd_dt, dd_A, trap, angle = torch.split(self.in_proj(u), sizes, dim=-1)
        heads, slots = (self.nheads, self.headdim), (self.rank, self.ngroups, self.d_state)
        z, x = z.unflatten(-1, heads), x.unflatten(-1, heads)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        dt = F.softplus(dd_dt.to(wide) + self.dt_bias)
        rate = scan.activate(dd_A.to(wide), self.a_activation).clamp(min=self.A_floor)
        trap = torch.sigmoid(trap.to(wide))
        terms = scan.Terms(dt, rate * dt, trap, scan.next_weights(dt, trap, last))
        angles = scan.cumulative_angles(angle, dt, None if state is None else state.angle)
        B, C = self.B_norm(B.unflatten(-1, slots)), self.C_norm(C.unflatten(-1, slots))
        k = scan.turn_heads(B, self.B_bias, angles, not self.is_mimo)
        q = scan.turn_heads(C, self.C_bias, angles, not self.is_mimo)
        v = self._values(x)
        return _Inner(z, x, q, k, v, angles, terms, scan.positions(q, k, v, terms))

    def _values(self, x: Tensor) -> Tensor:
        """x (..., H, P) as the values (..., R, H, P)."""
        if not self.is_mimo:
            return x.unsqueeze(-3)
        return (x.unsqueeze(-3) * self.mimo_x.transpose(0, 1)).to(x.dtype)

    def _seed(self, inner: _Inner, state: Mamba3State) -> Tensor:
        """(B, H, P, N): what the last token before still adds to the state, at the first step from here."""
        first = ((1 - inner.terms.trap) * inner.terms.dt)[:, 0]
        v, k = self._values(state.v).to(first.dtype), state.k.to(first.dtype)
        return torch.einsum("bh,brhp,brhn->bhpn", first, v, k)

    def _scan(
        self,
        inner: _Inner,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        seq_idx: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        p = inner.positions
        return torch.ops.triscan.ssd(
            p.x, p.dt, self._decay(p), p.B, p.C, self.D, None, None, None, initial, cu_seqlens, seq_idx,
            False, 0.0, math.inf, "sum", False, keep, "auto",
        )  # fmt: skip

    def _decay(self, p: scan.Positions) -> Tensor:
        return torch.full((self.nheads,), -1.0, device=p.dt.device, dtype=p.dt.dtype)

    def _after(self, inner: _Inner, ssm: Tensor, before: Mamba3State, lengths: Tensor | None) -> Mamba3State:
        """The state after each row's last real token."""

        def at_end(t: Tensor, old: Tensor) -> Tensor:
            if lengths is None:
                return t[:, -1].to(old.dtype)
            shape = (-1,) + (1,) * (t.ndim - 1)
            index = (lengths - 1).clamp(min=0).view(shape).expand(-1, 1, *t.shape[2:])
            found = t.gather(1, index)[:, 0].to(old.dtype)
            return torch.where(lengths.view(shape[:-1]) > 0, found, old)

        angle = at_end(inner.angles, before.angle).remainder(2 * math.pi)
        return Mamba3State(angle, ssm.to(before.ssm.dtype), at_end(inner.k, before.k), at_end(inner.x, before.v))

    def _output(self, inner: _Inner, y: Tensor) -> Tensor:
        """out_proj of the scan's outputs (B, L R, H, P), completed, gated and summed over the rank."""
        y = y.unflatten(1, (-1, self.rank)) + scan.same_step(inner.q, inner.k, inner.v, inner.terms)
        z = inner.z.unsqueeze(2)
        if self.is_mimo:
            z = z * self.mimo_z.transpose(0, 1)
        if self.norm is None:
            y = y * F.silu(z.to(y.dtype))
        else:
            y = self.norm(y.flatten(-2), z.to(y.dtype).flatten(-2)).unflatten(-1, (self.nheads, self.headdim))
        y = (y * self.mimo_o.transpose(0, 1)).sum(2) if self.is_mimo else y.squeeze(2)
        return self.out_proj(y.to(inner.x.dtype).flatten(-2))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, headdim={self.headdim}, ngroups={self.ngroups}, "
            f"rank={self.rank}, a_activation={self.a_activation}"
        )


class _Inner(NamedTuple):
    """A call's intermediate tensors."""

    z: Tensor  # (B, L, H, P)
    x: Tensor  # (B, L, H, P)
    q: Tensor  # (B, L, R, H, N), rotated, float32 or float64, as the next
    k: Tensor  # (B, L, R, H, N)
    v: Tensor  # (B, L, R, H, P)
    angles: Tensor  # (B, L, H, S)
    terms: scan.Terms
    positions: scan.Positions


def _check_sizes(layer: Mamba3, expand: float, rope_fraction: float) -> None:
    for name in ("d_model", "d_state", "headdim", "ngroups", "rank"):
        if getattr(layer, name) < 1:
            raise ValueError(f"{name.replace('rank', 'mimo_rank')}: got {getattr(layer, name)}, wanted at least 1")
    if layer.d_inner != expand * layer.d_model or expand <= 0:
        raise ValueError(f"expand: got {expand}, wanted a positive factor that makes expand * {layer.d_model} whole")
    if layer.d_inner % layer.headdim:
        raise ValueError(f"headdim: got {layer.headdim}, wanted a divisor of expand * d_model = {layer.d_inner}")
    heads = layer.d_inner // layer.headdim
    if heads % layer.ngroups:
        raise ValueError(f"ngroups: got {layer.ngroups}, wanted a divisor of the {heads} heads")
    if not 0 < rope_fraction <= 1 or layer.pairs < 1:
        raise ValueError(
            f"rope_fraction: got {rope_fraction}, wanted a part of {layer.d_state} states with a pair in it"
        )
    if layer.is_mimo and layer.d_state % 2:
        raise ValueError(f"d_state: got {layer.d_state} with is_mimo, wanted an even number: halves rotate together")
    if not layer.is_mimo <= layer.rank <= 16:
        raise ValueError(f"mimo_rank: got {layer.rank}, wanted 1 to 16")
    if layer.a_activation not in scan.A_ACTIVATIONS:
        raise ValueError(f"a_activation: got {layer.a_activation!r}, wanted one of {', '.join(scan.A_ACTIVATIONS)}")
