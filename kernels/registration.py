"""How ops are registered with PyTorch: with little work for the host at each call.

``torch.library.custom_op`` looks every argument up in the schema, checks outputs for aliases and goes through the
dispatcher twice, which takes longer than a short scan takes a GPU. An ``Op`` has the same interface and the same
properties (fake tensors, tracing, autograd, any device), but where tensors are plain and nobody watches, the kernel
that PyTorch calls for autograd runs the implementation itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey

_library = torch.library.Library("triscan", "FRAGMENT")
_below = torch._C._after_ADInplaceOrView_keyset
_PLAIN = (DispatchKey.CPU, DispatchKey.CUDA, DispatchKey.XPU)


class Op:
    """An op ``torch.ops.triscan.<name>`` that changes none of its inputs and returns tensors of its own.

    Args:
        function: The implementation for every device; its annotated signature, without defaults, is the schema. Named
            as the op, with one underscore in front.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__.removeprefix("_")
        _library.define(
            self.name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        self.overload = getattr(torch.ops.triscan, self.name).default
        self._function = function
        self._autograd = _not_differentiable(self.name)
        _library.impl(self.name, function, "CompositeExplicitAutograd")
        kernel = self._kernel()
        _library.impl(self.name, kernel, "Autograd", with_keyset=True)
        for f in (function, kernel):
            _leave_to_python(f)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the op through PyTorch's dispatcher."""
        return self.overload(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Gives the op, as a decorator, the function that returns empty outputs, for meta and traced tensors."""
        torch.library.register_fake(f"triscan::{self.name}", function, lib=_library)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Makes the op differentiable; the two functions are those of ``torch.library.register_autograd``.

        Args:
            backward: ``(ctx, *gradients)`` of the outputs to a tuple of those of the arguments.
            setup_context: ``(ctx, inputs, output)``, keeps what backward needs.
        """
        run = self._run

        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            output = run(keyset, arguments)
            setup_context(ctx, arguments, output)
            return output

        def backward_(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return (None, *backward(ctx, *grads))

        _leave_to_python(backward_)
        self._autograd = _function(self.name, forward, backward_)

    def _kernel(self) -> Callable[..., Any]:
        def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
                return self._autograd.apply(keyset, *arguments)
            return self._run(keyset, arguments)

        return kernel

    def _run(self, keyset: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
        """The outputs: from the implementation where no mode, subclass or wrapper stands between, else dispatched."""
        with torch._C._AutoDispatchBelowAutograd():
            if (keyset & _below).highestPriorityTypeId() in _PLAIN:
                return self._function(*arguments)
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _not_differentiable(name: str) -> Any:
    """The autograd of an op without a derivative: of a backward, whose op has it from plain operators only."""

    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            op = getattr(torch.ops.triscan, name).default
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"triscan::{name} has no derivative; use backend='torch', whose operators have")

    return _function(name, forward, backward)


def _function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """A class that autograd calls; its name is what a graph of gradients shows."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Triscan_{name}", (torch.autograd.Function,), methods)


def _leave_to_python(function: Callable[..., Any]) -> None:
    """Keeps ``torch.compile`` from compiling what runs inside an op; its own decorator takes seconds to import."""
    frames = torch._C._dynamo.eval_frame  # type: ignore[attr-defined]
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


def op(function: Callable[..., Any]) -> Op:
    """Registers an implementation as an op: ``Op`` as a decorator."""
    return Op(function)
