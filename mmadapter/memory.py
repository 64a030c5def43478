"""What becomes of memory that a process frees."""

from __future__ import annotations

import ctypes
import functools
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
LARGEST = 2**30  # bytes; a larger tensor still comes from the system and goes back to it


@functools.cache
def keep_freed_memory() -> bool:
    """Large tensors that are freed leave their memory to the next ones; False where the C library is not glibc.

    By itself it gives blocks over some megabytes back, and of the same tensor in the next batch every page costs time
    again: a sixth of a batch of captions. The process then stays as large as it was at its largest.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, LARGEST))
