"""What the C library does with memory that tensors on the CPU leave."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
LARGEST = 2**31 - 1  # of mallopt's int


def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors for the next ones, up to its peak.

    By default glibc gives buffers of megabytes back to the system as soon as they are free and asks for the next one
    anew, and the system clears every page of it: for a model whose layers pass over such buffers once, that costs as
    much as a third of the work. For programs of one purpose; a library should leave the allocator to its user.

    Returns:
        Whether this C library has the setting (glibc has).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST))
