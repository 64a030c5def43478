"""The named entity evaluation: HIPE's TSV, counts of spans, models' texts, tiny models that are asked, the record."""

from __future__ import annotations

import csv
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import tiny_session
from tiny_session import Tiny

from eval import ner as command
from eval import ner_texts
from eval.hipe import (
    TYPES,
    Document,
    Passage,
    Span,
    entity_type,
    known_types,
    passages,
    plain_label,
    read_hipe,
    spans_of,
)
from eval.ner_json import Entity, read_entities
from eval.ner_metrics import count_spans, scores
from eval.ner_model import choose_prompt
from eval.ner_texts import find_mentions, input_text, instruction, parse_iob, parse_json, response_text
from mmadapter.generate import Generated
from mmadapter.record import file_sha256
from mmadapter.session import Session

DATA = os.environ.get("MMADAPTER_DATA")

HEADER = "TOKEN\tNE-COARSE-LIT\tNE-COARSE-METO\tNE-FINE-LIT\tMISC"
# Two documents: a token and its label, "_" after a token that no blank follows, "/" at the end of a printed line and
# "." at the end of a sentence.
TWO = {
    "EXP-1": "M|B-pers|_ .|I-pers|. Ilg|I-pers va|O|/ a|O Berne|B-loc|_ .|O|. "
    "A|O Berne|B-loc ,|O l'|O|_ ATS|B-org|_ .|O|.",
    "EXP-2": "#|O Paul|B-pers|/ Meyer|I-pers et|O Ilg|B-pers a|O|/ Paris|B-loc|.",
}
FLAGS = {"_": "NoSpaceAfter", "/": "EndOfLine", ".": "EndOfSentence", "": "_"}


def row(token: str, label: str = "O", flag: str = "") -> str:
    return "\t".join([token, label, "O", f"{label}.x" if label != "O" else "O", FLAGS[flag]])


def tsv(documents: dict[str, str], header: str = HEADER) -> str:
    parts = [header]
    for name, tokens in documents.items():
        parts += [f"# hipe2022:document_id = {name}", "# hipe2022:date = 1908-01-21"]
        parts += [row(*token.split("|")) for token in tokens.split()]
        parts += [""]
    return "\n".join(parts)


def written(path: Path, content: str | list[dict]) -> Path:
    text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    return written(tmp_path / "gold.tsv", tsv(TWO))


def document(labels: str, flags: str = "") -> Document:
    """Tokens a, b, c, ... with these labels; of the flags one character a token, a dot for none."""
    names = {".": frozenset(), "l": frozenset({"EndOfLine"}), "s": frozenset({"EndOfSentence"})}
    size = len(labels.split())
    marks = tuple(names[mark] for mark in flags or "." * size)
    return Document("d", tuple("abcdefghijklmnop"[:size]), tuple(labels.split()), marks, tuple(range(size)))


# HIPE's TSV


def test_documents_labels_and_flags(gold):
    """A comment begins with # and has no tab: the token # was read as a comment."""
    first, second = read_hipe(gold)
    assert (first.id, second.id) == ("EXP-1", "EXP-2")
    assert first.tokens[:4] == ("M", ".", "Ilg", "va")
    assert first.labels[:4] == ("B-PER", "I-PER", "I-PER", "O")
    assert first.flags[:4] == (frozenset({"NoSpaceAfter"}), {"EndOfSentence"}, frozenset(), {"EndOfLine"})
    assert first.lines[:2] == (4, 5)
    assert second.tokens[:2] == ("#", "Paul")
    assert spans_of(first.labels) == [Span("PER", 0, 3), Span("LOC", 5, 6), Span("LOC", 8, 9), Span("ORG", 11, 12)]
    assert first.text(0, 7) == "M. Ilg va a Berne."
    assert [document.labels[0] for document in read_hipe(gold, "NE-FINE-LIT")] == ["B-PER.x", "O"]
    assert {label for document in read_hipe(gold, "NE-COARSE-METO") for label in document.labels} == {"O"}


def test_quotes_line_ends_and_files_without_ids(tmp_path):
    """A quotation mark is a token; a separator that Python takes for the end of a line is a part of one."""
    lines = ["# a comment", "TOKEN\tNE-COARSE-LIT", '"\tB-LOC', "a\u2028b\tI-LOC", "", "", "c\tI-loc", ""]
    documents = read_hipe(written(tmp_path / "gold.tsv", "\ufeff" + "\r\n".join(lines)))
    assert [(own.id, own.tokens) for own in documents] == [("1", ('"', "a\u2028b")), ("2", ("c",))]
    assert [spans_of(own.labels) for own in documents] == [[Span("LOC", 0, 2)], [Span("LOC", 0, 1)]]
    lines = ["TOKEN\tNE-COARSE-LIT", "# document_id = x y", "a\tO", "", "b\tO", "# document_id = z", "", "c\tO"]
    documents = read_hipe(written(tmp_path / "gold.tsv", "\n".join(lines)))
    assert [(own.id, own.tokens) for own in documents] == [("x y", ("a", "b")), ("z", ("c",))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is empty; expected HIPE's TSV: a header TOKEN, NE-COARSE-LIT"),
        ("word,label\n", r"line 1 is 'word,label', expected HIPE's TSV: a header TOKEN"),
        ("TOKEN\tNE-FINE-LIT\tMISC\n", r"has no column NE-COARSE-LIT; it has NE-FINE-LIT$"),
        ("TOKEN\tMISC\n", r"has no column NE-COARSE-LIT; it has none with labels$"),
        (f"{HEADER}\na\tO\tO\n", r"line 2 has 3 fields, expected 5 as in the header, tabs between"),
        (
            f"{HEADER}\na\tLOC\tO\tO\t_\n",
            r"line 2: unknown label 'LOC' in NE-COARSE-LIT, expected a token and O, B-TYPE",
        ),
        (f"{HEADER}\na\tE-loc\tO\tO\t_\n", r"line 2: unknown label 'E-loc'"),
        (f"{HEADER}\na\t_\tO\tO\t_\n", r"unknown label '_' .*; the column was not filled in, choose another$"),
        (f"{HEADER}\n\tO\tO\tO\t_\n", r"line 2: no token, expected a token"),
        (f"{HEADER}\n", r"has no tokens$"),
        (f"{HEADER}\n# document_id = x\n# document_id = y\na\tO\tO\tO\t_\n", r"has no tokens in 1 document \(x\)"),
        (f"{HEADER}\na\tO\tO\tO\t_\n# document_id = y\n", r"line 2: a token before the first document_id"),
        (f"{HEADER}\n# document_id = y\n# document_id = y\n", r"line 3: document y stands in the file already"),
    ],
)
def test_bad_gold_files(tmp_path, content, message):
    path = written(tmp_path / "gold.tsv", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_hipe(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("PER", "PERSON", "pers", "Person"), "PER"),
        (("loc", "LOC", "LOCATION"), "LOC"),
        (("org", "ORG", "ORGANIZATION"), "ORG"),
        (("time", "TIME"), "TIME"),
        (("prod", "PROD", "PRODUCT"), "PROD"),
        (("pers.ind", "PER.ind"), "PER.ind"),
        (("HumanProd",), "HUMANPROD"),
    ],
)
def test_one_name_for_a_type(names, kind):
    assert {entity_type(name) for name in names} == {kind}
    assert {plain_label(f"i-{name}") for name in names} == {f"I-{kind}"}


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("O B-LOC I-LOC B-LOC O", [("LOC", 1, 3), ("LOC", 3, 4)]),
        ("I-LOC I-LOC O", [("LOC", 0, 2)]),  # what continues nothing begins
        ("B-LOC I-ORG I-ORG", [("LOC", 0, 1), ("ORG", 1, 3)]),
        ("B-LOC O I-LOC", [("LOC", 0, 1), ("LOC", 2, 3)]),
    ],
)
def test_spans(labels, spans):
    assert spans_of(labels.split()) == [Span(*span) for span in spans]


