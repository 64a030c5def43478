"""A service without a model for tests of the server: it says back what it was asked, a word at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from app.job import AdapterInfo, Busy, Failure, Job, Update


class ScriptedService:
    """Answers each job with its last words, in capitals.

    Attributes:
        jobs: All that were asked for.
        runs: One for each request.
        hold: While it is not set, no word after the first of a run is written.
        busy: Seconds of `Busy`, which every request then gets.
        breaks: What is raised after the first word.
        failures: What nobody foresaw.
    """

    def __init__(self) -> None:
        self.adapters = [
            AdapterInfo("caption", "Captions", ("caption", "answer", "chat"), True, None),
            AdapterInfo("instruct", "Instructions", ("chat",), False, None),
            AdapterInfo("none", "The base model", ("chat", "answer"), False, None),
        ]
        self.default = {"caption": "caption", "answer": "caption", "chat": "instruct"}
        self.jobs: list[Job] = []
        self.runs: list[ScriptedRun] = []
        self.hold = threading.Event()
        self.hold.set()
        self.busy: float | None = None
        self.breaks: Exception | None = None
        self.failures: list[Exception] = []

    def run(self, jobs: Sequence[Job]) -> ScriptedRun:
        if self.busy is not None:
            raise Busy(self.busy)
        if any(job.task == "chat" and job.messages[-1]["role"] != "user" for job in jobs):
            raise ValueError("a conversation must end with a message of the user that is not empty")
        self.jobs += jobs
        self.runs.append(ScriptedRun(self, jobs))
        return self.runs[-1]

    def failure(self, error: Exception) -> Failure:
        self.failures.append(error)
        return Failure("f0e1d2")

    def close(self) -> None:
        self.hold.set()


class ScriptedRun:
    def __init__(self, service: ScriptedService, jobs: Sequence[Job]) -> None:
        self.service, self.jobs = service, jobs
        self.cancelled = threading.Event()
        self._updates = self._write()

    def cancel(self) -> None:
        self.cancelled.set()

    def __iter__(self) -> Iterator[Update]:
        return self

    def __next__(self) -> Update:
        return next(self._updates)

    def __enter__(self) -> ScriptedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def _write(self) -> Iterator[Update]:
        yield Update(0, "waiting", "", None, 0, 0, 2, 3.4)
        for index, job in enumerate(self.jobs):
            asked = job.messages[-1]["content"] if job.task == "chat" else job.question or "picture"
            words = asked.upper().split()[: job.settings.get("max_new_tokens", 100)]
            finish = "length" if len(words) < len(asked.split()) else "stop"
            text = ""
            for count, word in enumerate(words, 1):
                text = f"{text} {word}".strip()
                yield Update(index, "writing", text, None, 7, count, 0, 0.0)
                if self.service.breaks is not None:
                    raise self.service.breaks
                while not self.service.hold.wait(0.01):
                    if self.cancelled.is_set():
                        yield Update(index, "done", text, "cancelled", 7, count, 0, 0.1)
                        return
            yield Update(index, "done", text, finish, 7, len(words), 0, 0.1)
