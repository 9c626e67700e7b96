"""RMSNorm and LayerNorm as one op: with a residual added first, a gate before or after, over groups of channels.

``norm`` is the function to call. Models that must survive tracing call the custom op behind it,
``torch.ops.triscan.norm``, whose arguments are the same by position; checks and dispatch are inside the op.

D channels, G groups.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import resolve, runs_on_numba
from kernels.norm.problem import make_problem
from kernels.plans import Plan, Plans
from kernels.recompute import gradients
from kernels.registration import op

__all__ = ["norm"]


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    kind: Literal["rms", "layer"] = "rms",
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    residual_in_fp32: bool = True,
    return_residual: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises ``s = x + residual`` over the last axis and applies weight, bias and gate.

    ``y = s / sqrt(mean(s^2) + eps) * weight + bias`` for ``rms`` (Zhang & Sennrich 2019, equation 4); ``layer`` takes
    the mean away first (Ba et al. 2016). Statistics are float32 (float64 for float64). Float dtypes may be mixed.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)`` or None.
        residual: Shape of x; added to x before the norm.
        z: Gate, shape of x: ``norm(s) * silu(z)``, or ``norm(s * silu(z))`` with ``norm_before_gate=False``.
        kind: ``rms`` or ``layer``.
        eps: Added to the mean square.
        group_size: Channels that share statistics, a divisor of D; None is the whole row.
        norm_before_gate: Whether the gate comes after the norm.
        residual_in_fp32: Whether s is returned in float32 (float64 for float64), else in residual's dtype (or x's).
        return_residual: Whether to return s too.
        backend: ``auto``, ``triton``, ``cpu``, ``torch`` or ``reference``; see ``kernels.backend``.

    Returns:
        y in x's dtype, and s if asked for.

    Raises:
        ValueError: If a shape, dtype, device or value doesn't fit; the message names the tensor and the fix.
    """
    if not torch.compiler.is_compiling() and x.is_cpu and runs_on_numba(backend):
        # without the op and its dispatch, where nothing but the kernels has a part
        found = _loaded("cpu_direct").find(
            x, weight, bias, residual, z, kind, eps, group_size, norm_before_gate, residual_in_fp32, return_residual
        )
        if found is not None:
            y, s = found
            if not return_residual:
                return y
            return y, (x.float() if residual_in_fp32 else x) if s is None else s
    arguments = (x, weight, bias, residual, z, kind, eps, group_size or 0, norm_before_gate, residual_in_fp32)
    if backend in ("torch", "reference"):  # plain operators: differentiable twice, exportable
        y, s, _, _ = _implementation(backend).norm(make_problem(*arguments))
    else:
        y, s, _, _ = _norm(*arguments, backend)
    if not return_residual:
        return y
    if residual is None:
        s = x.float() if residual_in_fp32 and x.dtype != torch.float64 else x
    return y, s


def _implementation(name: str) -> Any:
    """The module behind a backend: ``norm`` for plain operators, ``forward`` and ``backward`` for kernels."""
    if name == "cpu":
        from kernels.norm import cpu as module
    elif name == "cpu_direct":
        from kernels.norm import cpu_direct as module
    elif name == "triton":
        from kernels.norm import triton as module
    else:
        from kernels.norm import reference as module
    return module


_plans, _backward_plans = Plans(), Plans()
_loaded = functools.cache(_implementation)  # an import statement takes microseconds; inside an op nothing is traced


def _resolve(plan: Plan, backend: str, device: torch.device) -> str:
    """The backend that runs a problem."""
    if "backend" not in plan:
        plan["backend"] = resolve("norm", backend, device)
    return plan["backend"]


