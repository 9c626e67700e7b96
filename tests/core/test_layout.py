"""The rules of the house that a test can hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = tuple(name for name in ("vision", "genomics", "audio") if (ROOT / name / "__init__.py").is_file())
ALLOWED = {"kernels": {"kernels"}, "core": {"kernels", "core"}} | {d: {"kernels", "core", d} for d in DOMAINS}
OURS = set(ALLOWED) | {"tests", "benchmarks", "configs"}
SOURCES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def loads_without_weights_only(tree: ast.AST) -> list[int]:
    """The lines that call ``torch.load`` (or ``trainer.load``-like helpers of that name) without weights_only=True."""
    lines = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        given = [k.value for k in node.keywords if k.arg == "weights_only"]
        if not (given and isinstance(given[0], ast.Constant) and given[0].value is True):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = (imported(ast.parse(path.read_text(encoding="utf-8"))) & OURS) - ALLOWED[package]
    assert not wrong, f"{package} must not import {', '.join(sorted(wrong))}"


def test_the_import_rule_can_fail() -> None:
    assert imported(ast.parse("def f():\n    from vision.models import vim\n")) == {"vision"}


def test_weights_only_everywhere() -> None:
    files = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    found = {str(p.relative_to(ROOT)): loads_without_weights_only(ast.parse(p.read_text("utf-8"))) for p in files}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert loads_without_weights_only(ast.parse("torch.load(f)\ntorch.load(f, weights_only=True)")) == [1]


@pytest.mark.parametrize("name", [*ALLOWED])
def test_the_packages_are_ours(name: str) -> None:
    module = __import__(name)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().parent == ROOT / name, f"another package shadows {name}: {module.__file__}"


def test_no_init_under_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert list((ROOT / "configs").rglob("__init__.py")) == []


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import audio.generate, audio.train, core.parallel.strategies, core.pretrain, genomics.pretrain, vision.train
"""


def test_commands_do_without_triton() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, cwd=ROOT)
