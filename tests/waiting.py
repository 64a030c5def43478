"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def comes_true(condition: Callable[[], object], seconds: float) -> bool:
    """Whether a condition comes true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
