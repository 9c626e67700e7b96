"""The norms on the CPU, in threads of their own: ``cpu_rows`` where it takes the dtypes, else one numba pass over rows.

    u = s, or s gate with the gate first;   n = (u - mean) rstd;   o = n weight + bias;   y = o, or o gate
    do = dy, or dy gate;   dn = do weight;   du = rstd (dn - mean(dn) - n mean(dn n)), without mean(dn) for RMSNorm
    dweight = sum do n,   dbias = sum do,   ds = du, or du gate;   dgate = dy o, or du s

The rest is for float64, float16 and mixtures, and takes its exponentials from ATen.

D channels, M rows, G groups of D / G channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import owned
from kernels.jit import compiled
from kernels.norm import cpu_direct
from kernels.norm.cpu_direct import NARROW
from kernels.norm.cpu_rows import GATE_FIRST, GATE_LAST, LAYER
from kernels.norm.problem import Problem
from kernels.threads import parts, run

ROWS = 32  # rows in a job; a job sums its own part of dweight
SUMS = {"reassoc", "contract"}  # sums over a row may be vectorised; NaN and infinity keep their meaning


@compiled(fastmath=SUMS)
def _forward(x, residual, gate, weight, bias, layer, eps, gate_last, s, y, mean, rstd, first, last):
    """Writes s, y (M, D), mean and rstd (M, G) of rows first * ROWS <= m < last * ROWS; absent inputs are (0, 0)."""
    rows, channels = x.shape
    groups = mean.shape[1]
    size = channels // groups
    one = weight.dtype.type(1)
    for m in range(first * ROWS, min(rows, last * ROWS)):
        xr, yr = x[m], y[m]
        if residual.shape[0] > 0:
            rr, xr = residual[m], s[m]
            for d in range(channels):
                xr[d] = x[m, d] + rr[d]
        if gate.shape[0] > 0 and not gate_last:
            gr = gate[m]
            for d in range(channels):
                yr[d] = xr[d] * gr[d]
            xr = yr
        for i in range(groups):
            u, out = xr[i * size : (i + 1) * size], yr[i * size : (i + 1) * size]
            w, b = weight[i * size : (i + 1) * size], bias[i * size : (i + 1) * size]
            center = weight.dtype.type(0)
            if layer:
                for d in range(size):
                    center += u[d]
                center /= size
            square = weight.dtype.type(0)
            for d in range(size):
                square += (u[d] - center) * (u[d] - center)
            scale = one / np.sqrt(square / size + eps)
            mean[m, i], rstd[m, i] = center, scale
            for d in range(size):
                out[d] = (u[d] - center) * scale * w[d] + b[d]
        if gate.shape[0] > 0 and gate_last:
            gr = gate[m]
            for d in range(channels):
                yr[d] *= gr[d]


@compiled(fastmath=SUMS)
def _backward(s, dy, add, gate, weight, bias, mean, rstd, layer, gate_last, ds, dgate, dweight, dbias, first, last):
    """Writes ds and dgate (M, D), and each job's part of dweight and dbias (jobs, D)."""
    rows, channels = s.shape
    groups = mean.shape[1]
    size = channels // groups
    n, do = np.empty(size, weight.dtype), np.empty(size, weight.dtype)
    gated = gate.shape[0] > 0
    for job in range(first, last):
        dweight[job] = 0
        dbias[job] = 0
        for m in range(job * ROWS, min(rows, (job + 1) * ROWS)):
            for i in range(groups):
                a, z = i * size, (i + 1) * size
                sr, dr, w, out = s[m, a:z], dy[m, a:z], weight[a:z], ds[m, a:z]
                dw, db, center, scale = dweight[job, a:z], dbias[job, a:z], mean[m, i], rstd[m, i]
                if gated and not gate_last:
                    gr = gate[m, a:z]
                    for d in range(size):
                        n[d] = (sr[d] * gr[d] - center) * scale
                else:
                    for d in range(size):
                        n[d] = (sr[d] - center) * scale
                if gated and gate_last:
                    gr, dg, br = gate[m, a:z], dgate[m, a:z], bias[a:z]
                    for d in range(size):
                        dg[d] = dr[d] * (n[d] * w[d] + br[d])
                        do[d] = dr[d] * gr[d]
                else:
                    for d in range(size):
                        do[d] = dr[d]
                c1, c2 = weight.dtype.type(0), weight.dtype.type(0)
                for d in range(size):
                    dw[d] += do[d] * n[d]
                    db[d] += do[d]
                    do[d] *= w[d]  # dn, rounded: in a row of one channel it is its mean, exactly
                    c1 += do[d] * n[d]
                    c2 += do[d]
                c1 /= size
                c2 = c2 / size if layer else weight.dtype.type(0)
                for d in range(size):
                    out[d] = scale * (do[d] - c2 - n[d] * c1)
                if gated and not gate_last:
                    gr, dg = gate[m, a:z], dgate[m, a:z]
                    for d in range(size):
                        dg[d] = out[d] * sr[d]
                        out[d] *= gr[d]
                if add.shape[0] > 0:
                    ar = add[m, a:z]
                    for d in range(size):
                        out[d] += ar[d]


