"""Read the JSON list of entities that a model wrote, mending what can be mended in one way only.

Never evaluated, only read. Mended: code fences and other text around the list; commas too many; single and typographic
quotes, and keys without any; line breaks and needless backslashes within strings; a list inside an object; objects
without the brackets of a list; a list that ends too early, of which the entities that are whole are kept, if there is
one. Not mended, because it could mean several things: two lists, an entity without its type or its text, a key twice in
one object, and anything else.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

FENCE = re.compile(r"^[ \t]*```[ \t]*\w*[ \t]*$", re.MULTILINE)
DOUBLE_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
# An apostrophe within ends the string only where a string can end.
SINGLE_QUOTED = re.compile(r"'((?:[^'\\]|\\.|'(?!\s*[,:}\]]))*)'", re.DOTALL)
TYPOGRAPHIC = re.compile(
    r"[“”„‟]((?:[^“”‟\\]|\\.|[“”‟](?!\s*[,:}\]]))*)[“”‟]|[‘’‚‛]((?:[^‘’‛\\]|\\.|[‘’‛](?!\s*[,:}\]]))*)[‘’‛]", re.DOTALL
)
BARE_KEY = re.compile(r"[A-Za-z_]\w*(?=\s*(?::|$))")
ESCAPE = re.compile(r'\\(.)|"|[\x00-\x1f]', re.DOTALL)
LITERAL = re.compile(r"[\w.+-]+")
LIST_START = re.compile(r"\[\s*(?=[{\]])")


class Entity(NamedTuple):
    """An entity as a model gives it: the name of its type, and its words."""

    type: str
    text: str


class CutShortError(ValueError):
    """The text ends within something."""


def read_entities(text: str) -> tuple[list[Entity], bool] | None:
    """The entities of a model's text, and whether it had to be mended; None for a text that cannot be read."""
    try:
        content = json.loads(text, object_pairs_hook=_fields)
        if isinstance(content, list):
            return [_entity(record) for record in content], False
    except (ValueError, RecursionError):
        pass
    try:
        entities = _mended(FENCE.sub("", text))
    except ValueError:
        return None
    return entities, True


def _mended(text: str) -> list[Entity]:
    lists, place = [], 0
    while match := LIST_START.search(text, place):
        entities, place = _read_list(text, match.end())
        lists.append(entities)
    if not lists:  # objects one after the other, as JSON lines
        start = text.find("{")
        if start < 0:
            raise ValueError("no list")
        entities, end = _read_objects(text, start)
        if "{" in text[end:] or not entities:
            raise ValueError("more than one run of objects")
        lists.append(entities)
    if len(lists) > 1:
        raise ValueError("more than one list")
    return lists[0]


def _read_list(text: str, place: int) -> tuple[list[Entity], int]:
    """The list whose bracket stands before `place`, and where it ends."""
    entities, place = _read_objects(text, place)
    if place < len(text) and text[place] == "]":
        return entities, place + 1
    if place < len(text) or not entities:
        raise ValueError("not a list of objects")
    return entities, place


def _read_objects(text: str, place: int) -> tuple[list[Entity], int]:
    """Objects and the commas between them, as many as follow each other; one cut short by the end is left out."""
    entities: list[Entity] = []
    while True:
        place = _skip(text, place, commas=True)
        if place == len(text) or text[place] != "{":
            return entities, place
        try:
            record, place = _read_object(text, place + 1)
        except CutShortError:
            return entities, len(text)
        entities.append(_entity(record))


def _read_object(text: str, place: int) -> tuple[dict[str, Any], int]:
    """The object whose brace stands before `place`, its keys in lower case, and where it ends."""
    pairs = []
    while True:
        place = _skip(text, place, commas=True)
        if _at(text, place) == "}":
            return _fields(pairs), place + 1
        bare = BARE_KEY.match(text, place)
        key, place = (bare[0], bare.end()) if bare else _read_value(text, place)
        place = _skip(text, place)
        if not isinstance(key, str) or _at(text, place) != ":":
            raise ValueError("a key needs a value")
        value, place = _read_value(text, _skip(text, place + 1))
        place = _skip(text, place)
        if _at(text, place) not in ",}":
            raise ValueError("a value must be followed by a comma or by the end of its object")
        pairs.append((key, value))


def _read_value(text: str, place: int) -> tuple[Any, int]:
    """A string in any kind of quotes, a number, true, false or null."""
    quote = _at(text, place)
    if quote in "\"'“”„‟‘’‚‛":
        match = {'"': DOUBLE_QUOTED, "'": SINGLE_QUOTED}.get(quote, TYPOGRAPHIC).match(text, place)
        if match is None:
            raise CutShortError("a string without an end")
        return json.loads(f'"{ESCAPE.sub(_escaped, match[match.lastindex])}"'), match.end()
    match = LITERAL.match(text, place)
    if match is None:
        raise ValueError("neither a string nor a number")
    if match.end() == len(text):
        raise CutShortError("perhaps not the whole of it")
    return json.loads(match[0]), match.end()


def _escaped(match: re.Match[str]) -> str:
    """What stands for a part of a string in JSON."""
    if match[1] is None:
        return '\\"' if match[0] == '"' else " "
    return match[0] if match[1] in '"\\/bfnrtu' else match[1]


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {key.strip().lower(): value for key, value in pairs}
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def _entity(record: Any) -> Entity:
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("entity", "text")):
        raise ValueError("an entity needs entity and text, both strings")
    return Entity(record["entity"], record["text"])


def _skip(text: str, place: int, *, commas: bool = False) -> int:
    while place < len(text) and (text[place].isspace() or (commas and text[place] == ",")):
        place += 1
    return place


def _at(text: str, place: int) -> str:
    if place >= len(text):
        raise CutShortError("the text ends within an object")
    return text[place]