@pytest.mark.parametrize(
    ("flags", "words", "sizes"),
    [
        ("..s.l.s...", 4, [3, 4, 3]),  # whole sentences
        ("..s..s....", 6, [6, 4]),  # as many as fit
        ("...l.l..l.", 5, [4, 5, 1]),  # lines where no sentence is marked
        ("..s..l....", 4, [3, 3, 4]),  # and where none fits
        ("..........", 4, [4, 4, 2]),
        ("ssssssssss", 1, [1] * 10),
        ("..........", 99, [10]),
        (".........s", 10, [10]),
    ],
)
def test_passages(flags, words, sizes):
    whole = document("O " * 10, flags)
    parts = passages(whole, words)
    assert [part.end - part.start for part in parts] == sizes
    assert [part.id for part in parts] == [f"d#{number}" for number in range(len(sizes))]
    assert [token for part in parts for token in part.tokens] == list(whole.tokens)


def test_a_passage_knows_what_it_cuts():
    parts = passages(document("B-LOC O B-PER I-PER I-PER O", ".s.l.."), 4)
    assert [part.spans() for part in parts] == [[Span("LOC", 0, 1)], [Span("PER", 0, 3)]]
    assert [part.cuts() for part in parts] == [False, False]
    parts = passages(document("B-LOC O B-PER I-PER I-PER O", "...l.."), 4)
    assert [part.spans() for part in parts] == [[Span("LOC", 0, 1), Span("PER", 2, 4)], [Span("PER", 0, 1)]]
    assert [part.cuts() for part in parts] == [True, True]


# Counts


def counted(gold: str, predicted: str, nowhere: tuple[str, ...] = ()) -> dict:
    spans = [spans_of(labels.split()) for labels in (gold, predicted)]
    table = scores(count_spans(*spans, nowhere))
    return {
        match: {kind: (row["TP"], row["FP"], row["FN"]) for kind, row in rows.items()} for match, rows in table.items()
    }


@pytest.mark.parametrize(
    ("gold", "predicted", "strict", "fuzzy"),
    [
        ("B-LOC I-LOC O", "B-LOC I-LOC O", (1, 0, 0), (1, 0, 0)),
        ("B-LOC I-LOC O", "B-LOC O O", (0, 1, 1), (1, 0, 0)),
        ("B-LOC I-LOC O", "O O B-LOC", (0, 1, 1), (0, 1, 1)),
        ("B-LOC I-LOC O", "B-PER I-PER O", (0, 1, 1), (0, 1, 1)),
        # Each gold entity counts once ...
        ("B-LOC I-LOC O", "B-LOC B-LOC O", (0, 2, 1), (1, 1, 0)),
        ("B-LOC B-LOC O", "B-LOC I-LOC O", (0, 1, 2), (1, 0, 1)),
        # ... and one that is exactly right is its own.
        ("B-LOC I-LOC B-LOC", "O B-LOC B-LOC", (1, 1, 1), (2, 0, 0)),
        # The first one overlapped is the partner, also where the next one is of the right type.
        ("B-PER B-LOC O", "B-LOC I-LOC O", (0, 1, 2), (0, 1, 2)),
        ("O O O", "O O O", (0, 0, 0), (0, 0, 0)),
    ],
)
def test_counts(gold, predicted, strict, fuzzy):
    found = counted(gold, predicted)
    assert (found["strict"]["ALL"], found["fuzzy"]["ALL"]) == (strict, fuzzy)


def test_counts_by_type():
    """A wrong type is a false positive of the gold entity's type, what is nowhere one of its own; as published."""
    found = counted("B-PER O B-LOC O", "B-ORG O B-LOC B-ORG", ("TIME", "TIME"))
    assert found["strict"] == found["fuzzy"]
    assert found["strict"] == {
        "ALL": (1, 4, 1),
        "LOC": (1, 0, 0),
        "ORG": (0, 1, 0),
        "PER": (0, 1, 1),
        "TIME": (0, 2, 0),
    }


def test_rates():
    table = scores(Counter({("strict", "LOC", "TP"): 3, ("strict", "LOC", "FP"): 1, ("strict", "ORG", "FN"): 2}))
    assert table["strict"]["ALL"] == {"P": 0.75, "R": 0.6, "F1": pytest.approx(2 / 3), "TP": 3, "FP": 1, "FN": 2}
    assert table["strict"]["ORG"] == {"P": 0, "R": 0, "F1": 0, "TP": 0, "FP": 0, "FN": 2}
    assert table["fuzzy"]["ALL"]["F1"] == 0


