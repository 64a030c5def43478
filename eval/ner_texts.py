"""The two ways to ask a model for named entities, and what its texts mean.

`json` asks for a JSON list of objects with `entity` and `text`, `iob` for one IOB label a word; both after Oh,
"Exploring the Performance of LLaMA 7B-Adapter", in our own words. A model gives entities as words without a place, so
they are looked for in the passage in reading order: each takes the first mention, after the one before it, whose words
no other entity has; where there is none, the first such mention from the beginning. Words are compared without blanks,
and a mention begins and ends with a token. An entity whose words are not found is a false positive, and one of a type
that was not asked for is wrong, too (its type counts as OTHER). No entity is taken of a text that cannot be read or
whose labels are not as many as the words.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from eval.hipe import Document, Passage, Span, coarse, entity_type, passages, plain_label, require_documents, spans_of
from eval.ner_json import read_entities
from mmadapter.captions import named, read_text

PROMPTS = ("json", "iob")
INSTRUCTIONS = {
    "json": (
        "You are an expert at finding named entities in historical newspapers. Mark every entity of the kinds {types} "
        'in the text. Write a JSON list with one object for each entity, in reading order: "entity" is its kind, '
        '"text" its words as they stand in the text. Write [] if there is none'
    ),
    "iob": (
        "You are an expert at finding named entities in historical newspapers. Label every word of the text, in order, "
        "with a blank between the labels: B- and the kind for the first word of an entity, I- and the kind for each "
        "word that continues it, O for all other words. The kinds are {types}"
    ),
}
LONG_NAMES = {"LOC": "LOCATION", "ORG": "ORGANIZATION", "PER": "PERSON", "PROD": "PRODUCT"}
PUBLISHED_ORDER = ("TIME", "LOC", "PER", "ORG", "PROD")
OTHER = "OTHER"
OK, REPAIRED, UNPARSED, SHORT, LONG = "ok", "repaired", "unparsed", "short", "long"
SLACK = 2  # labels too few or too many that are mended
# A word and its label may stand together, as in Paris/B-LOC.
WORD_AND_LABEL = re.compile(r"\s+|(?<=\S)[/:|](?=(?:O|[BI]-[\w.]+)(?:\s|$))")


@dataclass(frozen=True)
class Parsed:
    """What a model's text says of a passage.

    Attributes:
        spans: Entities, counted from the passage's first token.
        nowhere: Types of those whose words are not in the passage.
        status: OK, REPAIRED, UNPARSED, or SHORT or LONG for labels that are too few or too many.
    """

    spans: tuple[Span, ...]
    nowhere: tuple[str, ...]
    status: str


def type_names(types: Collection[str], prompt: str) -> str:
    """Types as a prompt lists them: the published five in their order, then others by name."""
    ordered = [kind for kind in PUBLISHED_ORDER if kind in types] + sorted(set(types) - set(PUBLISHED_ORDER))
    return ", ".join(_name(kind, prompt) for kind in ordered)


def instruction(prompt: str, types: Collection[str]) -> str:
    """What a model is told to do; the passage is the input beside it."""
    return INSTRUCTIONS[prompt].format(types=type_names(types, prompt))


def input_text(passage: Passage, prompt: str) -> str:
    """The passage as it is shown: as printed, or for `iob` with a blank between all tokens, which are its words."""
    return passage.text if prompt == "json" else " ".join(passage.tokens)


def response_text(passage: Passage, prompt: str) -> str:
    """The right answer, on one line."""
    if prompt == "json":
        document, start = passage.document, passage.start
        entities = [
            {"entity": _name(span.type, prompt), "text": document.text(start + span.start, start + span.end)}
            for span in passage.spans()
        ]
        return json.dumps(entities, ensure_ascii=False)
    labels = ["O"] * len(passage.tokens)
    for span in passage.spans():
        for place in range(span.start, span.end):
            labels[place] = f"{'B' if place == span.start else 'I'}-{span.type}"
    return " ".join(labels)


def parse(text: str, passage: Passage, prompt: str, types: Collection[str]) -> Parsed:
    """What a model's text says of the passage; see the module.

    Args:
        types: Coarse types that can be right.
    """
    read = parse_json if prompt == "json" else parse_iob
    return read(text, passage.tokens, types)


def parse_json(text: str, tokens: Sequence[str], types: Collection[str]) -> Parsed:
    """Of a list of entities; what is mended is in `ner_json`."""
    found = read_entities(text)
    if found is None:
        return Parsed((), (), UNPARSED)
    entities, mended = found
    places = find_mentions([entity.text for entity in entities], tokens)
    kinds = [_known(entity.type, types) for entity in entities]
    spans = [Span(kind, *place) for kind, place in zip(kinds, places, strict=True) if place is not None]
    nowhere = tuple(kind for kind, place in zip(kinds, places, strict=True) if place is None)
    return Parsed(tuple(sorted(spans, key=lambda span: span.start)), nowhere, REPAIRED if mended else OK)


def find_mentions(texts: Sequence[str], tokens: Sequence[str]) -> list[tuple[int, int] | None]:
    """The tokens of each text, as the first and the one after the last; None for one that is not found."""
    squeezed = [_squeezed(token) for token in tokens]
    ends = list(accumulate(map(len, squeezed)))
    whole = "".join(squeezed)
    first = {end - len(token): place for place, (token, end) in enumerate(zip(squeezed, ends, strict=True))}
    last = {end: place + 1 for place, end in enumerate(ends)}
    taken = [False] * len(tokens)
    found: list[tuple[int, int] | None] = []
    reached = 0
    for text in texts:
        wanted = _squeezed(text)
        mentions = []
        position = whole.find(wanted) if wanted else -1
        while position >= 0:
            if position in first and position + len(wanted) in last:
                start, end = first[position], last[position + len(wanted)]
                if not any(taken[start:end]):
                    mentions.append((start, end))
            position = whole.find(wanted, position + 1)
        mention = next((own for own in mentions if own[0] >= reached), mentions[0] if mentions else None)
        if mention is not None:
            reached = mention[1]
            taken[slice(*mention)] = [True] * (mention[1] - mention[0])
        found.append(mention)
    return found


def parse_iob(text: str, tokens: Sequence[str], types: Collection[str]) -> Parsed:
    """Of labels. Commas, quotes and brackets between them, words beside them and other text around one run are mended.

    A wrong number of labels is mended only where they do not move: up to `SLACK` too few after an O, which are O (any
    number where the passage's words stand beside the labels), and up to `SLACK` too many that are O, which are left
    out. Else nobody knows which label is of which word, and no entity is taken.
    """
    labels, mended, beside_words = _find_labels(text, tokens)
    if not labels:
        return Parsed((), (), UNPARSED)
    lacking, surplus = len(tokens) - len(labels), labels[len(tokens) :]
    if lacking > 0 and (labels[-1] != "O" or (lacking > SLACK and not beside_words)):
        return Parsed((), (), SHORT)
    if len(surplus) > SLACK or any(label != "O" for label in surplus):
        return Parsed((), (), LONG)
    fitted = (labels + ["O"] * max(0, lacking))[: len(tokens)]
    fitted = [label if label == "O" else f"{label[:2]}{_known(label[2:], types)}" for label in fitted]
    return Parsed(tuple(spans_of(fitted)), (), REPAIRED if mended or lacking else OK)


def _find_labels(text: str, tokens: Sequence[str]) -> tuple[list[str], bool, bool]:
    """The labels of a text, none where it cannot be read.

    Returns:
        Also whether there is more than labels and blanks, and whether that is the passage's words.
    """
    labels = [plain_label(piece) for piece in text.split()]
    if None not in labels:
        return labels, False, False
    pieces = WORD_AND_LABEL.split(text.strip())
    labels = [plain_label(piece) for piece in pieces[1::2]]
    if pieces[0::2] == list(tokens[: len(labels)]) and None not in labels:
        return labels, True, True
    pieces = [piece.rstrip(".:") for piece in re.split(r"[\s,;'\"`\[\]()]+", text)]
    labels = [plain_label(piece) for piece in pieces if piece]
    runs = [list(run) for is_label, run in groupby(labels, lambda label: label is not None) if is_label]
    runs = [run for run in runs if len(run) > 1 or len(tokens) == 1]  # a lone O may be a word
    return (runs[0] if len(runs) == 1 else []), True, False


def read_texts(
    path: Path, gold: Sequence[Document], wanted: Sequence[Document], words: int
) -> tuple[list[Passage], dict[str, str], int]:
    """A model's texts by passage, from JSON lines of `id` and `text`.

    An id is that of a document, or of a passage (`passages` makes them); each document is given in one way, whole. A
    line may also have the `passage` that the text is about, which then must be the gold file's.

    Args:
        gold: All documents of the gold file; the ids must be theirs.
        wanted: Those that are scored.
        words: The most words of a passage.

    Returns:
        The passages of `wanted` in reading order, their texts by id, and how many texts of others were passed over.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is malformed, or an id is unknown, twice or missing.
    """
    texts: dict[str, str] = {}
    shown: dict[str, tuple[str, str]] = {}
    for where, record in _records(path):
        name = record["id"]
        if name in texts:
            raise ValueError(f"{where}: id {name} has a text already; keep one each")
        # A lone surrogate, which JSON can hold and no file can.
        texts[name] = record["text"].encode("utf-8", "replace").decode()
        if isinstance(record.get("passage"), str):
            shown[name] = where, record["passage"]
    chosen, known = [], set()
    scored = {document.id for document in wanted}
    for document in gold:
        parts = passages(document, words)
        known |= {document.id, *(part.id for part in parts)}
        present = [part for part in parts if part.id in texts]
        if document.id in texts:
            if present:
                raise ValueError(f"{path} has a text for document {document.id} and for its passages; keep one kind")
            present = parts = [Passage(document.id, document, 0, len(document.tokens))]
        if document.id in scored:
            if present and len(present) < len(parts):
                missing = [part.id for part in parts if part.id not in texts]
                raise ValueError(
                    f"{path}: {named(missing, 'passage')} missing, of {len(parts)} of document {document.id} with "
                    f"--passage-words {words}"
                )
            chosen += present
    unknown = [name for name in texts if name not in known]
    if unknown:
        raise ValueError(
            f"{path}: {named(unknown, 'id')} not in the gold file; expected DOCUMENT, or DOCUMENT#N for its passage N "
            f"from 0, here of at most {words} words (--passage-words)"
        )
    require_documents(path, {passage.document.id for passage in chosen}, gold, wanted)
    for passage in chosen:
        where, text = shown.get(passage.id, ("", passage.text))
        if _squeezed(text) != _squeezed(passage.text):
            raise ValueError(
                f"{where}: the passage of {passage.id} is {text!r:.40}, in the gold file it is {passage.text!r:.40}; "
                "give the --passage-words and the gold file that the texts were made with"
            )
    return chosen, {passage.id: texts[passage.id] for passage in chosen}, len(texts) - len(chosen)


def likely_prompt(kept: Sequence[Passage], texts: dict[str, str], types: Collection[str]) -> str:
    """The prompt format that more of the texts can be read in."""
    readable = {
        prompt: sum(parse(texts[passage.id], passage, prompt, types).status != UNPARSED for passage in kept)
        for prompt in PROMPTS
    }
    return max(PROMPTS, key=lambda prompt: readable[prompt])


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file of texts, each with its place."""
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: not JSON ({error}); expected JSON lines of id and text, or HIPE's TSV"
            ) from None
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("id", "text")):
            raise ValueError(f"{where}: expected id and text, both strings, got {record!r:.80}")
        records.append((where, record))
    return records


def _known(name: str, types: Collection[str]) -> str:
    kind = entity_type(name)
    return kind if coarse(kind) in types else OTHER


def _name(kind: str, prompt: str) -> str:
    return LONG_NAMES.get(kind, kind) if prompt == "json" else kind


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())
