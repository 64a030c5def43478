"""Conversations and questions one after another, over a service without a model and without a page."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_service import FakeService
from PIL import Image

from app.conversation import (
    GONE,
    Setting,
    Talk,
    Turn,
    View,
    begin_anew,
    judge,
    say,
    say_again,
    say_otherwise,
    take_back,
)
from app.feedback import Feedback
from app.outcome import Side
from app.questions import KEPT, Asked, ask
from app.questions import View as Asking
from app.tasks import Current, Tasks

HOW = {"seed": 5, "temperature": 1.0}
ONE, TWO = [Side("instruct")], [Side("instruct"), Side("none")]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def tasks(service: FakeService, tmp_path: Path) -> Tasks:
    return Tasks(service, feedback=Feedback(tmp_path / "feedback.jsonl"))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(path)
    return str(path)


def setting(sides: list[Side] = ONE, current: Current | None = None) -> Setting:
    return Setting(None, "", sides, HOW, current or Current())


def said(tasks: Tasks, *words: str, sides: list[Side] = ONE) -> Talk:
    """A conversation of these turns, each answered."""
    talk: Talk = ()
    for word in words:
        *_, last = say(tasks, talk, word, setting(sides))
        talk = last.talk
    return talk


def test_no_module_of_them_needs_gradio() -> None:
    code = "import sys, app.conversation, app.questions; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_message_is_answered_and_the_field_is_emptied_once(tasks: Tasks) -> None:
    first, *others = say(tasks, (), " hello ", setting())
    assert (first.field, first.talk[0].user) == ("", "hello")
    assert {view.field for view in others} == {None}
    assert others[-1].outcome.done
    assert others[-1].talk[0].answers[0].text == "chat by instruct 1 seeing nothing hello"


def test_both_sides_hear_their_own_answers(tasks: Tasks, service: FakeService) -> None:
    talk = said(tasks, "one", "two", sides=TWO)
    heard = [[message["content"] for message in job.messages] for job in service.runs[1]]
    assert heard[0] == ["one", "chat by instruct 1 seeing nothing one", "two"]
    assert heard[1] == ["one", "chat by base seeing nothing one", "two"]
    assert [len(turn.answers) for turn in talk] == [2, 2]


def test_nothing_said_is_told_and_changes_nothing(tasks: Tasks, service: FakeService) -> None:
    assert list(say(tasks, (), "  ", setting())) == [View(problem="Please write a message first.")]
    assert service.runs == []


def test_what_could_not_be_said_comes_back(tasks: Tasks, service: FakeService) -> None:
    before = said(tasks, "one")
    service.busy = 1
    *_, last = say(tasks, before, "two\n", setting())
    assert (last.talk, last.field) == (before, "two\n")  # as it was written
    assert last.outcome.error == "Too many people are waiting; try again in about 4 s."


def test_every_retry_is_drawn_with_another_seed(tasks: Tasks, service: FakeService) -> None:
    talk: Talk = (Turn("one"), Turn("two"))
    for _ in range(2):
        *_, last = say_again(tasks, talk, 1, setting())
        talk = last.talk
    assert [turn.user for turn in talk] == ["one", "two"]
    *_, last = say(tasks, talk, "three", setting())
    assert [run[0].settings["seed"] for run in service.runs] == [6, 7, 5]


def test_other_words_take_the_place_of_a_turn_and_of_what_followed(tasks: Tasks) -> None:
    *_, last = say_otherwise(tasks, said(tasks, "one", "two", "three"), 1, "other", setting())
    assert [turn.user for turn in last.talk] == ["one", "other"]


def test_a_turn_taken_back_ends_what_is_written_and_is_in_the_field(tasks: Tasks) -> None:
    before, current = said(tasks, "one"), Current()
    views = say(tasks, before, "two", setting(current=current))
    next(views)
    talk = (*before, Turn("two"))
    assert take_back(talk, 1, current) == View(before, "two", over=True)
    assert list(views) == [View()]  # nothing of it is shown any more
    assert begin_anew(current) == View((), over=True)


def test_turns_that_the_server_does_not_know_are_told(tasks: Tasks, service: FakeService) -> None:
    assert list(say_again(tasks, (), 1, setting())) == [View(problem=GONE)]
    assert take_back((), 1, Current()) == View(problem=GONE, over=True)
    assert judge(tasks, (), 1, 0, "up") == "There is no answer to judge yet."
    assert service.runs == []


def test_a_judgement_is_kept_or_taken_back(tasks: Tasks, tmp_path: Path) -> None:
    talk = said(tasks, "one", sides=TWO)
    assert judge(tasks, talk, 0, 1, "up") == "Thank you, that is kept."
    assert '"adapter": "none"' in tasks.feedback.path.read_text()
    assert judge(tasks, talk, 0, 1, None) == "The judgement was taken back."
    lines = (tmp_path / "feedback.jsonl").read_text().splitlines()
    assert [json.loads(line)["verdict"] for line in lines] == ["up", None]
    assert judge(tasks, (Turn("one"),), 0, 0, "down") == "There is no answer to judge yet."


# Questions about a picture


def asked(
    tasks: Tasks, photo: str | None, question: str, before: tuple[Asked, ...] = (), last: Asked | None = None
) -> list[Asking]:
    return list(ask(tasks, photo, question, [], [Side("caption")], HOW, Current(), before, last))


def test_a_question_goes_to_the_earlier_ones_when_another_is_asked(tasks: Tasks, photo: str) -> None:
    first = asked(tasks, photo, " What? ")
    assert (first[0].field, first[0].earlier) == ("", ())
    assert {(view.field, view.earlier) for view in first[1:]} == {(None, None)}
    latest = first[-1].latest
    assert latest.question == "What?"
    second = asked(tasks, photo, "Who?", (), latest)
    assert second[0].earlier == (latest,)
    assert second[-1].latest.question == "Who?"


def test_a_question_that_was_not_answered_is_not_kept(tasks: Tasks, photo: str) -> None:
    (failed,) = asked(tasks, photo, "  ")
    assert failed.outcome.error == "Please enter a question first."
    assert (failed.field, failed.earlier, failed.latest.outcome) == (None, None, None)
    assert asked(tasks, photo, "Who?", (), failed.latest)[0].earlier == ()


def test_a_question_that_failed_on_the_way_can_be_asked_again(tasks: Tasks, service: FakeService, photo: str) -> None:
    service.broken = True
    views = asked(tasks, photo, "What?")
    assert views[0].field == ""
    assert (views[-1].field, views[-1].outcome.error[:20]) == ("What?", "Something went wrong")


def test_a_question_that_is_overtaken_changes_nothing_more(tasks: Tasks, photo: str) -> None:
    current = Current()
    views = ask(tasks, photo, "What?", [], [Side("caption")], HOW, current)
    next(views)
    current.leave()
    assert list(views) == [Asking()]


def test_so_many_earlier_questions_stay(tasks: Tasks, photo: str) -> None:
    latest = asked(tasks, photo, "What?")[-1].latest
    before = tuple(replace(latest, question=str(number)) for number in range(KEPT))
    kept = asked(tasks, photo, "Who?", before, latest)[0].earlier
    assert (len(kept), kept[0], kept[-1].question) == (KEPT, latest, str(KEPT - 2))
