"""What the page shows of a request: plain values, which `app.tasks` gives and `app.render` draws."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass

from PIL import Image

from app.job import Job

BASE = "none"  # the adapter that is none: the base model alone
AUTOMATIC = "auto"  # chat: the adapter that suits what is there, an image or only text


@dataclass(frozen=True)
class Side:
    """An adapter and how strongly it acts; two of them are compared."""

    adapter: str
    strength: float = 1.0


@dataclass(frozen=True)
class Answer:
    """One text, as far as it is written.

    Attributes:
        side: Who writes it.
        job: What was asked of the service.
        note: What a reader should know, such as that the model did not see the picture.
        choices: With choices: what there was to choose from; `text` is the one chosen.
        probabilities: Of each choice.
    """

    side: Side
    job: Job
    text: str = ""
    state: str = "waiting"
    finish: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    ahead: int = 0
    seconds: float = 0.0
    note: str = ""
    choices: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()

    @property
    def done(self) -> bool:
        return self.state == "done"


@dataclass(frozen=True)
class Outcome:
    """What is to be shown of one request: its answers, or why there are none (`error`, a sentence)."""

    answers: tuple[Answer, ...] = ()
    error: str = ""

    @property
    def done(self) -> bool:
        return bool(self.error) or all(answer.done for answer in self.answers)


@dataclass(frozen=True)
class FileRow:
    """One file of a batch; `picture` is small, for a table, and None where the file cannot be read."""

    name: str
    picture: Image.Image | None = None
    caption: str = ""
    error: str = ""

    @property
    def done(self) -> bool:
        return bool(self.caption or self.error)


@dataclass(frozen=True)
class Files:
    """A batch of files, as far as it is done."""

    rows: tuple[FileRow, ...] = ()
    seconds: float = 0.0
    finished: bool = False
    note: str = ""

    @property
    def done(self) -> int:
        return sum(row.done for row in self.rows)

    def as_csv(self) -> str:
        """Columns image, caption, error; with the mark by which spreadsheets know UTF-8, and without formulas."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["image", "caption", "error"])
        writer.writerows(map(_no_formula, (row.name, row.caption, row.error)) for row in self.rows if row.done)
        return "\ufeff" + text.getvalue()

    def as_json_lines(self) -> str:
        """One object a line, as `python -m mmadapter caption --out` writes them."""
        rows = (
            {"image": row.name} | ({"error": row.error} if row.error else {"caption": row.caption})
            for row in self.rows
            if row.done
        )
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _no_formula(cell: str) -> str:
    """A cell that spreadsheets take as text: a file's name or a caption may begin as a formula does."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
