"""Scan routes over a grid of patches: in which order a scan visits the pixels.

A route is a pure function of the grid, ``(height, width) -> index``: ``index[p]`` is the raster number
``row * width + column`` of the patch at scan position p, and -1 is a padding slot. A new route is one function here,
marked with ``@route``; its name can be given to a model at once, and so can the name with ``_reversed`` behind it::

    @route
    def diagonals(height: int, width: int) -> Tensor:
        rows, columns = grid(height, width)
        return torch.argsort((rows + columns).flatten(), stable=True)

    timm.create_model("vim_tiny_patch16_224", routes=("diagonals", "diagonals_reversed"))

A function with a third integer argument is a family: the number stands in the name (``windows7``, ``atrous0``).

Dimension letters: H, W height and width of the grid in patches, M = H W patches, P scan positions, K routes.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vision.tables import Kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["atrous", "columns", "draw_route", "raster", "route", "route_names", "scan_routes", "snake", "snake_columns",
           "windows"]  # fmt: skip

Function = TypeVar("Function", bound=Callable[..., Tensor])
_ROUTES: dict[str, Callable[..., Tensor]] = {}


@Kept
def _kept(names: str, height: int, width: int, class_token: bool, device: torch.device) -> Tensor:
    """``scan_routes`` on a device, kept: models ask for the same few in every step."""
    with torch.device(device):
        return scan_routes(names.split(","), height, width, class_token)


def route(function: Function) -> Function:
    """Makes a function of (height, width) a route that models know by the function's name."""
    _ROUTES[function.__name__] = function
    _kept.forget()
    return function


def grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, two (H, W) int64 tensors."""
    rows, columns = torch.arange(height), torch.arange(width)
    return rows.unsqueeze(1).expand(height, width), columns.unsqueeze(0).expand(height, width)


def numbers(height: int, width: int) -> Tensor:
    """Raster number of every patch, (H, W) int64."""
    return torch.arange(height * width).view(height, width)


@route
def raster(height: int, width: int) -> Tensor:
    """Row by row, left to right: the reading order (Vim, Zhu et al. 2024)."""
    return numbers(height, width).flatten()


@route
def columns(height: int, width: int) -> Tensor:
    """Column by column, top to bottom (cross-scan; VMamba, Liu et al. 2024)."""
    return numbers(height, width).t().flatten()


@route
def snake(height: int, width: int) -> Tensor:
    """Row by row, every second row right to left, so that each step meets a neighbour (PlainMamba, Yang et al.)."""
    rows, columns = grid(height, width)
    return (rows * width + torch.where(rows % 2 == 0, columns, width - 1 - columns)).flatten()


@route
def snake_columns(height: int, width: int) -> Tensor:
    """Column by column, every second column bottom to top (PlainMamba)."""
    rows, columns = grid(height, width)
    return (torch.where(columns % 2 == 0, rows, height - 1 - rows) * width + columns).t().flatten()


@route
def windows(height: int, width: int, size: int) -> Tensor:
    """Row by row inside windows of size x size patches, the windows row by row (LocalMamba, Huang et al. 2024).

    Windows that stand out at the right and at the bottom are filled with padding slots.
    """
    if size < 1:
        raise ValueError(f"windows: got a window of {size} patches, wanted at least 1, as in 'windows7'")
    padded = F.pad(numbers(height, width), (0, -width % size, 0, -height % size), value=-1)
    tiles = padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size)
    return tiles.transpose(1, 2).flatten()


@route
def atrous(height: int, width: int, quarter: int) -> Tensor:
    """Every second patch of every second row: one of four quarters (ES2D; EfficientVMamba, Pei et al. 2024).

    Quarters 0 (even rows, even columns) and 2 (even rows, odd columns) go row by row, 1 (odd rows, even columns) and 3
    (odd rows, odd columns) column by column. Together they visit each patch once. Odd grids are padded to even ones.
    """
    if quarter not in (0, 1, 2, 3):
        raise ValueError(f"atrous: got quarter {quarter}, wanted 'atrous0', 'atrous1', 'atrous2' or 'atrous3'")
    padded = F.pad(numbers(height, width), (0, width % 2, 0, height % 2), value=-1)
    part = padded[quarter % 2 :: 2, quarter // 2 :: 2]
    return (part.t() if quarter % 2 else part).flatten()


def route_names() -> list[str]:
    """The names of all routes, families with a # for their number; each can also be reversed."""
    families = {name for name, f in _ROUTES.items() if f.__code__.co_argcount == 3}
    return [name + "#" if name in families else name for name in _ROUTES]


