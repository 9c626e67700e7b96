"""Freed memory stays with the process when it is asked to keep it."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import re
from pathlib import Path
from core.memory import keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

if {keep}:
    assert keep_freed_memory()
before = resident()
block = bytearray(64 << 20)
block[::4096] = b"x" * (len(block) // 4096)
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_is_kept_on_request(keep: bool) -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True
    )
    kept = int(found.stdout) / 1024
    assert kept > 60 if keep else kept < 10
