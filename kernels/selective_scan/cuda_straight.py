"""The most common CUDA scans with little work for the host: tokens in order, real A, parameters in float32.

In eager mode Python takes longer over a scan than a GPU over a short one. What a call needs besides addresses is worked
out once for a signature (``kernels.plans``): sizes of tensors, kernels, blocks, the struct of arguments. A call then
allocates, writes the addresses into copies of the struct and launches. The kernels and their arguments are those of
``cuda.py``, which takes all other scans, so the results are the same bit by bit.

B batch, L tokens, D channels, N state, G groups.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import nvrtc, plans
from kernels.selective_scan import cuda_few
from kernels.selective_scan.cuda_launch import PLACES, TYPES, Launch, backward_macros, forward_macros
from kernels.selective_scan.cuda_states import MOST, Part
from kernels.selective_scan.cuda_sums import THREADS
from kernels.selective_scan.exactness import exact
from kernels.selective_scan.problem import Problem, make_problem

# x, dt, A, B, C, D, z, dt_bias, initial_state as the caller has them.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
ALIGNED = 16  # bytes

_X, _DT, _A, _B, _C, _D, _Z, _BIAS = (PLACES[n] for n in ("x", "dt", "A", "B", "C", "D", "z", "bias"))
_INITIAL, _FINAL, _SAVED, _Y = (PLACES[n] for n in ("initial", "final", "saved", "y"))
_ENDS, _SUMS = PLACES["ends"], PLACES["sums"]
_DY, _DX, _DDT, _DZ, _DFINAL, _DINITIAL = (PLACES[n] for n in ("dy", "dx", "ddt", "dz", "dfinal", "dinitial"))
_OUTPUTS = [PLACES[n] for n in ("sum_A", "dB", "dC", "sum_D", "sum_bias")]


def supports(p: Problem) -> bool:
    """Whether a problem that ``cuda.supports`` is one of these."""
    parameters = (p.A, p.D, p.dt_bias, p.initial_state)
    return (
        p.route is None
        and p.code is None
        and p.cu_seqlens is None
        and not p.is_complex
        and p.state <= MOST
        and p.B.ndim == p.C.ndim == 5
        and all(t is None or t.stride(-1) == 1 for t in (p.x, p.dt, p.z))
        and all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in parameters)
        and not cuda_few.supports(p)
    )


def _give(values: array[int], t: Inputs) -> None:
    """Writes the addresses of the inputs."""
    x, dt, A, B, C, D, z, bias, initial = t
    values[_X], values[_DT], values[_A] = x.data_ptr(), dt.data_ptr(), A.data_ptr()
    values[_B], values[_C] = B.data_ptr(), C.data_ptr()
    if D is not None:
        values[_D] = D.data_ptr()
    if z is not None:
        values[_Z] = z.data_ptr()
    if bias is not None:
        values[_BIAS] = bias.data_ptr()
    if initial is not None:
        values[_INITIAL] = initial.data_ptr()


class Straight:
    """The scans of one signature.

    Args:
        p: A problem of this signature, which ``supports`` takes.
    """

    def __init__(self, p: Problem) -> None:
        self._flags = (p.dt_softplus, True, "sum", p.reverse)
        self._forwards: dict[tuple[bool, bool], Forward] = {}
        self._backwards: dict[tuple[torch.dtype, bool], Backward] = {}

    def _problem(self, t: Inputs) -> Problem:
        x, dt, A, B, C, D, z, bias, initial = t
        return make_problem(x, dt, A, B, C, D, z, bias, None, None, initial, None, None, *self._flags)

    def forward(self, t: Inputs, keep: bool, final: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y, the final state ``(B, D, N)`` if asked for, and if ``keep`` the saved states, which the backward needs."""
        key = (final, exact(final))
        found = self._forwards.get(key)
        if found is None:
            found = self._forwards[key] = Forward(self._problem(t), *key)
        with plans.on_device(t[0]):
            return found(t, keep)

    def backward(self, dy: Tensor, dstate: Tensor | None, saved: Tensor, t: Inputs) -> Sequence[Tensor | None]:
        """Gradients of the inputs, in their order, shapes and dtypes; None where there is no input.

        Args:
            dy: Gradient of y.
            dstate: Gradient of the final state, or None.
            saved: What forward saved.
            t: The inputs.
        """
        if not dy.is_contiguous():
            dy = dy.contiguous()
        key = (dy.dtype, dy.data_ptr() % ALIGNED == 0)
        found = self._backwards.get(key)
        if found is None:
            found = self._backwards[key] = Backward(self._problem(t), dy)
        with plans.on_device(dy):
            return found(dy, dstate, saved, t)


def _like(t: Tensor) -> Tensor:
    """Memory for a tensor of this shape and dtype, dense."""
    return torch.empty_like(t) if t.is_contiguous() else t.new_empty(t.shape)


