"""``python -m core.report``: one page of several runs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from core.cli import run
from core.errors import UserError
from core.report import find_runs, join, summary
from core.training.folder import MARK
from core.training.report import Report, read_page


def leave_run(
    folder: Path, headline: tuple[str, str], metrics: dict[str, float | None], ended: int, status: str = "finished"
) -> Path:
    """Leaves what a run leaves in its folder."""
    folder.mkdir(parents=True)
    report = Report(f"{folder.name} <run>", *headline)
    report.facts("Facts", {"<kept>": "</main></body></html>"})
    report.images("Images", [(np.zeros((4, 4), np.uint8), "zero", True)])
    report.write(folder / "report.html")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / MARK).write_text(json.dumps({"status": status}))
    os.utime(folder / MARK, (ended, ended))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "demo"
    leave_run(
        root / "reads", ("97.0 %", "test accuracy"),
        {
            "test/accuracy": 0.97, "test/unseen_loci_accuracy": 0.26, "test/loss": 0.1, "baseline/kmer_accuracy": 0.99,
            "baseline/kmer_unseen_loci_accuracy": 0.24, "baseline/chance_accuracy": 0.25,
        },
        ended=20,
    )  # fmt: skip
    leave_run(
        root / "digits", ("0.9", "test accuracy"), {"test/accuracy": 0.9, "baseline/logistic_regression": 0.8}, ended=10
    )
    leave_run(root / "clips", ("0.5", "seconds taken"), {"seconds": 1.0}, ended=30)
    leave_run(root / ".digits.replaced", ("0", "old"), {}, ended=5)
    return root


def test_the_page_holds_every_page_in_the_order_the_runs_ended(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(join, [str(runs), "--title", "Demo & more"])
    assert capsys.readouterr().out.splitlines()[-1] == str(runs / "report.html")
    page = (runs / "report.html").read_text()
    assert "<h1>Demo &amp; more</h1>" in page
    assert "3 of 3 <small>runs finished</small>" in page
    places = [page.index(f'<article id="{name}">') for name in ("digits", "reads", "clips")]
    assert places == sorted(places)
    assert page.count('href="#') == page.count("<article ") == 3
    for name in ("digits", "reads", "clips"):
        assert read_page(runs / name / "report.html").sections.replace("h2>", "h3>") in page
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    run(join, [str(runs), "--title", "Demo & more"])
    assert (runs / "report.html").read_text() == page


def test_figures_stand_beside_their_baselines(runs: Path) -> None:
    rows = [tuple(row.values()) for row in summary(find_runs(runs))]
    assert rows == [
        ("digits <run>", "accuracy", "90.0 %", "logistic regression 80.0 %"),
        ("reads <run>", "accuracy", "97.0 %", "kmer 99.0 %, chance 25.0 %"),
        ("reads <run>", "unseen loci accuracy", "26.0 %", "kmer 24.0 %"),
        ("clips <run>", "seconds taken", "0.5", ""),
    ]


def test_a_run_that_did_not_finish_is_counted(runs: Path) -> None:
    leave_run(runs / "broken", ("", ""), {"test/accuracy": None}, ended=40, status="interrupted")
    join(str(runs))
    assert "3 of 4 <small>runs finished</small>" in (runs / "report.html").read_text()


def test_a_page_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for headline in (("<1>", "a & b"), ("1", ""), ("", "")):
        report = Report("<t>", *headline)
        report.text("T", "</main></body></html>\n")
        report.write(tmp_path / "page.html")
        page = read_page(tmp_path / "page.html")
        assert page[:3] == ("<t>", *headline)
        assert page.sections.startswith("<section><h2>T</h2>")
        assert page.sections.endswith("</section>\n")


def test_bad_folders_are_one_message(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(folder: Path, word: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            run(join, [str(folder)])
        message = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert word in message

    fails(tmp_path / "absent", "no folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no runs")
    (runs / "report.html").write_text("my notes")
    fails(runs, "is no page of a run")
    assert (runs / "report.html").read_text() == "my notes"
    (runs / "report.html").unlink()
    (runs / "reads" / "metrics.json").unlink()
    fails(runs, "reads: the run left no figures")
    (runs / "reads" / "metrics.json").write_text("{}")
    (runs / "reads" / "report.html").unlink()
    fails(runs, "no page at")
    assert not (runs / "report.html").exists()


def test_other_files_are_no_pages(tmp_path: Path) -> None:
    (tmp_path / "x.html").write_bytes(b"\xff\xfe<!doctype html>")
    with pytest.raises(UserError, match=r"x\.html is no page"):
        read_page(tmp_path / "x.html")
