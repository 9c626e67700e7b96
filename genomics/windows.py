"""Windows for language models from the rows of a split: tiled, or as the papers take them from rows of one length.

Coordinates are 0-based and half-open; L is the window's length.
"""

import bisect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

from core.errors import UserError
from genomics.intervals import PARTS, Interval, tile

Strategy = Literal["tile", "rows", "ends", "widen"]
WIDE = 1 << 20  # what Caduceus widens rows to


def merge(intervals: Sequence[Interval]) -> list[Interval]:
    """Join intervals that overlap, so that no base is in two; those that only touch stay apart.

    The order is that of the first interval of each group in the given order.
    """
    ordered = sorted(enumerate(intervals), key=lambda pair: (pair[1].record, pair[1].start))
    groups: list[list[tuple[int, Interval]]] = []
    end = 0
    for number, interval in ordered:
        if groups and interval.record == groups[-1][0][1].record and interval.start < end:
            groups[-1].append((number, interval))
            end = max(end, interval.end)
        else:
            groups.append([(number, interval)])
            end = interval.end
    groups.sort(key=lambda group: min(number for number, _ in group))
    return [
        Interval(group[0][1].record, group[0][1].start, max(interval.end for _, interval in group)) for group in groups
    ]


def make_windows(
    rows: Sequence[Interval], lengths: Mapping[str, int], length: int, strategy: Strategy
) -> list[Interval]:
    """Cut or extend rows to windows.

    - ``tile``: rows that overlap are joined, and every base lies in exactly one window; the last of a row is shorter.
    - ``rows``: one window a row, as HyenaDNA takes them: its first L bases, or the row and as much on either side
      (Nguyen et al. 2023, code). It may reach beyond the record, where it is padded.
    - ``ends``: rows of at least L are cut in windows that do not overlap, a rest being left out; shorter ones give two
      windows, one that starts and one that ends with the row (Gu & Dao 2023, appendix E.3.1).
    - ``widen``: rows are widened to 2^20 around their middle, moved inside the record, and cut in 2^20 / L windows
      (Schiff et al. 2024, code).

    Args:
        rows: The rows of one part.
        lengths: Length of each record.
        length: L.
        strategy: One of these.

    Raises:
        UserError: If ``widen`` is asked for with L that does not divide 2^20, or on a record shorter than L.
    """
    if strategy == "tile":
        return tile(merge(rows), length)
    if strategy == "rows":
        return [_centred(row, length) for row in rows]
    if strategy == "ends":
        return [window for row in rows for window in _from_ends(row, lengths[row.record], length)]
    if WIDE % length:
        raise UserError(
            f"--data.strategy widen cuts rows of {WIDE:,} bases; --data.window {length:,} does not divide it"
        )
    found = []
    for row in rows:
        width = min(WIDE, lengths[row.record] // length * length)
        if not width:
            raise UserError(f"{row}: its record has {lengths[row.record]:,} bases, fewer than a window of {length:,}")
        start = min(max((row.start + row.end - width) // 2, 0), lengths[row.record] - width)
        found += tile([Interval(row.record, start, start + width)], length)
    return found


def _centred(row: Interval, length: int) -> Interval:
    if len(row) >= length:
        return Interval(row.record, row.start, row.start + length)
    start = row.start - (length - len(row)) // 2
    return Interval(row.record, start, start + length)


def _from_ends(row: Interval, end: int, length: int) -> list[Interval]:
    if len(row) >= length:
        return tile([Interval(row.record, row.start, row.start + len(row) // length * length)], length)
    first, last = min(row.start, max(end - length, 0)), max(row.end - length, 0)
    return [Interval(row.record, start, start + length) for start in dict.fromkeys((first, last))]


def without_leaks(windows: Mapping[str, Sequence[Interval]]) -> tuple[dict[str, list[Interval]], dict[str, int]]:
    """Leave out windows that reach into another part: of training those that overlap validation or test, of validation
    those that overlap the test.

    Args:
        windows: Of each part.

    Returns:
        What is left, and how many each part lost.
    """
    kept = {"test": list(windows["test"])}
    kept["val"] = _apart(windows["val"], kept["test"])
    kept["train"] = _apart(windows["train"], [*kept["test"], *kept["val"]])
    return {part: kept[part] for part in PARTS}, {part: len(windows[part]) - len(kept[part]) for part in PARTS}


def _apart(windows: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The windows that share no base with any of the others."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for other in sorted(others):
        spans = taken.setdefault(other.record, [])
        if spans and other.start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], other.end))
        else:
            spans.append((other.start, other.end))
    found = []
    for window in windows:
        spans = taken.get(window.record, [])
        place = bisect.bisect_left(spans, (window.end, 0)) - 1  # the last span that starts before the window ends
        if place < 0 or spans[place][1] <= window.start:
            found.append(window)
    return found


def check_parts_disjoint(parts: Mapping[str, Sequence[Interval]]) -> None:
    """Make sure that no base belongs to two parts of a split; within a part rows may overlap.

    Raises:
        UserError: Naming two intervals that overlap.
    """
    tagged = sorted((interval, part) for part in parts for interval in merge(parts[part]))
    for (before, part), (after, other) in pairwise(tagged):
        if before.record == after.record and after.start < before.end:
            raise UserError(f"{before} ({part}) and {after} ({other}) overlap; a base may be in one part only")
