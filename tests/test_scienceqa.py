"""ScienceQA: reading the data set, formats, answers, accuracies."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import pytest

from mmadapter.scienceqa import (
    CLASSES,
    LETTERS,
    Format,
    Problem,
    accuracies,
    choice_texts,
    held_out,
    parse_answer,
    parse_format,
    prompt_text,
    read_problems,
    response_text,
)

DATA = os.environ.get("MMADAPTER_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")

STATE = {
    "question": "Which of these states\nis farthest  north?",
    "choices": ["West Virginia", "Louisiana", "Arizona"],
    "answer": 1,
    "hint": "Look at\nthe map.",
    "image": "image.jpg",
    "grade": "grade2",
    "subject": "social science",
    "lecture": "Maps have\nfour directions.",
    "solution": "Louisiana is farthest north.",
    "split": "train",
}
BARE = {"question": "Is this a sentence?", "choices": ["no", "yes"], "answer": 0}


def data_folder(folder: Path, problems: dict, splits: dict | None = None) -> Path:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits or {"train": list(problems)}))
    return folder


def problem(**changes: object) -> Problem:
    fields = {**STATE, "pid": "1", "choices": tuple(STATE["choices"]), "image": Path("image.jpg"), "grade": 2}
    return Problem(**{**fields, **changes})


# The files


def test_reading_a_split_in_its_order(tmp_path):
    nulls = dict.fromkeys(("hint", "image", "grade", "subject", "lecture", "solution"))
    problems = {"2": {**BARE, **nulls}, "10": STATE, "3": BARE}
    splits = {"train": ["10", "2"], "minitest": ["3"]}
    folder = data_folder(tmp_path, problems, splits)
    first, second = read_problems(folder, "train")
    assert first == Problem(
        pid="10",
        question="Which of these states\nis farthest  north?",
        choices=("West Virginia", "Louisiana", "Arizona"),
        answer=1,
        hint="Look at\nthe map.",
        image=tmp_path / "images" / "train" / "10" / "image.jpg",
        lecture="Maps have\nfour directions.",
        solution="Louisiana is farthest north.",
        subject="social science",
        grade=2,
        split="train",
    )
    assert second == Problem("2", "Is this a sentence?", ("no", "yes"), 0, split="train")
    assert (second.hint, second.image, second.lecture, second.solution) == ("", None, "", "")
    assert (second.subject, second.grade) == (None, None)
    [third] = read_problems(folder, "minitest")
    assert third == dataclasses.replace(second, pid="3", split="minitest")


def test_a_part_of_a_split_has_its_images_in_the_whole(tmp_path):
    folder = data_folder(tmp_path, {"5": {**STATE, "split": "test"}}, {"minitest": ["5"]})
    [found] = read_problems(folder, "minitest")
    assert found.image == tmp_path / "images" / "test" / "5" / "image.jpg"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "pid 7: it has no question"),
        ({"question": 3}, "pid 7: question must be a text, got 3"),
        ({"choices": None}, "pid 7: choices must be a list of 2 to 26 texts, got None"),
        ({"choices": ["yes"]}, r"pid 7: choices must be a list of 2 to 26 texts, got \['yes'\]"),
        ({"choices": [*LETTERS, "27"]}, "2 to 26"),
        ({"choices": ["yes", ""]}, "every choice must be a text that is not empty"),
        ({"choices": ["yes", 1]}, "every choice must be a text"),
        ({"answer": 2}, "pid 7: answer must be an index from 0 to 1, got 2"),
        ({"answer": -1}, "answer must be an index"),
        ({"answer": "0"}, "answer must be an index from 0 to 1, got '0'"),
        ({"answer": True}, "answer must be an index"),
        ({"hint": ["a"]}, "hint must be a text"),
        ({"grade": "grade13"}, "grade must be grade1 to grade12 or null, got 'grade13'"),
        ({"subject": "magic"}, "subject must be one of natural science, social science, language science or null"),
    ],
)
def test_bad_problems_are_named(tmp_path, changes, message):
    folder = data_folder(tmp_path, {"7": {**BARE, **changes}})
    with pytest.raises(ValueError, match=message) as caught:
        read_problems(folder, "train")
    assert str(tmp_path / "problems.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("problems", "splits", "message"),
    [
        ("[]", "{}", "problems.json must be a JSON object, got list"),
        ("{", "{}", "problems.json is not JSON"),
        ("{}", '{"val": [], "test": ["1"]}', "has no split 'train'; there are val, test"),
        ("{}", '{"train": []}', "split train is empty"),
        ("{}", '{"train": [1]}', "split train must be a list of pids, each a string"),
        ("{}", '{"train": "1"}', "split train must be a list"),
        ("{}", '{"train": ["1", "2", "1"]}', "split train names pid 1 more than once"),
        ('{"1": []}', '{"train": ["1"]}', "pid 1: expected an object, got list"),
        (
            '{"1": {}}',
            '{"train": ["9", "1", "8", "7", "6"]}',
            "problems.json lacks 4 of the 5 pids of split train, such as 9, 8, 7",
        ),
    ],
)
def test_bad_files(tmp_path, problems, splits, message):
    (tmp_path / "problems.json").write_text(problems)
    (tmp_path / "pid_splits.json").write_text(splits)
    with pytest.raises(ValueError, match=message) as caught:
        read_problems(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; give the one that holds ScienceQA"):
        read_problems(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"no .*problems\.json; a ScienceQA folder has"):
        read_problems(tmp_path, "train")
    (tmp_path / "problems.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no .*pid_splits\.json"):
        read_problems(tmp_path, "train")


# What is held out


def questions(with_image: int, without: int) -> list[Problem]:
    """Those with images among the others."""
    images = random.Random(1).sample([Path("x.jpg")] * with_image + [None] * without, with_image + without)
    return [problem(pid=str(index), image=image) for index, image in enumerate(images)]


def test_half_of_what_is_held_out_has_images():
    all_of_them = questions(40, 60)
    train, held = held_out(all_of_them, 20, seed=3)
    assert (len(train), len(held)) == (80, 20)
    assert sum(found.image is not None for found in held) == 10
    for part in (train, held):
        assert part == sorted(part, key=lambda found: int(found.pid)), "the order is kept"
    assert {found.pid for found in train + held} == {found.pid for found in all_of_them}
    assert held_out(all_of_them, 20, seed=3) == (train, held)
    assert held_out(all_of_them, 20, seed=4)[1] != held


def test_what_is_held_out_does_not_change_between_versions():
    """Scores on held-out questions compare only where these are the same ones."""
    assert [found.pid for found in held_out(questions(5, 5), 4, seed=0)[1]] == ["3", "4", "5", "7"]


def test_fewer_images_than_half():
    train, held = held_out(questions(3, 30), 20)
    assert sum(found.image is not None for found in held) == 3
    assert len(held) == 20
    assert len(train) == 13


@pytest.mark.parametrize(("count", "with_image", "without"), [(0, 5, 5), (10, 5, 5), (11, 5, 5), (8, 9, 3)])
def test_too_few_questions_to_hold_out(count, with_image, without):
    message = f"cannot hold out {count} questions, half of them with images, of {with_image} with and {without} without"
    with pytest.raises(ValueError, match=message):
        held_out(questions(with_image, without), count)


# Formats


@pytest.mark.parametrize("text", ["QCM-A", "QM-A", "CQM-A", "QCML-A", "QCMLE-A", "QLEM-A", "QCM-ALE", "QCM-EA"])
def test_formats_of_the_papers(text):
    form = parse_format(text)
    assert form == Format(*text.split("-"))
    assert str(form) == text


@pytest.mark.parametrize(
    "text",
    ["", "QCM", "QCM-", "-A", "QC-A", "CM-A", "QCM-L", "QCMM-A", "QCML-LA", "QCMA-A", "QCM-AQ", "qcm-a", "Q-M-A"],
)
def test_bad_formats(text):
    with pytest.raises(
        ValueError, match=r"is no ScienceQA format: .*; such as QCM-A, QCM-ALE, QCM-LEA, QCMLE-A"
    ) as caught:
        parse_format(text)
    assert repr(text) in str(caught.value)


def test_the_prompt_of_the_paper():
    assert prompt_text(problem(), parse_format("QCM-A")) == (
        "Question: Which of these states is farthest north?\n"
        "Context: Look at the map.\n"
        "Options: (A) West Virginia (B) Louisiana (C) Arizona\n"
        "Answer:"
    )
    assert prompt_text(problem(hint=""), parse_format("CMQ-A")) == (
        "Context: N/A\n"
        "Options: (A) West Virginia (B) Louisiana (C) Arizona\n"
        "Question: Which of these states is farthest north?\n"
        "Answer:"
    )


def test_lecture_and_solution_are_read_where_asked_and_there():
    assert prompt_text(problem(), parse_format("QMEL-A")) == (
        "Question: Which of these states is farthest north?\n"
        "Options: (A) West Virginia (B) Louisiana (C) Arizona\n"
        "Solution: Louisiana is farthest north.\n"
        "Lecture: Maps have four directions.\n"
        "Answer:"
    )
    assert prompt_text(problem(lecture="", solution=""), parse_format("QMEL-A")) == prompt_text(
        problem(), parse_format("QM-A")
    )


@pytest.mark.parametrize(
    ("form", "letter", "text"),
    [
        ("QCM-A", "The answer is B.", "Louisiana"),
        (
            "QCM-ALE",
            "The answer is B. BECAUSE: Maps have four directions. Louisiana is farthest north.",
            "Louisiana BECAUSE: Maps have four directions. Louisiana is farthest north.",
        ),
        (
            "QCM-EA",
            "Louisiana is farthest north. The answer is B.",
            "Louisiana is farthest north. The answer is Louisiana",
        ),
        (
            "QCM-LAE",
            "Maps have four directions. The answer is B. BECAUSE: Louisiana is farthest north.",
            "Maps have four directions. The answer is Louisiana BECAUSE: Louisiana is farthest north.",
        ),
    ],
)
def test_responses(form, letter, text):
    assert response_text(problem(), parse_format(form)) == letter
    assert response_text(problem(), parse_format(form), "text") == text
    for answer_form, response in (("letter", letter), ("text", text)):
        assert parse_answer(response, STATE["choices"], answer_form) == 1


@pytest.mark.parametrize("form", ["QCM-ALE", "QCM-LEA"])
def test_nothing_to_explain(form):
    """No BECAUSE without a reason, and no blank at either end."""
    silent = problem(lecture="", solution="")
    assert response_text(silent, parse_format(form)) == "The answer is B."
    assert response_text(silent, parse_format(form), "text") == "Louisiana"


def test_choice_texts():
    assert choice_texts(problem()) == ["The answer is A.", "The answer is B.", "The answer is C."]
    assert choice_texts(problem(choices=("a\n b", "c")), "text") == ["a b", "c"]
    with pytest.raises(ValueError, match="answer form must be letter or text, got 'index'"):
        choice_texts(problem(), "index")


# Answers

PLANTS = ("a magnet", "Moss", "A fern.", "oak")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("(B).", 1),
        ("b", 1),
        (" B \n", 1),
        ("The answer is B", 1),
        ("The answer is B.", 1),
        ("the answer is b.", 1),
        ("The answer is (B)", 1),
        ("answer is: (b) and nothing else", 1),
        ("ANSWER IS D", 3),
        ("moss", 1),
        ("Moss.", 1),
        ("OAK", 3),
        ("a fern", 2),
        ("The answer is Moss.", 1),
        ("The answer is moss, which is green.", 1),
        ("The answer is A fern.", 2),
        ("The answer is A. It is a magnet", 0),
        ("The answer is a magnet", 0),
        ("The answer is a stone", None),
        ("The answer is a", 0),
        ("The answer is oakum", None),
        ("First I thought the answer is A. Now I think the answer is C. BECAUSE: it is green", 2),
        ("The answer is B. BECAUSE: the answer is not\nknown", 1),
        ("The answer is B. But the answer is E.", None),
        ("The answer is E.", None),
        ("E", None),
        ("(Z)", None),
        ("B or C", None),
        ("Bad", None),
        ("I like moss", None),
        ("Moss BECAUSE: it is green", 1),
        ("(D) BECAUSE: it is a tree", 3),
        ("B. Moss", 1),
        ("(B) moss", 1),
        ("B) Moss", 1),
        ("D: an oak is a tree", 3),
        ("C. It grows in the shade.", 2),
        ("C. It grows. The answer is D", 3),
        ("C. It grows, so the answer is green.", 2),
        ("B. oak", None),
        ("E. oak", None),
        ("b. it is green", None),
        ("B it is", None),
        ("A magnet is not. B. Moss", None),
        ("BECAUSE: B", None),
        ("", None),
        (" ", None),
        (".", None),
        ("The answer is", None),
        ("The answer is ", None),
        ("(B", None),
        ("1", None),
    ],
)
def test_answers(text, index):
    assert parse_answer(text, PLANTS) == index


@pytest.mark.parametrize(
    ("choices", "text", "index"),
    [
        (("1", "2"), "The answer is 1.5", None),
        (("1", "1.5"), "The answer is 1.5", 1),
        (("1", "2"), "The answer is 1. It is odd.", 0),
        (("1", "2"), "The answer is 1, as it is odd.", 0),
        (("12", "3"), "The answer is 12:30", None),
        (("12", "3"), "The answer is 12: it is noon", 0),
        (("$1", "$2"), "The answer is $1,500", None),
        (("1", "2"), "The answer is 1/2", None),
        (("1", "2"), "The answer is 1–5", None),
        (("x", "ray"), "The answer is x-ray", None),
        (("no", "yes"), "The answer is no-one", None),
        (("no", "yes"), "The answer is no - it is not", 0),
        (("no", "yes"), "The answer is no.It is not", 0),
        (("Anna", "Ida"), "The answer is Anna's", None),
        (("Anna", "Ida"), "The answer is Anna’s sister", None),
        (("and", "or"), "The answer is and/or", None),
        (PLANTS, "The answer is A-1", None),
        (PLANTS, "The answer is B'", 1),
    ],
)
def test_the_beginning_of_a_longer_word_or_number_is_no_option(choices, text, index):
    assert parse_answer(text, choices) == index


@pytest.mark.parametrize("text", ["B)", "B:", "b)", "b:", " B) ", "B) BECAUSE: it is green", "So the answer is b)"])
def test_a_letter_with_a_bracket_or_colon(text):
    assert parse_answer(text, PLANTS) == 1


STATES = ("West Virginia", "Virginia", "no")


@pytest.mark.parametrize(
    ("choices", "text", "index"),
    [
        (STATES, "A. Virginia", None),
        (STATES, "A. Virginia.", None),
        (STATES, "A. Virginia BECAUSE: it is farther north", None),
        (STATES, "The answer is A. Virginia", None),
        (STATES, "The answer is A. Virginia.", None),
        (STATES, "The answer is A. virginia. BECAUSE: it is farther north", None),
        (STATES, "The answer is A: Virginia", None),
        (STATES, "The answer is (A) Virginia", None),
        (STATES, "The answer is A, Virginia", None),
        (STATES, "The answer is A - Virginia", None),
        (STATES, "The answer is C. The answer is A. Virginia", None),
        (STATES, "B. So the answer is A. Virginia", None),
        (STATES, "The answer is A. Virginia. Now the answer is B", 1),
        (STATES, "The answer is B. Virginia", 1),
        (STATES, "The answer is A. West Virginia", 0),
        (STATES, "The answer is A. Virginia is farther south", 0),
        (STATES, "The answer is B. No other state is farther north", 1),
        (STATES, "The answer is Virginia (A)", None),
        (STATES, "The answer is Virginia (B)", 1),
        (STATES, "The answer is Virginia (X)", 1),
        (("iron", "magnet"), "The answer is A magnet", None),
        (("iron", "magnet"), "The answer is A magnet.", None),
        (("iron", "magnet"), "The answer is A magnet that pulls", None),
        (("iron", "magnet"), "The answer is A because it is magnetic", 0),
        (("iron", "magnet"), "The answer is A. Magnet that it is, it pulls", 0),
        (("iron", "a magnet"), "The answer is A magnet", 1),
        (("iron", "magnet"), "The answer is B magnet", 1),
        (("-5", "5"), "A. -5", 0),
        (("-5", "5"), "The answer is A. -5", 0),
        (("-5", "5"), "The answer is A -5", 0),
        ((".5", "5"), "(A) .5", 0),
        ((".5", "5"), "The answer is B. .5", None),
        (("?", "."), "The answer is A", 0),
    ],
)
def test_a_letter_and_a_text_that_contradict_each_other(choices, text, index):
    """By one rule, after "answer is" as at the beginning: neither counts."""
    assert parse_answer(text, choices) == index


def test_options_that_differ_in_case_alone():
    """There are hundreds of these in the data set, about capital letters."""
    choices = ("the Nile", "The nile", "THE NILE.")
    assert [parse_answer(choice, choices) for choice in choices] == [0, 1, 2]
    assert parse_answer("the nile", choices) is None
    assert [parse_answer(f"The answer is {choice}", choices) for choice in choices] == [0, 1, 2]
    assert parse_answer("The answer is the nile.", choices) is None


def test_an_option_that_another_begins_with():
    choices = ("oak", "oak tree", "an oak")
    assert [parse_answer(f"I see. The answer is {choice}, yes", choices) for choice in choices] == [0, 1, 2]


def test_options_that_are_letters():
    """On maps with lettered places; the answer form says what the letter is."""
    choices = ("C", "B", "H", "A")
    for text in ("{}", "({})", "{}.", "So the answer is {}.", "{} BECAUSE: see the map"):
        assert parse_answer(text.format("A"), choices) == 0, text
        assert parse_answer(text.format("C"), choices) == 2, text
        if "(" not in text:
            assert parse_answer(text.format("A"), choices, "text") == 3, text
            assert parse_answer(text.format("C"), choices, "text") == 0, text
            assert parse_answer(text.format("H"), choices) == 2, text  # as a letter it is past the last one


def test_options_with_the_characters_of_patterns():
    choices = ("(a+b)*c", "1.5 km", "1x5 km", "$2?")
    assert [parse_answer(f"Well, the answer is {choice}", choices) for choice in choices] == [0, 1, 2, 3]


# Accuracies


def test_accuracies_by_class():
    """TXT and IMG overlap; a question without grade or subject is left out of those classes only."""
    plain = {"hint": "", "image": None}
    problems = [
        problem(pid="1", subject="natural science", grade=6, answer=0),  # hint and image
        problem(pid="2", subject="social science", grade=7, answer=1, image=None),
        problem(pid="3", subject="language science", grade=1, answer=2, **plain),
        problem(pid="4", subject=None, grade=None, answer=0, **plain),
        problem(pid="5", subject="natural science", grade=None, answer=0, hint=""),
    ]
    predicted = {"1": 0, "2": 0, "3": 2, "4": None, "5": 3, "unknown": 1}
    scores = accuracies(problems, predicted)
    assert scores == {
        "avg": 40.0,
        "NAT": 50.0,
        "SOC": 0.0,
        "LAN": 100.0,
        "TXT": 50.0,
        "IMG": 50.0,
        "NO": 50.0,
        "G1-6": 100.0,
        "G7-12": 0.0,
        "n": {"avg": 5, "NAT": 2, "SOC": 1, "LAN": 1, "TXT": 2, "IMG": 2, "NO": 2, "G1-6": 2, "G7-12": 1},
        "unparsed": 2,
        "total": 5,
    }
    assert tuple(scores)[:9] == CLASSES


def test_an_empty_class_is_none_and_nothing_is_rounded():
    problems = [problem(pid=str(n), answer=0, subject=None, grade=12, image=None) for n in range(3)]
    scores = accuracies(problems, {"0": 0, "1": 1, "2": -1})
    assert scores["avg"] == scores["TXT"] == scores["G7-12"] == 100 / 3
    assert [scores[name] for name in ("NAT", "SOC", "LAN", "IMG", "NO", "G1-6")] == [None] * 6
    assert scores["n"]["IMG"] == 0
    assert scores["unparsed"] == 1


def test_a_missing_prediction_is_an_error():
    problems = [problem(pid=str(n)) for n in range(6)]
    with pytest.raises(ValueError, match=r"5 of 6 questions have no prediction, such as pid 0, 1, 3; every question"):
        accuracies(problems, {"2": 0})
    with pytest.raises(ValueError, match=r"1 of 6 .* such as pid 5;"):
        accuracies(problems, dict.fromkeys("01234", 0))


# The real data


@pytest.fixture(scope="module")
def splits():
    return {split: read_problems(Path(DATA) / "scienceqa", split) for split in ("train", "val", "test")}


@pytest.mark.data
@needs_data
def test_the_data_set_is_read_whole(splits):
    assert {split: len(found) for split, found in splits.items()} == {"train": 12236, "val": 180, "test": 4241}
    images = {split: [found.image for found in problems if found.image] for split, problems in splits.items()}
    assert {split: len(found) for split, found in images.items()} == {"train": 5729, "val": 0, "test": 2017}
    assert all(path.is_file() for path in images["test"] + images["train"][::50])
    train, held = held_out(splits["train"])
    assert (len(train), len(held)) == (11036, 1200)
    assert sum(found.image is not None for found in held) == 600


@pytest.mark.data
@needs_data
@pytest.mark.parametrize("answer_form", ["letter", "text"])
def test_every_answer_of_the_data_set_is_understood(splits, answer_form):
    forms = [parse_format(text) for text in ("QCM-ALE", "QCM-LEA")]
    for found in splits["train"][::8] + splits["test"][::4]:
        for index, text in enumerate(choice_texts(found, answer_form)):
            assert parse_answer(text, found.choices, answer_form) == index, (found.pid, text)
        for form in forms:
            response = response_text(found, form, answer_form)
            assert parse_answer(response, found.choices, answer_form) == found.answer, (found.pid, response)
