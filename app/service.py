"""The model behind the app: one thread that owns it, a queue, and one running batch for everybody."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from app.job import AdapterInfo, Busy, Failure, Job, Update
from app.log import Log
from app.run import Run, Ticket
from app.worker import Call, Row, Worker, Writing
from mmadapter import wording
from mmadapter.checkpoint import FILE_NAME, AdapterFile
from mmadapter.image import load_image, to_square
from mmadapter.sampling import row_limits
from mmadapter.session import Session

if TYPE_CHECKING:
    from mmadapter.inspection import Inside

__all__ = ["AdapterInfo", "Busy", "Failure", "Job", "Run", "Service", "Update"]

MOST_STRENGTH = 10.0
TITLES = {
    "caption": "Photo captions",
    "answer": "Questions about photos",
    "instruct": "Instructions",
    "scienceqa": "Science questions",
}
MOST_BEAMS = 8  # each is a text of its own to the model, and a search holds its thread until it ends
MOST_CHOICES = 50
NUMBERS = ("temperature", "top_p", "repetition_penalty", "length_penalty")


class Service:
    """Runs jobs for many people at once; every method may be called from any thread.

    Attributes:
        adapters: The default first, the base ("none") last.
        default: The adapter that a task takes where nobody chose one: task -> name.
    """

    def __init__(
        self,
        session: Session,
        adapters: Sequence[str | os.PathLike],
        *,
        max_batch: int = 8,
        max_waiting: int = 32,
        log: Log | None = None,
    ) -> None:
        """Loads the adapters and starts the model's thread.

        Args:
            session: Its base is used; the session itself stays as it is.
            adapters: Names, folders or files (`checkpoint.find_adapter`); jobs name a folder or file by its last part.
            max_batch: Texts that are written at a time.
            max_waiting: Runs that may wait for a place.
            log: Where runs and failures are noted; None notes failures on standard error.

        Raises:
            FileNotFoundError: There is no such adapter.
            ValueError: An adapter does not fit the base, two have one name, or a number is out of range.
        """
        if max_batch < 1 or max_waiting < 0:
            raise ValueError(f"max_batch must be at least 1 and max_waiting 0, got {max_batch} and {max_waiting}")
        self._sessions: dict[str, Session] = {}
        for adapter in adapters:
            name = _name(adapter)
            if name in self._sessions or name == "none":
                raise ValueError(f"two adapters would be called {name!r}; rename a folder")
            self._sessions[name] = session.with_adapter(adapter)
        self._sessions["none"] = session.with_adapter(None)
        self.adapters = [_info(name, loaded.about) for name, loaded in self._sessions.items()]
        self.default = _defaults(self.adapters)
        self._log = log or Log()
        self._worker = Worker(session.llama, session.tokenizer, max_batch, max_waiting, self._log)

    def run(self, jobs: Sequence[Job]) -> Run:
        """Puts jobs in the queue; those of one run are written side by side where they fit into a batch.

        Raises:
            ValueError: A job cannot be done, in one sentence that says why.
            Busy: The queue is full.
            Failure: The service is closed.
        """
        return self._submit(self._rows(jobs))

    def choose(self, jobs: Sequence[Job], choices: Sequence[str]) -> Run:
        """As `run`, but the answer to each job's question is the likeliest of some choices; the jobs are scored in one
        pass where they fit into a batch.

        Raises:
            ValueError, Busy, Failure: As `run`; there are not two choices or too many, or one is empty.
        """
        if len(choices) > MOST_CHOICES:
            raise ValueError(f"choices must be at most {MOST_CHOICES}, got {len(choices)}")
        rows = self._rows([replace(job, task="answer") for job in jobs])
        for row in rows:
            row.tokens, row.endings = wording.choice_tokens(
                row.session.tokenizer, row.session.about, row.job.question, choices
            )
            row.choices = tuple(choices)
        longest = max(len(row.tokens) for row in rows) + max(len(ending) for row in rows for ending in row.endings)
        context = rows[0].session.llama.config.context
        if longest > context:
            raise ValueError(
                f"question and choice have {longest} tokens and the model's context holds {context}; shorten them"
            )
        return self._submit(rows)

    def inside(self, job: Job, text: str) -> Future[Inside]:
        """What the adapter did to a text that it wrote (`mmadapter.inspection`), for when its turn has come; before
        that it can be cancelled.

        Raises:
            ValueError, Busy, Failure: As `run`. Waiting for the result raises them, too: the job is for the base, or
                the text is too long.
        """
        row, future = self._row(0, job, {}), Future()
        self._worker.submit(Call(partial(_look_inside, row, text), future, row))
        return future

    def failure(self, error: Exception) -> Failure:
        """What people are told of an error that nobody foresaw; the log has its traceback under the same code."""
        return Failure(self._log.failure(error))

    def close(self) -> None:
        """Cancels everything and ends the model's thread."""
        self._worker.close()

    def _submit(self, rows: list[Row]) -> Run:
        ticket = Ticket(len(rows))
        self._worker.submit(Writing(ticket, rows))
        return Run(ticket)

    def _rows(self, jobs: Sequence[Job]) -> list[Row]:
        if not jobs:
            raise ValueError("a run needs at least one job, got none")
        squares: dict[tuple, Image.Image] = {}
        return [self._row(index, job, squares) for index, job in enumerate(jobs)]

    def _row(self, index: int, job: Job, squares: dict[tuple, Image.Image]) -> Row:
        """A job as tokens and settings; all that can be wrong with it is told here, in the caller's thread.

        Args:
            squares: Images of this run that are made small already.
        """
        if job.adapter not in self._sessions:
            raise ValueError(f"no adapter {job.adapter!r}; there are {', '.join(self._sessions)}")
        session = self._sessions[job.adapter]
        if (
            not isinstance(job.strength, int | float)
            or not isfinite(job.strength)
            or not 0 <= job.strength <= MOST_STRENGTH
        ):
            raise ValueError(f"strength must be a number from 0 to {MOST_STRENGTH:g}, got {job.strength!r}")
        tokens, sampling = session.prepare(
            job.task, _settings(job.settings), question=job.question, messages=job.messages
        )
        if sampling.beams > MOST_BEAMS:
            raise ValueError(f"beams must be at most {MOST_BEAMS}, got {sampling.beams}")
        (limit,) = row_limits(session.llama, [tokens], sampling)
        square = None
        if job.task == "caption" and job.image is None:
            raise ValueError("a caption needs an image; choose one")
        if job.image is not None:
            encoder = session.encoder  # an error where the adapter does not see
            key = (id(job.image), encoder.image_size, encoder.config.resize)
            if key not in squares:  # small, since it may wait for long beside many others
                squares[key] = to_square(load_image(job.image), encoder.image_size, encoder.config.resize)
            square = squares[key]
        return Row(index, job, session, square, tokens, sampling, limit)


