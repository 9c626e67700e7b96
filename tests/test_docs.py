"""The Python examples in README.md and docs/ run, and so do the commands (their options at least)."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

import core.cli
import core.training.recipe  # keeps the parser that there is when it is imported
import vision.routes
from core.cli import parse

TRAINING = (".train", ".classify", ".pretrain", ".segment")  # commands with recipes
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_examples_run(page: Path) -> None:
    """All blocks of a page share their names; the calls that need a downloaded checkpoint are left out."""
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        code = compile(re.sub(r"official = timm.create_model\(.*?\n\)", "", block, flags=re.DOTALL), str(page), "exec")
        exec(code, dict(vars(vision.routes)) if "@route" in block else names)  # a new route belongs into that file


def commands() -> list[str]:
    """Every `python -m` command of the README and of the docs, without comments."""
    found = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line.split(" #")[0].strip() for line in found if line.startswith("python -m ")})


def parse_only(parser: Any, arguments: Sequence[str]) -> NoReturn:
    """Parses a command's arguments, and leaves the command before it looks for files that only the examples name."""
    parse(parser, arguments)
    raise SystemExit(0)


def exit_code(module: str) -> int | str:
    """Runs a module as a command, in this process: starting one for each command would take minutes."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command of the documentation parses; training ones print their configuration instead of training."""
    module, *arguments = shlex.split(command)[2:]
    if module.endswith(TRAINING) and "--help" not in arguments:
        arguments.append("--print_config")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(core.cli, "parse", parse_only)
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of a second copy
    code = exit_code(module)
    errors = capsys.readouterr().err
    assert code == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "command", ["python -m vision.predict a.jpg --modell MODEL", "python -m vision.train digits --model.nam vim"]
)
def test_mistakes_in_commands_are_found(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="did you mean"):
        test_commands_are_understood(command, monkeypatch, capsys)
