"""Fills the table of a study, one CSV row a run: ``python -m core.synthetics.table induction_heads --parallel 8``.

A table can be filled over several sittings: runs that the file holds are not run again. Several processes can fill it
that take different models or seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from core.cli import exit_codes
from core.errors import UserError

if TYPE_CHECKING:
    from core.synthetics.command import Parsed, TableOptions
    from core.synthetics.recipe import Recipe, Settings


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``python -m core.synthetics.table RECIPE [options]``.

    Args:
        argv: Arguments instead of the process's own.

    Raises:
        SystemExit: With code 2 after a user's mistake, 130 after Ctrl-C.
    """
    with exit_codes():
        from core.synthetics import command

        arguments = sys.argv[1:] if argv is None else argv
        command.start("core.synthetics.table", arguments, command.TableOptions, run)


def run(parsed: Parsed) -> None:
    """Fills a table, prints it and writes its page.

    Args:
        parsed: Recipe, settings and options.

    Raises:
        UserError: For what does not fit, and after all if some of the runs failed.
    """
    options: TableOptions = parsed.options
    if options.parallel < 1:
        raise UserError(f"--parallel is {options.parallel}; wanted at least 1")
    wanted = parsed.recipe.rows(parsed.changed, options.models or [], options.seeds or [parsed.recipe.settings.seed])
    file = Path(options.file or f"runs/synthetics/{parsed.recipe.name}/table.csv")
    failed = [] if options.show else fill(parsed.recipe, wanted, file, options)
    write_page(parsed, wanted, file)
    if failed:
        raise UserError(f"{len(failed)} of the runs failed: {'; '.join(failed)}; the others are in {file}")


def fill(recipe: Recipe, wanted: Sequence[Settings], file: Path, options: TableOptions) -> list[str]:
    """Runs what is missing, and adds each run to the file as it ends.

    Args:
        recipe: The study.
        wanted: Its runs.
        file: Of the table.
        options: How many at once, how long, where.

    Returns:
        What went wrong, a text for each run that failed; these have no row.
    """
    import torch

    from core.synthetics import command, rows, training
    from core.table import append_row

    device = command.device(options.device)
    facts = {"device": command.device_name(device), "torch": torch.__version__, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    known = {row["id"] for row in rows.read_rows(file) if row["stopped"] != "time"}
    waiting = [settings for settings in wanted if recipe.identity(settings) not in known]
    for settings in wanted[:1]:
        rows.check_columns(file, rows.row(recipe, settings, training.Result(), facts))
    failed = []
    with command.progress(sum(settings.steps for settings in waiting)) as lines:
        for run, result in training.queue(recipe, waiting, device, options.parallel, options.minutes):
            lines.show(command.label(run.settings), run.result)
            if result is None or (result.stopped == "time" and not options.keep_unfinished):
                continue
            if result.stopped == "failed":
                failed.append(f"{command.label(run.settings)}: {result.error}")
                continue
            append_row(file, rows.row(recipe, run.settings, result, facts))
    return failed


def write_page(parsed: Parsed, wanted: Sequence[Settings], file: Path) -> None:
    """Prints the table of the wanted runs that there are, and writes it with its curves beside the file."""
    from core.synthetics import figures, rows
    from core.training.report import Report

    ids = {parsed.recipe.identity(settings): place for place, settings in enumerate(wanted)}
    found = sorted((row for row in rows.read_rows(file) if row["id"] in ids), key=lambda row: ids[row["id"]])
    lines = rows.summary(found)
    print(rows.markdown(lines))
    if not found:
        return
    report = Report(parsed.recipe.name.replace("_", " "), f"{len(found)} of {len(wanted)}", "runs of the table")
    report.table("Accuracy", lines, "Share of right answers in per cent, by length of the test; mean over the seeds.")
    page = Path(parsed.options.page) if parsed.options.page else file.with_suffix(".html")
    page.parent.mkdir(parents=True, exist_ok=True)
    for title, figure in (("Lengths", figures.lengths_figure(found)), ("Widths", figures.widths_figure(found))):
        if figure is not None:
            report.figure(title, figure)
            figure.savefig(page.with_name(f"{page.stem}_{title.lower()}.png"), dpi=110)
    report.table("Runs", found)
    report.write(page)
    print(page)


if __name__ == "__main__":
    main()
