"""What the evaluations share: how a result is documented, and answers of a model that a stopped run goes on from."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapter.record import file_sha256, git_commit

if TYPE_CHECKING:
    from mmadapter.session import Session


def provenance(command: str, packages: Sequence[str], **programs: str | None) -> dict[str, Any]:
    """What any result is recorded with: the command, the commit, versions and the time (UTC).

    Args:
        command: The command line that gives the result.
        packages: Those that had a part in it, beside mmadapter and torch; the version of one not installed is None.
        **programs: Versions of what else had, beside Python.
    """
    found = {"python": sys.version.split()[0], **programs}
    for package in ("mmadapter", "torch", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {
        "command": command,
        "git_commit": git_commit(),
        "versions": found,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def prepare_outputs(*paths: Path | None) -> None:
    """Makes the folders of the files that a command will write: better now than after an hour of work.

    Raises:
        ValueError: A path is a folder.
    """
    for path in paths:
        if path is not None:
            if path.is_dir():
                raise ValueError(f"{path} is a folder; give a file name")
            path.parent.mkdir(parents=True, exist_ok=True)


def kept_line(answer: dict[str, Any], model: dict[str, Any]) -> str:
    """A line of a file of answers: the answer, and the settings that decided it.

    With these, two models' answers cannot mix in one file.
    """
    return json.dumps({**answer, "model": model}, ensure_ascii=False) + "\n"


def read_kept(path: Path, model: dict[str, Any], fields: Sequence[str], what: str, option: str) -> list[dict[str, Any]]:
    """The answers that an earlier run of the same model left in `path`, none if there is no such file.

    A line that the earlier run was stopped in is cut off the file.

    Args:
        fields: What every answer has, the first of them at its beginning.
        what: What an answer is called in errors, such as "caption".
        option: The option that names the file.

    Raises:
        ValueError: The file holds something else, or another model's answers; it stays as it is.
    """
    if not path.exists():
        return []
    not_kept = f"is not a {what} that this command kept; name another {option}"
    content = path.read_bytes()
    complete, _, torn = content.rpartition(b"\n")
    answers = []
    for number, line in enumerate(filter(None, complete.split(b"\n")), 1):
        try:
            answer = json.loads(line)
            other = answer.pop("model")
            fits = all(field in answer for field in fields)
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(f"{path}, line {number} {not_kept}")
        if other != model:
            raise ValueError(
                f"{path} holds {what}s of another model ({json.dumps(other)}); delete it or name another file"
            )
        answers.append(answer)
    if torn:
        if not f'{{"{fields[0]}": '.encode().startswith(torn[: len(fields[0]) + 5]):
            raise ValueError(f"{path}, last line {not_kept}")
        os.truncate(path, len(content) - len(torn))
    return answers


def note(message: str) -> None:
    """Says something beside the result, on standard error."""
    print(message, file=sys.stderr, flush=True)


def sees(session: Session) -> bool:
    """Whether the adapter in use was trained with images; the others are asked without, also where there is one."""
    return session.about is not None and session.about.vision is not None


def adapter_hash(name: str) -> str:
    """SHA-256 of the adapter's weights: one trained anew under the same name is another model."""
    from mmadapter.checkpoint import FILE_NAME, find_adapter

    path = find_adapter(name)
    if path.is_dir():
        names = (FILE_NAME, "adapter_model.safetensors", "adapter_model.bin")
        path = next(path / name for name in names if (path / name).is_file())
    return file_sha256(path)
