"""Hyena's implicit filter, and convolutions as long as the sequence by FFT.

Legend: B batch, L length, T inputs before, M taps, C channels, E features of a position, H width of the network.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels.checks import full_precision
from kernels.long_convolution import fft_length


class Sine(nn.Module):
    """sin(freq x) with a frequency a channel (1, H)."""

    def __init__(self, dim: int, w: float, train: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        freq = torch.full((1, dim), float(w), device=device, dtype=dtype)
        self.freq = nn.Parameter(freq, requires_grad=train)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq.to(x.dtype) * x)


class HyenaFilter(nn.Module):
    """h_t = window(t) MLP(position features of t): taps (M, C), M up to ``l_max`` (Poli et al. 2023, equation 7).

    The features are t / (l_max - 1) and the real and imaginary parts of (E - 1) / 2 complex exponentials. All sines
    share one frequency parameter, which appears under several names. See ``Hyena`` for the arguments.
    """

    def __init__(
        self,
        channels: int,
        l_max: int,
        emb_dim: int,
        width: int,
        lr: float,
        lr_pos_emb: float,
        w: float,
        wd: float,
        bias: bool,
        num_inner_mlps: int,
        modulate: bool,
        normalized: bool,
        fast_decay_pct: float,
        slow_decay_pct: float,
        target: float,
        modulation_lr: float,
        shift: float,
        train_freq: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim: got {emb_dim}, wanted an odd number of at least 3 (time, cosines and sines)")
        self.use_bias, self.modulate, self.normalized, self.shift = bias, modulate, normalized, shift
        self.bias = nn.Parameter(torch.randn(channels, device=device, dtype=dtype))
        self.l_max, self.emb_dim = l_max, emb_dim
        z = position_features(l_max, l_max, emb_dim)
        deltas = torch.linspace(math.log(target) / slow_decay_pct, math.log(target) / fast_decay_pct, channels)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.pos_emb, self.modulation = nn.Module(), nn.Module()  # the published names of the tables
        for module, name, table, rate in (
            (self.pos_emb, "z", z[None], lr_pos_emb),
            (self.pos_emb, "t", z[None, :, :1], 0.0),
            (self.modulation, "deltas", deltas[None, None], modulation_lr),
        ):
            _register(module, name, table.to(device=device, dtype=wide), rate)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sine = Sine(width, w, train_freq, device, dtype)
        layers: list[nn.Module] = [nn.Linear(emb_dim, width, **factory), sine]
        for _ in range(num_inner_mlps):
            layers += [nn.Linear(width, width, **factory), sine]
        self.implicit_filter = nn.Sequential(*layers, nn.Linear(width, channels, bias=False, **factory))
        for parameter in self.implicit_filter.parameters():
            parameter._optim = {"weight_decay": wd, "lr": lr}  # type: ignore[attr-defined]
            parameter._no_weight_decay = wd == 0  # type: ignore[attr-defined]

    def filter(self, length: int) -> Tensor:
        """The first taps.

        Args:
            length: M, at most ``l_max``.

        Returns:
            (M, C) float32, float64 for a float64 layer: under autocast too, for a filter of a million taps is a
            difference of large phases.
        """
        z, t = self._tables(length)
        with full_precision(z.device):
            h = z
            for layer in self.implicit_filter:
                if isinstance(layer, nn.Linear):
                    bias = None if layer.bias is None else layer.bias.to(z.dtype)
                    h = nn.functional.linear(h, layer.weight.to(z.dtype), bias)
                else:
                    h = layer(h)
            if self.modulate:
                h = h * (torch.exp(-t * self.modulation.deltas[0].to(t.dtype).abs()) + self.shift)  # type: ignore[index]
            if self.normalized:
                h = h / h.abs().sum(dim=1, keepdim=True)
        return h

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Features (M, E) and times (M, 1); made afresh where ``.to(bfloat16)`` has rounded the tables."""
        z, t = self.pos_emb.z[0, :length], self.pos_emb.t[0, :length]  # type: ignore[index]
        if z.dtype in (torch.float32, torch.float64):
            return z, t
        exact = position_features(self.l_max, length, self.emb_dim).to(z.device, torch.float32)
        return (z.float() if isinstance(self.pos_emb.z, nn.Parameter) else exact), exact[:, :1]

    def add_bias(self, y: Tensor, v: Tensor, channels: slice) -> Tensor:
        """y + b v in v's dtype: the tap at the token itself beside the filter's."""
        return torch.addcmul(y, v, self.bias[channels].to(y.dtype)) if self.use_bias else y


