"""Time-invariant diagonal state spaces as one op: what S4D, and every layer of its kind, computes.

``diagonal_ssm`` is the function to call, ``torch.ops.triscan.diagonal_ssm`` the custom op behind it, whose arguments
are the same by position. ``vandermonde`` is the kernel of the same system as a convolution.

B batch, L length, H channels, M complex states of a channel (half of N real ones; their conjugates are implied).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import recompute
from kernels.backend import resolve
from kernels.checks import check_shape, owned
from kernels.diagonal_ssm import aten, reference
from kernels.diagonal_ssm.powers import vandermonde
from kernels.registration import op

__all__ = ["diagonal_ssm", "vandermonde"]


def diagonal_ssm(
    u: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs ``x_t = exp(log_a) x_{t-1} + B u_t``, ``y_t = 2 Re sum_m C_m x_{t,m}`` (Gu et al. 2022, S4D, section 3).

    A whole sequence is cut into chunks and becomes matrix products: within a chunk by the system's kernel, between
    chunks by its state (as SSD does for a selective scan, Dao & Gu 2024, section 6). That needs no Fourier transform,
    starts from any state, is causal to the bit, and keeps nothing but its inputs for the backward, which computes the
    rest again. Float64 tensors are computed in float64, others in float32; powers of ``exp(log_a)`` in float64 always,
    since their phases grow with time.

    Args:
        u: ``(B, L, H)`` real input.
        log_a: ``(H, M)`` complex logarithm of the discrete decay, with real part below 0.
        B: ``(H, M)`` complex discrete input weights.
        C: ``(H, M)`` complex output weights.
        initial_state: ``(B, H, M)`` complex; zeros by default.
        backend: ``reference`` for the definition; ``triton`` has kernels for the states between chunks; all others of
            ``kernels.backend`` mean the same operators.

    Returns:
        y ``(B, L, H)`` in u's dtype, and the final state ``(B, H, M)`` complex.

    Raises:
        ValueError: If a shape, dtype or device doesn't fit; the message names the tensor and the fix.
    """
    return torch.ops.triscan.diagonal_ssm(u, log_a, B, C, initial_state, backend)


def _check(u: Tensor, log_a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None) -> None:
    if not u.is_floating_point():
        raise ValueError(f"u: got dtype {u.dtype}, wanted a real floating-point one; convert it with .float()")
    if u.ndim != 3:
        raise ValueError(f"u: got shape {tuple(u.shape)}, wanted (B, L, H)")
    if log_a.ndim != 2:
        raise ValueError(f"log_a: got shape {tuple(log_a.shape)}, wanted (H, M)")
    size = (u.shape[2], log_a.shape[1])
    wanted = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    for name, t in (("log_a", log_a), ("B", B), ("C", C), ("initial_state", initial_state)):
        if t is None:
            continue
        check_shape(name, t, (u.shape[0], *size) if name == "initial_state" else size, "(H, M), a state (B, H, M)")
        if t.dtype != wanted:
            raise ValueError(f"{name}: got dtype {t.dtype}, wanted {wanted} for u of {u.dtype}; convert it with .to()")
        if t.device != u.device:
            raise ValueError(f"{name}: got device {t.device}, wanted {u.device} as u; move it with .to(u.device)")


def _backend(u: Tensor, backend: str) -> tuple[Any, Any, Any]:
    """Three functions: from (B, L, H) to (H, B, L), back, and in between in plain differentiable operators."""
    name = resolve("diagonal_ssm", backend, u.device)
    if name == "triton" and u.dtype != torch.float64 and u.numel():
        from kernels.diagonal_ssm import triton

        return triton.rows, triton.put_rows, functools.partial(aten.diagonal_ssm, between=triton.between)
    return aten.rows, aten.put_rows, _reference if name == "reference" else aten.diagonal_ssm


def _reference(u: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    y, state = reference.diagonal_ssm(u.permute(1, 2, 0), *arguments)
    return y.permute(2, 0, 1), state


@op
def _diagonal_ssm(
    u: Tensor, log_a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """y ``(B, L, H)`` and the final state ``(B, H, M)``."""
    _check(u, log_a, B, C, initial_state)
    with torch.autocast(u.device.type, enabled=False), torch.no_grad():
        y = u.new_empty(u.shape)
        final = log_a.new_empty((u.shape[0], *log_a.shape))
        rows, put_rows, run = _backend(u, backend)
        for part in aten.channel_blocks(u):
            s0 = None if initial_state is None else initial_state[:, part]
            found, final[:, part] = run(rows(u[:, :, part], log_a.real.dtype), log_a[part], B[part], C[part], s0)
            put_rows(found, y[:, :, part])
    return y, final


@_diagonal_ssm.register_fake
def _(u, log_a, B, C, initial_state, backend):
    _check(u, log_a, B, C, initial_state)
    return u.new_empty(u.shape), log_a.new_empty((u.shape[0], *log_a.shape))


@op
def _diagonal_ssm_backward(
    dy: Tensor | None,
    dstate: Tensor | None,
    u: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, log_a, B, C and the initial state, shaped as these."""
    grads = [u.new_empty(u.shape), *(t.new_empty(t.shape) for t in (log_a, B, C))]
    dinitial = log_a.new_empty(0 if initial_state is None else initial_state.shape)
    rows, put_rows, run = _backend(u, backend)
    with torch.autocast(u.device.type, enabled=False):
        for part in aten.channel_blocks(u):
            s0 = None if initial_state is None else initial_state[:, part]
            found = recompute.gradients(
                run,
                (rows(u[:, :, part], log_a.real.dtype), log_a[part], B[part], C[part], s0),
                (
                    None if dy is None else rows(dy[:, :, part], log_a.real.dtype),
                    None if dstate is None else dstate[:, part],
                ),
            )
            put_rows(found[0], grads[0][:, :, part])
            for grad, values in zip(grads[1:], found[1:4], strict=True):
                grad[part] = values
            if initial_state is not None:
                dinitial[:, part] = found[4]
    return grads[0], grads[1], grads[2], grads[3], owned(dinitial, dinitial.shape)


@_diagonal_ssm_backward.register_fake
def _(dy, dstate, u, log_a, B, C, initial_state, backend):
    shape = 0 if initial_state is None else initial_state.shape
    return (*(t.new_empty(t.shape) for t in (u, log_a, B, C)), log_a.new_empty(shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None and dstate is None:
        return (None,) * 6
    tensors = ctx.saved_tensors
    *grads, dinitial = torch.ops.triscan.diagonal_ssm_backward(dy, dstate, *tensors, ctx.backend)
    return (*grads, None if tensors[4] is None else dinitial, None)


_diagonal_ssm.register_autograd(_backward, setup_context=_setup_context)


def _flops(u: Any, log_a: Any) -> int:
    """A product by the kernel's matrix within a chunk, one into the state and one out of it."""
    return 2 * u[0] * u[1] * u[2] * (aten.CHUNK + 4 * log_a[1])


@register_flop_formula(torch.ops.triscan.diagonal_ssm)
def _forward_flops(u, log_a, *args, **kwargs) -> int:
    return _flops(u, log_a)


@register_flop_formula(torch.ops.triscan.diagonal_ssm_backward)
def _backward_flops(dy, dstate, u, log_a, *args, **kwargs) -> int:
    return 3 * _flops(u, log_a)  # the forward again, and two products for each of its products
