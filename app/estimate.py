"""How long people will wait, from the pace of the model so far."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

WEIGHT = 0.1  # of the newest measurement in a running mean
FIRST_SECONDS = 0.05  # a token, before anything was measured
FIRST_TOKENS = {"caption": 12, "answer": 12, "chat": 120}  # likewise, of a text


class Pace:
    """Running means of the seconds that a token of every row takes, and of the tokens that a task's texts have."""

    def __init__(self) -> None:
        self._seconds: float | None = None
        self._tokens: dict[str, float] = dict(FIRST_TOKENS)

    def step(self, seconds: float) -> None:
        """Takes the time of one token of every row."""
        before = seconds if self._seconds is None else self._seconds
        self._seconds = before + WEIGHT * (seconds - before)

    def text(self, task: str, tokens: int) -> None:
        """Takes the length of a text that ended by itself."""
        self._tokens[task] += WEIGHT * (tokens - self._tokens[task])

    def remaining(self, task: str, limit: int, tokens: int = 0) -> float:
        """Seconds that a text probably needs from now.

        Args:
            limit: Most tokens it can have.
            tokens: How many it has.
        """
        expected = min(max(self._tokens[task] - tokens, 1), limit - tokens)
        return expected * (FIRST_SECONDS if self._seconds is None else self._seconds)


def waits(busy: Sequence[float], runs: Sequence[Sequence[float]], places: int) -> list[float]:
    """Seconds until each run starts, if places are given in the order of the queue.

    Args:
        busy: Seconds that each text being written still takes.
        runs: For each run in the queue the seconds of each of its texts. All of them start together where they fit.
        places: Texts that are written at a time.
    """
    free = [0.0] * max(places - len(busy), 0) + sorted(busy)[-places:]  # when each place is free next
    heapq.heapify(free)
    starts = []
    for texts in runs:
        together = [heapq.heappop(free) for _ in texts[:places]]
        start = max(together, default=0.0)
        starts.append(start)
        for seconds in texts[:places]:
            heapq.heappush(free, start + seconds)
        for seconds in texts[places:]:
            heapq.heappush(free, heapq.heappop(free) + seconds)
    return starts
