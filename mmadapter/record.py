"""What every result is kept with: the commit, the data's hash, files written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


def git_commit() -> str | None:
    """The commit that this code was checked out at, with `-dirty` behind it where tracked files have changed since.

    None outside its repository.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        # Without the optional locks: another git at work in the same tree is not kept from its own.
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").split("\n")[:2]
        if Path(top).resolve() != root:
            return None  # that of a repository around an installed copy
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`: at the end it takes the place of `path`, after an error it is gone."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Writes JSON, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
