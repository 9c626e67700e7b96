"""CUDA C++ compiled at run time by NVRTC, which ships inside PyTorch's wheels: nothing to build or to install.

``kernel`` compiles a source for the current GPU and returns something to launch on PyTorch's current stream. Machine
code is kept in memory and on disk (``TRISCAN_CACHE_DIR``, by default ``~/.cache/triscan``), so that a second process
starts at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

SHARED_MEMORY = 48 << 10  # bytes a block may use without asking for more
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

TOGETHER = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_Pointer = ctypes.c_void_p * 1
_thread = threading.local()  # whether this thread has a CUDA context


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``, of a whole number."""

    _fields_ = (("id", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


_early, _together = _Attribute(EARLY, 0, 1), _Attribute(TOGETHER, 0, 1)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """PyTorch's own NVRTC; its process has found it already where it was imported with CUDA."""
    major = (torch.version.cuda or "0").split(".")[0]
    name = f"libnvrtc.so.{major}"
    site = Path(torch.__file__).parents[1] / "nvidia"
    for path in (name, *map(str, site.glob(f"*/lib/{name}"))):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise OSError(f"{name} not found: it comes with PyTorch's CUDA wheels (nvidia-cuda-nvrtc); reinstall torch")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def version() -> tuple[int, int]:
    """NVRTC's version.

    Raises:
        OSError: If this PyTorch came without it.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _ok(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
    return major.value, minor.value


@functools.cache
def available() -> bool:
    """Whether this process can compile and run CUDA C++ on an NVIDIA GPU of compute capability 8.0 or later."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    try:
        _nvrtc()
        _driver()
    except OSError:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def arguments(pointers: Sequence[str], integers: Sequence[str]) -> str:
    """The struct ``Args`` that a ``Kernel`` takes: pointers, then whole numbers, by their names."""
    fields = [f"void* {n};" for n in pointers] + [f"long long {n};" for n in integers]
    return f"struct Args {{ {' '.join(fields)} }};"


def compile_cubin(source: str, macros: Sequence[str], architecture: str) -> bytes:
    """Machine code of ``source``.

    Args:
        source: CUDA C++ that includes nothing.
        macros: What is defined above it, such as ``N 16``. (As options they would reach NVRTC's own header too.)
        architecture: For instance ``sm_90a``.

    Raises:
        RuntimeError: With the compiler's log, if it refuses the source.
    """
    lib, program = _nvrtc(), ctypes.c_void_p()
    text = "".join(f"#define {m}\n" for m in macros) + source
    _ok(lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None), "create")
    flags = [f"--gpu-architecture={architecture}", "--std=c++17"]
    status = lib.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags)))
    size = ctypes.c_size_t()
    if status:
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC refused a kernel ({', '.join(macros)}):\n{log.value.decode()[:4000]}")
    _ok(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size")
    code = ctypes.create_string_buffer(size.value)
    _ok(lib.nvrtcGetCUBIN(program, code), "fetch")
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def _ok(status: int, step: str) -> None:
    if status:
        raise RuntimeError(f"NVRTC: step {step!r} failed with status {status}")


def _cached_cubin(source: str, macros: tuple[str, ...], architecture: str) -> bytes:
    """``compile_cubin``, through the folder of compiled kernels."""
    folder = Path(os.environ.get("TRISCAN_CACHE_DIR") or Path.home() / ".cache" / "triscan")
    key = hashlib.sha256("\0".join((source, *macros, architecture, str(torch.version.cuda))).encode()).hexdigest()
    path = folder / f"{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = compile_cubin(source, macros, architecture)
    try:  # a folder that can't be written costs the next process a compilation, no more
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    except OSError:
        pass
    return code


class Kernel:
    """A loaded kernel whose one argument is a struct of 8-byte fields.

    Args:
        code: Machine code.
        name: The kernel's name (``extern "C"``).
        shared: Bytes of dynamic shared memory of a block.
        device: Index of the GPU.
        early: Whether it may start before what was launched before it has ended, which it waits for by itself
            (``griddepcontrol.wait``, from compute capability 9.0 on).
        together: Whether its blocks wait for each other, so that all have to be on the GPU at once; a launch of more
            blocks than there is room for is refused. Not with ``early``.
    """

    def __init__(
        self, code: bytes, name: str, shared: int, device: int, early: bool = False, together: bool = False
    ) -> None:
        self.shared, self.code, self.device = shared, code, device
        self.attribute = _early if early else _together if together else None
        self._enter()
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        driver = _driver()
        self._check(driver.cuModuleLoadData(ctypes.byref(module), code), f"load {name}")
        self._check(driver.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()), f"find {name}")
        if shared > SHARED_MEMORY:
            status = driver.cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED, shared)
            self._check(status, f"give {name} {shared} bytes of shared memory")

    def _enter(self) -> None:
        """Makes PyTorch's context current: a thread of autograd's may have made no CUDA call yet."""
        driver, context, device = _driver(), ctypes.c_void_p(), ctypes.c_int()
        driver.cuCtxGetCurrent(ctypes.byref(context))
        if context.value is None:
            self._check(driver.cuDeviceGet(ctypes.byref(device), self.device), "find the device")
            self._check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "retain its context")
            self._check(driver.cuCtxSetCurrent(context), "enter its context")

    @staticmethod
    def _check(status: int, step: str) -> None:
        if status:
            raise RuntimeError(f"CUDA driver: could not {step} (status {status})")

    def __call__(self, blocks: int, threads: int, fields: array[int]) -> None:
        """Launches on the current stream of the current device.

        Args:
            blocks: Number of blocks, in one dimension.
            threads: Threads of a block.
            fields: The struct, 8 bytes each: pointers and integers in their order. It is copied.
        """
        if blocks == 0:
            return
        if not getattr(_thread, "entered", False):  # a context stays current until another one is made so
            self._enter()
            _thread.entered = True
        argument = _Pointer(fields.buffer_info()[0])
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self.device))
        if self.attribute is not None:
            attributes = ctypes.addressof(self.attribute)
            config = _Config((blocks, 1, 1), (threads, 1, 1), self.shared, stream.value, attributes, 1)
            status = _driver().cuLaunchKernelEx(ctypes.byref(config), self.function, argument, None)
        else:
            status = _driver().cuLaunchKernel(
                self.function, blocks, 1, 1, threads, 1, 1, self.shared, stream, argument, None
            )
        if status:
            self._check(status, f"launch {blocks} blocks of {threads} threads")


@functools.cache
def _loaded(
    source: str, name: str, macros: tuple[str, ...], shared: int, device: int, early: bool, together: bool
) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    suffix = "a" if major >= 9 else ""
    code = _cached_cubin(source, macros, f"sm_{major}{minor}{suffix}")
    return Kernel(code, name, shared, device, early and major >= 9, together)


def kernel(
    source: str, name: str, macros: tuple[str, ...] = (), shared: int = 0, early: bool = False, together: bool = False
) -> Kernel:
    """A kernel for the current device, compiled on first use.

    Args:
        source: CUDA C++ that includes nothing.
        name: An ``extern "C"`` kernel in it.
        macros: What is defined above it, such as ``N 16``.
        shared: Bytes of dynamic shared memory of a block.
        early: Whether it waits by itself for what was launched before it, where the GPU can (see ``Kernel``).
        together: Whether its blocks wait for each other.
    """
    return _loaded(source, name, macros, shared, torch.cuda.current_device(), early, together)