# A model's texts: lists


PARIS, ILG = Entity("LOCATION", "Paris"), Entity("PERSON", "M. Ilg")
JSON_PARIS, JSON_ILG = '{"entity": "LOCATION", "text": "Paris"}', '{"entity": "PERSON", "text": "M. Ilg"}'


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        ("[]", []),
        (f" [{JSON_PARIS},\n {JSON_ILG}]\n", [PARIS, ILG]),
        ('[{"text": "Paris", "entity": "LOCATION", "note": [1, null]}]', [PARIS]),
    ],
)
def test_valid_lists(text, entities):
    assert read_entities(text) == (entities, False)


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        (f"[{JSON_PARIS}, {JSON_ILG},]", [PARIS, ILG]),
        (f"[{JSON_PARIS},, {JSON_ILG}]", [PARIS, ILG]),
        ('[{"entity": "LOCATION", "text": "Paris",}]', [PARIS]),
        (f"```json\n[{JSON_PARIS}]\n```", [PARIS]),
        (f"Here they are [1]: [{JSON_PARIS}] That is all {{of them}}.", [PARIS]),
        ("There are none: [ ]", []),
        (f'{{"entities": [{JSON_PARIS}]}}', [PARIS]),
        (f"[[{JSON_PARIS}]]", [PARIS]),
        (JSON_PARIS, [PARIS]),
        (f"{JSON_PARIS}\n{JSON_ILG}\nDone.", [PARIS, ILG]),
        # cut short
        (f"[{JSON_PARIS}, {JSON_ILG}", [PARIS, ILG]),
        (f"[{JSON_PARIS}, {JSON_ILG[:-1]}", [PARIS]),
        (f'[{JSON_PARIS}, {{"entity": "PERS', [PARIS]),
        (f'[{JSON_PARIS}, {{"entity"', [PARIS]),
        (f"[{JSON_PARIS}, {{", [PARIS]),
        (f'[{JSON_PARIS}, {{"entity": nul', [PARIS]),
        (f"[{JSON_PARIS},", [PARIS]),
        (f"```\n[{JSON_PARIS},\n```", [PARIS]),
        # quotes
        ("[{'entity': 'LOCATION', 'text': 'Paris'}]", [PARIS]),
        ("[{'entity': 'ORG', 'text': 'l'ATS'}]", [Entity("ORG", "l'ATS")]),
        ("""[{'entity': 'ORG', 'text': "l'ATS"}]""", [Entity("ORG", "l'ATS")]),
        (r"[{'entity': 'ORG', 'text': 'l\'ATS \"x\"'}]", [Entity("ORG", 'l\'ATS "x"')]),
        ("""[{'entity': 'PROD', 'text': 'le "Temps"'}]""", [Entity("PROD", 'le "Temps"')]),
        (r"""[{"entity": "ORG", "text": "l\'ATS\u00e9\\"}]""", [Entity("ORG", "l'ATSé\\")]),
        ('[{"entity": "LOC", "text": "La\nChaux"}]', [Entity("LOC", "La Chaux")]),
        ("[{'Entity': 'LOCATION', 'Text': 'Paris', 'score': 0.5}]", [PARIS]),
        ('[{entity: "LOCATION", text: "Paris"}]', [PARIS]),
        ('[{ entity : "LOCATION", "text": "Paris", score: 0.5 }]', [PARIS]),
        (f"[{JSON_PARIS}, {{entity", [PARIS]),
        ("[{“entity”: “LOCATION”, “text”: “Paris”}]", [PARIS]),
        ("[{“entity“: „LOCATION“, ‘text’: ‘Paris’}]", [PARIS]),
        ('[{"entity": "ORG", "text": “l’ATS "x"”}]', [Entity("ORG", 'l’ATS "x"')]),
        ("[{‘entity’: ‘ORG’, ‘text’: ‘l’ATS’}]", [Entity("ORG", "l’ATS")]),
        (f"[{JSON_PARIS}, {{“entity”: “LOC", [PARIS]),
    ],
)
def test_lists_that_can_be_mended(text, entities):
    assert read_entities(text) == (entities, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "LOCATION: Paris",
        "[",
        "[ {",
        '["Paris"]',
        "[1]",
        "null",
        '{"LOCATION": ["Paris"]}',
        '[{"entity": "LOCATION", "te',
        '[{"entity": "LOCATION"}]',
        '[{"entity": "LOCATION", "text": ["Paris"]}]',
        '[{"entity": "LOCATION", "text": null}]',
        f'[{JSON_PARIS}, {{"entity": "PERSON"}}]',
        f"[{JSON_PARIS}, M. Ilg]",
        f"[{JSON_PARIS} and more",
        f"[{JSON_PARIS}]\n[{JSON_ILG}]",
        f"[] or [{JSON_PARIS}]",
        f"{JSON_PARIS} or {JSON_ILG}",
        '[{"entity": "LOC", "text": "A", "entity": "PER"}]',
        '[{"entity": "PROD", "text": "le "Temps""}]',
        '[{"entity": "LOC" "text": "A"}]',
        '[{entity "LOC", text "A"}]',
        "[{entity: LOC, text: A}]",
        "[{“entity”: “LOC, text: “A”}]",
        '[{"entity": "LOC", "text": "\\u12"}]',
        "[{'entity': __import__('os').system('true'), 'text': 'a'}]",
        "[" * 100_000,
        '[{"a":' * 50_000,
    ],
)
def test_lists_that_could_mean_several_things(text):
    assert read_entities(text) is None


TOKENS = ("M", ".", "Ilg", "quitte", "Paris", "pour", "la", "Chaux", "-", "de", "-", "Fonds", ",", "Paris", "!")


@pytest.mark.parametrize(
    ("texts", "places"),
    [
        (["M. Ilg", "Paris", "Chaux-de-Fonds", "Paris"], [(0, 3), (4, 5), (7, 12), (13, 14)]),
        (["Chaux - de - Fonds", "Paris"], [(7, 12), (13, 14)]),  # in reading order, so it is the second one
        (["Chaux-de-Fonds", "Paris", "Paris", "Paris"], [(7, 12), (13, 14), (4, 5), None]),  # each mention once
        (["Ilg", "M. Ilg", "M."], [(2, 3), None, (0, 2)]),  # a word is of one entity
        (["Par", "aris", "paris", "", " ", "Lyon"], [None] * 6),  # whole tokens as they stand
        ([], []),
    ],
)
def test_mentions(texts, places):
    assert find_mentions(texts, TOKENS) == places


