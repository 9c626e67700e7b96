"""Trains and tests one model on a synthetic task: ``python -m core.synthetics induction_heads --model mamba``."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from core.cli import exit_codes
from core.errors import UserError

if TYPE_CHECKING:
    from core.synthetics.command import Parsed
    from core.synthetics.training import Result, Run


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``python -m core.synthetics RECIPE [options]``.

    Args:
        argv: Arguments instead of the process's own.

    Raises:
        SystemExit: With code 2 after a user's mistake, 130 after Ctrl-C.
    """
    with exit_codes():
        from core.synthetics import command

        arguments = sys.argv[1:] if argv is None else argv
        command.start("core.synthetics", arguments, command.RunOptions, run)


def run(parsed: Parsed) -> None:
    """Runs one run and leaves its folder, whose path is printed last.

    Args:
        parsed: Recipe, settings and options.

    Raises:
        UserError: For what does not fit, and if the run fails.
    """
    from core.synthetics import command, training
    from core.training.folder import named, numbered

    settings, options = parsed.recipe.run(parsed.changed), parsed.options
    runs = training.queue(parsed.recipe, [settings], command.device(options.device), minutes=options.minutes)
    work, result = next(runs)  # which finds out what does not fit, before there is a folder
    folder = (
        named(Path(options.run_dir), options.overwrite)
        if options.run_dir
        else numbered(Path("runs/synthetics") / parsed.recipe.name)
    )
    folder.start()
    (folder.path / "config.yaml").write_text(yaml.safe_dump(asdict(settings), sort_keys=False), encoding="utf-8")
    folder.mark({"status": "running", "command": parsed.line})
    status, result, begin = "interrupted", result or work.result, time.perf_counter()
    try:
        with command.progress(settings.steps) as lines:
            for _, ended in runs:
                lines.show(command.label(settings), work.result)
                result = ended or result
        status = "failed" if result.stopped == "failed" else "finished"
    finally:
        if status == "interrupted":
            result = replace(result, stopped=status, seconds=time.perf_counter() - begin)
        leave(folder.path, parsed, work, result, status)
        folder.mark({"status": status, "command": parsed.line, "seconds": round(result.seconds, 1)})
        if status != "failed":
            print(folder.path)
    if status == "failed":
        raise UserError(f"the run failed: {result.error}; {folder.path} holds what there is")


def leave(folder: Path, parsed: Parsed, work: Run, result: Result, status: str) -> None:
    """Prints a run's figures, and writes them with its history and its page."""
    from core.synthetics import command, figures, rows
    from core.training.report import Report, curves, write_atomically

    facts = {"device": command.device_name(work.device), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    row = rows.row(parsed.recipe, work.settings, result, facts)
    print(rows.markdown(rows.summary([row])))
    accuracy = {f"test/accuracy@{length}": value for length, value in result.accuracy.items()}
    metrics = {
        **accuracy,
        "run/seconds": result.seconds,
        "run/steps": result.steps,
        "run/parameters": result.parameters,
    }
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if result.history:
        with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(result.history[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(result.history)
    last = list(result.accuracy.items())[-1:]
    headline = (f"{100 * last[0][1]:.2f} %", f"of the answers right at length {last[0][0]:,}") if last else ("", "")
    report = Report(f"{parsed.recipe.name.replace('_', ' ')}: {work.settings.model}", *headline)
    if status != "finished":
        report.text("State", f"This run was {status}: the figures are those up to that point.")
    report.facts(
        "Run", {**asdict(work.settings), "layer": parsed.recipe.entry(work.settings), **facts, "command": parsed.line}
    )
    report.table("Tests", rows.summary([row]), "Accuracy in per cent by length; training ended by: " + result.stopped)
    for title, figure in (("Training", curves(result.history)), ("Lengths", figures.lengths_figure([row]))):
        if figure is not None:
            report.figure(title, figure)
    report.write(folder / "report.html")


if __name__ == "__main__":
    main()
