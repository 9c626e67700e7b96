"""How a low-precision result is judged: against float64, by the error of the reference in the same dtype."""

from __future__ import annotations

import torch


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    """rms(value - truth) / rms(truth), computed in float64; NaN counts as infinite."""
    wide = torch.complex128 if truth.is_complex() else torch.float64
    value, truth = value.detach().to("cpu", wide), truth.detach().to("cpu", wide)
    if not torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all():
        return float("inf")
    scale = truth.abs().square().mean().sqrt().item()
    error = (value - truth).abs().square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_as_accurate(name: str, value: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor) -> None:
    """Holds ``value`` to at most twice the error of ``reference``, both against the float64 ``truth``.

    The floor of a few units in the last place keeps exact references (zeros, copies) from asking the impossible.
    """
    assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, wanted {tuple(truth.shape)}"
    assert value.dtype == reference.dtype, f"{name}: dtype {value.dtype}, wanted {reference.dtype}"
    floor = 4 * torch.finfo(value.dtype).eps
    ours, theirs = relative_rms(value, truth), relative_rms(reference, truth)
    assert ours <= max(2 * theirs, floor), (
        f"{name}: error {ours:.3g}, wanted at most twice the reference's {theirs:.3g}"
    )
