"""Named entities in HIPE-2022's TSV: documents of labelled tokens, their spans, and passages that a model is asked.

A file has a header, then one token a line. Comment lines begin with `#` and hold no tab (a token may be `#`, too); the
comment `document_id` begins a document. Fields are what stands between tabs: quotation marks mean nothing. MISC says,
separated by `|`, whether a blank follows (NoSpaceAfter) and where a line or a sentence ends (EndOfLine, EndOfSentence);
files of 2020 have no ends of sentences. Source: https://github.com/hipe-eval/HIPE-2022-data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mmadapter.captions import named, read_text

COLUMN = "NE-COARSE-LIT"
TYPES = ("LOC", "ORG", "PER", "PROD", "TIME")
ALIASES = {
    "LOCATION": "LOC",
    "ORGANIZATION": "ORG",
    "ORGANISATION": "ORG",
    "PERS": "PER",
    "PERSON": "PER",
    "PRODUCT": "PROD",
}
DOCUMENT_ID = re.compile(r"#\s*(?:[\w.-]+:)?document_id\s*=\s*(.*\S)\s*")
LABEL = re.compile(r"O|([BI])-(\w+(?:[.-]\w+)*)", re.IGNORECASE)


class Span(NamedTuple):
    """An entity: its type, its first token, and the one after its last."""

    type: str
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A document and the labels of one column.

    Attributes:
        labels: One a token: "O", or "B-" or "I-" and the type as `entity_type` calls it.
        flags: What MISC says of each token.
        lines: Where each token stands in the file, from 1.
    """

    id: str
    tokens: tuple[str, ...]
    labels: tuple[str, ...]
    flags: tuple[frozenset[str], ...] = field(repr=False)
    lines: tuple[int, ...] = field(repr=False)

    def text(self, start: int, end: int) -> str:
        """Tokens `start` to `end` (not included) as they were printed, on one line."""
        pieces = zip(self.tokens[start:end], self.flags[start:end], strict=True)
        return "".join(token if "NoSpaceAfter" in flags else f"{token} " for token, flags in pieces).strip()


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of a document, as many as a model is asked about at once.

    Attributes:
        id: The document's id, with `#` and the passage's number, from 0; without these a document is one passage.
        start: Its first token in the document.
        end: The token after its last.
    """

    id: str
    document: Document
    start: int
    end: int

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.document.tokens[self.start : self.end]

    @property
    def text(self) -> str:
        return self.document.text(self.start, self.end)

    def spans(self) -> list[Span]:
        """Its entities, counted from its own first token; of one that it cuts, the part inside."""
        return spans_of(self.document.labels[self.start : self.end])

    def cuts(self) -> bool:
        """Whether an entity reaches over its beginning or its end."""
        return any(
            span.start < place < span.end for span in spans_of(self.document.labels) for place in (self.start, self.end)
        )


def entity_type(name: str) -> str:
    """One name for what data sets and models call differently: PER, PERSON and pers are PER; pers.ind is PER.ind."""
    head, dot, rest = name.strip().partition(".")
    return ALIASES.get(head.upper(), head.upper()) + dot + rest


def coarse(name: str) -> str:
    """The coarse type that a type of `entity_type` belongs to: LOC of LOC.adm.town."""
    return name.partition(".")[0]


def known_types(documents: Iterable[Document]) -> frozenset[str]:
    """The coarse types that a label may have: HIPE's five, and what the documents have beyond."""
    return frozenset(TYPES) | {coarse(span.type) for document in documents for span in spans_of(document.labels)}


def plain_label(label: str) -> str | None:
    """A label with its type as `entity_type` calls it, None for what is no IOB label."""
    match = LABEL.fullmatch(label)
    if match is None:
        return None
    return "O" if match[1] is None else f"{match[1].upper()}-{entity_type(match[2])}"


def spans_of(labels: Sequence[str]) -> list[Span]:
    """The entities that labels mark, in reading order.

    An I- that continues nothing of its own type begins an entity, as in the benchmark's own scoring.
    """
    spans: list[Span] = []
    for place, label in enumerate(labels):
        if label == "O":
            continue
        position, kind = label[0], label[2:]
        if position == "I" and spans and spans[-1].end == place and spans[-1].type == kind:
            spans[-1] = spans[-1]._replace(end=place + 1)
        else:
            spans.append(Span(kind, place, place + 1))
    return spans


