"""Intervals, splits and windows."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from genomics.intervals import (
    Interval,
    check_lengths,
    read_bed,
    split_by_coordinate,
    split_by_records,
    tile,
    whole_records,
)
from genomics.windows import check_parts_disjoint

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def coverage(intervals: list[Interval], sizes: dict[str, int]) -> dict[str, np.ndarray]:
    counts = {name: np.zeros(size, int) for name, size in sizes.items()}
    for interval in intervals:
        counts[interval.record][interval.start : interval.end] += 1
    return counts


@given(lengths, st.integers(1, 70))
def test_every_base_is_in_one_window(sizes: list[int], window: int) -> None:
    records = {f"r{i}": size for i, size in enumerate(sizes)}
    windows = tile(whole_records(records), window)
    assert all(0 < len(w) <= window for w in windows)
    assert all((counts == 1).all() for counts in coverage(windows, records).values())


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8).filter(lambda s: sum(s) >= 20))
def test_split_by_coordinate_covers_once_and_in_order(sizes: list[int]) -> None:
    records = {f"r{i}": size for i, size in enumerate(sizes)}
    parts = split_by_coordinate(whole_records(records), 0.2, 0.3)
    check_parts_disjoint(parts)
    everything = [interval for part in parts.values() for interval in part]
    assert all((counts == 1).all() for counts in coverage(everything, records).values())
    total = sum(sizes)
    assert sum(map(len, parts["test"])) == total - round(0.7 * total)
    order = list(records)
    last_train = max((order.index(i.record), i.end) for i in parts["train"])
    first_test = min((order.index(i.record), i.start) for i in parts["test"])
    assert last_train <= first_test or last_train[0] < first_test[0]


def test_split_by_records() -> None:
    parts = split_by_records(whole_records({"a": 5, "b": 6, "c": 7, "d": 8}), ["c"], ["a", "d"])
    assert [i.record for i in parts["train"]] == ["b"]
    assert [i.record for i in parts["test"]] == ["a", "d"]


@pytest.mark.parametrize(
    ("val", "test", "message"),
    [
        (["x"], ["a"], "no record 'x'"),
        (["a"], ["a"], "both"),
        (["a"], [], "test part"),
        (["a", "c"], ["b"], "train part"),
    ],
)
def test_records_that_cannot_be_held_out(val: list[str], test: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_by_records(whole_records({"a": 5, "b": 6, "c": 5}), val, test)


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (0.0, 0.2), (-0.1, 0.3)])
def test_shares_that_leave_nothing(val: float, test: float) -> None:
    with pytest.raises(UserError, match="shares"):
        split_by_coordinate(whole_records({"a": 100}), val, test)


def test_an_interval_shorter_than_the_window_is_named() -> None:
    with pytest.raises(UserError, match=r"b:0-9 has 9 bases, shorter than the window of 10"):
        check_lengths(whole_records({"a": 10, "b": 9}), 10)


def test_bed(tmp_path: Path) -> None:
    path = tmp_path / "a.bed"
    path.write_text("track name=x\n# comment\n\nchr1\t0\t5\ttrain\nchr1\t7\t9\ttest\textra\nchr2 1 2\n")
    found = read_bed(path, {"chr1": 9, "chr2": 4})
    assert found == [(Interval("chr1", 0, 5), "train"), (Interval("chr1", 7, 9), "test"), (Interval("chr2", 1, 2), "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("chr1\t0", "line 1.*wanted record, start and end"),
        ("chr1\tzero\t5", "line 1"),
        ("chr3\t0\t5", "no record 'chr3'"),
        ("chr1\t0\t10", "ends beyond the record's 9"),
        ("chr1\t5\t5", "empty"),
        ("", "no intervals"),
    ],
)
def test_bed_lines_that_do_not_fit(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.bed"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_bed(path, {"chr1": 9})


def test_gzipped_bed(tmp_path: Path) -> None:
    path, data = tmp_path / "a.bed.gz", gzip.compress(b"chr1\t0\t5\n" * 100, mtime=0)
    path.write_bytes(data)
    assert read_bed(path, {"chr1": 9}) == [(Interval("chr1", 0, 5), "")] * 100
    for damaged in (data[:20], data[:-8] + b"01234567", data[:12] + b"\xff" * 20):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a.bed.gz cannot be read as a BED file \(damaged gzip file"):
            read_bed(path, {"chr1": 9})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="it is no text"):
        read_bed(path, {"chr1": 9})


def test_missing_bed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_bed(tmp_path / "none.bed", {"chr1": 9})
