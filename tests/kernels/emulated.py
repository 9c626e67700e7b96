"""Runs the CUDA scans' source on a CPU, slowly: compiled as C++, a fiber for each thread (``emulated.h``).

Inline PTX is replaced, statement by statement, by what it does; the special functions are libm's, so that errors of the
GPU's own approximations don't show. Everything else is the source that runs on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from array import array
from pathlib import Path

HEADER = Path(__file__).with_name("emulated.h")
FUNCTIONS = (  # of one line each: what stands before the body, and the body
    (r"number\(f16 v\)", "return (float)cast_bits<_Float16>(v.bits);"),
    (r"put\(bf16& to, float v\)", "to.bits = to_bf16(v);"),
    (r"put\(f16& to, float v\)", "to.bits = cast_bits<unsigned short>((_Float16)v);"),
    (r"pin\(E\*& p\)", ""),
    (r"pin\(int& v\)", ""),
    (r"ex2\(float v\)", "return v < -126.0f ? 0.0f : exp2f(v);"),
    (r"rcp\(float v\)", "return 1.0f / v;"),
    (r"void follow\(\)", ""),
    (r"unsigned address\(const void\* shared\)", "return 0;"),
)
# From where to where in the source, and what stands there instead.
LOAD = ("    if constexpr (bytes == 16)\n        asm", "    return r;\n", "    if (live) memcpy(r.word, p, bytes);\n")
SAVE = (
    "    if constexpr (bytes == 16) {\n        uint4",
    "}\n\n#define UNCUT",
    "    if (live) memcpy((void*)p, &from, sizeof(from));\n",
)
BARRIERS = (
    "__device__ __forceinline__ void set_up(",
    "// This thread's place in the block.",
    """static void set_up(i64* barrier, int count) { arrivals[barrier] = {count, 0, 0}; }
static void arrive(i64* barrier) {
    __syncwarp();
    Arrivals& a = arrivals[barrier];
    if (threadIdx.x % 32 == 0 && ++a.arrived == a.wanted) a.arrived = 0, a.phase++;
}
static void wait_for(i64* barrier, int turn) { while (arrivals[barrier].phase <= turn) others(); }

""",
)
READ = "memcpy(to + i, p + i, 4 * once);"
START = """
static Args* given;
static void start() {{ {name}(*given); fibers[current].done = true; others(); }}
extern "C" void run(long long blocks, int threads, int bytes, Args* arguments) {{
    given = arguments;
    run_blocks<Args>(start, blocks, threads, bytes);
}}
"""


def translated(source: str, name: str) -> str:
    """C++ of a kernel's source."""
    for head, body in FUNCTIONS:
        source = re.sub(rf"({head}) \{{.*\}}\n", lambda m, body=body: f"{m[1]} {{ {body} }}\n", source)
    source = _between(source, *LOAD)
    source = _between(source, *SAVE)
    source = _between(source, *BARRIERS)
    source = re.sub(r'asm\("" : "\+r"\(none\)\);', "", source)
    source = re.sub(r'asm\("mad\.wide[^;]*;"[^;]*;', "p = (E*)((char*)base + (i64)row * stride);", source)
    source = re.sub(r'asm\("mma\.sync[^;]*;"[^;]*;', "product(to, first, second);", source)
    source = re.sub(r'asm volatile\("ld.volatile.shared[^;]*;"[^;]*;', READ, source)
    source = re.sub(r'asm volatile\("prefetch[^;]*;"[^;]*;', ";", source)
    source = source.replace("extern __shared__ float4 memory[];", "float4* memory = shared_memory;")
    assert "asm" not in source, "inline PTX that the emulation doesn't know"
    return source + START.format(name=name)


def _between(source: str, first: str, last: str, new: str) -> str:
    """``source`` with what stands from ``first`` up to ``last`` replaced, if it is there."""
    start = source.find(first)
    return source if start < 0 else source[:start] + new + source[source.index(last, start) :]


@functools.cache
def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("g++")


class Kernel:
    """Stands in for ``nvrtc.Kernel``."""

    def __init__(self, source: str, name: str, macros: tuple[str, ...], shared: int) -> None:
        self.shared = shared
        text = f'#include "{HEADER}"\n' + "".join(f"#define {m}\n" for m in macros) + translated(source, name)
        with tempfile.TemporaryDirectory() as folder:
            code, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            code.write_text(text)
            flags = ("-O1", "-std=c++17", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-shared", "-fPIC")
            subprocess.run([str(compiler()), *flags, "-o", str(library), str(code)], check=True)
            self._library = ctypes.CDLL(str(library))

    def __call__(self, blocks: int, threads: int, fields: array[int]) -> None:
        address = ctypes.c_void_p(fields.buffer_info()[0])
        self._library.run(ctypes.c_longlong(blocks), threads, self.shared, address)


@functools.cache
def kernel(source: str, name: str, macros: tuple[str, ...] = (), shared: int = 0, early: bool = False) -> Kernel:
    """Stands in for ``nvrtc.kernel``."""
    return Kernel(source, name, macros, shared)
