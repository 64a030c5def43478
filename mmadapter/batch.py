"""Captions for many files: found, read ahead, captioned in batches, written line by line, resumed."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from mmadapter.image import IMAGE_SUFFIXES, load_image, to_square
from mmadapter.record import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmadapter.session import Session
    from mmadapter.vision import ImageEncoder

LINE_START = b'{"image": "'  # of every line that a run writes


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
        encoder = session.encoder
        with tqdm(total=len(todo), unit="image", disable=None) as bar, ThreadPoolExecutor(2) as pool:
            for batch in _read_ahead(pool, encoder, todo, batch_size):
                photos = [photo for photo in batch.values() if not isinstance(photo, str)]
                captions = iter(session.caption(photos, batch_size=batch_size, **settings))
                for path, photo in batch.items():
                    if isinstance(photo, str):
                        writer.fail(path, photo)
                    else:
                        writer.caption(path, next(captions))
                bar.update(len(batch))
    return 1 if writer.failures else 0


def _read_ahead(
    pool: ThreadPoolExecutor, encoder: ImageEncoder, paths: Sequence[str], batch_size: int
) -> Iterator[dict[str, Image | str]]:
    """Batches of squares for the encoder, or of the reason why there is none; the next one is read during this one."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    ahead: list[Future] = [pool.submit(_load, encoder, path) for path in batches[0]]
    for index, batch in enumerate(batches):
        current = ahead
        ahead = [pool.submit(_load, encoder, path) for path in batches[index + 1]] if index + 1 < len(batches) else []
        yield {path: future.result() for path, future in zip(batch, current, strict=True)}


def _load(encoder: ImageEncoder, path: str) -> Image | str:
    """The picture at the encoder's size: two batches of photos as they come from a camera would fill gigabytes."""
    try:
        return to_square(load_image(path), encoder.image_size, encoder.config.resize)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())


class _Writer:
    """Prints results and appends them to the file as they come, so that a stopped run loses nothing."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.failures = out, 0

    def caption(self, path: str, caption: str) -> None:
        _print(f"{path}\t{caption}", sys.stdout)
        self._append({"image": path, "caption": caption})

    def fail(self, path: str, reason: str) -> None:
        self.failures += 1
        _print(f"error: {path}: {reason.removeprefix(path).lstrip(': ')}", sys.stderr)
        self._append({"image": path, "error": reason})

    def _append(self, line: dict[str, str]) -> None:
        if self.out is not None:
            # A file name that is no UTF-8 holds lone surrogates; with a backslash they are what JSON writes for them.
            with open(self.out, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _print(line: str, file: TextIO) -> None:
    encoding = file.encoding or "utf-8"
    with tqdm.external_write_mode(file=file):  # beside the progress bar; one odd file name must not end the run
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def _take_up(out: Path) -> set[str]:
    """Pictures whose captions the file holds; lines of errors and a line cut short are taken out of it.

    Raises:
        ValueError: The file is something else; it is left as it is.
        FileNotFoundError: Its folder does not exist.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} does not exist; make it first")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; --out takes a file")
    if not out.exists():
        out.touch()
    if not out.is_file():  # such as /dev/null: it holds nothing, and must not be replaced by a file
        return set()
    content = out.read_bytes()
    kept: dict[str, bytes] = {}
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            # The last line has no end and begins like ours: the run was stopped while writing it.
            if not line.endswith(b"\n") and (line.startswith(LINE_START) or LINE_START.startswith(line)):
                continue
            raise _foreign(out, number) from error
        known = isinstance(entry, dict) and isinstance(entry.get("image"), str)
        if not known or not any(isinstance(entry.get(key), str) for key in ("caption", "error")):
            raise _foreign(out, number)
        if isinstance(entry.get("caption"), str):
            kept[entry["image"]] = line.rstrip(b"\n") + b"\n"
    repaired = b"".join(kept.values())
    if repaired != content:
        with replacing(out.resolve()) as temporary:
            temporary.write_bytes(repaired)
    return set(kept)


def _foreign(out: Path, number: int) -> ValueError:
    return ValueError(f"{out}, line {number}, is not a caption; choose another --out file")
