"""What an op works out from the sizes of its arguments, kept between calls.

Checks, the choice of an implementation, shapes of blocks and compiled kernels follow from the signature of a call: the
sizes, strides, dtypes, devices and alignment of its tensors, and its flags. Python takes longer over them than a GPU
over a short scan, so they are worked out at the first call of each signature.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Plan = dict[Any, Any]  # whatever the parts of an op keep for one signature, each under keys of its own; no tensors
KEPT = 1024  # plans of an op

T = TypeVar("T")

_nothing = contextlib.nullcontext()


class Plans:
    """The plans of one op."""

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], Plan] = {}

    def find(self, tensors: Sequence[Tensor | None], flags: tuple[object, ...]) -> Plan:
        """The plan of a call; an empty one at the first call of its signature.

        Args:
            tensors: The op's tensors: real ones, none that is being traced.
            flags: Its other arguments.
        """
        key = (
            flags,
            os.environ.get("TRISCAN_BACKEND"),
            tuple([
                None if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16)
                for t in tensors
            ]),
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= KEPT:
                self._plans.clear()
            plan = self._plans[key] = {}
        return plan


class kept(Generic[T]):  # noqa: N801  a decorator, as ``property`` is
    """A property, of an object whose problem is ``p``, that follows from the signature: kept in the problem's plan."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if instance is None:  # asked of the class
            return self  # type: ignore[return-value]
        plan = instance.p.plan
        if self not in plan:
            plan[self] = self._function(instance)
        return plan[self]


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of ``t`` the current one, on which kernels are launched; it nearly always is."""
    if t.is_cuda:
        return _nothing if t.get_device() == torch._C._cuda_getDevice() else torch.cuda.device(t.device)
    return _nothing if t.device.type == "cpu" else torch.get_device_module(t.device).device(t.device)


def launch(plan: Plan, kernel: Any, blocks: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launches a Triton kernel on the current device; from the second time on without Triton's own look at arguments.

    Args:
        plan: Of the call. Everything that Triton compiles a kernel for must follow from its signature: the numbers
            among ``arguments``, ``constants`` and, of tensors, dtype and alignment.
        kernel: The kernel, whose compile-time constants come last; launched once a call.
        blocks: Programs, in one dimension.
        arguments: Its other arguments, by position.
        constants: Compile-time constants and options by name.
    """
    found = plan.get(kernel.fn)
    if found is None:
        compiled = kernel[(blocks,)](*arguments, **constants)
        if hasattr(compiled, "packed_metadata"):  # Triton's interpreter compiles nothing
            rest = (None,) * (len(kernel.arg_names) - len(arguments))
            plan[kernel.fn] = (compiled, rest)
    else:
        compiled, rest = found
        compiled[blocks, 1, 1](*arguments, *rest)


def launch_named(
    plan: Plan,
    key: tuple[object, ...],
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    others: Callable[[], dict[str, Any]],
) -> None:
    """``launch`` for a kernel with so many arguments that they go by name.

    Args:
        plan: As in ``launch``.
        key: Tells the launches of a kernel in one call apart.
        kernel: The kernel.
        grid: Programs, in up to three dimensions.
        tensors: Its tensors.
        others: Returns its numbers, compile-time constants and options; asked at the first call of a signature.
    """
    key = (kernel.fn, *key)
    found = plan.get(key)
    if found is None:
        rest = others()
        compiled = kernel[grid](**tensors, **rest)
        if hasattr(compiled, "packed_metadata"):
            places = [(i, n) for i, n in enumerate(kernel.arg_names) if n in tensors]
            grid = (*grid, 1, 1)[:3]
            plan[key] = (compiled[grid], [rest.get(n) for n in kernel.arg_names], places)
    else:
        start, arguments, places = found
        arguments = arguments.copy()
        for i, n in places:
            arguments[i] = tensors[n]
        start(*arguments)
