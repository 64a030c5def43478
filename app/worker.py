"""The thread that owns the model: it lets runs into the running batch and writes a token of every text a step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from PIL import Image

from app.estimate import Pace, waits
from app.job import Busy, Failure, Job, Update
from app.log import Log
from app.run import Ticket
from mmadapter.adapter import Prompts, stack_prompts
from mmadapter.choices import log_likelihoods
from mmadapter.continuous import RunningBatch
from mmadapter.generate import generate
from mmadapter.llama import Llama
from mmadapter.sampling import Sampling
from mmadapter.session import Session
from mmadapter.tokenizer import Tokenizer
from mmadapter.wording import tidy

NEWS = 0.5  # seconds after which those who wait hear a new estimate


@dataclass(eq=False)
class Row:
    """A job, ready for the model.

    Attributes:
        session: With the job's adapter in use; its strength is the model thread's to set.
        square: The image as the encoder takes it.
        limit: Most tokens it can write.
        choices: Texts that it has to choose from; none where it writes.
        endings: The tokens of each choice.
        probabilities: Of each choice, once they are found.
        text: Written so far, as it came.
        count: Its tokens.
        finish: How it ended, None until then.
    """

    index: int
    job: Job
    session: Session
    square: Image.Image | None
    tokens: list[int]
    sampling: Sampling
    limit: int
    choices: tuple[str, ...] = ()
    endings: list[list[int]] = field(default_factory=list)
    probabilities: tuple[float, ...] = ()
    text: str = ""
    count: int = 0
    finish: str | None = None

    def update(self, ticket: Ticket, state: str, finish: str | None = None) -> Update:
        text = self.text if self.choices else tidy(self.job.task, self.text)
        counts = (len(self.tokens), self.count)
        return Update(self.index, state, text, finish, *counts, 0, ticket.seconds(), self.probabilities)


@dataclass(eq=False)
class Writing:
    """A run in the queue; `started` of its rows are in the model or done."""

    ticket: Ticket
    rows: list[Row]
    started: int = 0
    told: tuple[int, float] | None = None  # how many are ahead, and the estimate

    @property
    def waiting(self) -> list[Row]:
        return self.rows[self.started :]

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.ticket.cancelled.is_set() or self.ticket.abandoned()


@dataclass(eq=False)
class Call:
    """A function in the queue that needs the model for itself; `row` says for how long, about."""

    function: Callable[[], object]
    future: Future
    row: Row

    @property
    def waiting(self) -> list[Row]:
        return [self.row]

    @property
    def gone(self) -> bool:
        return self.future.cancelled()


class Worker:
    """See the module.

    Args:
        max_batch: Texts that are written at a time.
        max_waiting: Runs and calls that may wait for a place.
    """

    def __init__(self, llama: Llama, tokenizer: Tokenizer, max_batch: int, max_waiting: int, log: Log) -> None:
        self._llama, self._tokenizer, self._log = llama, tokenizer, log
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._batch = RunningBatch(llama, tokenizer)
        self._active: dict[int, tuple[Writing, Row]] = {}  # by their number in the batch
        self._starting: list[Row] = []  # on their way there, or in a call
        self._pace = Pace()
        self._changed = threading.Condition()  # guards the queue, what is active and what is starting
        self._queue: deque[Writing | Call] = deque()
        self._closed = False
        self._next_news = 0.0  # on the monotonic clock
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, item: Writing | Call) -> None:
        """Puts a run or a call at the end of the queue.

        Raises:
            Busy: The queue is full.
            Failure: The worker is closed.
        """
        with self._changed:
            if self._closed:
                raise Failure(self._log.failure(RuntimeError("the service is closed")))
            free = max(self._max_batch - len(self._busy()), 0)
            seconds = self._estimates([*self._queue, item])
            if len(self._queue) >= self._max_waiting + free:
                self._log.write("busy", waiting=len(self._queue), seconds=round(seconds[0], 1))
                raise Busy(max(seconds[0], 1.0))
            if isinstance(item, Writing):
                _tell(item, len(self._queue), seconds[-1])
            self._queue.append(item)
            self._changed.notify_all()

    def close(self) -> None:
        """Cancels all there is and waits for the thread's end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._admit()
                self._tell_news()
                self._step()
        except Exception as error:  # noqa: BLE001 - nobody above would hear of it
            self._log.failure(error, "model thread")
        finally:  # nobody may wait for a thread that has ended
            self._end()

    def _end(self) -> None:
        with self._changed:
            self._closed = True
            queue = [*self._queue]
            self._queue.clear()
        for writing, row in [*self._active.values()]:
            self._finish(writing, row, "cancelled")
        for item in queue:
            if isinstance(item, Writing):
                self._give_up(item)
            elif item.future.set_running_or_notify_cancel():
                item.future.set_exception(Failure(self._log.failure(RuntimeError("the service is closed"))))

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False at the end."""
        with self._changed:
            while not (self._queue or self._active or self._closed):
                self._changed.wait()
            return not self._closed

    def _drop_cancelled(self) -> None:
        for number, (writing, row) in [*self._active.items()]:
            if writing.gone:
                step = self._batch.cancel(number)
                row.text += step.text
                self._leave(number)
                self._finish(writing, row, "cancelled")
        with self._changed:
            gone = [item for item in self._queue if item.gone]
            for item in gone:
                self._queue.remove(item)
        for item in gone:
            if isinstance(item, Writing):
                self._give_up(item)

    def _admit(self) -> None:
        """Lets in what there is room for, in the order of the queue."""
        while (admitted := self._next()) is not None:
            item, rows = admitted
            long = self._answer(item) if isinstance(item, Call) else self._enter(item, rows)
            with self._changed:
                self._starting = []
            if long:
                return  # those in the batch get a token before the next long one

    def _next(self) -> tuple[Writing | Call, list[Row]] | None:
        """Takes the first of the queue, with as many of its rows as there is room for. The rows of a run start together
        where a batch holds them; of a longer one the rest goes back to the end of the queue."""
        with self._changed:
            if not self._queue:
                return None
            item = self._queue[0]
            if isinstance(item, Call):
                self._starting = [item.row]
                return self._queue.popleft(), []
            free = self._max_batch - len(self._active)
            if free < (1 if item.started else min(len(item.rows), self._max_batch)):
                return None
            self._queue.popleft()
            rows = item.waiting[:free]
            item.started += len(rows)
            if item.waiting:
                self._queue.append(item)
            self._starting = rows
            return item, rows

    def _answer(self, call: Call) -> bool:
        """Makes a call, which may take long: True, unless it was cancelled."""
        if not call.future.set_running_or_notify_cancel():
            return False
        try:
            call.future.set_result(call.function())
        except ValueError as error:
            call.future.set_exception(error)
        except Exception as error:  # noqa: BLE001 - the other people's texts go on
            call.future.set_exception(Failure(self._log.failure(error, task=call.row.job.task)))
        return True

    def _enter(self, writing: Writing, rows: Sequence[Row]) -> bool:
        """Starts rows; those that choose or search by beams are done at once, which may take long: whether there were
        any."""
        known: dict[tuple, Prompts | None] = {}
        chosen: list[tuple[Row, Prompts | None]] = []
        searched: list[tuple[Row, Prompts | None]] = []
        try:
            for row in rows:
                # The same object for all rows that it is the same for: a batch then keeps it once.
                key = (id(row.session), row.job.strength, id(row.square))
                if key not in known:
                    row.session.strength = row.job.strength
                    known[key] = row.session.prompts([row.square])
                writing.ticket.push(row.update(writing.ticket, "writing"))
                if row.choices:
                    chosen.append((row, known[key]))
                    continue
                if row.sampling.beams > 1:
                    searched.append((row, known[key]))
                    continue
                number = self._batch.add(row.tokens, row.sampling, known[key])
                with self._changed:
                    self._active[number] = (writing, row)
            if chosen:
                self._choose(writing, chosen)
            while searched:
                sampling = searched[0][0].sampling
                self._search(writing, sampling, [pair for pair in searched if pair[0].sampling == sampling])
                searched = [pair for pair in searched if pair[0].sampling != sampling]
        except Exception as error:  # noqa: BLE001 - the other people's texts go on
            self._fail([writing], error)
        return any(row.choices or row.sampling.beams > 1 for row in rows)

    def _choose(self, writing: Writing, pairs: Sequence[tuple[Row, Prompts | None]]) -> None:
        """Finds the likeliest choice of each row, by its mean log-probability a token, all in one pass; none is chosen
        where the run was stopped meanwhile."""
        rows = [row for row, _ in pairs]
        prompts = stack_prompts([prompts for _, prompts in pairs])
        found = log_likelihoods(self._llama, [row.tokens for row in rows], [row.endings for row in rows], prompts)
        for row, scores in zip(rows, found, strict=True):
            if writing.ticket.cancelled.is_set():
                self._finish(writing, row, "cancelled")
                continue
            means = scores.mean()
            row.text, row.probabilities = row.choices[int(means.argmax())], tuple(means.softmax(0).tolist())
            self._finish(writing, row, "stop")

    def _search(self, writing: Writing, sampling: Sampling, pairs: Sequence[tuple[Row, Prompts | None]]) -> None:
        """Writes rows of one setting by beam search."""
        found = generate(
            self._llama,
            self._tokenizer,
            [row.tokens for row, _ in pairs],
            sampling,
            stack_prompts([prompts for _, prompts in pairs]),
            writing.ticket.cancelled,
        )
        for (row, _), answer in zip(pairs, found, strict=True):
            row.text, row.count = answer.text, len(answer.tokens)
            self._finish(writing, row, answer.finish)

    def _step(self) -> None:
        """Writes a token of every row in the batch."""
        if not self._active:
            return
        began = time.monotonic()
        try:
            steps = self._batch.step()
        except Exception as error:  # noqa: BLE001 - the app goes on with a new batch
            writings = {id(writing): writing for writing, _ in self._active.values()}
            self._batch = RunningBatch(self._llama, self._tokenizer)
            self._fail([*writings.values()], error)
            return
        self._pace.step(time.monotonic() - began)
        for step in steps:
            writing, row = self._active[step.row]
            row.text, row.count = row.text + step.text, step.tokens
            if step.finish is None:
                writing.ticket.push(row.update(writing.ticket, "writing"))
            else:
                self._leave(step.row)
                self._pace.text(row.job.task, row.count)
                self._finish(writing, row, step.finish)

    def _leave(self, number: int) -> None:
        with self._changed:
            del self._active[number]

    def _finish(self, writing: Writing, row: Row, finish: str) -> None:
        row.finish = finish
        writing.ticket.push(row.update(writing.ticket, "done", finish))
        if all(row.finish is not None for row in writing.rows):
            self._log.write("run", **_record(writing))

    def _give_up(self, writing: Writing) -> None:
        """Ends what was still waiting of a run."""
        for row in writing.waiting:
            self._finish(writing, row, "cancelled")

    def _fail(self, writings: Sequence[Writing], error: Exception) -> None:
        """Ends runs by an error; the log has its traceback under the code that the readers get."""
        code = self._log.failure(error, runs=len(writings))
        for number, (writing, _) in [*self._active.items()]:
            if writing in writings:
                self._batch.cancel(number)
                self._leave(number)
        with self._changed:
            self._queue = deque(item for item in self._queue if item not in writings)
        for writing in writings:
            writing.ticket.fail(Failure(code))

    def _tell_news(self) -> None:
        """Tells those who wait how many are before them, and for how long."""
        if time.monotonic() < self._next_news:
            return
        self._next_news = time.monotonic() + NEWS
        with self._changed:
            for ahead, (item, seconds) in enumerate(zip(self._queue, self._estimates(self._queue), strict=True)):
                if isinstance(item, Writing) and item.told != (ahead, round(seconds)):
                    _tell(item, ahead, seconds)

    def _estimates(self, items: Sequence[Writing | Call]) -> list[float]:
        """Seconds until each of `items`, a queue, starts."""
        busy = [self._remaining(row) for row in self._busy()]
        return waits(busy, [[self._remaining(row) for row in item.waiting] for item in items], self._max_batch)

    def _busy(self) -> list[Row]:
        """The rows that have a place."""
        active = [row for _, row in self._active.values()]
        return active + [row for row in self._starting if row not in active]

    def _remaining(self, row: Row) -> float:
        return self._pace.remaining(row.job.task, row.limit, row.count)


def _tell(writing: Writing, ahead: int, seconds: float) -> None:
    writing.told = (ahead, round(seconds))
    for row in writing.waiting:
        writing.ticket.push(replace(row.update(writing.ticket, "waiting"), ahead=ahead, seconds=seconds))


def _record(writing: Writing) -> dict[str, object]:
    """What the log keeps of a run: no word of what was asked or written."""
    rows = writing.rows
    return {
        "tasks": sorted({row.job.task for row in rows}),
        "adapters": sorted({row.job.adapter for row in rows}),
        "finish": [row.finish for row in rows],
        "prompt_tokens": sum(len(row.tokens) for row in rows),
        "tokens": sum(row.count for row in rows),
        "seconds": round(writing.ticket.seconds(), 3),
    }
