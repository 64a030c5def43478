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
    """A temporary file beside `path`: at the end it takes the place of `path`, after an error it is gone.

    Behind a link it is the linked file that is replaced, and what is no file, such as a pipe, is written to itself.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() and path.is_file() else path
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_place(path: Path, folder: bool = False) -> None:
    """Refuses a path where nothing can be written, before the work whose result it shall hold.

    Args:
        folder: A folder shall stand there, not a file.

    Raises:
        ValueError: There is the other of the two, or what stands there, or the folder that it would lie in, cannot be
            written to.
    """
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{path} is a file; choose a folder" if folder else f"{path} is a folder; give a file name")
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if place != path and not place.is_dir():
        raise ValueError(f"cannot write {path}: {place} is no folder; give another path")
    if not os.access(place, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to write to {place}; give another path")


def write_json(path: Path, content: object) -> None:
    """Writes JSON, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
