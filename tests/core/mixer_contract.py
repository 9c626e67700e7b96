"""What every mixer is held to: whole, in pieces, token by token and in place are the same numbers; rows stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fill import fill_input, fill_param
from torch import Tensor, nn


def filled(mixer: nn.Module, dtype: torch.dtype = torch.float64, **shifts: float) -> Any:
    """The mixer with parameters from the fill rules, some of them shifted so that the scan matters."""
    mixer = mixer.to(dtype)
    state = {name: fill_param(name, tensor.shape) for name, tensor in mixer.state_dict().items()}
    for name, shift in shifts.items():
        state[name] += shift
    mixer.load_state_dict(state)
    return mixer


def inputs(batch: int, length: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return fill_input("x", (batch, length, width)).to(dtype)


def rows_of(state: Any, rows: slice) -> Any:
    """Some rows of a state."""
    return type(state)(*(t[rows] for t in state))


def assert_states_close(got: Any, want: Any) -> None:
    for name, a, b in zip(want._fields, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def assert_pieces_are_the_whole(mixer: Any, x: Tensor) -> None:
    """Holds ``forward_state`` on the whole, on pieces of two sizes and on tokens to ``forward``, ``decode`` too."""
    batch, length = x.shape[:2]
    whole, start = mixer(x), mixer.init_state(batch, max_length=length)
    kept = type(start)(*(t.clone() for t in start))
    with_state, end = mixer.forward_state(x, start)
    torch.testing.assert_close(with_state, whole)
    reverse = getattr(mixer, "reverse", False)
    for size in sorted({1, length // 2 + 1}):
        pieces = x.split(size, dim=1)
        state, outputs, stepped, place = start, [], [], type(start)(*(t.clone() for t in start))
        for piece in pieces[::-1] if reverse else pieces:
            y, state = mixer.forward_state(piece, state)
            outputs.append(y)
            if not reverse:
                stepped.append(mixer.decode(piece, place))
        torch.testing.assert_close(torch.cat(outputs[::-1] if reverse else outputs, dim=1), whole)
        assert_states_close(state, end)
        if not reverse:
            torch.testing.assert_close(torch.cat(stepped, dim=1), whole)
            assert_states_close(place, end)
    for a, b in zip(start, kept, strict=True):  # the state handed in is left alone
        assert torch.equal(a, b)


def assert_padded_rows_are_alone(mixer: Any, width: int, lengths: Sequence[int], **tolerance: float) -> None:
    """Holds each right-padded row, continued from a prefix, to the same row alone; then one more token."""
    rows, longest = len(lengths), max(lengths)
    room = {"max_length": longest + 6}
    _, before = mixer.forward_state(fill_input("prefix", (rows, 5, width)).double(), mixer.init_state(rows, **room))
    x = inputs(rows, longest, width)
    y, after = mixer.forward_state(x, before, torch.tensor(lengths))
    token = fill_input("token", (rows, 1, width)).double()
    next_y, _ = mixer.forward_state(token, after)
    for row, length in enumerate(lengths):
        here = slice(row, row + 1)
        alone = rows_of(before, here)
        if length:
            y_alone, alone = mixer.forward_state(x[here, :length], alone)
            torch.testing.assert_close(y[here, :length], y_alone)
        torch.testing.assert_close(next_y[here], mixer.forward_state(token[here], alone)[0])


def assert_packed_is_separate(mixer: Any, width: int, by_index: bool = True) -> None:
    """Holds packed sequences, by offsets and by indices, to the sequences alone."""
    sizes = [5, 1, 9, 2]
    x = inputs(1, sum(sizes), width)
    want = torch.cat([mixer(piece) for piece in x.split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(mixer(x, cu_seqlens=torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)), want)
    if by_index:
        index = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None].int()
        torch.testing.assert_close(mixer(x, seq_idx=index), want)


def assert_causal(mixer: Any, width: int) -> None:
    """Holds outputs before a changed token to the same bits, and those from there on to a change."""
    x = inputs(2, 21, width, torch.float32)
    y, cut = mixer(x), 10
    changed = x.clone()
    changed[:, cut] += 1
    after = mixer(changed)
    reverse = getattr(mixer, "reverse", False)
    unseen, seen = (slice(cut + 1, None), slice(None, cut + 1)) if reverse else (slice(None, cut), slice(cut, None))
    assert torch.equal(after[:, unseen], y[:, unseen])
    assert ((after - y)[:, seen].abs().amax(dim=(0, 2)) > 0).all()


def assert_gradients(mixer: Any, x: Tensor, state: Any) -> None:
    """Checks the gradients of a continuation, those of x, the states and every parameter, by differences."""
    names = [name for name, _ in mixer.named_parameters()]
    floats = [i for i, t in enumerate(state) if t.is_floating_point() and t.numel()]
    before = [t.detach() for t in state]
    mixer.forward = mixer.forward_state  # functional_call calls the module

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(before)
        for i, t in zip(floats, tensors, strict=False):
            given[i] = t
        parameters = dict(zip(names, tensors[len(floats) :], strict=True))
        y, after = torch.func.functional_call(mixer, parameters, (x, type(state)(*given)))
        return y, *(t for t in after if t.is_floating_point() and t.requires_grad)

    values = [before[i].clone().requires_grad_() for i in floats]
    values += [p.detach().clone().requires_grad_() for p in mixer.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values), fast_mode=True)
