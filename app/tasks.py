"""What the page and its endpoints can do, in plain values: nothing here knows of Gradio.

Every task takes what a person entered, asks the `Service`, and gives what is to be shown, again and again while text is
being written. What goes wrong is part of what is shown, as a sentence.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from threading import Event, Semaphore
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from PIL import Image

from app.feedback import Feedback
from app.outcome import AUTOMATIC, BASE, Answer, FileRow, Files, Outcome, Side
from app.service import AdapterInfo, Busy, Failure, Job, Run, Service
from app.uploads import Limits, read_upload
from mmadapter.image import load_image
from mmadapter.wording import task_sampling

if TYPE_CHECKING:
    from mmadapter.inspection import Inside

DECODED_AT_ONCE = 4  # pictures: a large one takes a hundred megabytes meanwhile
AT_ONCE = 8  # files of a batch that are given to the service together
MOST_FILES = 1000
MOST_CAPTIONS = 5
SLIDERS = ("temperature", "top_p", "max_new_tokens", "seed", "beams")
VARIETY = 0.7  # temperature of the second caption and those after it: the likeliest one is there already
PATIENCE = 120.0  # seconds that a batch of files waits for a place in the queue
EXAMPLES = Path(__file__).resolve().parents[1] / "assets" / "images"


class Current:
    """What one session has running, so that its Stop button can stop it from another thread.

    A task takes one or more runs, and Stop is for all of it: pressed between two runs it ends the next one, too.
    """

    def __init__(self) -> None:
        self._run: Run | Future | None = None
        self._stopped = Event()  # of the latest task
        self.turns = 0  # of what the session shows: an answer that belongs to an earlier one is shown no more

    def begin(self) -> Event:
        """A task begins, and the one before it starts nothing any more; returns what is set when this one is to end."""
        self._stopped.set()
        self._stopped = Event()
        return self._stopped

    def start(self, run: Run | Future, stopped: Event) -> None:
        """A session has one run at a time: a new one stops the one before it.

        Args:
            stopped: Of the task, as `begin` gave it.
        """
        if not stopped.is_set():
            before, self._run = self._run, run
            if before is not None:
                before.cancel()
        if stopped.is_set():  # perhaps just now, when `stop` may not have seen this run
            run.cancel()

    def stop(self) -> None:
        self._stopped.set()
        if self._run is not None:
            self._run.cancel()

    def turn(self) -> int:
        """Begins another turn; returns its number."""
        self.turns += 1
        return self.turns

    def leave(self) -> None:
        """Ends what is running, and what of it is still on its way is shown no more."""
        self.turn()
        self.stop()

    def __deepcopy__(self, memo: dict) -> Current:
        return Current()  # every session gets one of its own


def as_a_turn(outcomes: Iterator[Outcome], current: Current) -> Iterator[Outcome | None]:
    """Begins a turn of the session; its outcomes, and once None in their place when the session has begun another."""
    turn = current.turn()
    for outcome in outcomes:
        if current.turns != turn:
            yield None
            return
        yield outcome


def _told(task: Callable[..., Iterator[Outcome]]) -> Callable[..., Iterator[Outcome]]:
    """A task whose errors are its last outcome."""

    @functools.wraps(task)
    def told(self: Tasks, *args: Any, **options: Any) -> Iterator[Outcome]:
        try:
            yield from task(self, *args, **options)
        except Exception as error:  # noqa: BLE001 - a person reads it, as a code if it says nothing to people
            yield Outcome(error=self.sentence(error))

    return told


class Tasks:
    """The tasks of the page over one service.

    Args:
        limits: Of uploaded pictures; None takes the defaults.
        feedback: Where thumbs and comments are kept; None keeps none.
    """

    def __init__(self, service: Service, *, limits: Limits | None = None, feedback: Feedback | None = None) -> None:
        self.service, self.limits, self.feedback = service, limits or Limits(), feedback
        self._pictures: WeakValueDictionary[str, Image.Image] = WeakValueDictionary()  # as long as an answer has them
        self._decoding = Semaphore(DECODED_AT_ONCE)

    @property
    def adapters(self) -> list[AdapterInfo]:
        return self.service.adapters

    def adapter(self, name: str) -> AdapterInfo:
        """One of the adapters.

        Raises:
            ValueError: There is none of that name.
        """
        for info in self.adapters:
            if info.name == name:
                return info
        raise ValueError(f"there is no adapter {name!r}; there are {', '.join(info.name for info in self.adapters)}")

    def defaults(self, task: str) -> dict[str, Any]:
        """What the sliders of a task start at; of a chat, what its default adapter asks for. One beam streams."""
        about = self.adapter(self.service.default[task]).about if task == "chat" else None
        sampling = task_sampling(about, task, {"beams": 1})
        return {name: getattr(sampling, name) for name in SLIDERS}

    @_told
    def caption(
        self,
        picture: str | Path | None,
        sides: Sequence[Side],
        settings: Mapping[str, Any],
        count: int = 1,
        current: Current | None = None,
    ) -> Iterator[Outcome]:
        """Captions a picture, `count` times by each side, all in one batch."""
        if not 1 <= count <= MOST_CAPTIONS:
            raise ValueError(f"the number of captions must be from 1 to {MOST_CAPTIONS}, got {count}")
        image = self._read(picture, "a picture to caption")
        answers = []
        for side in sides:
            for number in range(count):
                own = dict(settings)
                if number:
                    own |= {"seed": int(own.get("seed") or 0) + number, "beams": 1}
                    own["temperature"] = own.get("temperature") or VARIETY
                answers.append(self._answer("caption", side, own, image))
        yield from self._write(answers, current)

    @_told
    def ask(
        self,
        picture: str | Path | None,
        question: str,
        sides: Sequence[Side],
        settings: Mapping[str, Any],
        choices: Sequence[str] = (),
        current: Current | None = None,
    ) -> Iterator[Outcome]:
        """Answers a question, about a picture or without one; with choices it finds how likely each of them is."""
        choices = tuple(choice.strip() for choice in choices if choice.strip())
        if not question.strip():
            raise ValueError("Please enter a question first.")
        if len(choices) == 1:
            raise ValueError("Please enter at least two choices, one a line, or none.")
        image = None if picture is None else self._read(picture, "")
        answers = [self._answer("answer", side, settings, image, question=question.strip()) for side in sides]
        yield from self._write([dataclasses.replace(answer, choices=choices) for answer in answers], current)

    @_told
    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        picture: str | Path | None,
        sides: Sequence[Side],
        settings: Mapping[str, Any],
        current: Current | None = None,
    ) -> Iterator[Outcome]:
        """Goes on with a conversation, or with one for each side: messages with role and content."""
        image = None if picture is None else self._read(picture, "")
        answers = [
            self._answer("chat", side, settings, image, messages=tuple(conversation))
            for conversation, side in zip(conversations, sides, strict=True)
        ]
        yield from self._write(answers, current)

    def files(
        self,
        paths: Sequence[str | Path],
        side: Side,
        settings: Mapping[str, Any],
        current: Current | None = None,
    ) -> Iterator[Files]:
        """Captions many files, some at a time; a file that cannot be read has its error in its row."""
        current = current or Current()
        stopped = current.begin()
        start = time.monotonic()
        note = ""
        if len(paths) > MOST_FILES:
            note = f"Only the first {MOST_FILES} of {len(paths)} files are done."
        rows = [FileRow(Path(path).name) for path in paths[:MOST_FILES]]

        def shown(finished: bool = False, note: str = note) -> Files:
            return Files(tuple(rows), time.monotonic() - start, finished, note)

        if not rows:
            yield shown(True, "Please choose some pictures first.")
            return
        yield shown()
        waits = ""
        for first in range(0, len(rows), AT_ONCE):
            places, answers = [], []
            for place in range(first, min(first + AT_ONCE, len(rows))):
                if stopped.is_set():
                    break
                try:
                    image = self._read(paths[place], "")
                    answers.append(self._answer("caption", side, settings, image))
                except (ValueError, OSError) as error:
                    rows[place] = dataclasses.replace(rows[place], error=sentence(error))
                else:
                    places.append(place)
                    rows[place] = dataclasses.replace(rows[place], picture=thumbnail(image))
            try:
                for outcome in self._patiently(answers, current, stopped):
                    before = (shown().done, waits)
                    for place, answer in zip(places, outcome.answers, strict=True):
                        rows[place] = _row(rows[place], answer)
                    waits = _waits(outcome)
                    if (shown().done, waits) != before:
                        yield shown(note=waits or note)
            except Exception as error:  # noqa: BLE001 - as of the other tasks
                yield shown(True, self.sentence(error))
                return
            if stopped.is_set():
                yield shown(True, "Stopped.")
                return
        yield shown(True)

    def inside(self, answer: Answer, current: Current | None = None) -> Inside:
        """What the adapter did to an answer.

        Args:
            current: Of nothing but looks: while one waits for its turn, the next one or a closed tab ends it.

        Raises:
            ValueError: It was not the work of an adapter, nothing is written yet, or it was ended.
            Busy, Failure: As of the service.
        """
        if answer.side.adapter == BASE:
            raise ValueError("The base model alone has no adapter to look into; choose an adapter and ask again.")
        current = current or Current()
        stopped = current.begin()
        look = self.service.inside(answer.job, answer.text)
        current.start(look, stopped)
        try:
            return look.result()
        except CancelledError as error:
            raise ValueError("This look inside was ended; open it again.") from error

    def judge(self, answer: Answer, verdict: str | None, comment: str = "") -> str:
        """Keeps what a person thinks of an answer; returns a sentence to show.

        Args:
            verdict: "up" or "down"; None comes with a comment alone, or takes a judgement back.
        """
        if self.feedback is None:
            return "Feedback is not kept here."
        job = answer.job
        try:
            self.feedback.add(
                task=job.task,
                adapter=job.adapter,
                strength=job.strength,
                settings=job.settings,
                question=job.question,
                messages=job.messages,
                text=answer.text,
                verdict=verdict,
                comment=comment.strip(),
                image=job.image,
            )
        except Exception as error:  # noqa: BLE001 - as of the other tasks
            return f"The feedback could not be kept: {self.sentence(error)}"
        if comment.strip():
            return "Thank you, your comment is kept."
        return "Thank you, that is kept." if verdict else "The judgement was taken back."

    def sentence(self, error: Exception) -> str:
        """An error as one line to show: one that is not made for people as a code, under which the log has it."""
        foreseen = isinstance(error, (ValueError, OSError, Busy, Failure))
        return sentence(error if foreseen else self.service.failure(error))

    def _read(self, picture: str | Path | None, what: str) -> Image.Image:
        """A picture, decoded once for all answers that have it; uploads lie under a hash of their content."""
        if picture is None:
            raise ValueError(f"Please choose {what or 'a picture'} first.")
        image = self._pictures.get(str(picture))
        if image is None:
            with self._decoding:
                image = self._pictures[str(picture)] = read_upload(picture, self.limits)
        return image

    def _answer(
        self, task: str, side: Side, settings: Mapping[str, Any], image: Image.Image | None, **asked: Any
    ) -> Answer:
        """An answer that waits to be written."""
        if side.adapter == AUTOMATIC:
            side = dataclasses.replace(side, adapter=self.service.default["chat" if image is None else "answer"])
        info, strength, note = self.adapter(side.adapter), side.strength, ""
        if image is not None and not info.sees:
            note = "The base model cannot see: written without the picture."
            if task == "caption":  # at strength 0 the adapter is the base model, asked in the same words
                info, strength = self.adapter(self.service.default["caption"]), 0.0
            else:
                image, note = (
                    None,
                    note if info.name == BASE else f"{info.name} cannot see: written without the picture.",
                )
        given = {name: value for name, value in settings.items() if value is not None}
        if given.get("temperature"):
            given["beams"] = 1  # a beam search does not sample
        job = Job(task, image=image, adapter=info.name, strength=strength, settings=given, **asked)
        return Answer(side, job, note=note)

    def _write(self, answers: Sequence[Answer], current: Current | None) -> Iterator[Outcome]:
        """Runs the answers together."""
        current = current or Current()
        stopped = current.begin()
        yield Outcome(tuple(answers))
        yield from self._run(answers, current, stopped)

    def _run(self, answers: Sequence[Answer], current: Current, stopped: Event) -> Iterator[Outcome]:
        shown = list(answers)
        jobs, choices = [answer.job for answer in answers], answers[0].choices
        with self.service.choose(jobs, choices) if choices else self.service.run(jobs) as run:
            current.start(run, stopped)
            for update in run:
                fields = dataclasses.asdict(update)
                place = fields.pop("index")
                if update.finish == "cancelled":  # nothing was chosen
                    fields["choices"] = ()
                shown[place] = dataclasses.replace(shown[place], **fields)
                yield Outcome(tuple(shown))

    def _patiently(self, answers: Sequence[Answer], current: Current, stopped: Event) -> Iterator[Outcome]:
        """As `_run`, but waits for a place in the queue, where a person would not."""
        until = time.monotonic() + PATIENCE
        while answers and not stopped.is_set():
            try:
                yield from self._run(answers, current, stopped)
                return
            except Busy as busy:
                if time.monotonic() > until:
                    raise
                yield Outcome(tuple(dataclasses.replace(answer, seconds=busy.seconds) for answer in answers))
                stopped.wait(min(max(busy.seconds, 0.5), 5.0))


def examples() -> list[Path]:
    """The sample pictures of the repository; none where it was installed without them."""
    return sorted(EXAMPLES.glob("*.jpg"))


def thumbnail(image: Image.Image, size: int = 96) -> Image.Image:
    """A small copy."""
    small = load_image(image)
    small.thumbnail((size, size))
    return small


def sentence(error: Exception) -> str:
    """An error as one line to show."""
    if isinstance(error, OSError) and error.strerror:
        return f"The file cannot be read: {error.strerror}."
    text = " ".join(str(error).split()) or type(error).__name__
    return text[0].upper() + text[1:]


def _waits(outcome: Outcome) -> str:
    """What a batch says while none of its captions has begun."""
    if any(answer.state != "waiting" for answer in outcome.answers):
        return ""
    seconds = max(answer.seconds for answer in outcome.answers)
    return f"Others are served first: about {seconds:.0f} s." if seconds >= 1 else ""


def _row(row: FileRow, answer: Answer) -> FileRow:
    if not answer.done:
        return row
    if answer.finish == "cancelled":
        return row
    text = " ".join(answer.text.split())
    return (
        dataclasses.replace(row, caption=text) if text else dataclasses.replace(row, error="The model wrote nothing.")
    )
