"""A service without a model: it says which adapter, strength and task it was asked with, word by word."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

from app.job import AdapterInfo, Busy, Failure, Job, Update
from mmadapter.inspection import Inside

ADAPTERS = [
    AdapterInfo("caption", "Photo captions (caption)", ("caption", "answer", "chat"), True, None),
    AdapterInfo("other", "Adapter (other)", ("caption", "answer", "chat"), True, None),
    AdapterInfo("instruct", "Instructions (instruct)", ("chat",), False, None),
    AdapterInfo("none", "Base model, no adapter", ("chat", "answer"), False, None),
]


class FakeRun:
    """Updates of some jobs, a word at a time in turn; with shares all words are those of the first choice."""

    def __init__(self, jobs: Sequence[Job], texts: Sequence[str], pause: float, shares: Sequence[float] = ()) -> None:
        self.jobs, self.texts, self.pause = jobs, texts, pause
        self.cancelled = threading.Event()
        self._updates = self._choose(tuple(shares)) if shares else self._write()

    def _write(self) -> Iterator[Update]:
        for index in range(len(self.jobs)):
            yield Update(index, "waiting", "", None, 0, 0, 2, 3.0)
        words = [text.split() for text in self.texts]
        said = [0] * len(words)
        finished: set[int] = set()
        while len(finished) < len(words):
            for index, own in enumerate(words):
                if index in finished:
                    continue
                self.cancelled.wait(self.pause)
                if self.cancelled.is_set() or said[index] == len(own):
                    finished.add(index)
                    finish = "cancelled" if self.cancelled.is_set() else "stop"
                    yield Update(index, "done", " ".join(own[: said[index]]), finish, 7, said[index], 0, 0.5)
                else:
                    said[index] += 1
                    yield Update(index, "writing", " ".join(own[: said[index]]), None, 7, said[index], 0, 0.2)

    def _choose(self, shares: tuple[float, ...]) -> Iterator[Update]:
        for index, text in enumerate(self.texts):
            waiting = Update(index, "waiting", "", None, 0, 0, 2, 3.0)
            yield waiting
            self.cancelled.wait(self.pause)
            if self.cancelled.is_set():
                yield replace(waiting, state="done", finish="cancelled", ahead=0)
            else:
                yield replace(waiting, state="done", text=text, finish="stop", ahead=0, probabilities=shares)

    def __iter__(self) -> FakeRun:
        return self

    def __next__(self) -> Update:
        return next(self._updates)

    def cancel(self) -> None:
        self.cancelled.set()

    def __enter__(self) -> FakeRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class FakeService:
    """As `app.service.Service`.

    Attributes:
        runs: The jobs of each run.
        busy: How many more runs are refused.
        broken: Whether runs fail.
        failures: What nobody foresaw.
    """

    def __init__(self, pause: float = 0.0, words: int = 0) -> None:
        self.adapters = list(ADAPTERS)
        self.default = {"caption": "caption", "answer": "caption", "chat": "none"}
        self.pause, self.words = pause, words
        self.runs: list[list[Job]] = []
        self.made: list[FakeRun] = []
        self.busy, self.broken = 0, False
        self.failures: list[Exception] = []

    def text(self, job: Job) -> str:
        asked = job.question or (job.messages[-1]["content"] if job.messages else "")
        seen = f"{job.image.width}x{job.image.height}" if job.image is not None else "nothing"
        strength = "base" if job.strength == 0 or job.adapter == "none" else f"{job.adapter} {job.strength:g}"
        return " ".join([f"{job.task} by {strength} seeing {seen}", asked, *["word"] * self.words]).strip()

    def run(self, jobs: Sequence[Job]) -> FakeRun:
        if self.busy:
            self.busy -= 1
            raise Busy(4.0)
        if self.broken:
            raise Failure("ab12cd")
        self.runs.append(list(jobs))
        self.made.append(FakeRun(jobs, [self.text(job) for job in jobs], self.pause))
        return self.made[-1]

    def choose(self, jobs: Sequence[Job], choices: Sequence[str]) -> FakeRun:
        self.runs.append(list(jobs))
        shares = [2.0 ** -(1 + place) for place in range(len(choices))]
        shares = [share / sum(shares) for share in shares]
        self.made.append(FakeRun(jobs, [choices[0]] * len(jobs), self.pause, shares))
        return self.made[-1]

    def inside(self, job: Job, text: str) -> Future[Inside]:
        if self.broken:
            raise Failure("ab12cd")
        gates = [[0.1 * (layer - head) for head in range(4)] for layer in range(3)]
        look: Future[Inside] = Future()
        look.set_result(Inside(gates, 2, [0.0, 0.0, 0.2, 0.3, 0.5], {"stage 2": 0.25, "final": 0.75}, job.strength))
        return look

    def failure(self, error: Exception) -> Failure:
        self.failures.append(error)
        return Failure("f0e1d2")

    def close(self) -> None:
        pass
