"""What a bug report needs to know of a machine: ``python -m core.env [--json true]``."""

import json as jsonlib
import os
import platform
import shutil
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

from core.errors import UserError
from kernels import backend, nvrtc

PACKAGES = ("torch", "triton", "numba", "timm", "lightning", "jsonargparse", "numpy")
OPS = ("selective_scan", "causal_conv1d", "norm")
VARIABLES = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CC")  # and TRISCAN_*, TRITON_*


def versions() -> dict[str, str]:
    """Return the versions of Python, of the project and of the packages it stands on; ``-`` is not installed."""
    import core

    found = {"python": platform.python_version(), "triscan": core.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def git_revision() -> str | None:
    """Return the checkout's commit, with ``+`` if files differ from it, or None outside of a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def find_device(device: str) -> torch.device:
    """The device of a command's ``--device``; ``auto`` is the GPU if there is one.

    Raises:
        UserError: If there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device is {device!r}, wanted auto, cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {device}, but there is no CUDA device here; give --device cpu")
    return found


def device_name(device: torch.device) -> str:
    """What a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def gpus() -> list[str]:
    """Return name, memory and compute capability of each GPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}")
    return found


def launcher() -> dict[str, str]:
    """Return what Triton needs once to build its launcher: a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {
        "C compiler": compiler or "missing: install gcc or clang",
        "Python headers": str(headers) if headers.is_file() else f"missing: {headers}; install the dev package",
    }


def backends() -> dict[str, str]:
    """Return which implementation each op would take on each kind of device at hand, and why."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    chosen = {}
    for device in devices:
        for op in OPS:
            try:
                has_cuda = device.type == "cuda" and op == "selective_scan" and nvrtc.available()
                name, reason = backend.choose("auto", device, has_cuda)
                text = f"{name} ({reason})"
            except ValueError as error:  # TRISCAN_BACKEND asks for what this device cannot do
                text = str(error)
            chosen[f"{op} on {device.type}"] = text
    return chosen


def runtime_compiler() -> str:
    """Return the version of the NVRTC that comes with PyTorch and compiles CUDA kernels at run time."""
    try:
        return ".".join(map(str, nvrtc.version()))
    except OSError:
        return "none (not a CUDA build of PyTorch)"


def environment() -> dict[str, dict[str, str]]:
    """Return all of it, in sections."""
    variables = {k: v for k, v in os.environ.items() if k in VARIABLES or k.startswith(("TRISCAN_", "TRITON_"))}
    machine = {
        "platform": platform.platform(),
        "CPU": cpu_name(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "CUDA of torch": torch.version.cuda or "-",
        "GPU": "; ".join(gpus()) or "none",
        "NVRTC": runtime_compiler(),
    }
    return {
        "versions": {**versions(), "git": git_revision() or "-"},
        "machine": machine,
        "launcher (Triton)": launcher(),
        "backends": backends(),
        "variables": variables,
    }


def show(json: bool = False) -> None:
    """Print versions, machine, GPU and backends, for bug reports.

    Args:
        json: Print JSON instead of text.
    """
    sections = environment()
    if json:
        print(jsonlib.dumps(sections, indent=2))
        return
    width = max(len(name) for facts in sections.values() for name in facts)
    for title, facts in sections.items():
        print(title)
        for name, value in (facts or {"none": ""}).items():
            print(f"  {name:<{width}}  {value}".rstrip())


if __name__ == "__main__":
    from core.cli import run

    run(show)
