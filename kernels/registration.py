"""How ops are registered with PyTorch: with little work for the host at each call.

``torch.library.custom_op`` looks every argument up in the schema, checks outputs for aliases and goes through the
dispatcher twice, which takes longer than a short scan takes a GPU. An ``Op`` has the same interface and the same
properties (fake tensors, tracing, autograd, any device), but where tensors are plain and nobody watches, the kernel
that PyTorch calls for autograd runs the implementation itself, and a call of the ``Op`` leaves the dispatcher out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import DispatchKey, _autograd, _functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad

_library = torch.library.Library("triscan", "FRAGMENT")
_below = torch._C._after_ADInplaceOrView_keyset
# looked up once: each call of an op asks them
modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _profiler, _tracing = _functorch.peek_interpreter_stack, _autograd._profiler_enabled, torch._C._is_tracing
_PLAIN = (DispatchKey.CPU, DispatchKey.CUDA, DispatchKey.XPU)
TENSORS = frozenset({Tensor, torch.nn.Parameter, type(None)})  # plain ones, or absent
_ARGUMENTS = TENSORS | {bool, int, float, str, torch.dtype}


def plain(arguments: Sequence[Any]) -> bool:
    """Whether an op may run on these without the dispatcher: eager mode, nobody watches, tensors are what they seem."""
    if not (unwatched() and simple(arguments)):
        return False
    return not any(a.is_neg() or a.is_conj() or a.is_meta for a in arguments if isinstance(a, Tensor))


def simple(arguments: Iterable[Any]) -> bool:
    """Whether no argument is of a class that PyTorch calls back: a traced tensor, a distributed one."""
    return _ARGUMENTS.issuperset(map(type, arguments))


def unwatched() -> bool:
    """Whether no mode, transform, tracer or profiler wants to see the ops that are called."""
    return not (
        modes()
        or _function_modes()
        or _transform() is not None
        or _profiler()
        or _tracing()
        or forward_ad._current_level >= 0  # type: ignore[attr-defined]  it has no public name
    )


class Op:
    """An op ``torch.ops.triscan.<name>`` that changes none of its inputs and returns tensors of its own.

    Args:
        function: The implementation for every device; its annotated signature, without defaults, is the schema. Named
            as the op, with one underscore in front.
    """

    named: ClassVar[dict[str, Op]] = {}  # all of them

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__.removeprefix("_")
        _library.define(
            self.name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        self.overload = getattr(torch.ops.triscan, self.name).default
        self._function = function
        self._autograd = _not_differentiable(self.name)
        self._transformed = _for_transforms(self.overload, lambda *_: None, self._autograd.backward)
        _library.impl(self.name, function, "CompositeExplicitAutograd")
        kernel = self._kernel()
        _library.impl(self.name, kernel, "Autograd", with_keyset=True)
        for f in (function, kernel):
            _leave_to_python(f)
        self.named[self.name] = self

    def __call__(self, *arguments: Any) -> Any:
        """Calls the op: through PyTorch's dispatcher where anything but the implementation and autograd has a part."""
        if torch.compiler.is_compiling():
            return self.overload(*arguments)
        if not plain(arguments):
            if _functorch.peek_interpreter_stack() is not None:
                return self._transformed.apply(*arguments)
            return self.overload(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self._autograd.apply(None, *arguments)
        return self._function(*arguments)

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
        self._transformed = _for_transforms(self.overload, setup_context, backward)

    def _kernel(self) -> Callable[..., Any]:
        def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):  # type: ignore[attr-defined]
                _no_forward_mode(self.name)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
                if _functorch.peek_interpreter_stack() is not None:
                    raise RuntimeError(
                        f"torch.ops.triscan.{self.name}: got called inside grad, vjp or jacrev of torch.func, wanted "
                        f"the function kernels.{self.name}, which they can go through; or use torch.autograd.grad"
                    )
                return self._autograd.apply(keyset, *arguments)
            return self._run(keyset, arguments)

        return kernel

    def _run(self, keyset: torch._C.DispatchKeySet | None, arguments: tuple[Any, ...]) -> Any:
        """The outputs: from the implementation where no mode, subclass or wrapper stands between, else dispatched.

        Args:
            keyset: What the dispatcher called with; None if it didn't.
            arguments: Of the op.
        """
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None or (keyset & _below).highestPriorityTypeId() in _PLAIN:
                return self._function(*arguments)
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _not_differentiable(name: str) -> Any:
    """The autograd of an op without a derivative: of a backward, whose op has it from plain operators only."""

    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            op = getattr(torch.ops.triscan, name).default
            return (
                op(*arguments)
                if keyset is None
                else op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
            )

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"triscan::{name} has no derivative; use backend='torch', whose operators have")

    return _function(name, forward, backward)


def _for_transforms(op: torch._ops.OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """The same for ``torch.func``'s grad, vjp, jacrev and vmap, which run a batch one by one."""
    methods = {
        "forward": staticmethod(lambda *arguments: op(*arguments)),
        "setup_context": staticmethod(lambda ctx, inputs, output: setup_context(ctx, inputs, output)),
        "backward": staticmethod(lambda ctx, *grads: backward(ctx, *grads)),
        "jvp": staticmethod(lambda ctx, *tangents: _no_forward_mode(op._opname)),
        "generate_vmap_rule": True,
    }
    return type(f"Triscan_{op._opname}_in_transforms", (torch.autograd.Function,), methods)


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _no_forward_mode(name: str) -> None:
    raise RuntimeError(
        f"triscan::{name} has no derivative in forward mode; use backend='reference', whose operators have"
    )


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