def find_route(name: str) -> Callable[[int, int], Tensor]:
    """The function behind a name, without its ``_reversed``, the number of a family bound.

    Raises:
        ValueError: If there is no such route; the message lists those there are.
    """
    stem = name.removesuffix("_reversed")
    family = re.fullmatch(r"(.*?)(\d+)", stem)
    if stem in _ROUTES and _ROUTES[stem].__code__.co_argcount == 2:
        return _ROUTES[stem]
    if family and family[1] in _ROUTES and _ROUTES[family[1]].__code__.co_argcount == 3:
        return functools.partial(_ROUTES[family[1]], **{_ROUTES[family[1]].__code__.co_varnames[2]: int(family[2])})
    near = difflib.get_close_matches(stem, _ROUTES, n=1)
    raise ValueError(
        f"unknown route {name!r}" + (f", did you mean {near[0]!r}?" if near else ".")
        + f" There are {', '.join(route_names())}, each also with '_reversed' (# is a number, as in 'windows7')."
        " A new one is a function in vision/routes.py with @route above it."
    )  # fmt: skip


def with_class_token(index: Tensor, patches: int) -> Tensor:
    """The route over M + 1 tokens, where the class token stands at row M // 2: it is visited in the middle.

    Args:
        index: A route over the patches alone, (P,).
        patches: Number of patches M.

    Returns:
        (P + 1,) token rows.
    """
    row, position = patches // 2, index.shape[0] // 2
    shifted = index + (index >= row)
    return torch.cat((shifted[:position], index.new_full((1,), row), shifted[position:]))


def scan_routes(names: Sequence[str], height: int, width: int, class_token: bool = False) -> Tensor:
    """The index of one or several routes over a grid, as ``kernels.selective_scan`` takes it.

    Args:
        names: Names of K routes.
        height: Patches from top to bottom.
        width: Patches from left to right.
        class_token: Whether a class token stands in the middle, at row M // 2 of M + 1 tokens.

    Returns:
        (K, P) int32. Shorter routes end in padding slots.
    """
    indices = []
    for name in names:
        index = find_route(name)(height, width)
        if class_token:
            index = with_class_token(index, height * width)
        indices.append(index.flip(0) if name.endswith("_reversed") else index)
    longest = max(index.shape[0] for index in indices)
    return torch.stack([F.pad(index, (0, longest - index.shape[0]), value=-1) for index in indices]).to(torch.int32)


def check_routes(names: Sequence[str], height: int, width: int) -> None:
    """Refuses names that don't exist and functions that don't return a route.

    Raises:
        ValueError: Naming the route and what is wrong with it.
    """
    if not names or isinstance(names, str):
        raise ValueError(f"routes: got {names!r}, wanted a list of names such as ('raster', 'raster_reversed')")
    for name in names:
        with torch.device("cpu"):  # models may be built on the meta device, where an index has no values
            index = find_route(name)(height, width)
        if index.ndim != 1 or index.is_floating_point():
            raise ValueError(f"route {name!r}: got {index.dtype} of shape {tuple(index.shape)}, wanted (P,) integers")
        visits = index[index != -1].tolist()
        if visits and not 0 <= min(visits) <= max(visits) < height * width:
            raise ValueError(
                f"route {name!r} on a {height} x {width} grid: got patch numbers from {min(visits)} to {max(visits)}, "
                f"wanted 0 to {height * width - 1} (row * width + column), or -1 for a padding slot"
            )
        if len(set(visits)) < len(visits):
            raise ValueError(f"route {name!r} on a {height} x {width} grid: visits a patch twice, wanted at most once")


@torch.library.custom_op("triscan::scan_routes", mutates_args=())
def _scan_routes(tokens: Tensor, names: str, height: int, width: int, class_token: bool) -> Tensor:
    """``scan_routes`` on the device of ``tokens``, names separated by commas: an op, so that tracers keep it."""
    return _kept(names, height, width, class_token, tokens.device).clone()


@_scan_routes.register_fake
def _(tokens: Tensor, names: str, height: int, width: int, class_token: bool) -> Tensor:
    with torch.device(tokens.device):
        return scan_routes(names.split(","), height, width, class_token)


def draw_route(name: str, height: int, width: int, axes: Axes, class_token: bool = False) -> None:
    """Draws a route as arrows from patch to patch, from dark to bright; the class token is a star beside the grid.

    Args:
        name: Name of the route.
        height: Patches from top to bottom.
        width: Patches from left to right.
        axes: Where to draw.
        class_token: Whether to draw the class token in the middle of the scan.
    """
    from matplotlib import colormaps

    patches = height * width
    visits = [i for i in scan_routes([name], height, width, class_token)[0].tolist() if i >= 0]
    places = []
    for token in visits:
        number = token - (class_token and token > patches // 2)
        is_class = class_token and token == patches // 2
        places.append((width + 0.2, (height - 1) / 2) if is_class else (number % width, number // width))
        axes.plot(*places[-1], marker="*" if is_class else "o", color="crimson" if is_class else "0.6", ms=4)
    for p, (start, end) in enumerate(itertools.pairwise(places)):
        color = colormaps["viridis"](p / (len(places) - 1))
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "shrinkA": 0, "shrinkB": 0})
    axes.set(xlim=(-0.6, width + (0.7 if class_token else -0.4)), ylim=(height - 0.4, -0.6), title=name, aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
