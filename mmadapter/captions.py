"""Caption data sets, and predicted captions, read from the files that people have.

Two annotation formats are recognised by content: COCO's (`images` and `annotations`, one file a split) and Karpathy's
`dataset_*.json` (`images` with their `sentences`, all splits in one file). Predictions are COCO results or JSON lines.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CaptionedImage:
    """One photo and the sentences that people wrote about it.

    Attributes:
        image_id: COCO's number; in Karpathy's files `cocoid` where there is one, else `imgid`.
        file_name: Where the picture lies below the image folder; Karpathy's `filepath` is part of it.
        captions: At least one sentence, with every run of white space made one blank.
        split: "train", "val", "test" or "restval" in Karpathy's files, None in COCO's.
    """

    image_id: int | str
    file_name: str
    captions: tuple[str, ...]
    split: str | None


def read_captions(
    path: Path, split: str | None = None, bare: list[CaptionedImage] | None = None
) -> list[CaptionedImage]:
    """Read COCO caption annotations or a Karpathy `dataset_*.json`, in the file's order.

    Args:
        path: The annotation file.
        split: Keep this split only, None keeps all images. COCO annotations have none.
        bare: Takes the images without captions, which are then left out; with None they are an error. With a list, a
            caption that is no text is read as an empty one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of neither format, contradicts itself, has an image without captions or no such split.
    """
    path = Path(path)
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); give COCO caption annotations or a dataset_*.json") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
        raise ValueError(
            f"{path} is neither COCO caption annotations nor a Karpathy dataset_*.json: it has no list of images"
        )
    if isinstance(content.get("annotations"), list):
        captioned = _read_coco(path, images, content["annotations"], bare is not None)
    elif any("sentences" in image for image in images):
        captioned = _read_karpathy(path, images, bare is not None)
    else:
        raise ValueError(
            f"{path} has images but neither annotations (COCO) nor sentences (Karpathy): it holds no captions; "
            "give a file that does, such as captions_val2017.json"
        )
    for image_id, count in Counter(str(image.image_id) for image in captioned).items():
        if count > 1:
            raise ValueError(f"{path}: image id {image_id} stands there {count} times; ids must be unique")
    without = [image for image in captioned if not image.captions]
    if without and bare is None:
        names = named([image.file_name for image in without], "image")
        raise ValueError(f"{path}: {names} without captions; remove it from the file or add captions")
    if bare is not None:
        bare += without
        captioned = [image for image in captioned if image.captions]
    return captioned if split is None else select_split(captioned, split, path)


def select_split(images: Sequence[CaptionedImage], split: str, path: Path) -> list[CaptionedImage]:
    """The images of one split; `path` is the file to name in the error.

    Raises:
        ValueError: No image is of that split.
    """
    chosen = [image for image in images if image.split == split]
    if not chosen:
        splits = sorted({image.split for image in images if image.split is not None})
        there = f"it has {', '.join(splits)}" if splits else "COCO annotations have none, so give no split"
        raise ValueError(f"{path} has no split {split!r}: {there}")
    return chosen


def image_path(folder: Path, image: CaptionedImage) -> Path:
    """The picture's file: below `folder` as the annotations name it, or right in `folder`.

    Raises:
        FileNotFoundError: It is at neither place.
    """
    for candidate in (Path(folder) / image.file_name, Path(folder) / base_name(image.file_name)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no picture {image.file_name} in {folder}; give the folder of the images")


def match_predictions(
    path: Path, wanted: Sequence[CaptionedImage], known: Iterable[CaptionedImage]
) -> tuple[list[str], int]:
    """Read predicted captions and put them in the order of the images.

    Args:
        path: COCO results (`[{"image_id": 42, "caption": "..."}]`) or JSON lines of `image` and `caption`, matched by
            file name. A line with `error` and no caption counts as missing, unless another line has the caption.
        wanted: The images that are scored: each needs exactly one caption.
        known: All images of the annotation file. Captions of those that are not wanted (other splits) are passed over.

    Returns:
        The captions, one for each wanted image, and how many were passed over.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Malformed, or with missing, duplicate or unknown images, which are named.
    """
    known = list(known)
    by_id = {str(image.image_id): image for image in known}
    by_name: dict[str, list[CaptionedImage]] = {}
    for image in known:
        by_name.setdefault(base_name(image.file_name), []).append(image)

    found: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    shown: dict[str, str] = {}  # how the prediction file calls an image, which is what its errors should say
    unknown: list[str] = []
    for where, record in _prediction_records(path):
        if "image_id" in record:
            label = f"image_id {record['image_id']}"
            matches = [by_id[str(record["image_id"])]] if str(record["image_id"]) in by_id else []
        elif isinstance(record.get("image"), str):
            label = base_name(record["image"])
            matches = by_name.get(label, [])
        else:
            raise ValueError(f"{path}, {where}: expected image_id or image beside caption, got {sorted(record)}")
        if len(matches) > 1:
            raise ValueError(f"{path}, {where}: {len(matches)} images are called {label}; give COCO results (image_id)")
        if not matches:
            unknown.append(label)
            continue
        key = str(matches[0].image_id)
        shown[key] = label
        if record.get("caption") is None and "error" in record:
            failed[key] = str(record["error"])
        elif isinstance(record.get("caption"), str):
            found.setdefault(key, []).append(" ".join(record["caption"].split()))
        else:
            raise ValueError(f"{path}, {where}: caption must be text, got {record.get('caption')!r}")

    if unknown:
        raise ValueError(f"{path}: {named(unknown, 'image')} not in the annotations; do the two files belong together?")
    keys = [str(image.image_id) for image in wanted]
    twice = [shown[key] for key in keys if len(found.get(key, ())) > 1]
    if twice:
        raise ValueError(f"{path}: {named(twice, 'image')} with more than one caption; keep one caption an image")
    missing = [
        f"{shown[key]} ({' '.join(failed[key].split())})" if key in failed else f"{image.image_id} {image.file_name}"
        for key, image in zip(keys, wanted, strict=True)
        if key not in found
    ]
    if missing:
        raise ValueError(
            f"{path}: {named(missing, 'image')} without a caption, of {len(wanted)} to score; caption them first"
        )
    return [found[key][0] for key in keys], len(found.keys() - set(keys))


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, or not UTF-8.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; check the path")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def base_name(path: str) -> str:
    """The file name alone, also of a path that was written on Windows."""
    return re.split(r"[\\/]", path)[-1]


def named(names: Sequence[str], noun: str, limit: int = 3) -> str:
    """Count and name a few of many, for an error: `7 images (a.jpg, b.jpg, c.jpg, ...)`."""
    few = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({few})"


def _read_coco(path: Path, images: list[dict], annotations: list[Any], lenient: bool) -> list[CaptionedImage]:
    captions: dict[int | str, list[str]] = {}
    for number, image in enumerate(images):
        captions[_field(path, image, "id", (int, str), f"images[{number}]")] = []
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        image_id = _field(path, annotation, "image_id", (int, str), where)
        if image_id not in captions:
            raise ValueError(f"{path}: {where} is for image id {image_id}, which is not among the {len(images)} images")
        captions[image_id].append(_caption(path, annotation, "caption", where, lenient))
    return [
        CaptionedImage(
            image_id=image["id"],
            file_name=_field(path, image, "file_name", (str,), f"images[{number}]"),
            captions=tuple(captions[image["id"]]),
            split=None,
        )
        for number, image in enumerate(images)
    ]


def _read_karpathy(path: Path, images: list[dict], lenient: bool) -> list[CaptionedImage]:
    captioned = []
    for number, image in enumerate(images):
        where = f"images[{number}]"
        sentences = image.get("sentences", [])
        if not isinstance(sentences, list):
            raise ValueError(f"{path}: sentences of {where} must be a list, got {type(sentences).__name__}")
        file_name = _field(path, image, "filename", (str,), where)
        captioned.append(
            CaptionedImage(
                image_id=_field(path, image, "cocoid" if "cocoid" in image else "imgid", (int, str), where),
                file_name=f"{image['filepath']}/{file_name}" if image.get("filepath") else file_name,
                captions=tuple(
                    _caption(path, sentence, "raw", f"{where}.sentences", lenient) for sentence in sentences
                ),
                split=_field(path, image, "split", (str,), where),
            )
        )
    return captioned


def _caption(path: Path, record: Any, key: str, where: str, lenient: bool) -> str:
    """A sentence on one line: a stray line break within one would shift every later caption of a line-based tool."""
    if lenient and not (isinstance(record, dict) and isinstance(record.get(key), str)):
        return ""
    return " ".join(_field(path, record, key, (str,), where).split())


def _field(path: Path, record: Any, key: str, types: tuple[type, ...], where: str) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, types):
        expected = " or ".join({int: "a number", str: "text"}[kind] for kind in types)
        raise ValueError(f"{path}: {where} needs {key} ({expected}), got {value!r}; are these caption annotations?")
    return value


def _prediction_records(path: Path) -> list[tuple[str, dict]]:
    """The predictions of either format, each with the place that an error names."""
    text = read_text(path)
    expected = 'expected COCO results ([{"image_id": ..., "caption": ...}]) or JSON lines of image and caption'
    try:
        if text.lstrip().startswith("["):
            records = [(f"entry {number}", record) for number, record in enumerate(json.loads(text), 1)]
        else:
            records = [
                (f"line {number}", json.loads(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()
            ]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); {expected}") from None
    if not records:
        raise ValueError(f"{path} holds no predictions; {expected}")
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {where}: {expected}, got {record!r:.80}")
    return records
