"""What every op is held to, once: as a custom op in a model, and between implementations.

A test file subclasses ``OpContract`` under a name that begins with ``Test`` and gives it a model; the ``check_`` and
``assert_`` functions are called from tests that are parametrized over the file's own cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels.backend import interpreting

Run = Callable[[Any, torch.dtype, str, str], dict[str, Tensor]]  # case, dtype, backend, device; results by name


class OpContract:
    """Tests of a custom op inside a model of ``(B, L, channels)`` inputs.

    Attributes:
        Model: A module that calls the op the way models do and has float32 parameters.
        channels: Of its input.
        dynamic: The axis of the input whose size an exported program leaves open.
    """

    Model: ClassVar[type[nn.Module]]
    channels: ClassVar[int]
    dynamic: ClassVar[int] = 1

    @pytest.fixture
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.Model()

    def draw(self, *lead: int) -> Tensor:
        return torch.randn(*(lead or (2, 9)), self.channels)

    def test_compiles_whole(self, model: nn.Module) -> None:
        x, leaves = self.draw().requires_grad_(), list(model.parameters())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        y, wanted = compiled(x), model(x)
        torch.testing.assert_close(y, wanted)
        got, truth = (torch.autograd.grad(t.square().sum(), [x, *leaves]) for t in (y, wanted))
        torch.testing.assert_close(got, truth)

    def test_exports(self, model: nn.Module) -> None:
        size = torch.export.Dim("size", min=2, max=64)
        program = torch.export.export(model, (self.draw(),), dynamic_shapes={"x": {self.dynamic: size}})
        x = self.draw(2, 21) if self.dynamic == 1 else self.draw(4, 9)
        torch.testing.assert_close(program.module()(x), model(x))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # timm's tests script
    def test_fx_and_torchscript(self, model: nn.Module) -> None:
        x = self.draw()
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))

    def test_meta_device(self, model: nn.Module) -> None:
        y = model.to("meta")(self.draw().to("meta"))
        assert (y.shape, y.device.type) == ((2, 9, self.channels), "meta")

    def test_autocast_keeps_dtypes(self, model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            x = F.linear(self.draw(), torch.randn(self.channels, self.channels))
            y = self.call(model, x)
        assert (x.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16)
        y.float().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads
        assert {g.dtype for g in grads} == {torch.float32}

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        """The public function on x with the model's parameters."""
        raise NotImplementedError

    def test_activation_checkpointing(self, model: nn.Module) -> None:
        x = self.draw().requires_grad_()
        (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
        (got,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
        assert torch.equal(got, wanted)


def flops(function: Callable[[], Tensor]) -> int:
    """Operations of a forward and a backward as PyTorch's counter sees them."""
    with FlopCounterMode(display=False) as counter:
        function().sum().backward()
    return counter.get_total_flops()


def triton_device() -> str:
    """Where Triton kernels can run here: ``cuda``, or ``cpu`` in the interpreter. Skips the test file where nowhere."""
    if interpreting():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU or TRITON_INTERPRET=1", allow_module_level=True)
    return "cuda"


def assert_equals_reference(run: Run, case: Any, backend: str, device: str = "cpu", atol: float = 1e-11) -> None:
    """Holds a backend to the reference in float64."""
    got, wanted = run(case, torch.float64, backend, device), run(case, torch.float64, "reference", "cpu")
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name].cpu(), value, rtol=1e-10, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Holds two results to each other."""
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_repeats(run: Run, case: Any, backend: str, device: str = "cpu") -> None:
    """Holds two float32 runs to the same bits."""
    assert_same_bits(*(run(case, torch.float32, backend, device) for _ in range(2)))


def assert_independent_of_threads(run: Run, case: Any) -> None:
    """Holds the CPU kernels to the same bits on one thread and on three."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, "cpu", "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(*results)


def assert_refuses(function: Callable[..., object], arguments: dict[str, object], message: str) -> None:
    """Holds a wrong call to a ValueError that says what is wanted."""
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def capture(step: Callable[[], Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor], list[Tensor]]:
    """Runs a step on a stream of its own, then captures it as a CUDA graph.

    Returns:
        The graph, the tensors that a replay writes, and what the run returned.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured, expected
