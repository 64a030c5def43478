"""A conversation by turns: what is said, said otherwise, said again and taken back. Nothing here knows of Gradio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.outcome import Answer, Outcome, Side
from app.tasks import Current, Tasks, as_a_turn

GONE = "The server was started anew and does not know this conversation any more; please begin a new one."


@dataclass(frozen=True)
class Turn:
    """What the user said and what each side answered; a turn from before a comparison has one answer for both.

    Attributes:
        retries: How often another answer was asked for; each is drawn with a seed of its own.
    """

    user: str
    answers: tuple[Answer, ...] = ()
    retries: int = 0

    def answer(self, side: int) -> Answer | None:
        return self.answers[min(side, len(self.answers) - 1)] if self.answers else None


Talk = tuple[Turn, ...]


@dataclass(frozen=True)
class Setting:
    """What a message is answered with.

    Attributes:
        picture: File of the picture that is talked about.
        system: System prompt.
        sides: Who answers.
        decoding: Fields of `Sampling`, the seed among them.
        current: What the session has running.
    """

    picture: str | None
    system: str
    sides: Sequence[Side]
    decoding: Mapping[str, Any]
    current: Current


@dataclass(frozen=True)
class View:
    """What the page shows next; None leaves a part as it is, and what has been overtaken leaves all of it.

    Attributes:
        talk: The conversation.
        field: What stands where messages are written.
        outcome: How the latest answer is getting on.
        problem: A sentence in place of an answer.
        over: Nothing is being written any more, and there is no outcome.
    """

    talk: Talk | None = None
    field: str | None = None
    outcome: Outcome | None = None
    problem: str = ""
    over: bool = False


def spoken(talk: Talk, side: int, system: str = "") -> list[dict[str, str]]:
    """A conversation as the model gets it, the last turn without its answer if it has none."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in talk:
        messages.append({"role": "user", "content": turn.user})
        answer = turn.answer(side)
        if answer is not None:
            messages.append({"role": "assistant", "content": answer.text})
    return messages


def say(tasks: Tasks, before: Talk, said: str, setting: Setting, retries: int = 0) -> Iterator[View]:
    """Adds a turn and writes its answers; what was said comes back into the field if there can be none."""
    words = said.strip()
    if not words:
        yield View(problem="Please write a message first.")
        return
    asked = [spoken((*before, Turn(words)), side, setting.system) for side in range(len(setting.sides))]
    decoding = {**setting.decoding, "seed": setting.decoding["seed"] + retries}
    outcomes = tasks.chat(asked, setting.picture, setting.sides, decoding, setting.current)
    field: str | None = ""
    for outcome in as_a_turn(outcomes, setting.current):
        if outcome is None:
            yield View()
        elif outcome.error:
            yield View(before, said, outcome)
        else:
            yield View((*before, Turn(words, outcome.answers, retries)), field, outcome)
        field = None  # emptied once: the next message may be in it by now


def say_otherwise(tasks: Tasks, before: Talk, turn: int, said: str, setting: Setting) -> Iterator[View]:
    """Puts other words in the place of a turn and of all after it."""
    yield from say(tasks, before[:turn], said, setting)


def say_again(tasks: Tasks, before: Talk, turn: int, setting: Setting) -> Iterator[View]:
    """Another answer to a turn, drawn with another seed."""
    if turn >= len(before):
        yield View(problem=GONE)
        return
    yield from say(tasks, before[:turn], before[turn].user, setting, before[turn].retries + 1)


def take_back(before: Talk, turn: int, current: Current) -> View:
    """A turn and all after it go; its words are in the field again."""
    current.leave()
    if turn >= len(before):
        return View(problem=GONE, over=True)
    return View(before[:turn], before[turn].user, over=True)


def begin_anew(current: Current) -> View:
    """An empty conversation."""
    current.leave()
    return View((), over=True)


def judge(tasks: Tasks, talk: Talk, turn: int, side: int, verdict: str | None) -> str:
    """Keeps a judgement on an answer, "up", "down", or None where it is taken back; returns a sentence to show."""
    answer = talk[turn].answer(side) if turn < len(talk) else None
    if answer is None:
        return "There is no answer to judge yet."
    return tasks.judge(answer, verdict)
