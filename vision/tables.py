"""Tables that models look up in every step, kept on their GPU."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["Kept"]

MOST = 256  # tables of a function


class Kept:
    """A function of hashable arguments, the last a device, that keeps the tables it was last asked for.

    A CUDA graph that was captured with a table reads it at every replay, so those stay for good. A table that is first
    asked for during a capture lies in the graph's memory and is not kept.

    Args:
        build: Makes a table.
    """

    def __init__(self, build: Callable[..., Tensor]) -> None:
        self.build = build
        self._tables: OrderedDict[tuple[Hashable, ...], Tensor] = OrderedDict()
        self._read_by_graphs: dict[int, Tensor] = {}

    def __call__(self, *arguments: Hashable) -> Tensor:
        device = arguments[-1]
        assert isinstance(device, torch.device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = self._tables.get(arguments)
        if table is None:
            table = self.build(*arguments) if device.type != "cuda" or capturing else self._build_apart(*arguments)
            if not capturing:
                self._tables[arguments] = table
                if len(self._tables) > MOST:
                    self._tables.popitem(last=False)
        elif capturing:
            self._read_by_graphs[id(table)] = table
        else:
            self._tables.move_to_end(arguments)
        return table

    def forget(self) -> None:
        """Makes tables afresh, because the function makes others from now on."""
        self._tables.clear()

    def _build_apart(self, *arguments: Hashable) -> Tensor:
        """A table in memory that no CUDA graph owns.

        ``torch.compile(mode="reduce-overhead")`` lends its graphs' memory to whatever the thread allocates that runs
        the model, and refuses what is kept there: so a thread of its own builds.
        """

        def work() -> Tensor:
            with torch.cuda.device(arguments[-1]):  # type: ignore[arg-type]
                table = self.build(*arguments)
                torch.cuda.current_stream().synchronize()
            return table

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()
