"""The Python examples in README.md and docs/ run, and so do the commands (their options at least)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vision.routes

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


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str) -> None:
    """A command of the documentation parses; training ones print their configuration instead of training."""
    words = [sys.executable, *shlex.split(command)[1:]]
    if words[2].endswith((".train", ".classify", ".pretrain")) and "--help" not in words:
        words.append("--print_config")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
