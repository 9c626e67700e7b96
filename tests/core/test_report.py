import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from core.training.report import Report, curves, write_atomically


def text_of(report: Report) -> str:
    return report.render()


def test_everything_given_is_escaped_but_markup() -> None:
    report = Report("<b>&", "<i>", "<u>")
    report.table("<t1>", [{"<k>": "<v>"}], "<c>")
    report.facts("<t2>", {"<name>": "<fact>"})
    report.text("<t3>", "<text>")
    report.images("<t4>", [(np.zeros((2, 2), np.uint8), '<"label">')])
    report.html("<t5>", "<em>as it is</em>")
    page = text_of(report)
    assert "<em>as it is</em>" in page
    for tag in ("b", "i", "u", "k", "v", "c", "t1", "t2", "t3", "t4", "t5", "name", "fact", "text"):
        assert f"&lt;{tag}&gt;" in page
        assert tag in ("b", "i", "u", "text") or f"<{tag}>" not in page
    assert "<b>" not in page
    assert 'alt="&lt;&quot;label&quot;&gt;"' in page


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    report = Report("run")
    figure = Figure()
    figure.subplots().plot([1, 2])
    report.figure("Figure", figure, "caption")
    report.images(
        "Images", [(Image.new("RGB", (4, 4), "red"), "a", True), (np.zeros((200, 200, 3), np.uint8), "b", False)]
    )
    report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'src="(?!data:image/png;base64,)', page) == []
    assert not re.search(r"https?://|@import|<link|<script", page)
    assert page.count("data:image/png;base64,") == 3
    assert page.count('class="pixels"') == 1  # the small one
    assert page.count('class="good"') == page.count('class="bad"') == 1
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_tables_take_rows_with_different_keys() -> None:
    report = Report("run")
    report.table("T", [{"a": 1, "b": 0.123456}, {"a": 2, "c": "x"}])
    page = text_of(report)
    assert "<tr><th>a</th><th>b</th><th>c</th></tr>" in page
    assert "<tr><td>1</td><td>0.1235</td><td></td></tr>" in page
    assert "<tr><td>2</td><td></td><td>x</td></tr>" in page


def test_curves_pair_the_stages_of_a_metric() -> None:
    rows: list[dict[str, float]] = [{"step": float(s), "train/loss": 1 / (s + 1)} for s in range(9)]
    rows += [{"step": s, "val/loss": 0.5, "val/accuracy": s / 9, "epoch": s} for s in (4.0, 8.0)]
    rows += [{"step": 9.0, "test/once": 1.0}, {"step": 9.0, "train/loss": float("nan")}]
    figure = curves(rows)
    assert figure is not None
    titles = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_visible()}
    assert set(titles) == {"loss", "accuracy"}
    train, val = titles["loss"].get_lines()
    assert len(train.get_xdata()) == 9
    assert list(val.get_xdata()) == [4.0, 8.0]


@pytest.mark.parametrize("rows", [[], [{"step": 1.0, "val/loss": 1.0}], [{"step": 1.0}, {"step": 2.0}]])
def test_no_curves_without_two_points(rows: list[dict[str, float]]) -> None:
    assert curves(rows) is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    write_atomically(target, "old")

    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
