"""Keeping freed memory in the process, which on Linux makes training on two cores half as fast again.

glibc hands every freed block of more than a few megabytes back to the system, and the next operation of the same shape
takes it again, page by page. A training step of 16 rows of 20 tokens takes 43,000 page faults that way and 2 without.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets this process reuse the blocks it frees; it holds on to its peak. Nothing happens where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**27)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
