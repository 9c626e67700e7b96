"""What PyTorch's counter of floating-point operations takes a selective scan for."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import kernels.selective_scan.op  # noqa: F401  registers the ops


def _scan_flops(x: Any, A: Any, dt_weight: Any, route: Any) -> int:
    """Multiplications and additions: 7 a state (decay, input, recurrence, read-out), 2 R for each projected dt."""
    routes, positions = (1, x[1]) if route is None else route
    elements = x[0] * positions * routes * x[-1]
    return elements * (7 * A[-1] + (0 if dt_weight is None else 2 * dt_weight[-1]))


@register_flop_formula(torch.ops.triscan.selective_scan)
def _forward_flops(x, dt, A, B, C, D, z, dt_bias, dt_weight, route, *args, **kwargs) -> int:
    return _scan_flops(x, A, dt_weight, route)


@register_flop_formula(torch.ops.triscan.selective_scan_backward)
def _backward_flops(dy, dstate, saved, x, dt, A, B, C, D, z, dt_bias, dt_weight, route, *args, **kwargs) -> int:
    """Twice the forward for the two adjoint scans, once more for the states that are computed again."""
    return 3 * _scan_flops(x, A, dt_weight, route)
