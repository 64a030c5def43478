"""Questions with their answers, and predicted answers, read from the files that people have.

Gold files are recognised by content: SQuAD's JSON (versions 1.1 and 2.0), JSON rows (mmadapter/rows.py) and CSV.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.qa_metrics import normalise
from eval.records import note
from mmadapter.captions import named, read_text
from mmadapter.rows import answer_text, fields_of, records, text_field

EXPECTED = (
    "expected SQuAD JSON, or rows of question and answer (and image, split, context, id): a JSON list, JSON lines or "
    "CSV with a header and commas"
)
EXPECTED_ANSWERS = "expected {id: text}, JSON lines of id (or index) and answer, or a JSON list of texts in gold order"


@dataclass(frozen=True)
class Question:
    """A question and what is right.

    Attributes:
        id: The file's own, or the place among the questions of its split, from 0.
        text: The question.
        answers: References, at least one, of which the best counts; "" of a question without an answer.
        context: What the question is about, "" for none.
        image: The picture's name as the file has it, "" for none.
        split: "" where the file names none.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    context: str = ""
    image: str = ""
    split: str = ""


@dataclass(frozen=True)
class Gold:
    """A gold file.

    Attributes:
        path: The file.
        questions: Of all splits, in the file's order; those without an id of their own have "".
        squad: Whether it is SQuAD's JSON, whose answers are taken as they stand. Those of rows, and what is compared
            with them, are read as they are said (`rows.answer_text`).
    """

    path: Path
    questions: list[Question]
    squad: bool

    def as_said(self, answer: str) -> str:
        """An answer in the spelling of this file's references."""
        return answer.strip() if self.squad else answer_text(answer.strip())


def read_gold(path: Path) -> Gold:
    """Reads questions and answers.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of no known format, or rows have no question or answer, or an id twice: three are named.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; {EXPECTED}")
    squad = _squad_articles(text)
    if squad is not None:
        questions = list(_squad_questions(path, squad))
    else:
        is_json = text.lstrip()[0] in "[{"
        questions = _row_questions(path, records(path) if is_json else _csv_rows(path, text))
    if not questions:
        raise ValueError(f"{path} holds no questions; {EXPECTED}")
    twice = [own for own, count in Counter(question.id for question in questions if question.id).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: {named(twice, 'id')} of more than one question; ids must be unique")
    return Gold(path, questions, squad is not None)


def of_split(gold: Gold, split: str | None) -> tuple[list[Question], str | None]:
    """The questions of a split, and those that name none, each with an id; and the name of the split.

    Args:
        split: None is "test" where the file has splits; where it has none, all questions are taken.

    Raises:
        ValueError: There are none, or the place of one without an id is the id of another.
    """
    splits = sorted({question.split for question in gold.questions} - {""})
    if splits:
        split = split or "test"
        chosen = [question for question in gold.questions if question.split in ("", split)]
        if not chosen:
            raise ValueError(f"{gold.path} has no questions of split {split!r}; it has {', '.join(splits)}")
    else:
        if split is not None:
            note(f"{gold.path} has no splits: all of it is taken")
        chosen, split = gold.questions, None
    chosen = [dataclasses.replace(found, id=found.id or str(place)) for place, found in enumerate(chosen)]
    twice = [own for own, count in Counter(question.id for question in chosen).items() if count > 1]
    if twice:
        raise ValueError(
            f"{gold.path}: {named(twice, 'id')} of one question and the place of another, which has none; give every "
            "question an id, or none"
        )
    return chosen, split


def read_answers(path: Path, gold: Gold, split: Sequence[Question], wanted: Sequence[Question]) -> dict[str, str]:
    """Predicted answers by id; those to questions that are not wanted are passed over.

    Args:
        path: A JSON object of id and text (SQuAD), JSON lines of `id` or `index` (the place in the split, from 0) and
            `answer`, or a JSON list of texts in the order of the split.
        split: All questions of the split.
        wanted: Those that are scored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Malformed, or with missing, duplicate or unknown ids: three are named.
    """
    answers: dict[str, str] = {}
    twice: list[str] = []
    for place, key, answer in _predictions(path, split, wanted, twice):
        if not isinstance(answer, str):
            raise ValueError(f"{path}, {place}: an answer must be text, got {answer!r:.60}; {EXPECTED_ANSWERS}")
        if key in answers:
            twice.append(key)
        answers[key] = answer
    if twice:
        raise ValueError(f"{path}: {named(list(dict.fromkeys(twice)), 'id')} with more than one answer; keep one each")
    known = {question.id for question in (*gold.questions, *split)}
    unknown = [key for key in answers if key not in known]
    if unknown:
        raise ValueError(f"{path}: {named(unknown, 'id')} not in {gold.path}; do the two files belong together?")
    missing = [question.id for question in wanted if question.id not in answers]
    if missing:
        raise ValueError(
            f"{path}: {named(missing, 'question')} without an answer, of {len(wanted)} to score; answer them first"
        )
    scored = {question.id: answers[question.id] for question in wanted}
    if len(answers) > len(scored):
        note(f"{len(answers) - len(scored)} answers to questions that are not scored here are passed over")
    return scored


def _squad_articles(text: str) -> list | None:
    """The articles of SQuAD's JSON, None where the text is something else."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    articles = content.get("data") if isinstance(content, dict) else None
    is_squad = isinstance(articles, list) and articles and all(isinstance(article, dict) for article in articles)
    return articles if is_squad and "paragraphs" in articles[0] else None