def test_mentions_do_not_depend_on_how_accents_are_written():
    assert find_mentions(["Me\u0301ne\u0301lik"], ["Ménélik"]) == [(0, 1)]


def test_entities_of_a_list():
    text = (
        '[{"entity": "Person", "text": "Ilg"}, {"entity": "city", "text": "Paris"}, {"entity": "ORG", "text": "ATS"}]'
    )
    parsed = parse_json(text, TOKENS, TYPES)
    assert parsed.spans == (Span("PER", 2, 3), Span("OTHER", 4, 5))
    assert (parsed.nowhere, parsed.status) == (("ORG",), "ok")
    assert parse_json(text[:-1], TOKENS, [*TYPES, "CITY"]).spans[1] == Span("CITY", 4, 5)
    assert parse_json(text[:-1], TOKENS, TYPES).status == "repaired"
    assert parse_json("none", TOKENS, TYPES) == ner_texts.Parsed((), (), "unparsed")


# A model's texts: labels


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("O B-LOC I-LOC O", "ok"),
        (" O\nb-location\nI-LOCATION\no\n", "ok"),
        ("O B-LOC I-LOC O O", "repaired"),
        ("O B-LOC I-LOC O O O", "repaired"),
        ("O B-LOC I-LOC", "short"),  # the entity may go on
        ("O B-LOC", "short"),
        ("a O La B-LOC", "short"),
        ("O B-LOC I-LOC O O B-LOC", "long"),  # perhaps a label was given twice before, and all behind it moved
        ("O B-LOC I-LOC O O O O", "long"),
        ("O, B-LOC, I-LOC, O", "repaired"),
        ('["O", "B-LOC", "I-LOC", "O"]', "repaired"),
        ("```\nO B-LOC I-LOC O\n```", "repaired"),
        ("The labels are: O B-LOC I-LOC O.\nThat is all.", "repaired"),
        ("The labels are: O B-LOC I-LOC O.\nB-LOC begins.", "long"),
        ("a O\nLa B-LOC\nChaux I-LOC\n: O", "repaired"),
        ("a/O La/B-LOC Chaux/I-LOC :/O", "repaired"),
        ("a/O La/B-LOC Chaux/I-LOC", "short"),
        ("a: O La: B-LOC", "unparsed"),  # the words of the passage have no colons
        ("a O Chaux B-LOC", "unparsed"),
        ("O B-LOC or O B-LOC I-LOC O", "unparsed"),
        ("O is the label", "unparsed"),
        ("", "unparsed"),
        ("none", "unparsed"),
    ],
)
def test_labels(text, status):
    parsed = parse_iob(text, ("a", "La", "Chaux", ":"), TYPES)
    assert parsed.status == status
    assert parsed.spans == (() if status in ("unparsed", "short", "long") else (Span("LOC", 1, 3),))


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("B-PER I-PER O O", "repaired"),
        ("B-PER I-PER O", "short"),  # three lack: which ones?
        ("a B-PER b I-PER c O", "repaired"),  # but here the words say it
        ("a B-PER b I-PER", "short"),
        ("B-PER I-PER O O O O O O", "repaired"),
        ("B-PER I-PER O O O O O B-LOC", "long"),
    ],
)
def test_labels_are_mended_where_they_do_not_move(text, status):
    parsed = parse_iob(text, tuple("abcdef"), TYPES)
    assert (parsed.status, parsed.spans) == (status, (Span("PER", 0, 2),) if status == "repaired" else ())


def test_texts_with_other_numbers_of_labels_are_counted(gold, tmp_path, capsys):
    texts = texts_of(gold, "iob", None)
    texts = [{**texts[0], "text": texts[0]["text"] + " O O O"}, {**texts[1], "text": "O B-LOC"}]
    predictions = written(tmp_path / "texts.jsonl", texts)
    record = record_of(tmp_path, gold, "--predictions", str(predictions))
    names = ("prompt", "version", "texts", "unparsed", "short", "long", "repaired")
    assert [record[name] for name in names] == ["iob", 2, 2, 0, 1, 1, 0]
    assert [own["texts"][0]["status"] for own in record["predictions"]] == ["long", "short"]
    assert "2 texts: 0 unparsed, 1 with too few labels, 1 with too many, 0 repaired; 0 " in capsys.readouterr().out


def test_labels_of_other_types_and_of_one_word():
    assert parse_iob("B-city I-town O", ("a", "b", "c"), TYPES).spans == (Span("OTHER", 0, 2),)
    assert parse_iob("It is B-PER.", ("a",), TYPES).spans == (Span("PER", 0, 1),)
    assert parse_iob("It is B-PER.", ("a", "b"), TYPES).status == "unparsed"


@pytest.mark.parametrize("prompt", ["json", "iob"])
def test_the_right_answer_is_right(gold, prompt):
    """What shots show is what is read: each passage's own answer gives its own entities."""
    for own in read_hipe(gold):
        for passage in [*passages(own, 5), Passage(own.id, own, 0, len(own.tokens))]:
            parsed = ner_texts.parse(response_text(passage, prompt), passage, prompt, TYPES)
            assert (parsed.spans, parsed.nowhere, parsed.status) == (tuple(passage.spans()), (), "ok")


def test_what_a_model_is_shown(gold):
    first = passages(read_hipe(gold)[0], 7)[0]
    assert input_text(first, "json") == "M. Ilg va a Berne."
    assert input_text(first, "iob") == "M . Ilg va a Berne ."
    assert response_text(first, "json") == (
        '[{"entity": "PERSON", "text": "M. Ilg"}, {"entity": "LOCATION", "text": "Berne"}]'
    )
    assert response_text(first, "iob") == "B-PER I-PER I-PER O O B-LOC O"
    assert "of the kinds TIME, LOCATION, PERSON, ORGANIZATION, PRODUCT in the text" in instruction("json", TYPES)
    assert instruction("iob", TYPES).endswith("The kinds are TIME, LOC, PER, ORG, PROD")
    assert instruction("iob", [*TYPES, "STREET", "BUILDING"]).endswith("ORG, PROD, BUILDING, STREET")


