"""What people think of the answers, kept in a file of JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

VERDICTS = ("up", "down", None)
MAX_COMMENT = 4000  # characters; the page is open to anyone who can reach it, the disk is not


class Feedback:
    """A file that grows by one JSON object for each verdict.

    Several threads may add to it; one process writes to it. A line is in the file whole or not at all, unless the
    process is killed while it writes: then the next line begins on its own.
    """

    def __init__(self, path: Path | str) -> None:
        """Makes the file and its folder where they are not there, so that a bad path is told at the start.

        Raises:
            OSError: The file cannot be written to.
        """
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab"):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"cannot keep feedback in {self.path} ({reason}); give a file that can be written") from error

    def add(
        self,
        *,
        task: str,
        adapter: str,
        strength: float,
        settings: Mapping[str, Any],
        text: str,
        verdict: str | None,
        comment: str = "",
        question: str = "",
        messages: Sequence[Mapping[str, str]] = (),
        image: Image.Image | None = None,
    ) -> None:
        """Keeps one verdict, with the time in UTC.

        Args:
            task: "caption", "answer" or "chat".
            adapter: Name of the adapter, "none" for the base model.
            strength: Factor on its gates.
            settings: Those of the answer that were not the adapter's own.
            text: The answer that is judged.
            verdict: "up", "down" or None, where a verdict was taken back or there is only a comment.
            comment: What the person wrote.
            question: Of the task "answer".
            messages: Of the task "chat", all that came before the answer.
            image: What the answer is about. Its size and the SHA-256 of its RGB pixels are kept, never the picture.

        Raises:
            ValueError: The verdict is another, or the comment is too long.
            OSError: The line cannot be written, such as on a full disk; the file stays as it was.
        """
        if verdict not in VERDICTS:
            raise ValueError(f'a verdict is "up", "down" or None, got {verdict!r}')
        if len(comment) > MAX_COMMENT:
            raise ValueError(f"the comment has {len(comment)} characters, at most {MAX_COMMENT} are kept; shorten it")
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "task": task,
            "adapter": adapter,
            "strength": strength,
            "settings": dict(settings),
            "question": question,
            "messages": [dict(message) for message in messages],
            "image": None if image is None else _identity(image),
            "text": text,
            "verdict": verdict,
            "comment": comment,
        }
        # Half a surrogate pair, which a page may send, becomes the escape that JSON has for it.
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            _append(self.path, line)


def _identity(image: Image.Image) -> dict[str, Any]:
    """What tells a picture from others and does not show it."""
    pixels = image.convert("RGB").tobytes()
    return {"sha256": hashlib.sha256(pixels).hexdigest(), "width": image.width, "height": image.height}


def _append(path: Path, line: bytes) -> None:
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # the line before was cut short
                line = b"\n" + line
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(f"{path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        except OSError:
            file.truncate(end)
            raise
