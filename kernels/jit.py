"""How the CPU kernels are compiled: without the GIL, kept on disk where a folder can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that compiles a function on its first call; ``options`` are ``numba.njit``'s."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder for its cache: a read-only installation without a home
            return numba.njit(nogil=True, **options)(function)

    return decorate
