"""Windows by the strategies of the papers, and that parts share no base."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from genomics.intervals import Interval
from genomics.windows import check_parts_disjoint, make_windows, merge, without_leaks

LENGTHS = {"c": 1000, "d": 90}


def spans(windows: list[Interval]) -> list[tuple[int, int]]:
    return [(w.start, w.end) for w in windows]


@given(st.lists(st.tuples(st.integers(0, 980), st.integers(1, 200)), min_size=1, max_size=12), st.integers(1, 50))
def test_tiling_covers_every_base_of_overlapping_rows_once(places: list[tuple[int, int]], length: int) -> None:
    rows = [Interval("c", start, min(start + size, 1000)) for start, size in places]
    count = [0] * 1000
    for window in make_windows(rows, LENGTHS, length, "tile"):
        assert len(window) <= length
        for i in range(window.start, window.end):
            count[i] += 1
    assert count == [int(any(row.start <= i < row.end for row in rows)) for i in range(1000)]


def test_rows_that_touch_stay_apart() -> None:
    assert spans(merge([Interval("c", 10, 20), Interval("c", 0, 10), Interval("c", 15, 30)])) == [(10, 30), (0, 10)]


def test_strategies_of_the_papers() -> None:
    row, edge = Interval("c", 400, 500), Interval("c", 950, 1000)
    assert spans(make_windows([row], LENGTHS, 60, "rows")) == [(400, 460)]
    assert spans(make_windows([row, edge], LENGTHS, 131, "rows")) == [(385, 516), (910, 1041)]
    assert spans(make_windows([row], LENGTHS, 30, "ends")) == [(400, 430), (430, 460), (460, 490)]
    assert spans(make_windows([row, edge], LENGTHS, 200, "ends")) == [(400, 600), (300, 500), (800, 1000)]
    lengths = {"c": (1 << 20) + 100, "d": 90}
    wide = make_windows([Interval("c", 0, 50)], lengths, 1 << 18, "widen")
    assert spans(wide) == [(i << 18, (i + 1) << 18) for i in range(4)]
    with pytest.raises(UserError, match="does not divide"):
        make_windows([row], LENGTHS, 1000, "widen")
    with pytest.raises(UserError, match="fewer than a window"):
        make_windows([Interval("d", 0, 50)], lengths, 128, "widen")


def test_no_window_of_training_reaches_into_the_test() -> None:
    parts = {"train": [Interval("c", 0, 100), Interval("c", 300, 400)], "val": [Interval("c", 110, 140)]}
    parts["test"] = [Interval("c", 140, 200), Interval("d", 0, 90)]
    windows = {part: make_windows(rows, LENGTHS, 90, "ends") for part, rows in parts.items()}
    kept, lost = without_leaks(windows)
    taken = [w for part in ("val", "test") for w in kept[part]]
    assert kept["train"]
    assert not [w for w in kept["train"] for t in taken if w.record == t.record and w.start < t.end and t.start < w.end]
    assert lost == {part: len(windows[part]) - len(kept[part]) for part in windows}
    assert lost["val"] == 2


def test_rows_of_two_parts_that_overlap_are_an_error() -> None:
    check_parts_disjoint({"train": [Interval("c", 0, 10), Interval("c", 5, 20)], "val": [Interval("c", 20, 30)]})
    with pytest.raises(UserError, match=r"c:0-20 \(train\) and c:19-30 \(val\) overlap"):
        check_parts_disjoint({"train": [Interval("c", 0, 10), Interval("c", 5, 20)], "val": [Interval("c", 19, 30)]})
