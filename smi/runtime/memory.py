"""Memory: what happens where there is too little, and how the C library treats large tensors that come and go."""

from __future__ import annotations

import ctypes
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

KEPT = 2**28  # bytes of freed memory that a process keeps
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them


def keep_freed() -> bool:
    """Let this process keep up to 256 MiB of freed memory instead of returning it. Returns whether that was possible.

    Each step of an inversion or a removal frees tensors of megabytes and asks for as many again. glibc returns them to
    the system in between, and the page faults cost a quarter of the time on a CPU. For programs, which own their
    process; a library call does not change its user's allocator. Nothing happens where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(TRIM_THRESHOLD, KEPT), mallopt(MMAP_THRESHOLD, KEPT)])


@dataclass
class Chunk:
    """How many items are worked on together; less where they turn out not to fit."""

    size: int


def halving(work: Callable[[Tensor], T], items: Tensor, chunk: Chunk) -> Iterator[T]:
    """``work`` of chunks of the items, in order; where the memory does not suffice, of half as many from there on.

    Says so in a warning. One item that does not fit raises the error that there was.
    """
    done = 0
    while done < len(items):
        part = items[done : done + chunk.size]
        try:
            found = work(part)
        except (RuntimeError, MemoryError) as error:
            chunk.size = halved(error, len(part))
            continue
        done += len(part)
        yield found


def halved(error: BaseException, size: int) -> int:
    """Half of ``size``, after a warning, where ``error`` says that memory ran out; else ``error`` is raised again."""
    lack = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA and mps, Linux, Windows
    if size < 2 or not (isinstance(error, MemoryError) or any(text in str(error).lower() for text in lack)):
        raise error
    told = f"out of memory with {size} at a time; going on with {size // 2}"
    warnings.warn(told, RuntimeWarning, stacklevel=3)
    return size // 2
