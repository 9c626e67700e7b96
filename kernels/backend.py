"""Which implementation of an op runs, and why. The one place that decides.

``auto`` (or the environment variable ``TRISCAN_BACKEND``) picks by device: CUDA C++ compiled at run time on NVIDIA GPUs
where an op has such a kernel for its arguments, Triton on NVIDIA, AMD and Intel GPUs, numba on the CPU, plain ATen
operators everywhere else. A named backend is taken as it is, or refused with a reason.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

BACKENDS = ("auto", "cuda", "triton", "cpu", "torch", "reference")
GPU_TYPES = ("cuda", "xpu")


@functools.cache
def warn_once(message: str) -> None:
    """Warns the first time it is called with ``message``."""
    warnings.warn(message, stacklevel=3)


@functools.cache
def has(module: str) -> bool:
    """Whether ``module`` is installed; does not import it."""
    return importlib.util.find_spec(module) is not None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU that copies boxes of tensors and launches kernels early (sm_90 and later)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def dependent_launch(t: torch.Tensor) -> dict[str, bool]:
    """Options of a Triton kernel with a ``PDL`` switch: programmatic dependent launch where the GPU of ``t`` has it."""
    return {"PDL": True, "launch_pdl": True} if is_hopper(t.device) and not interpreting() else {"PDL": False}


def choose(backend: str, device: torch.device, cuda: bool = False) -> tuple[str, str]:
    """The implementation that ``backend`` means on ``device``, and the reason in words.

    Args:
        backend: One of ``BACKENDS``; ``auto`` defers to ``TRISCAN_BACKEND``, then to the device.
        device: Where the tensors are.
        cuda: Whether the op has a CUDA kernel that takes its arguments here.

    Returns:
        ``(name, reason)`` with name one of ``cuda``, ``triton``, ``cpu``, ``torch``, ``reference``.

    Raises:
        ValueError: For an unknown backend, or one that cannot run on ``device``.
    """
    source = "argument"
    if backend == "auto" and os.environ.get("TRISCAN_BACKEND"):
        backend, source = os.environ["TRISCAN_BACKEND"], "TRISCAN_BACKEND"
    if backend not in BACKENDS:
        near = difflib.get_close_matches(backend, BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend ({source}): got {backend!r}, wanted one of {', '.join(BACKENDS)}{hint}")
    if backend == "cuda" and source == "TRISCAN_BACKEND" and not cuda:
        backend = "auto"  # not every op has such a kernel, and the variable holds for all
    if backend != "auto":
        return _named(backend, source, device, cuda)
    if cuda:
        return "cuda", f"device {device.type}, which has a CUDA kernel for these arguments"
    if device.type in GPU_TYPES:
        if has("triton"):
            return "triton", f"device {device.type} and Triton is installed"
        return "torch", f"device {device.type} without Triton (slow): pip install triton"
    if device.type == "cpu":
        if has("numba"):
            return "cpu", "device cpu and numba is installed"
        return "torch", "device cpu without numba (slow): pip install numba"
    return "torch", f"no kernel exists for device {device.type}"


def runs_on_numba(backend: str) -> bool:
    """Whether ``choose`` means ``cpu`` for tensors on the CPU: its answer in a fraction of its time, at each call."""
    if backend == "auto":
        return (_environment() or "auto") in ("auto", "cuda", "cpu") and has("numba")
    return backend == "cpu" and has("numba")


def _read_environment() -> Callable[[], str | None]:
    """A function that reads ``TRISCAN_BACKEND``: in ``os.environ`` it takes longer than a short norm."""
    data, key = getattr(os.environ, "_data", None), os.environ.encodekey("TRISCAN_BACKEND")
    if not isinstance(data, dict):
        return lambda: os.environ.get("TRISCAN_BACKEND")
    return lambda: data.get(key) and os.environ["TRISCAN_BACKEND"]


_environment = _read_environment()


def _named(backend: str, source: str, device: torch.device, cuda: bool) -> tuple[str, str]:
    """A backend asked for by name, checked against the device."""
    reason = f"asked for ({source})"
    if backend in ("torch", "reference"):
        return backend, reason
    if backend == "cpu":
        if device.type == "cpu" and has("numba"):
            return backend, reason
        fix = "install numba" if device.type == "cpu" else "move the tensors to the CPU or use backend='auto'"
        raise ValueError(f"backend 'cpu' ({source}): got tensors on {device.type}, wanted CPU and numba; {fix}")
    if backend == "cuda":
        if cuda:
            return backend, reason
        raise ValueError(
            f"backend 'cuda' ({source}): got arguments on {device.type} for which this op has no CUDA kernel, wanted "
            "an NVIDIA GPU of compute capability 8.0 or later and float32, bfloat16, float16 or complex64 tensors; "
            "use backend='auto'"
        )
    if not has("triton"):
        raise ValueError(f"backend {backend!r} ({source}): Triton is not installed; pip install triton")
    if device.type in GPU_TYPES or interpreting():
        return "triton", reason
    raise ValueError(
        f"backend {backend!r} ({source}): got tensors on {device.type}, wanted a GPU; "
        "move the tensors there, use backend='auto', or set TRITON_INTERPRET=1 to interpret the kernels"
    )


def resolve(op: str, backend: str, device: torch.device, cuda: bool = False) -> str:
    """``choose`` for one op; warns once when the choice is a slow fallback.

    Args:
        op: Name of the op, for the warning.
        backend: One of ``BACKENDS``.
        device: Where the tensors are.
        cuda: Whether the op has a CUDA kernel that takes its arguments here.
    """
    name, reason = choose(backend, device, cuda)
    if name == "torch" and not reason.startswith("asked"):
        warn_once(f"{op} runs on plain PyTorch operators: {reason}")
    return name