def _look_inside(row: Row, text: str) -> Inside:
    from mmadapter.inspection import look_inside

    session = row.session
    answer = wording.written_tokens(session.tokenizer, session.about, row.job.task, text)
    features = None if row.square is None else session.features([row.square])
    return look_inside(session, row.tokens, answer, features, row.job.strength)


def _name(adapter: str | os.PathLike) -> str:
    """How jobs name an adapter: the last part of its path, without what every adapter file is called."""
    path = Path(adapter)
    path = path.parent if path.name == FILE_NAME else path
    return path.stem if path.suffix in (".safetensors", ".pth", ".pt", ".bin") else path.name


def _info(name: str, about: AdapterFile | None) -> AdapterInfo:
    if about is None:
        return AdapterInfo(name, "Base model, no adapter", ("chat", "answer"), False, None)
    sees = about.vision is not None
    own = {
        "caption": ("caption", "answer", "chat"),
        "answer": ("answer", "chat"),
        "instruct": ("chat", "answer"),
        "scienceqa": ("answer",),
    }.get(about.task, ("chat", "answer", "caption"))
    tasks = tuple(task for task in own if sees or task != "caption")
    return AdapterInfo(name, f"{TITLES.get(about.task, 'Adapter')} ({name})", tasks, sees, about)


def _defaults(adapters: Sequence[AdapterInfo]) -> dict[str, str]:
    def first(*wishes: tuple[str, bool]) -> str:
        """The first adapter of the first wish, (task it was trained for, whether it sees), that there is one for."""
        for task, sees in wishes:
            for info in adapters:
                if info.about is not None and info.sees == sees and task in (info.about.task, "any"):
                    return info.name
        return "none"

    return {
        "caption": first(("caption", True), ("any", True)),
        "answer": first(("answer", True), ("caption", True), ("any", True)),
        "chat": first(("instruct", False)),
    }


def _settings(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings as `Sampling` takes them, from what a page or a request may send.

    Raises:
        ValueError: A value is of another kind.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name in NUMBERS:
        if isinstance(given.get(name, 0), bool) or not isinstance(given.get(name, 0), int | float):
            raise ValueError(f"{name} must be a number, got {given[name]!r}")
    if "stop" in given:
        if not isinstance(given["stop"], list | tuple):
            raise ValueError(f"stop must be a list of texts that are not empty, got {given['stop']!r}")
        given["stop"] = tuple(given["stop"])
    return given
