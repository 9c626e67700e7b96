"""Norms on the CPU called without an op's dispatch: their checks and the call of the kernel take a few microseconds.

What the kernels of ``cpu_rows`` take, in eager mode and with nobody watching, goes from ``norm`` straight to them; the
rest, and every misfit, goes through the op, whose checks say what is wrong. The op on the CPU runs the same kernels.

D channels, M rows, G groups of D / G channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.norm import cpu_rows
from kernels.norm.cpu_rows import ADD, BIAS, GATE_FIRST, GATE_LAST, LAYER, RESIDUAL, ROWS, SUM, WEIGHT, X, Z
from kernels.registration import TENSORS, modes, unwatched
from kernels.threads import over

NARROW = {torch.float32: False, torch.bfloat16: True}  # dtypes that the kernels read and write
FORMS = {"rms": 0, "layer": LAYER}
autocast, _any_requires_grad = torch._C._is_any_autocast_enabled, torch._C._any_requires_grad
FEW, FEW_IN_GRAPH = 1 << 13, 1 << 14  # numbers below which PyTorch's own LayerNorm is the faster one


def fits(t: Tensor, shape: torch.Size) -> bool:
    """Whether a kernel can read the memory of a tensor as it lies: dense rows of this shape."""
    return t.dtype in NARROW and t.shape == shape and t.is_cpu and t.is_contiguous() and not t.is_neg()


def find(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, z: Tensor | None,
    kind: str, eps: float, group_size: int | None, norm_before_gate: bool, residual_in_fp32: bool,
    return_residual: bool,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """y and, if asked for, x + residual, as ``norm`` returns them; None where the call is one for the op."""
    form = FORMS.get(kind)
    if form is None or not TENSORS.issuperset(map(type, (x, weight, bias, residual, z))):
        return None
    graph = torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual, z)
    total = None
    if residual is not None and return_residual:
        total = torch.float32 if residual_in_fp32 else residual.dtype
    if form and z is None and not group_size and _is_torch_faster(x, weight, bias, residual, graph):
        return _by_torch(x, weight, bias, residual, eps, total, graph)
    if not unwatched():
        return None
    shape = x.shape
    width = shape[-1:]
    if not (
        fits(x, shape) and fits(weight, width) and x.numel() and width
        and (bias is None or fits(bias, width))
        and (residual is None or fits(residual, shape))
        and (z is None or fits(z, shape))
    ):  # fmt: skip
        return None
    channels = width[0]
    size = group_size or channels
    if size < 0 or channels % size:
        return None
    if z is not None:
        form |= GATE_LAST if norm_before_gate else GATE_FIRST
    sizes = (x.numel() // size, size, channels // size)
    if graph:
        found = _Norm.apply(x, weight, bias, residual, z, form, eps, sizes, total)
        return found if total is not None else (found, None)
    y, s, _, _ = forward(x, weight, bias, residual, z, form, eps, sizes, total, False)
    return y, s


def _is_torch_faster(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, graph: bool
) -> bool:  # fmt: skip
    """Whether PyTorch's LayerNorm forms its sums in float32 and takes less time: a rule that ``benchmarks`` measured.

    Its nodes in the graph are C++; ours, which Python runs, take as long as the work on a few rows. Transforms, forward
    mode and tracers know it; modes that count or replace ops are to see ours.
    """
    if modes() or autocast():
        return False
    if x.dtype is torch.float32:
        return graph or x.numel() < FEW
    return (
        x.dtype is torch.bfloat16 and x.numel() < (FEW_IN_GRAPH if graph else FEW) and (graph or residual is None)
        and weight.dtype is torch.float32 and (bias is None or bias.dtype is torch.float32)
    )  # fmt: skip


def _by_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float,
    total: torch.dtype | None, graph: bool,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """The LayerNorm by PyTorch's, differentiable as that is; None if PyTorch refuses: the op's checks say why."""
    low, width = x.dtype is torch.bfloat16, x.shape[-1:]
    if not width or not width[0]:
        return None
    try:
        if residual is not None:
            if residual.shape != x.shape or residual.dtype not in NARROW:
                return None
            s = (x.float() if low and residual.dtype is torch.bfloat16 else x) + residual
        else:  # PyTorch's gradients of the parameters are rounded to bfloat16 where x is
            s = x.float() if low and graph else x
        y = torch.layer_norm(s, width, weight, bias, eps, False)
    except RuntimeError:
        return None
    if low:
        y = y.to(torch.bfloat16)
    return y, None if total is None else s if total is torch.float32 else s.to(total)


def _bits(narrow: int, t: Tensor | None, bit: int) -> int:
    return narrow | bit if t is not None and t.dtype is torch.bfloat16 else narrow


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, z: Tensor | None,
    form: int, eps: float, sizes: tuple[int, int, int], total: torch.dtype | None, keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """y, x + residual in the dtype ``total`` if there is one, mean (of a LayerNorm) and rstd (M G,) if they are kept.

    Args:
        x: As in ``norm``, like all tensors; each one ``fits``.
        weight: See x.
        bias: See x.
        residual: See x.
        z: See x.
        form: Bits of ``cpu_rows``.
        eps: As in ``norm``.
        sizes: M G, D / G, G.
        total: float32 or bfloat16.
        keep: Whether the statistics are.
    """
    s = None if total is None else torch.empty_like(x, dtype=total)
    y = torch.empty_like(x)
    rows = sizes[0]
    mean = torch.empty(rows, dtype=torch.float32) if keep and form & LAYER else None
    rstd = torch.empty(rows, dtype=torch.float32) if keep else None
    narrow = 0
    for t, bit in ((x, X), (residual, RESIDUAL), (z, Z), (weight, WEIGHT), (bias, BIAS), (s, SUM)):
        narrow = _bits(narrow, t, bit)
    arguments = (
        x.data_ptr(), _at(residual), _at(z), weight.data_ptr(), _at(bias), _at(s), y.data_ptr(), _at(mean), _at(rstd),
        sizes, narrow, form, np.float32(eps),
    )  # fmt: skip
    over(cpu_rows.forward, arguments, -(-rows // ROWS), x.numel())
    return y, s, mean, rstd


def backward(
    dy: Tensor, ds: Tensor | None, mean: Tensor | None, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, z: Tensor | None, residual_dtype: torch.dtype | None, form: int,
    sizes: tuple[int, int, int], parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x (in dy's dtype), weight, bias, residual and z; the first and the fourth may be one tensor.

    Args:
        dy: Gradient of y, like ds dense.
        ds: What arrives at x + residual from elsewhere.
        mean: Of ``forward``; read of a LayerNorm only.
        rstd: Of ``forward``.
        x: As in ``forward``; without a residual it may be the sum.
        weight: See x.
        bias: See x.
        residual: See x.
        z: See x.
        residual_dtype: Of the residual's gradient, None without one.
        form: As in ``forward``.
        sizes: As in ``forward``.
        parameters: Whether weight and bias get gradients.
    """
    rows, size, groups = sizes
    dx = torch.empty_like(dy)
    apart = residual_dtype is not None and residual_dtype != dy.dtype
    dresidual = torch.empty_like(dy, dtype=residual_dtype) if apart else None
    dz = None if z is None else torch.empty_like(z)
    jobs, channels = -(-rows // ROWS), size * groups
    part = torch.empty(jobs * 2 * channels, dtype=torch.float32)
    narrow = _bits(_bits(0, dy, X), dresidual, RESIDUAL) << 8
    for t, bit in ((x, X), (residual, RESIDUAL), (z, Z), (weight, WEIGHT), (bias, BIAS), (ds, ADD)):
        narrow = _bits(narrow, t, bit)
    arguments = (
        x.data_ptr(), _at(residual), _at(z), weight.data_ptr(), _at(bias), dy.data_ptr(), _at(ds),
        _at(mean), rstd.data_ptr(), dx.data_ptr(), _at(dresidual), _at(dz), part.data_ptr(), sizes, narrow, form,
    )  # fmt: skip
    over(cpu_rows.backward, arguments, jobs, 2 * x.numel())
    dweight = dbias = None
    if parameters:
        dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
        narrows = (_bits(0, weight, 1), _bits(0, bias, 1))
        cpu_rows.finish(part.data_ptr(), jobs, channels, dweight.data_ptr(), narrows[0], _at(dbias), narrows[1])
    return dx, dweight, dbias, dresidual if apart or residual_dtype is None else dx, dz


class _Norm(torch.autograd.Function):
    """The norm as autograd sees it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, z: Tensor | None,
        form: int, eps: float, sizes: tuple[int, int, int], total: torch.dtype | None,
    ) -> Any:  # fmt: skip
        y, s, mean, rstd = forward(x, weight, bias, residual, z, form, eps, sizes, total, True)
        # the sum replaces its terms where nothing was lost: it is kept alive by the next layer anyway
        kept = (s, None) if total is torch.float32 else (x, residual)
        ctx.save_for_backward(kept[0], weight, bias, kept[1], z, mean, rstd)
        ctx.given = (form, eps, sizes, x.dtype, None if residual is None else residual.dtype, total)
        ctx.set_materialize_grads(False)
        return y if s is None else (y, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        form, eps, sizes, dtype, residual_dtype, total = ctx.given
        if dy is None and ds is None:
            return (None,) * 9
        x, weight, bias, residual, z, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x, dtype=dtype)
        tensors = (dy, ds, x, weight, bias, residual, z, mean, rstd)
        if torch.is_grad_enabled() or not (TENSORS.issuperset(map(type, tensors)) and unwatched()):
            found = _by_op(dy, ds, mean, rstd, (x, weight, bias, residual, z), residual_dtype, form, eps, sizes, total)
        else:
            wanted = ctx.needs_input_grad
            dy, ds = dy.contiguous().resolve_neg(), None if ds is None else ds.contiguous().resolve_neg()
            found = backward(
                dy, ds, mean, rstd, x, weight, bias, residual, z, residual_dtype, form, sizes, wanted[1] or wanted[2]
            )
        return (*found, None, None, None, None)


def _by_op(
    dy: Tensor, ds: Tensor | None, mean: Tensor | None, rstd: Tensor, tensors: tuple[Tensor | None, ...],
    residual_dtype: torch.dtype | None, form: int, eps: float, sizes: tuple[int, int, int], total: torch.dtype | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``backward`` through the op, which modes and transforms see; refuses a second derivative."""
    from kernels.norm import _norm_backward

    _, size, groups = sizes
    x, _, bias, _, z = tensors
    assert x is not None
    rstd = rstd.view(*x.shape[:-1], groups)
    mean = torch.zeros_like(rstd) if mean is None else mean.view(rstd.shape)
    flags = ("layer" if form & LAYER else "rms", eps, size if groups > 1 else 0, not form & GATE_FIRST)
    dx, dweight, dbias, dresidual, dz = _norm_backward(
        dy, ds, mean, rstd, *tensors, residual_dtype, *flags, total is not torch.bfloat16, "cpu"
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if residual_dtype is None else dresidual,
        None if z is None else dz,
    )
