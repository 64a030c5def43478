"""The app's log: JSON lines, one for each event, and a code for each failure that a page can show."""

from __future__ import annotations

import contextlib
import datetime
import json
import secrets
import sys
import threading
import traceback
from pathlib import Path


class Log:
    """Writes one JSON object a line: time (UTC), level, event and what belongs to it. Any thread may write.

    What people wrote or sent does not belong in here: only counts, names, durations, and tracebacks of what broke.
    A file that can no longer be written, on a full disk, ends nothing: errors then go to standard error.

    Args:
        path: File that is appended to; None is standard error, and then only errors are written.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._told = False  # that the file can no longer be written
        if path is not None:
            try:  # what cannot be written is told at the start
                open(path, "a", encoding="utf-8").close()
            except OSError as error:
                raise OSError(
                    f"cannot keep the log in {path} ({error.strerror}); give a file that can be written"
                ) from error

    def write(self, event: str, *, level: str = "info", **fields: object) -> None:
        """Appends an event; `fields` are plain values."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "level": level, "event": event, **fields}, ensure_ascii=False, default=str)
        with self._lock, contextlib.suppress(OSError):  # standard error may be a file on the same disk
            if self._appended(line):
                return
            if level != "info":
                print(line, file=sys.stderr, flush=True)

    def failure(self, error: BaseException, event: str = "failure", **fields: object) -> str:
        """Appends an error with its traceback and returns the code that stands beside it."""
        code = secrets.token_hex(3)
        lines = traceback.format_exception(error)
        self.write(event, level="error", code=code, error=type(error).__name__, traceback="".join(lines), **fields)
        return code

    def _appended(self, line: str) -> bool:
        """Whether the file took a line; the first time that it does not, standard error says so."""
        if self.path is None:
            return False
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self._told:
                self._told = True
                reason = f"{error.strerror}; errors are written here meanwhile"
                print(f"the log {self.path} cannot be written: {reason}", file=sys.stderr, flush=True)
            return False
        return True