def position_features(l_max: int, length: int, emb_dim: int) -> Tensor:
    """Time, cosines and negated sines of the first ``length`` of ``l_max`` positions, (length, E) float64."""
    t = torch.linspace(0, 1, l_max, dtype=torch.float64)[:length, None]
    angle = 2 * math.pi * torch.arange(length, dtype=torch.float64)[:, None] / l_max
    bands = (emb_dim - 1) // 2
    phase = angle * torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    return torch.cat([t, phase.cos(), -phase.sin()], dim=1)


def _register(module: nn.Module, name: str, table: Tensor, rate: float) -> None:
    if rate == 0:
        module.register_buffer(name, table)
        return
    parameter = nn.Parameter(table)
    parameter._optim = {"weight_decay": 0.0, "lr": rate}  # type: ignore[attr-defined]
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    module.register_parameter(name, parameter)


class _LongConvolution(torch.autograd.Function):
    """Causal convolution by FFT that keeps its inputs, not their spectra, for the backward pass.

    Spectra of a million positions are complex float32 of twice the length: eight times a bfloat16 input, for a
    transform that takes a few milliseconds to repeat.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(u, taps)
        n = fft_length(u.shape[1] + taps.shape[0])
        return _back(_spectrum(u, n).mul_(_spectrum(taps, n)), n, u.shape[1], u.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, taps = ctx.saved_tensors
        n = fft_length(u.shape[1] + taps.shape[0])
        du = dtaps = None
        back = _spectrum(grad, n)
        if ctx.needs_input_grad[1]:
            product = (back * _spectrum(u, n).conj()).sum(dim=0)
            dtaps = _back(product, n, taps.shape[0], taps.dtype)
            del product
        if ctx.needs_input_grad[0]:
            du = _back(back.mul_(_spectrum(taps, n).conj()), n, u.shape[1], u.dtype)
        return du, dtaps


def _spectrum(x: Tensor, n: int) -> Tensor:
    """(..., L, C) -> (..., C, n/2 + 1), in float32 at least: transforms along the last, contiguous axis are fastest."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.fft.rfft(x.transpose(-1, -2).to(wide), n=n)


def _back(spectrum: Tensor, n: int, length: int, dtype: torch.dtype) -> Tensor:
    return torch.fft.irfft(spectrum, n=n)[..., :length].transpose(-1, -2).to(dtype)


def long_convolution(u: Tensor, taps: Tensor, length: int) -> Tensor:
    """y_t = sum_s taps_s u_{t - s}, the last ``length`` positions.

    Args:
        u: (B, T + L, C).
        taps: (M, C), M at least T + L.
        length: L.

    Returns:
        (B, L, C) in u's dtype.
    """
    if not u.shape[0] or not length:  # there is nothing to transform
        return u[:, u.shape[1] - length :]
    if length == 1:  # a decoding step: one sum
        taps = taps[: u.shape[1]].flip(0)
        return (u.to(taps.dtype) * taps).sum(dim=1, keepdim=True).to(u.dtype)
    return _LongConvolution.apply(u, taps)[:, u.shape[1] - length :]  # type: ignore[index]


def circular_convolution(u: Tensor, taps: Tensor, length: int) -> Tensor:
    """The published two-sided convolution: of twice the length, circular, with u moved right by half its length.

    A position sees what is half a length or more before it and after it; the arguments are those of
    ``long_convolution``.
    """
    if not u.shape[0] or not length:
        return u
    half, wide = length // 2, taps.dtype
    padded = nn.functional.pad(u.transpose(1, 2).to(wide), (half, half))
    spectrum = torch.fft.rfft(padded, n=2 * length) * torch.fft.rfft(taps.T, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2).to(u.dtype)
