"""A run: jobs on their way through the model, between the thread that wants them and the thread that writes them."""

from __future__ import annotations

import time
import weakref
from threading import Condition, Event

from app.job import Update

UNREAD = 64  # updates that a reader may leave unread
PATIENCE = 60.0  # seconds after which such a reader counts as gone


class Ticket:
    """What both sides share of a run. The newest update of a job takes the place of one that was not read yet, so a
    slow reader costs no memory and misses nothing: every update holds the whole text.

    Attributes:
        cancelled: Set by the reader's side, looked at by the model's.
        submitted: When, on the monotonic clock.
    """

    def __init__(self, jobs: int) -> None:
        self.cancelled = Event()
        self.submitted = time.monotonic()
        self._changed = Condition()
        self._pending: dict[int, Update] = {}  # by job, oldest first
        self._unfinished = jobs
        self._error: Exception | None = None
        self._unread, self._read_at = 0, self.submitted

    def seconds(self) -> float:
        """Since it was submitted."""
        return time.monotonic() - self.submitted

    def push(self, update: Update) -> None:
        """Gives an update to the reader."""
        with self._changed:
            self._pending[update.index] = update
            self._unread += 1
            self._unfinished -= update.state == "done"
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Ends the run: the reader gets the error."""
        with self._changed:
            self._error, self._unfinished = error, 0
            self._pending.clear()
            self._changed.notify_all()

    def read(self) -> Update | None:
        """The next update, waited for; None after the last.

        Raises:
            Exception: What ended the run.
        """
        with self._changed:
            self._unread, self._read_at = 0, time.monotonic()
            while not self._pending and self._unfinished > 0 and self._error is None:
                self._changed.wait()
            self._unread, self._read_at = 0, time.monotonic()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            return self._pending.pop(next(iter(self._pending))) if self._pending else None

    def abandoned(self) -> bool:
        """Whether nobody has read for long although there is much to read."""
        return self._unread >= UNREAD and time.monotonic() - self._read_at > PATIENCE


class Run:
    """An iterator over the updates of a run, which ends when every job is done.

    It frees its place in the model when it is cancelled, when its `with` block ends, and when nothing refers to it any
    more. One thread reads it; any may cancel it.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        weakref.finalize(self, ticket.cancelled.set).atexit = False

    def cancel(self) -> None:
        """Stops within one token: the jobs that are not done end as "cancelled" with the text so far."""
        self._ticket.cancelled.set()

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> Update:
        """The next update.

        Raises:
            Failure: Something broke; the run is over.
        """
        update = self._ticket.read()
        if update is None:
            raise StopIteration
        return update

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
