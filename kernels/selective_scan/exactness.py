"""How exact a final state of 16-bit inputs is: that of a prompt, or that between pieces of one sequence.

What decoding goes on from is asked for as exact as float32 is, at 1.2 times the time (docs/decisions.md). A state that
only hands a sequence on from one piece to the next need be no better than the states inside of the pieces, which come
from the GPU's own exponentials; nor need one that is kept in 16 bits between the steps that follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_between: list[bool] = []


@contextmanager
def between_pieces() -> Iterator[None]:
    """Final states in here go on into the next piece of the same sequence; in float32 nothing changes."""
    _between.append(True)
    try:
        yield
    finally:
        _between.pop()


def exact(final: bool) -> bool:
    """Whether exponentials have to be exact where a final state is asked for or is not."""
    return final and not _between
