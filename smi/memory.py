"""How the C library's allocator treats large tensors that come and go."""

from __future__ import annotations

import ctypes
import platform

KEPT = 2**30  # bytes of freed memory that a process keeps
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them


def keep_freed() -> bool:
    """Let this process keep up to 1 GiB of freed memory instead of returning it. Returns whether that was possible.

    Each step of an inversion or a removal frees tensors of megabytes and asks for as many again. glibc returns them to
    the system in between, and the page faults cost a quarter of the time on a CPU. For programs, which own their
    process; a library call does not change its user's allocator. Nothing happens where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(TRIM_THRESHOLD, KEPT), mallopt(MMAP_THRESHOLD, KEPT)])