def read_hipe(path: Path, column: str = COLUMN) -> list[Document]:
    """Every document of a file, in its order.

    A file without the comment `document_id` has documents between empty lines, called 1, 2, ...

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a TSV, has no such column, a label that is none, or two documents of one id.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    names, rows = _header(path, lines, column)
    token, label = names.index("TOKEN"), names.index(column)
    misc = names.index("MISC") if "MISC" in names else None
    has_ids = any(DOCUMENT_ID.fullmatch(line) for line in lines if _is_comment(line))

    parts: dict[str, list[tuple[str, str, frozenset[str], int]]] = {}
    current: list[tuple[str, str, frozenset[str], int]] | None = None
    for number, line in rows:
        where = f"{path}, line {number}"
        if _is_comment(line):
            match = DOCUMENT_ID.fullmatch(line)
            if match is not None:
                if match[1] in parts:
                    raise ValueError(f"{where}: document {match[1]} stands in the file already; ids must be unique")
                current = parts.setdefault(match[1], [])
            continue
        if not line.strip():
            current = current if has_ids else None
            continue
        if current is None:
            if has_ids:
                raise ValueError(f"{where}: a token before the first document_id; begin with # document_id = ID")
            current = parts.setdefault(str(len(parts) + 1), [])
        cells = line.split("\t")
        if len(cells) != len(names):
            raise ValueError(f"{where} has {len(cells)} fields, expected {len(names)} as in the header, tabs between")
        plain = plain_label(cells[label])
        if not cells[token] or plain is None:
            what = f"unknown label {cells[label]!r} in {column}" if cells[token] else "no token"
            hint = "; the column was not filled in, choose another" if cells[label] == "_" else ""
            raise ValueError(f"{where}: {what}, expected a token and O, B-TYPE or I-TYPE{hint}")
        flags = frozenset() if misc is None else frozenset(cells[misc].split("|")) - {"_", ""}
        current.append((cells[token], plain, flags, number))
    empty = [name for name, part in parts.items() if not part]
    if empty or not parts:
        raise ValueError(f"{path} has no tokens" + (f" in {named(empty, 'document')}" if empty else ""))
    return [Document(name, *map(tuple, zip(*part, strict=True))) for name, part in parts.items()]


def read_labels(path: Path, column: str, gold: Sequence[Document], wanted: Sequence[Document]) -> dict[str, list[Span]]:
    """Predicted entities by document, from a TSV with the tokens of the gold file.

    Args:
        gold: All documents of the gold file; those of the prediction file must be among them.
        wanted: Those that are scored: each must be in the prediction file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As `read_hipe`; or a document is missing or unknown, a token is another, or a type is in none of
            HIPE's schemes nor in the gold file.
    """
    found = {document.id: document for document in read_hipe(path, column)}
    require_documents(path, found, gold, wanted)
    known = known_types(gold)
    for document in wanted:
        own = found[document.id]
        for place, (token, expected) in enumerate(zip(own.tokens, document.tokens, strict=False)):
            if token != expected:
                raise ValueError(
                    f"{path}, line {own.lines[place]}: token {token!r}, the gold file has {expected!r} there (its line "
                    f"{document.lines[place]}); predictions must keep its tokens"
                )
        if len(own.tokens) != len(document.tokens):
            raise ValueError(
                f"{path}, line {own.lines[-1]}: document {document.id} ends after {len(own.tokens)} tokens, expected "
                f"{len(document.tokens)} as in the gold file"
            )
        for label, line in zip(own.labels, own.lines, strict=True):
            if label != "O" and coarse(label[2:]) not in known:
                raise ValueError(f"{path}, line {line}: unknown label {label}, expected {', '.join(sorted(known))}")
    return {document.id: spans_of(found[document.id].labels) for document in wanted}


def require_documents(path: Path, found: Iterable[str], gold: Sequence[Document], wanted: Sequence[Document]) -> None:
    """Checks that a prediction file has every document that is scored, and none that the gold file lacks.

    Raises:
        ValueError: It has not; three documents are named.
    """
    ids = set(found)
    unknown = sorted(ids - {document.id for document in gold})
    if unknown:
        raise ValueError(f"{path}: {named(unknown, 'document')} not in the gold file; do the two belong together?")
    missing = [document.id for document in wanted if document.id not in ids]
    if missing:
        raise ValueError(f"{path}: {named(missing, 'document')} missing, of {len(wanted)} to score; predict them first")


def passages(document: Document, words: int) -> list[Passage]:
    """A document in passages of at most `words` tokens.

    A passage has as many whole sentences as fit: ends of sentences are found by machine, and stand within names, too
    ("M. Ilg"), so a passage a sentence would tear entities apart. Where no sentence fits or none is marked, it has as
    many whole printed lines as fit, and where no line fits, `words` tokens.
    """
    bounds = []
    start = sentence_end = line_end = 0
    for place, flags in enumerate(document.flags, 1):
        if place - start > words:
            cut = next((end for end in (sentence_end, line_end) if end > start), place - 1)
            bounds.append((start, cut))
            start = cut
        if "EndOfSentence" in flags:
            sentence_end = place
        if "EndOfLine" in flags:
            line_end = place
    bounds.append((start, len(document.tokens)))
    return [Passage(f"{document.id}#{number}", document, *bound) for number, bound in enumerate(bounds)]


def _header(path: Path, lines: Sequence[str], column: str) -> tuple[list[str], list[tuple[int, str]]]:
    """The names of the columns, and the numbered lines below them."""
    for number, line in enumerate(lines, 1):
        if line.strip() and not _is_comment(line):
            names = line.split("\t")
            if names[0] != "TOKEN":
                raise ValueError(
                    f"{path}, line {number} is {line!r:.40}, expected HIPE's TSV: a header TOKEN, {COLUMN}, ..."
                )
            if column not in names[1:]:
                there = ", ".join(name for name in names if name.startswith("NE-")) or "none with labels"
                raise ValueError(f"{path} has no column {column}; it has {there}")
            # What stands above the header says nothing of a token, but it may name a document.
            numbered = list(enumerate(lines, 1))
            return names, numbered[: number - 1] + numbered[number:]
    raise ValueError(f"{path} is empty; expected HIPE's TSV: a header TOKEN, {COLUMN}, ... and a token a line")


def _is_comment(line: str) -> bool:
    return line.startswith("#") and "\t" not in line
