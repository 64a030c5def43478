"""Rows to learn from, read from the files that people have: Alpaca's instructions and questions about pictures.

Two formats are recognised by content: one JSON list (also as `{"data": [...]}`) and JSON lines. A row that cannot be
learnt is set aside with its place in the file and the reason, so that one bad row of a million is named, not met
after an hour of training.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mmadapter.captions import read_text
from mmadapter.prompts import Template, question_text, template

EXPECTED = "expected a list of rows, or one row a line, with instruction, input and output or question and answer"
FEW_PICTURES = 500  # so many are checked in a second or two, without a progress bar

_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,:]*")  # what stands between the values of a JSON text
_WORD_BREAK = re.compile(r"(?<=[^\W_])_(?=[^\W_])")


@dataclass(frozen=True)
class Row:
    """One row to learn.

    Attributes:
        prompt: The whole text before the response, rendered by a template, without the template's separator.
        response: What is learnt, without white space around it.
        image: The picture's file, None for text.
        where: The row's place for errors, such as "rows.jsonl, line 17" or "rows.json, row 17 (line 103)".
    """

    prompt: str
    response: str
    image: Path | None = None
    where: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be learnt, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_rows(
    path: Path, images: Path | None = None, template_name: str = "alpaca", split: str | None = None
) -> tuple[list[Row], list[BadRow]]:
    """Reads the rows of a file, in its order.

    A row has `instruction`, optionally `input`, and `output`; or `question` and `answer`. Either may have an `image`
    and a `split`. Underscores within the words of an `answer` become blanks (see `answer_text`).

    Args:
        path: A JSON list, an object with that list under "data", or JSON lines; UTF-8.
        images: Folder that relative picture names are below; by default the file's own, and then its `images/`.
        template_name: The prompt template (`mmadapter.prompts`).
        split: Take only rows of this split, and rows that name none. None takes all.

    Returns:
        The good rows, at least one, and the bad ones: what is not an object, lacks a field or has one that is not text,
        has an empty response, or names a picture that is not there. Pictures are not opened: see `check_images`.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: The file is not JSON, holds no rows, none of the split, or none that is good; or no such template.
    """
    path = Path(path)
    form = template(template_name)
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"there is no folder {images}; give the folder of the pictures")
    folders = [Path(images)] if images is not None else [path.parent, path.parent / "images"]
    good: list[Row] = []
    bad: list[BadRow] = []
    other_splits: set[str] = set()
    for where, record in records(path):
        try:
            fields = fields_of(record)
            own_split = text_field(fields, "split", optional=True)
            if split is not None and own_split not in ("", split):
                other_splits.add(own_split)
                continue
            good.append(_row(fields, where, form, folders))
        except ValueError as error:
            bad.append(BadRow(where, str(error)))
    if not good and not bad:
        if not other_splits:
            raise ValueError(f"{path} holds no rows; {EXPECTED}")
        raise ValueError(f"{path} has no rows of split {split!r}; it has {', '.join(sorted(other_splits))}")
    if not good:
        raise ValueError(f"{path} has no row to learn from: {_first(bad)}; {EXPECTED}")
    return good, bad


def check_images(rows: Sequence[Row]) -> list[BadRow]:
    """Decodes every picture of the rows once, and returns the rows whose picture cannot be read.

    Many pictures show a progress bar.
    """
    from tqdm import tqdm

    from mmadapter.image import check_image

    def reason(path: Path) -> str | None:
        try:
            check_image(path)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    paths = list(dict.fromkeys(row.image for row in rows if row.image is not None))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        checked = tqdm(
            pool.map(reason, paths),
            desc="pictures checked",
            unit="picture",
            total=len(paths),
            disable=len(paths) <= FEW_PICTURES,
        )
        reasons = dict(zip(paths, checked, strict=True))
    return [BadRow(row.where, reasons[row.image]) for row in rows if row.image is not None and reasons[row.image]]


def require_good(bad: Sequence[BadRow], skip: bool) -> None:
    """Stops at bad rows, or with `skip` says on standard error that they are left out.

    Raises:
        ValueError: There are bad rows, and `skip` is false.
    """
    if not bad:
        return
    if not skip:
        raise ValueError(f"{_first(bad)}; mend them, or go on without them with --skip-bad-rows")
    print(f"left out {_first(bad)}", file=sys.stderr)


def held_aside(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows, and at least `count` rows for validation; rows of one picture stay on one side.

    Args:
        count: 0 is one row in twenty, at most 500.
    """
    import torch  # here, so that reading rows does without it

    from mmadapter.data import seed_of

    groups: dict[object, list[Row]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(index if row.image is None else row.image, []).append(row)
    order = list(groups.values())
    shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed_of(seed, 0))).tolist()
    wanted = count or max(1, min(500, len(rows) // 20))
    train, validation = [], []
    for index in shuffled:
        (validation if len(validation) < wanted else train).extend(order[index])
    return train, validation


def answer_text(answer: str) -> str:
    """An answer as it is said: "wine_glass, cup" becomes "wine glass, cup".

    DAQUAR writes an answer of several words with underscores. Of each of the answers between commas that has no
    blank, the underscores between two letters or digits become blanks.
    """
    return ",".join(part if " " in part.strip() else _WORD_BREAK.sub(" ", part) for part in answer.split(","))


def _first(bad: Sequence[BadRow], limit: int = 3) -> str:
    """Counts bad rows and shows a few, on one line."""
    few = "; ".join(" ".join(str(row).split()) for row in bad[:limit])
    return f"{len(bad)} bad row{'s' if len(bad) > 1 else ''}: {few}{'; ...' if len(bad) > limit else ''}"


def _row(fields: dict, where: str, form: Template, folders: Sequence[Path]) -> Row:
    """A row from its fields; a ValueError says why there is none."""
    if "question" in fields and "instruction" not in fields:
        prompt = form.render(question_text(text_field(fields, "question")))
        response = answer_text(text_field(fields, "answer"))
    elif "instruction" in fields:
        prompt = form.render(text_field(fields, "instruction"), text_field(fields, "input", optional=True))
        response = text_field(fields, "output")
    else:
        raise ValueError(f"has neither instruction nor question, its fields are {', '.join(map(repr, fields))[:80]}")
    name = text_field(fields, "image", optional=True)
    return Row(prompt, response.strip(), find_picture(name, folders) if name else None, where)


def fields_of(record: object) -> dict:
    """The fields of a row that `records` gave.

    Raises:
        ValueError: It is no object, or no JSON at all.
    """
    if isinstance(record, json.JSONDecodeError):
        raise ValueError(f"not JSON: {record.msg} (column {record.colno})")
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with named fields, got {record!r:.60}")
    return record


def text_field(fields: dict, name: str, *, optional: bool = False) -> str:
    """A field's text; of an optional one "" where it is absent, null or blank.

    Raises:
        ValueError: It is absent, empty, not text, or not text that can be encoded.
    """
    value = fields.get(name)
    if value is None and optional:
        return ""
    if name not in fields:
        raise ValueError(f"has no {name}")
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r:.60}")
    if not value.strip():
        if optional:
            return ""
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of an emoji: JSON can write it, no tokenizer can take it
        raise ValueError(f"{name} holds half a character (a lone surrogate) at position {error.start + 1}") from None
    return value


def find_picture(name: str, folders: Sequence[Path]) -> Path:
    """The picture's file in the first of the folders that has it.

    Raises:
        ValueError: None has it.
    """
    for folder in folders:
        if os.path.isfile(folder / name):  # not Path.is_file, which raises for a name that is too long
            return folder / name
    places = "" if os.path.isabs(name) else f" in {' or '.join(map(str, folders))}"
    raise ValueError(f"there is no picture {name!r:.200}{places}")


def records(path: Path) -> Iterator[tuple[str, object]]:
    """Every row of a file of JSON or JSON lines with its place; a line that is not JSON as the error that it gave.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON, or holds no list of rows.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; {EXPECTED}")
    content = _parsed(text)
    if isinstance(content, json.JSONDecodeError):
        lines = [(number, _parsed(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        broken = [isinstance(record, json.JSONDecodeError) for _, record in lines]
        # One whole row to begin with, or most lines whole: JSON lines with broken ones among them.
        if text.lstrip().startswith("[") or (broken[0] and 2 * sum(broken) >= len(broken)):
            raise ValueError(
                f"{path} is not JSON: {content.msg} at line {content.lineno}, column {content.colno}; {EXPECTED}"
            )
        return ((f"{path.name}, line {number}", record) for number, record in lines)
    if isinstance(content, list):
        return _elements(text, text.index("["), path.name)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return _elements(text, _start_of_data(text), path.name)
    if isinstance(content, dict) and not content.keys().isdisjoint(("instruction", "question")):  # a file of one row
        return iter([(f"{path.name}, line {text.count(chr(10), 0, text.index('{')) + 1}", content)])
    raise ValueError(f"{path} holds {content!r:.60}; {EXPECTED}")


def _parsed(text: str) -> object:
    """The value of a JSON text, or the error that says where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of too many digits
        return json.JSONDecodeError(str(error).split(";")[0], text, 0)


def _elements(text: str, start: int, name: str) -> Iterator[tuple[str, object]]:
    """The elements of the list at `start` of a text known to be JSON, each with its place in the file called `name`."""
    position, line, counted = start + 1, 1, 0
    for number in itertools.count(1):
        position = _BETWEEN.match(text, position).end()
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        value, position = _DECODER.raw_decode(text, position)
        yield f"{name}, row {number} (line {line})", value


def _start_of_data(text: str) -> int:
    """Where the value of "data" begins in a text known to be a JSON object that has it."""
    start, position = 0, text.index("{") + 1
    while text[position := _BETWEEN.match(text, position).end()] != "}":
        key, position = _DECODER.raw_decode(text, position)
        position = _BETWEEN.match(text, position).end()
        if key == "data":
            start = position
        _, position = _DECODER.raw_decode(text, position)
    return start
