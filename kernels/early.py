"""What a kernel may do before the one in front of it has ended, where it was launched so early (sm_90)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch(ptr):
    """Asks L2 for the lines that pointers point to: a hint, so the one in front may yet write there.

    All must point to memory that there is.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
