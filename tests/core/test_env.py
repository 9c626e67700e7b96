import json

import pytest

from core import env


def test_text_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    env.show()
    out = capsys.readouterr().out
    packages = ("python", "torch", "triton", "numba", "timm", "lightning", "triscan")
    machine = ("CPU", "cores", "GPU", "C compiler", "Python headers")
    ops = ("selective_scan on cpu", "causal_conv1d on cpu", "norm on cpu")
    for word in (*packages, *machine, *ops):
        assert word in out, word
    assert not [line for line in out.splitlines() if line.endswith(" ")]


def test_json_has_the_same_sections(capsys: pytest.CaptureFixture[str]) -> None:
    env.show(json=True)
    sections = json.loads(capsys.readouterr().out)
    assert sections.keys() == env.environment().keys()
    assert sections["versions"]["torch"] == env.versions()["torch"]


def test_the_backend_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRISCAN_BACKEND", "reference")
    sections = env.environment()
    assert sections["backends"]["norm on cpu"].startswith("reference (asked for")
    assert sections["variables"]["TRISCAN_BACKEND"] == "reference"
    monkeypatch.setenv("TRISCAN_BACKEND", "refrence")
    assert "did you mean 'reference'" in env.environment()["backends"]["norm on cpu"]


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert env.versions()["no-such-package"] == "-"


def test_missing_headers_and_compiler_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    monkeypatch.setattr(env.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    found = env.launcher()
    assert found["C compiler"].startswith("missing: install")
    assert found["Python headers"].startswith("missing: /nowhere/Python.h")
