"""Runs timm's own model tests on the models of this project: ``python tests/vision/timm_suite.py [MODEL ...]``.

The tests come from the source distribution of the installed timm. One thing is changed in the copy: our models' names
and our files' names are added to the two lists by which timm's tests choose models whose features are tokens. Tests
that download weights are left out. The exit code is pytest's.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKEN_MODELS = ["vim_*", "test_vim*", "local_vim_*cls*", "test_local_vim_cls"]  # whose forward_features returns tokens


def download(version: str, folder: Path) -> Path:
    """Fetches timm's source distribution and unpacks its tests into ``folder``, once; returns where they are."""
    unpacked = folder / f"timm-{version}"
    if not (unpacked / "pyproject.toml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
        subprocess.run([*pip, "--dest", str(folder), f"timm=={version}"], check=True)
        with tarfile.open(folder / f"timm-{version}.tar.gz") as archive:
            wanted = [m for m in archive if re.match(rf"timm-{re.escape(version)}/(tests/|pyproject.toml$)", m.name)]
            archive.extractall(folder, wanted, filter="data")
    return unpacked


def list_our_models(source: str, modules: list[str]) -> str:
    """The test file with our names in front of those of its two lists."""
    for name, entries in (("NON_STD_FILTERS", TOKEN_MODELS), ("FEAT_INTER_FILTERS", modules)):
        head = f"\n{name} = [\n"
        if source.count(head) != 1:
            raise SystemExit(f"error: timm's tests/test_models.py has no list {name}; wanted the layout of timm 1.0.31")
        source = source.replace(head, head + "".join(f"    {entry!r},\n" for entry in entries))
    return source


def main() -> int:
    """Runs the tests of the models named on the command line, or of all."""
    sys.path.insert(0, str(ROOT))
    import timm

    import vision

    modules = sorted(
        {Path(str(vars(vision.models)[name].__module__).replace(".", "/")).name for name in vision.models.__all__}
    )
    ours = timm.list_models(module=modules)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=ours, metavar="MODEL", help=f"from {', '.join(ours)}")
    parser.add_argument("--select", default="", help="further pytest -k expression, such as test_model_forward_fx")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(ours))
    if unknown:
        parser.error(f"got {', '.join(unknown)}, wanted models of this project: {', '.join(ours)}")

    folder = download(timm.__version__, ROOT / "build" / "timm-suite")
    source = (folder / "tests" / "test_models.py").read_text()
    (folder / "tests" / "test_our_models.py").write_text(list_our_models(source, modules))
    (folder / "conftest.py").write_text("import vision  # noqa: F401  registers the models before timm lists them\n")
    chosen = " or ".join(f"-{name} or [{name}" for name in args.models)
    select = f"({chosen}) and not pretrained" + (f" and ({args.select})" if args.select else "")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select, "tests/test_our_models.py"]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
