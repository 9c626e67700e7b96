"""Machine code of Triton kernels for a Hopper GPU, made and read on any machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WORD = 1 << 32


class _Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "sm_90"

    def get_current_stream(self, device: object) -> int:
        return 0


def compiled(kernel: Any, tensors: Mapping[str, Any], others: Mapping[str, Any], grid: tuple[int, ...]) -> Any:
    """What Triton makes of a call of ``kernel`` for sm_90."""
    with mock.patch.object(driver, "_active", _Hopper()):
        return kernel.warmup(**tensors, **others, grid=grid)


def instructions(kernel: Any, folder: Path) -> list[str]:
    """The instructions of a compiled kernel, in their order."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([DISASSEMBLER, "-sass", file], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.MULTILINE)
    return [line.strip() for line in found]


def faulty_sums(code: list[str]) -> list[str]:
    """Sums of the descriptor of a tile, in halves, whose upper half takes the address's from a register that is not
    zero: addresses in shared memory have no upper half, the constant is all there is.

    A descriptor's upper half is the distance of two groups of rows, and in its two highest bits the way that the tile
    is swizzled.
    """
    add = re.compile(r"(?:@!?U?P\d+ )?UIADD3\.X (UR\d+), (UR\d+|URZ), (-?0x[0-9a-f]+)")
    found = []
    for at, line in enumerate(code):
        sum_ = add.match(line)
        if sum_ is None or sum_[2] == "URZ" or not _upper_half(int(sum_[3], 16) % WORD):
            continue
        source = next((i for i in reversed(code[:at]) if _writes(i, int(sum_[2][2:]))), "nothing")
        if not re.match(r"UMOV UR\d+, URZ", source):
            found.append(f"{line}, after {source}")
    return found


def _upper_half(constant: int) -> bool:
    return bool(constant >> 30) and 0 < constant % (1 << 30) < 1 << 14


def _writes(line: str, register: int) -> bool:
    """Whether an instruction writes a uniform register."""
    result = re.match(r"(?:@!?U?P\d+ )?(\S+) +(?:UP\d, )?UR(\d+)", line)
    if result is None:
        return False
    first, wide = int(result[2]), re.search(r"WIDE|\.64", result[1])
    return register in ((first, first + 1) if wide else (first,))


Launch = tuple[Any, Mapping[str, Any], Mapping[str, Any], tuple[int, ...]]  # kernel, tensors, others, grid


def collector(launches: dict[str, Launch]) -> Callable[..., None]:
    """In place of ``launch_named``: keeps the first launch of every kernel, and runs nothing."""

    def keep(plan: object, key: object, kernel: Any, grid: tuple[int, ...], tensors: Any, others: Any) -> None:
        launches.setdefault(kernel.fn.__name__, (kernel, tensors, others(), grid))

    return keep
