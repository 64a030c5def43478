"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): its files, prompt formats, answers and the nine accuracies.

A format names what the model reads and writes, in order: `QCM-ALE` reads question, context and options (multiple
choice) and writes answer, lecture and explanation.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmadapter.rows import BadRow

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
CLASSES = ("avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
ANSWER_FORMS = ("letter", "text")
# Where a letter or an option ends, and not within a longer word or number.
WORD_END = r"(?!\w|[.,:]\d|['’/‐‑-]\w|–\d)"
# Where the text of an option ends that is all that is said of it.
TEXT_END = r"(?=[.;!?]*(?: BECAUSE:|$)|[.;!?] )"
FORMAT_EXAMPLES = "QCM-A, QCM-ALE, QCM-LEA, QCMLE-A"


@dataclass(frozen=True)
class Problem:
    """One question. What the data set does not say is "" or None.

    Attributes:
        pid: Its key in `problems.json`.
        answer: Index of the right choice.
        hint: Its textual context.
        image: Where its image is to be; the file itself is not looked for.
        grade: School grade, 1 to 12.
        split: The folder of `images` that it belongs to.
    """

    pid: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    image: Path | None = None
    lecture: str = ""
    solution: str = ""
    subject: str | None = None
    grade: int | None = None
    split: str = ""


def read_problems(folder: Path, split: str, bad: list[BadRow] | None = None) -> list[Problem]:
    """The questions of one split, in the order of `pid_splits.json`.

    Args:
        folder: Holds `problems.json`, `pid_splits.json` and images as `images/SPLIT/PID/FILE`.
        split: A key of `pid_splits.json`.
        bad: Takes the incomplete questions, which are then left out; with None the first is an error.

    Raises:
        FileNotFoundError: The folder or one of the two files is not there.
        ValueError: A file is damaged, there is no such split, or a question is incomplete; the message names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give the one that holds ScienceQA's problems.json")
    problems = _read_object(folder / "problems.json")
    splits = _read_object(folder / "pid_splits.json")
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'} has no split {split!r}; there are {', '.join(splits)}")
    pids = splits[split]
    if not isinstance(pids, list) or not all(isinstance(pid, str) for pid in pids):
        raise ValueError(f"{folder / 'pid_splits.json'}: split {split} must be a list of pids, each a string")
    if not pids:
        raise ValueError(f"{folder / 'pid_splits.json'}: split {split} is empty")
    if len(set(pids)) < len(pids):
        twice = next(pid for pid in pids if pids.count(pid) > 1)
        raise ValueError(f"{folder / 'pid_splits.json'}: split {split} names pid {twice} more than once")
    missing = [pid for pid in pids if pid not in problems]
    if missing and bad is None:
        raise ValueError(
            f"{folder / 'problems.json'} lacks {len(missing)} of the {len(pids)} pids of split {split}, "
            f"such as {', '.join(missing[:3])}"
        )
    found = []
    for pid in pids:
        try:
            if pid not in problems:
                raise ValueError(f"it is in pid_splits.json, split {split}, and not here")
            found.append(_problem(folder, pid, problems[pid], split))
        except ValueError as error:
            if bad is None:
                raise ValueError(f"{folder / 'problems.json'}, pid {pid}: {error}") from None
            bad.append(BadRow(f"problems.json, pid {pid}", str(error)))
    return found


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; a ScienceQA folder has problems.json, pid_splits.json and images/")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def _problem(folder: Path, pid: str, record: object, split: str) -> Problem:
    """One question; a ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")

    def text(name: str) -> str:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a text, got {value!r}")
        return (value or "").strip()

    choices, answer, grade, subject = record.get("choices"), record.get("answer"), text("grade"), text("subject")
    if not text("question"):
        raise ValueError("it has no question")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices must be a list of 2 to {len(LETTERS)} texts, got {choices!r}")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"every choice must be a text that is not empty, got {choices!r}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer must be an index from 0 to {len(choices) - 1}, got {answer!r}")
    if grade and not re.fullmatch(r"grade([1-9]|1[0-2])", grade):
        raise ValueError(f"grade must be grade1 to grade12 or null, got {grade!r}")
    if subject and subject not in SUBJECTS.values():
        raise ValueError(f"subject must be one of {', '.join(SUBJECTS.values())} or null, got {subject!r}")
    own_split = text("split") or split  # a part such as minitest has its images in those of the whole, test
    return Problem(
        pid=pid,
        question=text("question"),
        choices=tuple(choices),
        answer=answer,
        hint=text("hint"),
        image=folder / "images" / own_split / pid / text("image") if text("image") else None,
        lecture=text("lecture"),
        solution=text("solution"),
        subject=subject or None,
        grade=int(grade.removeprefix("grade")) if grade else None,
        split=own_split,
    )


def held_out(problems: Sequence[Problem], count: int = 1200, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """Sets questions aside to choose settings by: (the others, those set aside), both in the order given.

    Half of those set aside have an image, or all that have one if they are fewer.

    Raises:
        ValueError: There are too few questions.
    """
    with_image = [index for index, problem in enumerate(problems) if problem.image is not None]
    without = [index for index, problem in enumerate(problems) if problem.image is None]
    images = min(count // 2, len(with_image))
    if count < 1 or count >= len(problems) or count - images > len(without):
        raise ValueError(
            f"cannot hold out {count} questions, half of them with images, of {len(with_image)} with and "
            f"{len(without)} without; choose another number"
        )
    draw = random.Random(seed)
    held = {*draw.sample(with_image, images), *draw.sample(without, count - images)}
    return (
        [problem for index, problem in enumerate(problems) if index not in held],
        [problem for index, problem in enumerate(problems) if index in held],
    )


@dataclass(frozen=True)
class Format:
    """What the model reads and writes; see `parse_format`.

    Attributes:
        reads: Letters of Q question, C context (the hint), M options, L lecture, E explanation (the solution).
        writes: Letters of A answer, L and E.
    """

    reads: str
    writes: str

    def __str__(self) -> str:
        return f"{self.reads}-{self.writes}"


def parse_format(text: str) -> Format:
    """Reads a format as the data set's paper writes it, such as `QCM-ALE`.

    Raises:
        ValueError: It is none: Q and M must be read, A must be written, and no letter occurs twice.
    """
    reads, dash, writes = text.partition("-")
    fits = (
        dash
        and set(reads) <= set("QCMLE")
        and set("QM") <= set(reads)
        and set(writes) <= set("ALE")
        and "A" in writes
        and len(set(reads + writes)) == len(reads + writes)
    )
    if not fits:
        raise ValueError(
            f"{text!r} is no ScienceQA format: before the dash Q and M, and C, L or E if wanted, after it A, and L or "
            f"E if wanted, no letter twice; such as {FORMAT_EXAMPLES}"
        )
    return Format(reads, writes)


def prompt_text(problem: Problem, form: Format) -> str:
    """What the model reads: a line for each letter of the format, then `Answer:`.

    A question without a hint has the context N/A; an empty lecture or solution has no line.
    """
    lines = {
        "Q": f"Question: {_one_line(problem.question)}",
        "C": f"Context: {_one_line(problem.hint) or 'N/A'}",
        "M": "Options: " + " ".join(f"({LETTERS[i]}) {_one_line(text)}" for i, text in enumerate(problem.choices)),
        "L": f"Lecture: {_one_line(problem.lecture)}" if problem.lecture else "",
        "E": f"Solution: {_one_line(problem.solution)}" if problem.solution else "",
    }
    return "\n".join([*(lines[letter] for letter in form.reads if lines[letter]), "Answer:"])


def response_text(problem: Problem, form: Format, answer_form: str = "letter") -> str:
    """What the model is to write after `prompt_text`, without a blank before it.

    The letters' order is kept, as in the data set's own formats: `A` is "The answer is B.", `ALE` "The answer is B.
    BECAUSE: LECTURE SOLUTION", `LEA` "LECTURE SOLUTION The answer is B.". Where all that BECAUSE would introduce is
    empty, it is left out.

    Args:
        answer_form: "letter", or "text" for the option's own text ("West Virginia") in place of "The answer is B.".
            After a lecture or solution it is "The answer is West Virginia", so that one can tell where it begins.
    """
    fields = {"L": _one_line(problem.lecture), "E": _one_line(problem.solution)}
    before, after = form.writes.split("A")
    first = [fields[letter] for letter in before if fields[letter]]
    last = [fields[letter] for letter in after if fields[letter]]
    answer = choice_texts(problem, answer_form)[problem.answer]
    if answer_form == "text" and first:
        answer = f"The answer is {answer}"
    return " ".join([*first, answer, *(["BECAUSE:", *last] if last else [])])


def choice_texts(problem: Problem, answer_form: str = "letter") -> list[str]:
    """Each option as the model would answer it: "The answer is A.", or with "text" the option's own text.

    Raises:
        ValueError: Another answer form.
    """
    if answer_form not in ANSWER_FORMS:
        raise ValueError(f"answer form must be {' or '.join(ANSWER_FORMS)}, got {answer_form!r}")
    if answer_form == "text":
        return [_one_line(choice) for choice in problem.choices]
    return [f"The answer is {LETTERS[index]}." for index in range(len(problem.choices))]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def parse_answer(text: str, choices: Sequence[str], answer_form: str = "letter") -> int | None:
    """The choice that an answer names, None where it names none.

    The first of these that names something:

    1. The whole text, as a letter (B, (B), B., B), B:; also a small one) or an option's own text.
    2. The last "answer is X" in it, X a letter or an option's own text, whichever is longer. A small letter counts in
       brackets or before a stop or bracket only: "the answer is a magnet" is not A.
    3. What stands before "BECAUSE:", as in 1.
    4. The capital letter that it begins with, in brackets or with a stop ("B. Louisiana", "(B) for it is ...").

    X is not the beginning of a longer word or number: "1" is not in 1.5, 12:30 or $1,500, nor "x" in x-ray. A letter
    and an option's own text that contradict each other name nothing, and then the answer is None: in 2 and 4 a letter
    with another option's text right behind it, up to a stop, "BECAUSE:" or the end ("A. Virginia"), in 2 also A and a
    blank with an option's text behind it, whatever follows ("A magnet that ..."), and an option's text with another
    letter in brackets behind it. A letter past the last choice names nothing, and if it is the X of 2, then the answer
    is None, too. Of an option's text, case and a stop at the end do not matter unless two options differ in nothing
    else.

    Args:
        answer_form: What a letter is that is also an option's own text: the "letter", or the option of that "text".
    """
    text = _one_line(text)
    whole = _whole(text, choices, answer_form)
    if whole is not None:
        return whole
    for stated in reversed(list(re.finditer(r"\banswer is:? ", text, re.IGNORECASE))):
        named = _beginning(text[stated.end() :], choices, answer_form)
        if named is not None:
            return named if named < len(choices) else None
    before = _whole(text.partition("BECAUSE:")[0].strip(), choices, answer_form)
    return before if before is not None else _leading(text, choices)


def _whole(text: str, choices: Sequence[str], answer_form: str) -> int | None:
    """The choice that is all of `text`."""
    letter = re.fullmatch(r"\(([A-Za-z])\)\.?|([A-Za-z])[.):]?", text)
    lettered = LETTERS.index((letter[1] or letter[2]).upper()) if letter else len(choices)
    named = [index for index in (lettered, _option(text, choices)) if index is not None and index < len(choices)]
    return named[0 if answer_form == "letter" else -1] if named else None


def _leading(text: str, choices: Sequence[str]) -> int | None:
    """The choice whose letter, (B) or "B.", comes before other text, which must not contradict it."""
    letter = re.match(r"(?:\(([A-Z])\)\.?|([A-Z])[.):]) ", text)
    if letter is None:
        return None
    index = LETTERS.index(letter[1] or letter[2])
    return index if index < len(choices) and not _contradicted(index, text[letter.end() - 1 :], choices) else None


def _contradicted(index: int, behind: str, choices: Sequence[str], end: str = TEXT_END) -> bool:
    """Whether right behind a choice's letter stands another one's own text, and not the choice's.

    Args:
        behind: The text from the letter's end.
        end: Pattern of what follows the option's text.
    """
    behind = re.sub(r"^[.):,]* *(?:[-–] )?", "", behind)
    options = [(own, re.escape(_loosely(choice))) for own, choice in enumerate(choices) if _loosely(choice)]
    followed = [own for own, option in options if re.match(option + end, behind, re.IGNORECASE)]
    return bool(followed) and index not in followed


def _option(text: str, choices: Sequence[str]) -> int | None:
    """The choice whose own text is `text`, as it stands or else loosely; None if that is none or several."""
    for same in (_one_line, _loosely):
        found = [index for index, choice in enumerate(choices) if same(choice) == same(text)]
        if len(found) == 1:
            return found[0]
    return None


def _beginning(text: str, choices: Sequence[str], answer_form: str) -> int | None:
    """The choice that `text` begins with.

    Returns:
        None where it begins with none, `len(choices)` or more where it names one that is not there or contradicts
        itself.
    """
    letter = re.match(rf"\(([A-Za-z])\)|([A-Z]){WORD_END}|([a-z])(?=[.,;:!?)]|$){WORD_END}", text)
    lettered = LETTERS.index((letter[1] or letter[2] or letter[3]).upper()) if letter else None
    by_letter = lettered
    end = WORD_END if text.startswith("A ") else TEXT_END  # it may be no letter but an article
    if letter and _contradicted(lettered, text[letter.end() :], choices, end):
        by_letter = len(choices)
    lengths = {}
    for index, choice in enumerate(choices):
        option = _one_line(choice).rstrip(".")
        if option and re.match(re.escape(option) + WORD_END, text, re.IGNORECASE):
            lengths[index] = (len(option), text.startswith(option))  # of two that differ in case, the one as it stands
    if not lengths:
        return by_letter
    best = max(lengths.values())
    if letter and best[0] == len(letter[0]) and answer_form == "letter" and lettered < len(choices):
        return by_letter
    found = [index for index, length in lengths.items() if length == best]
    if len(found) != 1:
        return None
    behind = re.match(r"[.,]? ?\(([A-Z])\)", text[best[0] :])
    other = found[0] if behind is None else LETTERS.index(behind[1])
    return found[0] if other == found[0] or other >= len(choices) else len(choices)


def _loosely(text: str) -> str:
    return _one_line(text).rstrip(".").lower()


def accuracies(problems: Sequence[Problem], predicted: Mapping[str, int | None]) -> dict[str, Any]:
    """The nine accuracies of the benchmark.

    Args:
        problems: The questions that are scored.
        predicted: For each pid the index of a choice, None for an answer that names none. An index outside the choices
            counts as none, and none is wrong. Answers to other questions are passed over.

    Returns:
        `avg`; by subject `NAT`, `SOC` and `LAN`; `TXT` (has a hint), `IMG` (has an image) and `NO` (has neither);
        `G1-6` and `G7-12`: in percent, None for a class without a question. `n`: how many questions each had.
        `unparsed`: answers that name no choice. `total`: questions.

    Raises:
        ValueError: A question has no answer in `predicted`.
    """
    missing = [problem.pid for problem in problems if problem.pid not in predicted]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(problems)} questions have no prediction, such as pid {', '.join(missing[:3])}; "
            "every question needs one"
        )
    right: dict[str, list[bool]] = {name: [] for name in CLASSES}
    unparsed = 0
    for problem in problems:
        index = predicted[problem.pid]
        if index is None or not 0 <= index < len(problem.choices):
            unparsed += 1
        for name in _classes(problem):
            right[name].append(index == problem.answer)
    scores = {name: 100 * sum(found) / len(found) if found else None for name, found in right.items()}
    counts = {name: len(found) for name, found in right.items()}
    return {**scores, "n": counts, "unparsed": unparsed, "total": len(problems)}


def _classes(problem: Problem) -> list[str]:
    """The accuracies that a question counts for; one with a hint and an image counts for TXT and for IMG."""
    names = ["avg", *(name for name, subject in SUBJECTS.items() if subject == problem.subject)]
    if problem.hint:
        names.append("TXT")
    if problem.image is not None:
        names.append("IMG")
    if not problem.hint and problem.image is None:
        names.append("NO")
    if problem.grade is not None:
        names.append("G1-6" if problem.grade <= 6 else "G7-12")
    return names
