"""Joins the pages of several runs in one: ``python -m core.report runs/demo`` writes ``runs/demo/report.html``."""

import html
import json
from dataclasses import dataclass
from pathlib import Path

from core.cli import run
from core.errors import UserError
from core.training.folder import MARK
from core.training.report import Page, Report, read_page

PAGE = "report.html"


@dataclass(frozen=True)
class Run:
    """A run as it lies in its folder.

    Args:
        name: Name of the folder.
        status: ``finished``, ``interrupted``, ``failed`` or ``running``.
        page: What its page shows.
        metrics: Its figures by name; None is one that was not finite.
    """

    name: str
    status: str
    page: Page
    metrics: dict[str, float | None]


def join(folder: str, title: str | None = None) -> None:
    """Writes one page of all runs in a folder, report.html in it: a table of their figures, then each run's own page.

    The runs stand in the order in which they ended. Pictures and sounds are inside the page; it needs no other file.

    Args:
        folder: Folder whose subfolders are runs, such as runs/demo or runs/vision/digits.
        title: Title of the page; null is the folder's name.
    """
    root = Path(folder).expanduser()
    runs = find_runs(root)
    if (root / PAGE).exists():
        read_page(root / PAGE)  # a file that is no such page is not ours to replace, and refused
    finished = sum(one.status == "finished" for one in runs)
    report = Report(title or root.resolve().name, f"{finished} of {len(runs)}", "runs finished")
    report.table("Figures", summary(runs), "What the models reach on the test data, and simple methods on the same.")
    links = (f'<li><a href="#{html.escape(one.name)}">{html.escape(one.page.title)}</a></li>' for one in runs)
    report.html("Runs", f"<ul>{''.join(links)}</ul>")
    for one in runs:
        report.page(one.name, one.page)
    report.write(root / PAGE)
    print(root / PAGE)


def find_runs(root: Path) -> list[Run]:
    """Reads the runs that lie in a folder, in the order in which they ended.

    Raises:
        UserError: If there is no such folder, no run in it, or a run that left no page.
    """
    if not root.is_dir():
        raise UserError(f"no folder at {root}; give one whose subfolders are runs, such as runs/demo")
    marks = [mark for mark in root.glob(f"*/{MARK}") if not mark.parent.name.startswith(".")]  # those are put aside
    if not marks:
        raise UserError(f"{root} holds no runs (no */{MARK}); give a folder whose subfolders are runs")
    return [_read(mark) for mark in sorted(marks, key=lambda mark: (mark.stat().st_mtime_ns, mark))]


def summary(runs: list[Run]) -> list[dict[str, str]]:
    """Returns a row for each figure of the tests that has a baseline, and for each run's headline."""
    rows = []
    for one in runs:
        headline = one.page.subline.replace(" ", "/", 1).removeprefix("test/")
        tests = {name.removeprefix("test/"): value for name, value in one.metrics.items() if name.startswith("test/")}
        simple: dict[str, list[str]] = {}
        for name, value in one.metrics.items():
            if name.startswith("baseline/"):
                name = name.removeprefix("baseline/")
                metric = max((m for m in tests if name.endswith(f"_{m}")), key=len, default=headline)
                method = _words(name.removesuffix(f"_{metric}"))
                simple.setdefault(metric, []).append(f"{method} {_figure(metric, value)}")
        shown = {name: _figure(name, value) for name, value in tests.items() if name == headline or name in simple}
        if headline not in shown:
            shown = {one.page.subline: one.page.headline, **shown}
        for name, value in sorted(shown.items(), key=lambda item: item[0] != headline):
            beside = ", ".join(simple.get(name, []))
            rows.append({"run": one.page.title, "figure": _words(name), "model": value, "baselines": beside})
    return rows


def _read(mark: Path) -> Run:
    folder = mark.parent
    try:
        status = json.loads(mark.read_text(encoding="utf-8"))["status"]
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: the run left no figures ({error}); run it again, or remove the folder") from error
    return Run(folder.name, status, read_page(folder / PAGE), metrics)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4g}"


if __name__ == "__main__":
    run(join)