# The command on prediction files


def record_of(tmp_path: Path, gold: Path, *arguments: str) -> dict:
    assert command.main(["--gold", str(gold), "--json", str(tmp_path / "out" / "scores.json"), *arguments]) == 0
    return json.loads((tmp_path / "out" / "scores.json").read_text())


def failed(capsys, gold: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert command.main(["--gold", str(gold), *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def counts_of(record: dict, match: str = "strict", kind: str = "ALL") -> tuple[int, int, int]:
    return tuple(record[match][kind][name] for name in ("TP", "FP", "FN"))


def test_scores_of_a_tsv(gold, tmp_path, capsys):
    """Documents may come in another order, labels in other names."""
    own = {name: TWO[name].replace("-pers", "-PERSON") for name in reversed(TWO)}
    own["EXP-1"] = own["EXP-1"].replace("Ilg|I-PERSON", "Ilg|O").replace("ATS|B-org", "ATS|O")
    predictions = written(tmp_path / "response.tsv", tsv(own))
    record = record_of(tmp_path, gold, "--predictions", str(predictions))
    assert (record["documents"], record["spans"], record["texts"]) == (2, 7, 0)
    assert counts_of(record) == (5, 1, 2)
    assert counts_of(record, "strict", "PER") == (2, 1, 1)
    assert counts_of(record, "fuzzy") == (6, 0, 1)
    assert record["strict"]["ALL"]["P"] == pytest.approx(5 / 6)
    assert list(record["strict"]) == ["ALL", "LOC", "ORG", "PER"]
    assert (record["column"], record["prompt"], record["model"], record["unparsed"]) == ("NE-COARSE-LIT", None, None, 0)
    assert record["data_hash"] == file_sha256(gold)
    assert record["predictions_hash"] == file_sha256(predictions)
    assert record["versions"]["torch"]
    assert record["command"].startswith("python -m eval.ner --gold ")
    first = record["predictions"][0]
    assert first["id"] == "EXP-1"
    assert first["gold"][0] == {"type": "PER", "start": 0, "end": 3, "text": "M. Ilg"}
    assert first["predicted"][0] == {"type": "PER", "start": 0, "end": 2, "text": "M."}
    assert (first["strict"], first["fuzzy"]) == ({"TP": 2, "FP": 1, "FN": 2}, {"TP": 3, "FP": 0, "FN": 1})
    shown = capsys.readouterr().out
    assert shown.startswith("gold.tsv, NE-COARSE-LIT: 2 documents, 7 entities\nstrict       P       R      F1")
    assert "ALL      0.833   0.714   0.769       5       1       2\n" in shown
    record = record_of(tmp_path, gold, "--predictions", str(predictions), "--limit", "1")
    assert counts_of(record) == (2, 1, 2)
    record = record_of(tmp_path, gold, "--predictions", str(predictions), "--column", "NE-FINE-LIT")
    assert counts_of(record, "strict", "PER.x") == (2, 1, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Berne\tB-loc", "Bern\tB-loc", r"line 9: token 'Bern', the gold file has 'Berne' there (its line 9)"),
        (
            "ATS\tB-org\tO\tB-org.x\tNoSpaceAfter\n",
            "",
            r"line 15: token '.', the gold file has 'ATS' there (its line 15)",
        ),
        ("Paris\tB-loc\tO\tB-loc.x\tEndOfSentence\n", "", "line 25: document EXP-2 ends after 6 tokens, expected 7 as"),
        ("ATS\tB-org", "ATS\tB-city", "line 15: unknown label B-CITY, expected LOC, ORG, PER, PROD, TIME"),
        ("ATS\tB-org", "ATS\tS-org", "line 15: unknown label 'S-org' in NE-COARSE-LIT"),
        ("EXP-2", "EXP-3", "1 document (EXP-3) not in the gold file; do the two belong together?"),
        ("NE-COARSE-LIT", "NE-LIT", "has no column NE-COARSE-LIT; it has NE-LIT, NE-COARSE-METO, NE-FINE-LIT"),
    ],
)
def test_bad_predictions_as_tsv(gold, tmp_path, capsys, old, new, message):
    predictions = written(tmp_path / "response.tsv", tsv(TWO).replace(old, new, 1))
    assert predictions.read_text() != gold.read_text()
    error = failed(capsys, gold, "--predictions", str(predictions))
    assert message in error
    assert str(predictions) in error


def test_missing_documents_and_files(gold, tmp_path, capsys):
    one = written(tmp_path / "response.tsv", tsv({"EXP-1": TWO["EXP-1"]}))
    assert "1 document (EXP-2) missing, of 2 to score; predict them first" in failed(
        capsys, gold, "--predictions", str(one)
    )
    assert command.main(["--gold", str(gold), "--predictions", str(one), "--limit", "1"]) == 0
    assert failed(capsys, tmp_path / "no.tsv", "--predictions", str(one)) == (
        f"error: there is no file {tmp_path / 'no.tsv'}; check the path"
    )
    assert "has no column NE-X; it has NE-COARSE-LIT" in failed(
        capsys, gold, "--predictions", str(one), "--column", "NE-X"
    )
    assert "is TSV; --prompt is about a model's texts" in failed(
        capsys, gold, "--predictions", str(one), "--prompt", "iob"
    )


def test_types_of_other_data_sets(tmp_path):
    """HIPE-2022 has data sets with types of their own; a prediction may have those and the five."""
    gold = written(tmp_path / "gold.tsv", tsv({"x": "a|B-street b|O"}))
    assert known_types(read_hipe(gold)) == {*TYPES, "STREET"}
    predictions = written(tmp_path / "response.tsv", tsv({"x": "a|B-STREET b|B-time"}))
    record = record_of(tmp_path, gold, "--predictions", str(predictions))
    assert (counts_of(record, kind="STREET"), counts_of(record, kind="TIME")) == ((1, 0, 0), (0, 1, 0))


def texts_of(gold: Path, prompt: str, words: int | None = 5) -> list[dict]:
    """The right answers, by passage, or without `words` by document."""
    parts = [
        part
        for own in read_hipe(gold)
        for part in (passages(own, words) if words else [Passage(own.id, own, 0, len(own.tokens))])
    ]
    return [{"id": part.id, "text": response_text(part, prompt)} for part in parts]


@pytest.mark.parametrize("prompt", ["json", "iob"])
@pytest.mark.parametrize("words", [7, None])
def test_scores_of_texts(gold, tmp_path, prompt, words):
    """The format is found out; passages and documents are both taken."""
    predictions = written(tmp_path / "texts.jsonl", texts_of(gold, prompt, words)[::-1])
    record = record_of(tmp_path, gold, "--predictions", str(predictions), "--passage-words", "7")
    assert counts_of(record) == (7, 0, 0)
    assert (record["prompt"], record["unparsed"], record["repaired"], record["cut"]) == (prompt, 0, 0, 0)
    assert record["texts"] == (3 if words else 2)
    assert [entry["id"] for entry in record["predictions"][0]["texts"]] == (
        ["EXP-1#0", "EXP-1#1"] if words else ["EXP-1"]
    )
    other = "iob" if prompt == "json" else "json"
    record = record_of(tmp_path, gold, "--predictions", str(predictions), "--passage-words", "7", "--prompt", other)
    assert (counts_of(record), record["unparsed"]) == ((0, 0, 7), record["texts"])


def test_texts_that_are_wrong_are_counted(gold, tmp_path, capsys):
    lists = [
        '[{"entity": "PERSON", "text": "M. Ilg"}, {"entity": "CITY", "text": "Berne"},',
        '[{"entity": "ORG", "text": "Reuter"}, {"entity": "LOC", "text": "Berne"}]',
        "I do not know.",
    ]
    names = [record["id"] for record in texts_of(gold, "json", 7)]
    assert names == ["EXP-1#0", "EXP-1#1", "EXP-2#0"]
    content = [{"id": name, "text": text} for name, text in zip(names, lists, strict=True)]
    predictions = written(tmp_path / "texts.jsonl", content)
    record = record_of(tmp_path, gold, "--predictions", str(predictions), "--passage-words", "7")
    # M. Ilg and the second Berne; CITY stands for a LOC, Reuter is nowhere.
    assert counts_of(record) == (2, 2, 5)
    assert counts_of(record, kind="ORG") == (0, 1, 1)
    assert (record["unparsed"], record["repaired"], record["not_found"]) == (1, 1, 1)
    first = record["predictions"][0]
    assert first["nowhere"] == ["ORG"]
    assert [span["type"] for span in first["predicted"]] == ["PER", "OTHER", "LOC"]
    assert [entry["status"] for entry in first["texts"]] == ["repaired", "ok"]
    assert record["predictions"][1]["texts"][0] == {"id": "EXP-2#0", "text": "I do not know.", "status": "unparsed"}
    shown = capsys.readouterr().out
    assert "3 texts: 1 unparsed, 1 repaired; 1 predicted entities not found in their passage\n" in shown


def test_entities_that_no_passage_has_whole_are_counted(gold, tmp_path, capsys):
    predictions = written(tmp_path / "texts.jsonl", texts_of(gold, "iob", 2))
    record = record_of(tmp_path, gold, "--predictions", str(predictions), "--passage-words", "2")
    assert record["cut"] == 2, "M. Ilg and Paul Meyer"
    assert counts_of(record) == (5, 4, 2)
    assert "2 gold entities reach over the end of a passage" in capsys.readouterr().out


def test_texts_of_other_documents_are_passed_over(gold, tmp_path, capsys):
    predictions = written(tmp_path / "texts.jsonl", texts_of(gold, "json", None))
    record = record_of(tmp_path, gold, "--predictions", str(predictions), "--limit", "1")
    assert counts_of(record) == (4, 0, 0)
    assert "1 texts of documents that are not scored here are passed over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "1 passage (EXP-1#0) missing, of 2 of document EXP-1 with --passage-words 7"),
        (lambda lines: lines[:2], "1 document (EXP-2) missing, of 2 to score"),
        (lambda lines: [*lines, lines[0]], "line 4: id EXP-1#0 has a text already; keep one each"),
        (
            lambda lines: [*lines, {"id": "EXP-1#9", "text": ""}],
            "1 id (EXP-1#9) not in the gold file; expected DOCUMENT, or DOCUMENT#N for its passage N from 0, here of",
        ),
        (lambda lines: [*lines, {"id": "EXP-1", "text": ""}], "has a text for document EXP-1 and for its passages"),
        (
            lambda lines: [{**lines[0], "passage": "M. Ilg"}, *lines[1:]],
            "line 1: the passage of EXP-1#0 is 'M. Ilg', in",
        ),
        (lambda lines: [*lines, {"id": 3, "text": ""}], "line 4: expected id and text, both strings, got {'id': 3"),
        (lambda lines: [*lines, {"id": "EXP-1"}], "line 4: expected id and text"),
    ],
)
def test_bad_texts(gold, tmp_path, capsys, change, message):
    lines = texts_of(gold, "json", 7)
    assert len(lines) == 3
    predictions = written(tmp_path / "texts.jsonl", change(lines))
    error = failed(capsys, gold, "--predictions", str(predictions), "--passage-words", "7")
    assert message in error
    assert str(predictions) in error


def test_texts_that_are_not_json(gold, tmp_path, capsys):
    predictions = written(tmp_path / "texts.jsonl", '{"id": "EXP-1", "text": "[]"}\n{"id"\n')
    assert "line 2: not JSON (" in failed(capsys, gold, "--predictions", str(predictions))


def test_half_a_character_is_no_reason_to_fail(gold, tmp_path):
    """JSON can hold a lone surrogate, which the record could not be written with after all the work."""
    predictions = written(tmp_path / "t.jsonl", '{"id": "EXP-1", "text": "\\ud83d"}\n{"id": "EXP-2", "text": "[]"}\n')
    record = record_of(tmp_path, gold, "--predictions", str(predictions))
    assert record["predictions"][0]["texts"][0]["text"] == "?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --predictions FILE or --adapter A (none is the base model)"),
        (["--predictions", "p", "--adapter", "none"], "give either"),
        (["--predictions", "p", "--shots", "0"], "--shots is about a model that answers; it goes with --adapter"),
        (["--predictions", "p", "--train", "t"], "--train is about a model"),
        (["--adapter", "none", "--shots", "2"], "--shots needs examples; give a TSV of them with --train"),
        (["--adapter", "none", "--column", "NE-FINE-LIT"], "--column NE-FINE-LIT goes with --predictions"),
        (["--adapter", "none", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--predictions", "p", "--passage-words", "0"], "--passage-words must be at least 1"),
        (["--adapter", "none", "--shots", "4"], "argument --shots: invalid choice"),
        (["--adapter", "none", "--prompt", "xml"], "argument --prompt: invalid choice"),
    ],
)
def test_misuse(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        command.main(["--gold", "g", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_opens_with_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(
        "python -m eval.ner --gold HIPE-2022-v2.1-hipe2020-test-fr.tsv --predictions"
    )


# A model that answers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return written(
        tmp_path / "train.tsv", tsv({"T-1": "a|O Lyon|B-loc|.", "T-2": "b|B-loc c|I-loc|. d|O e|O|.", **TWO})
    )


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The prompts of every batch that a session is asked, as text; instructions are short, as the tiny context is."""
    monkeypatch.setattr(ner_texts, "INSTRUCTIONS", {"json": "List {types}", "iob": "Label {types}"})
    batches: list[list[str]] = []
    real = Session.generate

    def generate(self, rows, sampling, prompts=None, cancelled=None):
        batches.append([self.tokenizer.decode(row) for row in rows])
        return real(self, rows, sampling, prompts, cancelled)

    monkeypatch.setattr(Session, "generate", generate)
    return batches


def model_arguments(tiny: Tiny, adapter: object, *more: str) -> list[str]:
    base = ["--llama", str(tiny.llama), "--dtype", "float32", "--max-new-tokens", "6", "--passage-words", "7"]
    return [*base, "--adapter", str(adapter), *more]


def texts_in(record: dict) -> dict[str, str]:
    return {entry["id"]: entry["text"] for own in record["predictions"] for entry in own["texts"]}


LISTED = "List TIME, LOCATION, PERSON, ORGANIZATION, PRODUCT"
LABELLED = "Label TIME, LOC, PER, ORG, PROD"


def test_an_adapter_is_asked_passage_by_passage(tiny, gold, tmp_path, asked):
    """Longest first, in the adapter's template; batches change nothing."""
    record = record_of(tmp_path, gold, *model_arguments(tiny, tiny.reads, "--batch-size", "2"))
    assert [len(batch) for batch in asked] == [2, 1]
    shown = [prompt for batch in asked for prompt in batch]
    assert all(f"### Instruction:\n{LISTED}\n\n### Input:\n" in prompt for prompt in shown)
    assert {prompt.partition("### Input:\n")[2] for prompt in shown} == {
        f"{text}\n\n### Response:" for text in ("M. Ilg va a Berne.", "A Berne , l'ATS.", "# Paul Meyer et Ilg a Paris")
    }
    single = record_of(tmp_path, gold, *model_arguments(tiny, tiny.reads, "--batch-size", "1"))
    assert texts_in(record) == texts_in(single)
    assert len(set(texts_in(record).values())) > 1
    assert texts_in(record) != texts_in(record_of(tmp_path, gold, *model_arguments(tiny, "none")))
    assert record["texts"] == 3
    assert record["adapter"] == str(tiny.reads)
    assert record["base"] == str(tiny.llama)
    model = record["model"]
    assert model["adapter_hash"] == file_sha256(tiny.reads / "adapter.safetensors")
    assert (model["template"], model["prompt"], model["passage_words"]) == ("alpaca", "json", 7)


def test_labels_are_asked_for_with_blanks_between_words(tiny, gold, tmp_path, asked):
    record = record_of(tmp_path, gold, *model_arguments(tiny, "none", "--prompt", "iob", "--limit", "1"))
    assert f"{LABELLED}:\nM . Ilg va a Berne .\n" in asked[0]
    assert record["prompt"] == record["model"]["prompt"] == "iob"
    assert record["model"]["template"] == "plain"


def test_what_a_model_writes_is_scored(tiny, gold, tmp_path, monkeypatch):
    seen = []

    def generate(self, rows, sampling, prompts=None, cancelled=None):
        seen.append(sampling)
        return [Generated(' [{"entity": "LOCATION", "text": "Berne"}] ', [1], "stop") for _ in rows]

    monkeypatch.setattr(ner_texts, "INSTRUCTIONS", {"json": "List {types}", "iob": "Label {types}"})
    monkeypatch.setattr(Session, "generate", generate)
    record = record_of(tmp_path, gold, *model_arguments(tiny, tiny.sees))
    assert counts_of(record) == (2, 1, 5)
    assert record["not_found"] == 1
    assert (seen[0].stop, seen[0].temperature, seen[0].beams, seen[0].max_new_tokens) == (("\n\n",), 0.0, 1, 6)


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("json", ['[{"entity": "LOCATION", "text": "Lyon"}]', '[{"entity": "LOCATION", "text": "b c"}]']),
        ("iob", ["O B-LOC", "B-LOC I-LOC O O"]),
    ],
)
def test_shots_are_passages_with_entities_of_other_documents(
    tiny, gold, train, tmp_path, asked, capsys, prompt, answers
):
    """The scored documents stand in the train file, too; what the seed draws never shows them."""
    arguments = model_arguments(tiny, "none", "--train", str(train), "--prompt", prompt)
    record = record_of(tmp_path, gold, *arguments, "--shots", "2")
    expected = random.Random(0).sample(list(zip(["a Lyon", "b c d e"], answers, strict=True)), 2)
    head = LISTED if prompt == "json" else LABELLED
    start = "".join(f"{head}:\n{text}\n {answer}\n\n" for text, answer in expected)
    assert all(text.startswith(f"{start}{head}:\n") for batch in asked for text in batch)
    assert [text for _, text in record["model"]["shots"]] == [text for text, _ in expected]
    assert record["train_hash"] == file_sha256(train)
    assert (record["shots"], record["seed"]) == (2, 0)
    seeds = [record_of(tmp_path, gold, *arguments, "--shots", "1", "--seed", str(seed)) for seed in range(4)]
    assert len({own["model"]["shots"][0][0] for own in seeds}) == 2
    assert (
        "--shots 3 needs as many passages with entities, of documents that are not scored, and there are 2"
        in failed(capsys, gold, *arguments, "--shots", "3")
    )