@op
def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    z: Tensor | None,
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    residual_in_fp32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + residual (empty without a residual), and the statistics mean and rstd ``(..., G)``."""
    flags = (kind, eps, group_size, norm_before_gate, residual_in_fp32)
    plan = _plans.find((x, weight, bias, residual, z), (*flags, backend))
    p = make_problem(x, weight, bias, residual, z, *flags, plan)
    name = _resolve(plan, backend, x.device)
    if name in ("cpu", "triton"):
        y, s, mean, rstd = _loaded(name).forward(p)
    else:
        y, s, mean, rstd = _loaded(name).norm(p)
    return y.contiguous(), s.contiguous(), mean.contiguous(), rstd.contiguous()


@_norm.register_fake
def _(x, weight, bias, residual, z, kind, eps, group_size, norm_before_gate, residual_in_fp32, backend):
    p = make_problem(x, weight, bias, residual, z, kind, eps, group_size, norm_before_gate, residual_in_fp32)
    size = (0,) if residual is None else x.shape
    stats = x.new_empty(p.stats_shape, dtype=p.dtype)
    return x.new_empty(x.shape), x.new_empty(size, dtype=p.residual_dtype), stats, torch.empty_like(stats)


@op
def _norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    z: Tensor | None,
    residual_dtype: torch.dtype | None,
    kind: str,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    residual_in_fp32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in dy's dtype), weight, bias, residual and z, shaped as these; empty for absent ones.

    ``ds`` is the gradient of x + residual. With ``residual_dtype`` but no residual, x is that sum.
    """
    flags = (kind, eps, group_size, norm_before_gate, residual_in_fp32)
    plan = _backward_plans.find((dy, ds, mean, rstd, x, weight, bias, residual, z), (*flags, residual_dtype, backend))
    p = make_problem(x, weight, bias, residual, z, *flags, plan)
    name = _resolve(plan, backend, x.device)
    if name in ("cpu", "triton"):
        dx, dweight, dbias, dresidual, dz = _loaded(name).backward(p, dy, ds, mean, rstd, residual_dtype)
    else:

        def run(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
            y, s, _, _ = _loaded(name).norm(make_problem(x, *tensors, *flags))  # type: ignore[arg-type]
            return y, x if residual is None else s

        dx, dweight, dbias, dresidual, dz = gradients(run, (x, weight, bias, residual, z), (dy, ds))
        if residual is None:  # an op's outputs share no memory
            dresidual = None if residual_dtype is None else dx.to(residual_dtype, copy=True)
            dx = dx.to(dy.dtype)
    return (
        dx,
        dweight.to(weight.dtype),
        x.new_empty(0) if bias is None else dbias.to(bias.dtype),
        x.new_empty(0) if dresidual is None else dresidual,
        x.new_empty(0) if z is None else dz.to(z.dtype),
    )


@_norm_backward.register_fake
def _(
    dy, ds, mean, rstd, x, weight, bias, residual, z, residual_dtype,
    kind, eps, group_size, norm_before_gate, residual_in_fp32, backend,
):  # fmt: skip
    dweight, dbias, dz = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias, z))
    dresidual = x.new_empty(0) if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype)
    return x.new_empty(x.shape, dtype=dy.dtype), dweight, dbias, dresidual, dz


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, z, *ctx.flags = inputs
    _, s, mean, rstd = output
    ctx.given = (bias is not None, residual is not None, z is not None)
    # x + residual replaces its terms where nothing was lost: it is kept alive by the next layer anyway
    kept = (s, None) if residual is not None and s.dtype == rstd.dtype else (x, residual)
    ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
    ctx.save_for_backward(kept[0], weight, bias, kept[1], z, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, mean, rstd = ctx.saved_tensors
    has_bias, has_residual, has_z = ctx.given
    none = (None,) * len(ctx.flags)
    ds = ds if has_residual else None
    if dy is None and ds is None:
        return (None,) * 5 + none
    if dy is None:
        dy = torch.zeros_like(tensors[0], dtype=ctx.dtypes[0])
    dx, dweight, dbias, dresidual, dz = _norm_backward(dy, ds, mean, rstd, *tensors, ctx.dtypes[1], *ctx.flags)
    return (
        dx,
        dweight,
        dbias if has_bias else None,
        dresidual if has_residual else None,
        dz if has_z else None,
        *none,
    )


_norm.register_autograd(_backward, setup_context=_setup_context)


def _norm_flops(x: Any, residual: Any, z: Any) -> int:
    """Five operations a channel (square, sum, scale, weight, bias), one for a residual, two for a gate."""
    total = 1
    for size in x:
        total *= size
    return total * (5 + (residual is not None) + 2 * (z is not None))


@register_flop_formula(torch.ops.triscan.norm)
def _forward_flops(x, weight, bias, residual, z, *args, **kwargs) -> int:
    return _norm_flops(x, residual, z)


@register_flop_formula(torch.ops.triscan.norm_backward)
def _backward_flops(dy, ds, mean, rstd, x, weight, bias, residual, z, *args, **kwargs) -> int:
    return 2 * _norm_flops(x, residual, z)