def _squad_questions(path: Path, articles: Sequence[dict]) -> Iterator[Question]:
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_member(article, "paragraphs", list, f"{path}: data[{a}]")):
            where = f"{path}: data[{a}].paragraphs[{p}]"
            context = _member(paragraph, "context", str, where)
            for q, entry in enumerate(_member(paragraph, "qas", list, where)):
                place = f"{where}.qas[{q}]"
                references = [
                    _member(answer, "text", str, f"{place}.answers")
                    for answer in _member(entry, "answers", list, place)
                ]
                yield Question(
                    id=_member(entry, "id", str, place),
                    text=_member(entry, "question", str, place),
                    # As SQuAD's own scoring has it: of references of nothing but articles, none is left.
                    answers=tuple(filter(normalise, references)) or ("",),
                    context=context,
                )


def _member(value: object, name: str, kind: type, where: str) -> object:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"{where} has no {name} ({'a list' if kind is list else 'text'}), got {found!r:.60}")
    return found


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """The rows of a CSV file with their places; the columns' names in any case."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        if not {"question", "answer"} <= set(reader.fieldnames):
            raise ValueError(f"{path} has the columns {', '.join(reader.fieldnames)!r:.80}; {EXPECTED}")
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: more fields than columns; quote texts with commas")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: not CSV: {error}; {EXPECTED}") from None


def _row_questions(path: Path, rows: Iterable[tuple[str, object]]) -> list[Question]:
    questions, bad = [], []
    for where, record in rows:
        try:
            questions.append(_row_question(fields_of(record)))
        except ValueError as error:
            bad.append(f"{where.removeprefix(f'{path.name}, ')}: {error}")
    if bad:
        raise ValueError(f"{path}: {named(bad, 'bad row')}; {EXPECTED}")
    return questions


def _row_question(fields: dict) -> Question:
    several = fields.get("answer")
    if not isinstance(several, list):
        several = [several] if "answer" in fields else []
    references = [text_field({"answer": one}, "answer") for one in several] or [text_field({}, "answer")]
    own = next((fields[name] for name in ("id", "question_id") if fields.get(name) not in (None, "")), "")
    if not isinstance(own, (str, int)):
        raise ValueError(f"id must be text or a number, got {own!r:.60}")
    return Question(
        id=str(own),
        text=text_field(fields, "question").strip(),
        answers=tuple(answer_text(reference.strip()) for reference in references),
        context=text_field(fields, "context", optional=True),
        image=text_field(fields, "image", optional=True),
        split=text_field(fields, "split", optional=True),
    )


def _predictions(
    path: Path, split: Sequence[Question], wanted: Sequence[Question], twice: list[str]
) -> Iterator[tuple[str, str, object]]:
    """Each answer as it stands: its place for errors, id, answer. `twice` gets the ids that an object repeats."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except ValueError:
        content = None
    if isinstance(content, dict) and not ("answer" in content and content.keys() & {"id", "index"}):
        yield from ((f"id {key}", key, answer) for key, answer in content.items())
    elif isinstance(content, list) and not (content and all(isinstance(entry, dict) for entry in content)):
        questions = wanted if len(content) == len(wanted) else split
        if len(content) != len(questions):
            raise ValueError(
                f"{path} is a list of {len(content)} answers; each of the {len(split)} questions needs one"
            )
        yield from (
            (f"item {number}", question.id, answer)
            for number, (question, answer) in enumerate(zip(questions, content, strict=True))
        )
    else:
        for where, record in _numbered(content) if isinstance(content, list) else _lines(path, text):
            if not isinstance(record, dict) or "answer" not in record or not record.keys() & {"id", "index"}:
                raise ValueError(f"{path}, {where}: got {record!r:.60}; {EXPECTED_ANSWERS}")
            key, index = record.get("id"), record.get("index")
            if key is None and type(index) is int:
                key = split[index].id if 0 <= index < len(split) else f"index {index}"
            yield where, str(key), record["answer"]


def _numbered(entries: list) -> Iterator[tuple[str, object]]:
    return ((f"item {number}", entry) for number, entry in enumerate(entries))


def _lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; {EXPECTED_ANSWERS}")
    for number, line in lines:
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); {EXPECTED_ANSWERS}") from None