class Forward:
    """The forward of one signature.

    Args:
        p: A problem.
        final: Whether the final state is asked for.
        exact: Whether it is to be as exact as float32 is.
    """

    def __init__(self, p: Problem, final: bool, exact: bool) -> None:
        launch = Launch(Part(p, 0, p.state, pairs=False))
        self.base, self.blocks, self.threads = launch.recipe.base, launch.blocks, launch.threads
        self.final = (p.batch, p.channels, p.state) if final else None
        self.saved = (p.slots, 1, p.state, p.channels)
        macros, shared = forward_macros(launch.shape, exact), 4 * launch.shape.forward_words
        self.kernel = launch.kernel(
            "forward", shared, **macros, TY=TYPES[p.x.dtype], HAS_INITIAL=p.initial_state is not None, ADD=False
        )
        self.first, self.ends = None, _ends(p, launch)
        if launch.shape.segments > 1:
            self.first = launch.kernel("forward", shared, ENDS=1, **macros)

    def __call__(self, t: Inputs, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, A, values = t[0], t[2], self.base[:]
        y = _like(x)
        saved = A.new_empty(self.saved) if keep else None
        final = None if self.final is None else A.new_empty(self.final)
        _give(values, t)
        if self.first is not None:
            ends = A.new_empty(self.ends + self.ends // A.shape[1])
            values[_ENDS], values[_SUMS] = ends.data_ptr(), ends.data_ptr() + 4 * self.ends
            self.first(self.blocks, self.threads, values)
        values[_Y] = y.data_ptr()
        if saved is not None:
            values[_SAVED] = saved.data_ptr()
        if final is not None:
            values[_FINAL] = final.data_ptr()
        self.kernel(self.blocks, self.threads, values)
        return y, final, saved


def _ends(p: Problem, launch: Launch) -> int:
    """Floats of the states that segments end in."""
    return p.batch * launch.shape.segments * p.channels * p.state


class Backward:
    """The backward for one kind of dy.

    Args:
        p: The problem.
        dy: A gradient of y.
    """

    def __init__(self, p: Problem, dy: Tensor) -> None:
        launch = Launch(Part(p, 0, p.state, pairs=False), dy.unsqueeze(2))
        self.sums, self.blocks, self.threads = launch.sums, launch.blocks, launch.threads
        macros = backward_macros(dy, p.x, p.dt, p.z)
        self.kernel: nvrtc.Kernel = launch.kernel("backward", launch.backward_bytes(ends=False), **macros)
        self.reduce: nvrtc.Kernel = launch.kernel("reduce", 0)
        self.first = None
        if launch.shape.segments > 1:
            self.first = launch.kernel("backward", launch.backward_bytes(ends=True), ENDS=1, **macros)
        self.base = launch.recipe.base[:]
        self.base[PLACES["dy_k"]] = 1
        # One tensor holds all that nobody sees: each field's place in it, in floats, at multiples of 16 bytes.
        sizes = {n: torch.Size(size).numel() for n, size in self.sums.parts.items()}
        sizes |= {"partial": self.sums.shares, "g": self.sums.kept}
        if self.first is not None:
            sizes |= {"ends": _ends(p, launch), "sums": _ends(p, launch) // p.state}
        self.places, self.held = [], 0
        self.g = 0
        for name, size in sizes.items():
            if name == "g":
                self.g = 4 * self.held
            elif size:
                self.places.append((PLACES[name], 4 * self.held))
            self.held += -(-size // 4) * 4
        self.slices = [
            ([(PLACES[n], v) for n, v in self.sums.bounds(i).items()], i) for i in reversed(range(self.sums.slices))
        ]

    def __call__(self, dy: Tensor, dstate: Tensor | None, saved: Tensor, t: Inputs) -> Sequence[Tensor | None]:
        x, dt, A, B, C, D, z, bias, initial = t
        values, held = self.base[:], A.new_empty(self.held)
        dx, ddt, dz = _like(x), _like(dt), None if z is None else _like(z)
        dB, dC = (m.new_empty(m.shape) for m in (B, C))
        dA, dD, dbias = torch.empty_like(A), None if D is None else torch.empty_like(D), None
        if bias is not None:
            dbias = torch.empty_like(bias)
        dinitial = None if initial is None else torch.empty_like(initial)
        _give(values, t)
        address = held.data_ptr()
        for place, offset in self.places:
            values[place] = address + offset
        values[_SAVED], values[_DY], values[_DX], values[_DDT] = (
            saved.data_ptr(), dy.data_ptr(), dx.data_ptr(), ddt.data_ptr()
        )  # fmt: skip
        if dz is not None:
            values[_DZ] = dz.data_ptr()
        for place, grad in zip(_OUTPUTS, (dA, dB, dC, dD, dbias), strict=True):
            if grad is not None:
                values[place] = grad.data_ptr()
        if dstate is not None:
            dstate = dstate.float().contiguous()
            values[_DFINAL] = dstate.data_ptr()
        if self.first is not None:
            self.first(self.blocks, self.threads, values)
        self._walk(values, 0 if dinitial is None else dinitial.data_ptr(), address + self.g)
        return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial

    def _walk(self, values: array[int], dinitial: int, g: int) -> None:
        """Launches the slices; ``g`` is where the state's gradient lies between them."""
        for bounds, i in self.slices:
            for place, value in bounds:
                values[place] = value
            values[PLACES["g_in"]] = g if i < self.sums.slices - 1 else 0
            values[PLACES["g_out"]] = g if i > 0 else 0
            if i == 0:
                values[_DINITIAL] = dinitial
            self.kernel(self.blocks, self.threads, values)
            self.reduce(self.sums.blocks(i), THREADS, values)