def test_a_stopped_run_goes_on(tiny, gold, tmp_path, asked, monkeypatch, capsys):
    """What is kept is not asked again, and the scores are those of an uninterrupted run."""
    out = tmp_path / "texts.jsonl"
    arguments = model_arguments(tiny, tiny.reads, "--batch-size", "1", "--out", str(out))
    whole = record_of(tmp_path, gold, *model_arguments(tiny, tiny.reads, "--batch-size", "1"))
    real, calls = Session.generate, []

    def generate(self, rows, *rest):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, rows, *rest)

    monkeypatch.setattr(Session, "generate", generate)
    assert command.main(["--gold", str(gold), *arguments]) == 130
    assert len(out.read_text().splitlines()) == 2
    with out.open("a") as file:
        file.write('{"id": "EXP-2#0", "te')  # the line that the run was stopped in
    capsys.readouterr()
    record = record_of(tmp_path, gold, *arguments)
    assert len(calls) == 4
    assert "2 of 3 answers are in" in capsys.readouterr().err
    assert record["predictions"] == whole["predictions"]
    # What a model kept is a prediction file as well, of the same passages only.
    again = ["--predictions", str(out), "--passage-words"]
    scored = record_of(tmp_path, gold, *again, "7")
    assert (scored["predictions"], scored["model"]) == (whole["predictions"], whole["model"])
    out.write_text(out.read_text().replace('"prompt": "json"', '"prompt": "iob"'))
    assert record_of(tmp_path, gold, *again, "7")["prompt"] == "iob", "the file says so, whatever its texts"
    out.write_text(out.read_text().replace('"prompt": "iob"', '"prompt": "json"'))
    assert "missing, of 5 of document EXP-1" in failed(capsys, gold, *again, "4")
    assert "not in the gold file" in failed(capsys, gold, *again, "99")
    for more in (["--template", "bare"], ["--prompt", "iob"], ["--passage-words", "6"]):
        assert "holds answers of another model" in failed(capsys, gold, *arguments, *more)


