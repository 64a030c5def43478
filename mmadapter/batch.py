"""Captions for many files: found, read ahead, captioned in batches, written line by line, resumed."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mmadapter.image import IMAGE_SUFFIXES, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmadapter.session import Session


def find_images(paths: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Pictures that command-line arguments name, in order and without repeats.

    A folder is walked in sorted order with the folders in it; symbolic links to files are followed. What is no path is
    taken as a glob.

    Returns:
        The files, and for each argument that gave none the reason.
    """
    found: dict[str, None] = {}
    failed: dict[str, str] = {}
    for path in paths:
        if os.path.isdir(path):
            files = sorted(_walk(path))
            if not files:
                failed[path] = f"no pictures in this folder ({', '.join(IMAGE_SUFFIXES)})"
        elif os.path.exists(path):
            files = [path]
        else:
            files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
            if not files:
                failed[path] = "no such file, and no file matches it as a pattern"
        found |= dict.fromkeys(files)
    return list(found), failed


def _walk(folder: str) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(root, name)
            if name.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(file):
                yield file


def caption_files(
    load: Callable[[], Session],
    images: Sequence[str],
    failed: dict[str, str],
    *,
    out: Path | None,
    batch_size: int,
    settings: dict[str, object],
) -> int:
    """Captions files and prints `PATH<TAB>CAPTION`; the model is loaded only if there is something left to do.

    Args:
        load: Gives the session.
        images: Files to caption.
        failed: Arguments that named no file, with the reason.
        out: JSON lines of `image` and `caption`, or `image` and `error`. Captions it holds are not made again.
        batch_size: Images at a time.
        settings: Decoding settings, see `Session.caption`.

    Returns:
        Exit status: 1 when any image failed, else 0.
    """
    done = _take_up(out) if out is not None else set()
    todo = [image for image in images if image not in done]
    if len(todo) < len(images):
        print(f"{len(images) - len(todo)} of {len(images)} captions are already in {out}", file=sys.stderr)
    writer = _Writer(out)
    for path, reason in failed.items():
        writer.fail(path, reason)
    if todo:
        session = load()
        with tqdm(total=len(todo), unit="image", disable=None) as bar, ThreadPoolExecutor(2) as pool:
            for batch in _read_ahead(pool, todo, batch_size):
                photos = {path: photo for path, photo in batch.items() if not isinstance(photo, str)}
                for path, photo in batch.items():
                    if isinstance(photo, str):
                        writer.fail(path, photo)
                if photos:
                    captions = session.caption(list(photos.values()), batch_size=batch_size, **settings)
                    for path, caption in zip(photos, captions, strict=True):
                        writer.caption(path, caption)
                bar.update(len(batch))
    return 1 if writer.failures else 0


def _read_ahead(pool: ThreadPoolExecutor, paths: Sequence[str], batch_size: int) -> Iterator[dict[str, Image | str]]:
    """Batches of decoded pictures, or of the reason why one could not be; the next batch is read during this one."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    ahead: list[Future] = [pool.submit(_load, path) for path in batches[0]]
    for index, batch in enumerate(batches):
        current = ahead
        ahead = [pool.submit(_load, path) for path in batches[index + 1]] if index + 1 < len(batches) else []
        yield {path: future.result() for path, future in zip(batch, current, strict=True)}


def _load(path: str) -> Image | str:
    try:
        return load_image(path)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())


class _Writer:
    """Prints results and appends them to the file as they come, so that a stopped run loses nothing."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.failures = out, 0

    def caption(self, path: str, caption: str) -> None:
        with tqdm.external_write_mode():
            print(f"{path}\t{caption}", flush=True)
        self._append({"image": path, "caption": caption})

    def fail(self, path: str, reason: str) -> None:
        self.failures += 1
        with tqdm.external_write_mode(file=sys.stderr):
            print(f"error: {path}: {reason.removeprefix(f'{path}: ')}", file=sys.stderr, flush=True)
        self._append({"image": path, "error": reason})

    def _append(self, line: dict[str, str]) -> None:
        if self.out is not None:
            with open(self.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _take_up(out: Path) -> set[str]:
    """Pictures whose captions the file holds; lines of errors and a line cut short are taken out of it.

    Raises:
        ValueError: The file is something else; it is left as it is.
        FileNotFoundError: Its folder does not exist.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} does not exist; make it first")
    if not out.exists():
        out.touch()
        return set()
    lines = out.read_text(encoding="utf-8").split("\n")
    kept: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image = entry["image"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # without a newline behind it: the run was stopped while writing
                continue
            raise ValueError(f"{out}, line {number}, is not a caption; choose another --out file") from error
        if isinstance(entry.get("caption"), str):
            kept[image] = line
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(line + "\n" for line in kept.values()), encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return set(kept)
