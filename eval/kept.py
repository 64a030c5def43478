"""Answers that a stopped run goes on from: JSON lines, each with the model that gave it and with how it was made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.records import PICTURE_PACKAGES, note, versions
from mmadapter.record import git_commit

PACKAGES = ("tokenizers", "timm", *PICTURE_PACKAGES)  # what, beside torch and numpy, an answer can depend on
UNKNOWN = "unknown"  # the commit of an answer that does not say


@dataclass(frozen=True)
class Made:
    """How answers came about.

    Attributes:
        commits: Those that they were made at, each once; `UNKNOWN` for answers that do not say.
        seconds: That earlier runs took over them; answers that do not say add nothing.
    """

    commits: tuple[str, ...]
    seconds: float = 0.0

    @classmethod
    def of(cls, lines: Iterable[object]) -> Made:
        """From the `made` of kept lines, None where there is none."""
        known = [made if isinstance(made, dict) else {} for made in lines]
        commits = dict.fromkeys(made.get("git_commit") or UNKNOWN for made in known)
        took = [made.get("seconds") for made in known]
        return cls(tuple(map(str, commits)), sum(value for value in took if isinstance(value, int | float)))


@dataclass(frozen=True)
class Answered:
    """What is to be scored.

    Attributes:
        answers: By the ids of the examples.
        model: The settings that decided the answers, None where they are not known.
        made: How they came about.
        images_hash: `records.images_hash` of the pictures that the model saw, None where it saw none.
    """

    answers: dict[str, Any]
    model: dict[str, Any] | None
    made: Made
    images_hash: str | None = None


class Kept:
    """The answers of a run; with a file, those that an earlier run left in it are there from the beginning.

    A line of the file is an answer and `model`, the settings that decided it, so that two models' answers cannot mix in
    one file; and `made`: the commit, versions, time (UTC) and seconds, which differ between the runs that it is from.

    Args:
        path: The file, None for none.
        model: The settings that decide the answers.
        fields: What every answer has, the first of them its id.
        what: What an answer is called in errors, such as "caption".
        wanted: The ids that are asked for. How many of them are there is said on standard error.
        older: The same settings as older files have them: without `sampling`.

    Raises:
        ValueError: The file holds something else, or another model's answers; it stays as it is.

    Attributes:
        answers: By id.
    """

    def __init__(
        self,
        path: Path | None,
        model: dict[str, Any],
        fields: Sequence[str],
        what: str,
        wanted: Iterable[str],
        older: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._model, self._id, self._wanted = path, model, fields[0], list(wanted)
        self._origin = {"git_commit": git_commit(), "versions": versions(PACKAGES)}
        self._marked = time.monotonic()
        self.answers: dict[str, dict[str, Any]] = {}
        self._taken: dict[str, object] = {}
        if path is None:
            return
        if older is None:
            older = {name: value for name, value in model.items() if name != "sampling"}
        for answer, made in read_kept(path, (model, dict(older)), fields, what):
            self.answers[answer[self._id]], self._taken[answer[self._id]] = answer, made
        found = sum(name in self.answers for name in self._wanted)
        if found:
            note(f"{found} of {len(self._wanted)} {what}s are in {path}; delete it to redo them")

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        """Adds answers, also to the file. They share evenly the seconds since the last ones, or since the beginning."""
        now = time.monotonic()
        seconds, self._marked = (now - self._marked) / max(1, len(answers)), now
        self.answers |= {answer[self._id]: answer for answer in answers}
        if self._path is not None:
            moment = datetime.now(UTC).isoformat(timespec="seconds")
            made = {**self._origin, "time": moment, "seconds": round(seconds, 4)}
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({**answer, "model": self._model, "made": made}, ensure_ascii=False) + "\n"
                    for answer in answers
                )

    @property
    def made(self) -> Made:
        """How the answers that are asked for came about; the seconds are those of earlier runs."""
        here = {"git_commit": self._origin["git_commit"]}
        return Made.of(self._taken.get(name, here) for name in self._wanted)


def read_kept(
    path: Path, models: Sequence[dict[str, Any]], fields: Sequence[str], what: str
) -> list[tuple[dict[str, Any], object]]:
    """The answers that an earlier run left in `path`, each with its `made`; none if there is no such file.

    A line that the earlier run was stopped in is cut off the file.

    Args:
        models: The settings that decide the answers, and other forms of the same.
        fields: What every answer has, the first of them at its beginning.
        what: What an answer is called in errors.

    Raises:
        ValueError: As `Kept`.
    """
    if not path.exists():
        return []
    not_kept = f"is no {what} that this command kept; name another --out"
    content = path.read_bytes()
    complete, _, torn = content.rpartition(b"\n")
    answers = []
    for number, line in enumerate(filter(None, complete.split(b"\n")), 1):
        try:
            answer = json.loads(line)
            other, made = answer.pop("model"), answer.pop("made", None)
            fits = all(field in answer for field in fields) and isinstance(other, dict)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(f"{path}, line {number} {not_kept}")
        if other not in models:
            raise ValueError(
                f"{path} holds {what}s of another model ({_differences(other, models[0])}); delete it or name another "
                "--out"
            )
        answers.append((answer, made))
    if torn:
        if not f'{{"{fields[0]}": '.encode().startswith(torn[: len(fields[0]) + 5]):
            raise ValueError(f"{path}, last line {not_kept}")
        os.truncate(path, len(content) - len(torn))
    return answers


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Where two models' settings differ, the first three of them."""
    found = []
    for name in (*here, *(there.keys() - here.keys())):
        if there.get(name) != here.get(name):
            old, new = (f"{json.dumps(settings.get(name), ensure_ascii=False):.60}" for settings in (there, here))
            found.append(f"{name} {old} there, {new} now" if old != new else f"other {name}")
    return "; ".join(found[:3]) or "it says less about its settings"


def scored_file(path: Path, field: str, wanted: Iterable[str]) -> tuple[dict[str, Any] | None, Made]:
    """Whose the answers of a file of predictions are, and how they were made, as far as it says.

    Args:
        field: That holds the id of an example.
        wanted: Ids of those that are scored.

    Returns:
        The model, None where the file does not say or there are several.
    """
    model: dict[str, Any] | None = None
    one_model, made = True, {}
    with path.open(encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            try:
                record = json.loads(line)
                found, name = record.get("model"), record.get(field)
            except (ValueError, AttributeError, RecursionError):
                return None, Made((UNKNOWN,))
            made[str(name)] = record.get("made")
            if not isinstance(found, dict) or not _agree(found, model or found):
                one_model = False
            elif model is None or "sampling" in found:
                model = found
    return model if one_model else None, Made.of(made.get(name) for name in wanted)


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two lines' models are one; older lines have no `sampling`, and no beams where these are the adapter's."""
    if ("sampling" in one) == ("sampling" in other):
        return one == other
    older, newer = (one, other) if "sampling" in other else (other, one)
    passed = ("sampling", "beams") if older.get("beams", 1) is None else ("sampling",)
    return all(older.get(name) == newer.get(name) for name in {*older, *newer} - {*passed})