def test_passages_that_are_too_long(tiny, gold, capsys):
    """The instruction in full leaves no room in the tiny model's context, with an example of its own length."""
    error = failed(capsys, gold, *model_arguments(tiny, "none", "--train", str(gold), "--limit", "1", "--shots", "1"))
    assert error.startswith("error: 2 passages (EXP-1#0 with ")
    assert error.endswith(
        "too long: the model's context holds 400, 1 examples and the answer included; take fewer --passage-words or "
        "--shots, or another --llama"
    )


def test_the_prompt_is_the_one_that_the_adapter_was_trained_with():
    assert choose_prompt(None, "a", {"prompt": "iob"}) == "iob"
    assert choose_prompt("json", "a", {"prompt": "iob"}) == "json"
    assert choose_prompt(None, "a", {}) == "json"
    with pytest.raises(ValueError, match=r"^adapter a says prompt 'xml', expected json or iob; give --prompt$"):
        choose_prompt(None, "a", {"prompt": "xml"})


# Published scores


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_the_published_scores_of_hipe(tmp_path):
    """Of all entities and by type, strict and fuzzy: each number as the shared task's own scorer gave it."""
    folder = Path(DATA) / "hipe2020_fr"
    response = folder / "published" / "neurbsl_bundle3_hipe2020_fr_1.tsv"
    record = record_of(tmp_path, folder / "HIPE-2022-v2.1-hipe2020-test-fr.tsv", "--predictions", str(response))
    overall = record["strict"]["ALL"]
    assert [round(overall[name], 3) for name in ("P", "R", "F1")] == [0.730, 0.785, 0.757]
    assert counts_of(record) == (1256, 464, 344)
    with response.with_name(f"{response.stem}_nerc_coarse.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if "-micro-" in row["Evaluation"]]
    assert len(rows) == 12
    for published in rows:
        own = record["fuzzy" if "fuzzy" in published["Evaluation"] else "strict"][entity_type(published["Label"])]
        assert {name: round(own[name], 3) for name in ("P", "R", "F1")} == {
            name: float(published[name]) for name in ("P", "R", "F1")
        }
        assert {name: own[name] for name in ("TP", "FP", "FN")} == {
            name: int(published[name]) for name in ("TP", "FP", "FN")
        }


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
@pytest.mark.parametrize("prompt", ["json", "iob"])
def test_the_right_answers_of_hipe_are_right(tmp_path, prompt):
    """In both formats every entity is found again, but for those that no passage has whole."""
    gold = Path(DATA) / "hipe2020_fr" / "HIPE-2022-v2.1-hipe2020-test-fr.tsv"
    by_document = written(tmp_path / "documents.jsonl", texts_of(gold, prompt, None))
    assert counts_of(record_of(tmp_path, gold, "--predictions", str(by_document))) == (1600, 0, 0)
    by_passage = written(tmp_path / "passages.jsonl", texts_of(gold, prompt, 60))
    record = record_of(tmp_path, gold, "--predictions", str(by_passage))
    assert counts_of(record) == (1600 - record["cut"], 2 * record["cut"], record["cut"])
    assert (record["texts"], record["cut"], record["not_found"]) == (879, 20, 0)


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_the_train_file_of_2020_is_read():
    """It marks no sentences, calls its ids otherwise and has a token #."""
    documents = read_hipe(Path(DATA) / "hipe2020_fr" / "CLEF-HIPE-2020-v0.9-train-fr.tsv")
    assert (len(documents), sum(len(own.tokens) for own in documents)) == (98, 97466)
    assert Counter(coarse.type for own in documents for coarse in spans_of(own.labels)) >= Counter(PER=1534, LOC=1896)
    assert any("#" in own.tokens for own in documents)
    parts = [part for own in documents for part in passages(own, 60)]
    assert max(part.end - part.start for part in parts) == 60