def _rows(p: Problem, t: Tensor | None) -> np.ndarray:
    """``(M, D)`` in the dtype of the statistics; an empty array for None."""
    if t is None:
        return np.empty((0, 0), np.float64 if p.dtype == torch.float64 else np.float32)
    return t.detach().to(p.dtype).reshape(-1, p.channels).contiguous().numpy()


def _parameters(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias ``(D,)``, zeros for no bias."""
    bias = torch.zeros(p.channels) if p.bias is None else p.bias.detach()
    return p.weight.detach().to(p.dtype).contiguous().numpy(), bias.to(p.dtype).contiguous().numpy()


def _view(t: Tensor, columns: int) -> np.ndarray:
    return t.view(-1, columns).numpy()


def _gate(p: Problem) -> Tensor | None:
    return None if p.z is None else F.silu(p.z.detach().to(p.dtype))


def _total(p: Problem) -> Tensor:
    """x + residual in the dtype of the statistics."""
    s = p.x.detach().to(p.dtype)
    return s if p.residual is None else s + p.residual.to(p.dtype)


def _as_rows(p: Problem, *others: Tensor | None) -> tuple[Any, ...] | None:
    """The tensors as the kernels of ``cpu_rows`` read them, if they can: x, weight, bias, residual, z and others."""
    tensors = (p.x, p.weight, p.bias, p.residual, p.z, *others)
    if p.dtype != torch.float32 or not p.x.numel() or any(t is not None and t.dtype not in NARROW for t in tensors):
        return None
    return tuple(t if t is None else t.detach().contiguous().resolve_neg() for t in tensors)


def _form(p: Problem) -> int:
    gate = 0 if p.z is None else GATE_LAST if p.norm_before_gate else GATE_FIRST
    return gate | (LAYER if p.layer else 0)


def _sizes(p: Problem) -> tuple[int, int, int]:
    size = p.channels // p.groups
    return p.x.numel() // size, size, p.groups


def _rows_forward(p: Problem, tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``forward`` by the kernels of ``cpu_rows``."""
    total = None
    if p.residual is not None:
        total = p.residual_dtype if p.residual_dtype in NARROW else torch.float32
    x, weight, bias, residual, z = tensors
    y, s, mean, rstd = cpu_direct.forward(
        x, weight, bias, residual, z, _form(p), p.eps, _sizes(p), total, True
    )  # fmt: skip
    assert rstd is not None
    rstd = owned(rstd, p.stats_shape)
    mean = torch.zeros_like(rstd) if mean is None else owned(mean, p.stats_shape)
    return y, p.x.new_empty(0, dtype=p.residual_dtype) if s is None else s.to(p.residual_dtype), mean, rstd


def _rows_backward(
    p: Problem, dy: Tensor, ds: Tensor | None, mean: Tensor, rstd: Tensor, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """``backward`` by the kernels of ``cpu_rows``, None if they don't take the problem."""
    tensors = _as_rows(p, dy, ds)
    if tensors is None or (residual_dtype is not None and residual_dtype not in NARROW):
        return None
    x, weight, bias, residual, z, dy_, ds = tensors
    stats = (mean.contiguous(), rstd.contiguous())
    dx, dweight, dbias, dresidual, dz = cpu_direct.backward(
        dy_,
        ds,
        *stats,
        x,
        weight,
        bias,
        residual,
        z,
        residual_dtype,
        _form(p),
        _sizes(p),
        True,
    )
    assert dweight is not None
    return dx, dweight, dbias, dx.clone() if dresidual is dx else dresidual, dz


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in x's dtype, x + residual (empty without a residual), mean and rstd ``(..., G)``."""
    if (tensors := _as_rows(p)) is not None:
        return _rows_forward(p, tensors)
    weight, bias = _parameters(p)
    x, residual, gate = _rows(p, p.x), _rows(p, p.residual), _rows(p, _gate(p))
    y = torch.empty(p.x.shape, dtype=p.dtype)
    s = torch.empty(0 if p.residual is None else p.x.shape, dtype=p.dtype)
    mean, rstd = torch.empty(p.stats_shape, dtype=p.dtype), torch.empty(p.stats_shape, dtype=p.dtype)
    outputs = (_view(s, p.channels), _view(y, p.channels), _view(mean, p.groups), _view(rstd, p.groups))
    eps = weight.dtype.type(p.eps)
    arguments = (x, residual, gate, weight, bias, p.layer, eps, p.norm_before_gate, *outputs)
    run(_forward, [(*arguments, *part) for part in parts(-(-x.shape[0] // ROWS))])
    return y.to(p.x.dtype), s.to(p.residual_dtype), mean, rstd


def backward(
    p: Problem, dy: Tensor, ds: Tensor | None, mean: Tensor, rstd: Tensor, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (in dy's dtype), weight, bias, the residual (in ``residual_dtype`` if there is one) and z.

    Args:
        p: The problem; its x may be the sum of x and a residual.
        dy: Gradient of y.
        ds: What arrives at the sum from elsewhere.
        mean: Of the forward.
        rstd: Of the forward.
        residual_dtype: Of the residual, None without one.
    """
    found = _rows_backward(p, dy, ds, mean, rstd, residual_dtype)
    if found is not None:
        return found
    weight, bias = _parameters(p)
    gate = _gate(p)
    s, dy_rows, add, gate_rows = _rows(p, _total(p)), _rows(p, dy), _rows(p, ds), _rows(p, gate)
    out = torch.empty(p.x.shape, dtype=p.dtype)
    dgate = torch.empty(0 if gate is None else p.x.shape, dtype=p.dtype)
    jobs = -(-s.shape[0] // ROWS)
    dweight, dbias = torch.empty(jobs, p.channels, dtype=p.dtype), torch.empty(jobs, p.channels, dtype=p.dtype)
    stats = (_view(mean.contiguous(), p.groups), _view(rstd.contiguous(), p.groups))
    outputs = (_view(out, p.channels), _view(dgate, p.channels), dweight.numpy(), dbias.numpy())
    arguments = (s, dy_rows, add, gate_rows, weight, bias, *stats, p.layer, p.norm_before_gate, *outputs)
    run(_backward, [(*arguments, *part) for part in parts(jobs)])
    dz = None if p.z is None else torch.ops.aten.silu_backward(dgate, p.z.to(p.dtype))
    # an op's outputs share no memory
    dresidual = None if residual_dtype is None else out.to(residual_dtype, copy=True)
    return out.to(dy.dtype), dweight.sum(0), dbias.sum(0), dresidual, dz
