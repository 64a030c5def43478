"""Questions about a picture, one after another, and what of them stays to be seen. Nothing here knows of Gradio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.outcome import Outcome, Side
from app.tasks import Current, Tasks, as_a_turn

KEPT = 30  # earlier questions that stay on the page


@dataclass(frozen=True)
class Asked:
    """A question and how its answers are getting on; None where there are none."""

    question: str
    outcome: Outcome | None


@dataclass(frozen=True)
class View:
    """What the page shows next; None leaves a part as it is, and what has been overtaken leaves all of it.

    Attributes:
        outcome: Of the latest question.
        latest: That question with what of it is kept once another is asked.
        field: What stands where questions are written.
        earlier: The questions before it, the latest first.
    """

    outcome: Outcome | None = None
    latest: Asked | None = None
    field: str | None = None
    earlier: tuple[Asked, ...] | None = None


def ask(
    tasks: Tasks,
    picture: str | None,
    question: str,
    choices: Sequence[str],
    sides: Sequence[Side],
    decoding: Mapping[str, Any],
    current: Current,
    before: tuple[Asked, ...] = (),
    last: Asked | None = None,
) -> Iterator[View]:
    """Asks, and puts the question before it to the earlier ones.

    Args:
        before: Earlier questions, the latest first.
        last: The one whose answer is shown now.
    """
    taken = False
    asked = question.strip()
    for outcome in as_a_turn(tasks.ask(picture, question, sides, decoding, choices, current), current):
        if outcome is None:
            yield View()
            break
        latest = Asked(asked, None if outcome.error else outcome)
        if outcome.error:
            yield View(outcome, latest, field=question if taken else None)  # to be asked again
        elif taken:
            yield View(outcome, latest)
        else:
            taken = True
            if last is not None and last.outcome is not None and last.outcome.answers:
                before = (last, *before)[:KEPT]
            yield View(outcome, latest, field="", earlier=before)
