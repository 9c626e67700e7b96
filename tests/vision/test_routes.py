"""Scan routes: what they visit and in which order, on grids of any shape."""

import itertools

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from vision import routes
from vision.routes import check_routes, draw_route, scan_routes, with_class_token

GRIDS = [(1, 1), (1, 6), (5, 1), (3, 5), (4, 4), (7, 6), (14, 14)]
WHOLE = ["raster", "columns", "snake", "snake_columns", "windows1", "windows2", "windows3", "windows7"]
NAMES = WHOLE + [f"atrous{quarter}" for quarter in range(4)]


def visits(name: str, height: int, width: int, class_token: bool = False) -> list[int]:
    return [i for i in scan_routes([name], height, width, class_token)[0].tolist() if i >= 0]


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_routes_visit_each_patch_once(name, height, width):
    assert sorted(visits(name, height, width)) == list(range(height * width))


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_atrous_quarters_share_the_patches(height, width):
    together = [i for quarter in range(4) for i in visits(f"atrous{quarter}", height, width)]
    assert sorted(together) == list(range(height * width))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_reversed_is_the_flip_with_its_padding(name, height, width, class_token):
    forward = scan_routes([name], height, width, class_token)
    assert torch.equal(scan_routes([name + "_reversed"], height, width, class_token), forward.flip(1))


def test_orders_by_hand():
    assert visits("raster", 2, 3) == [0, 1, 2, 3, 4, 5]
    assert visits("columns", 2, 3) == [0, 3, 1, 4, 2, 5]
    assert visits("snake", 3, 2) == [0, 1, 3, 2, 4, 5]
    assert visits("snake_columns", 2, 3) == [0, 3, 4, 1, 2, 5]
    assert scan_routes(["windows2"], 3, 3).tolist() == [[0, 1, 3, 4, 2, -1, 5, -1, 6, 7, -1, -1, 8, -1, -1, -1]]
    assert [visits(f"atrous{q}", 3, 4) for q in range(4)] == [[0, 2, 8, 10], [4, 6], [1, 3, 9, 11], [5, 7]]


@pytest.mark.parametrize("name", ["snake", "snake_columns"])
def test_snakes_move_to_neighbours(name):
    places = [divmod(i, 7) for i in visits(name, 5, 7)]
    assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in itertools.pairwise(places))


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_class_token_is_visited_in_the_middle(name, height, width):
    patches, index = height * width, scan_routes([name], height, width)[0]
    tokens = with_class_token(index, patches)
    position = len(index) // 2
    assert tokens[position] == patches // 2
    rest = torch.cat((tokens[:position], tokens[position + 1 :]))
    rows = torch.tensor(
        [row for row in range(patches + 1) if row != patches // 2] + [-1]
    )  # the patches' rows; -1 stays
    assert torch.equal(rest, rows.to(index.dtype)[index.long()])


def test_vims_routes_are_the_sequence_and_its_flip():
    index = scan_routes(["raster", "raster_reversed"], 3, 5, class_token=True)
    assert index.dtype == torch.int32
    assert torch.equal(index, torch.stack((torch.arange(16), torch.arange(15, -1, -1))).int())


def test_shorter_routes_end_in_padding():
    index = scan_routes(["raster", "atrous0"], 4, 4)
    assert index.shape == (2, 16)
    assert index[1].tolist() == [0, 2, 8, 10] + [-1] * 12


def test_op_agrees_and_traces_symbolically():
    tokens = torch.empty(1, 13, 4)
    names = ["snake", "windows2_reversed"]
    assert torch.equal(
        torch.ops.triscan.scan_routes(tokens, ",".join(names), 3, 4, True), scan_routes(names, 3, 4, True)
    )
    torch.library.opcheck(torch.ops.triscan.scan_routes, (tokens, ",".join(names), 3, 4, True))


@pytest.fixture
def own_route():
    """Registers routes for one test."""
    added = []

    def add(name, function):
        function.__name__ = name
        added.append(name)
        return routes.route(function)

    yield add
    for name in added:
        del routes._ROUTES[name]


def test_a_new_route_is_one_function(own_route):
    def spiral(height: int, width: int) -> torch.Tensor:
        rows, columns = routes.grid(height, width)
        ring = torch.minimum(torch.minimum(rows, height - 1 - rows), torch.minimum(columns, width - 1 - columns))
        return torch.argsort(ring.flatten(), stable=True)

    own_route("spiral", spiral)
    check_routes(["spiral", "spiral_reversed"], 3, 3)
    assert visits("spiral", 3, 3) == [0, 1, 2, 3, 5, 6, 7, 8, 4]
    assert visits("spiral_reversed", 3, 3) == [4, 8, 7, 6, 5, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda height, width: torch.arange(height * width + 1), "from 0 to 12"),
        (lambda height, width: torch.zeros(4, dtype=torch.int64), "visits a patch twice"),
        (lambda height, width: torch.rand(4), "wanted .P,. integers"),
        (lambda height, width: torch.arange(height * width).view(height, width), "shape .3, 4."),
    ],
)
def test_wrong_functions_are_refused(own_route, function, message):
    own_route("wrong", function)
    with pytest.raises(ValueError, match=message):
        check_routes(["wrong"], 3, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rasters", "did you mean 'raster'"),
        ("windows", "did you mean 'windows'"),
        ("atrous4", "atrous0"),
        ("windows0", "at least 1"),
        ("raster2", "unknown route"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        check_routes([name], 4, 4)


def test_names_must_be_a_list():
    with pytest.raises(ValueError, match="wanted a list"):
        check_routes("raster", 4, 4)


@pytest.mark.parametrize("class_token", [False, True])
def test_drawing_has_an_arrow_for_each_step(class_token):
    matplotlib.use("Agg")
    figure, axes = plt.subplots()
    draw_route("snake", 3, 4, axes, class_token)
    assert len(axes.texts) == 11 + class_token  # annotations are the arrows
    assert sum(line.get_marker() == "*" for line in axes.lines) == class_token
    plt.close(figure)
