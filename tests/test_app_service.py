"""The app's service over a tiny random model: many at once get what each gets alone, and nobody keeps a place."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_session
from PIL import Image
from tiny_session import Tiny
from waiting import comes_true

from app import run as run_module
from app import worker as worker_module
from app.estimate import Pace, waits
from app.job import Busy, Failure, Job, Update
from app.log import Log
from app.run import Run
from app.service import MOST_CHOICES, Service
from mmadapter.inspection import look_inside
from mmadapter.session import Session

SOON = 20.0  # seconds that a test waits before it fails
LONG = {"max_new_tokens": 300, "temperature": 1.0, "seed": 0}
TALK = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
WHY = Job("answer", question="Why?", adapter="none")
ASKED = ({"role": "user", "content": "Why?"},)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tiny: Tiny) -> Session:
    return tiny.load()


@pytest.fixture
def make(tiny: Tiny, base: Session, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Makes services of all three adapters, which are closed in the end; their log is `tmp_path / "log"`."""
    made = []

    def service(**options: int) -> Service:
        adapters = [tiny.sees, tiny.reads, tiny.tuned]
        made.append(Service(base, adapters, log=Log(tmp_path / "log"), **options))
        return made[-1]

    yield service
    for one in made:
        one.close()


@pytest.fixture
def photo(tiny: Tiny) -> Image.Image:
    return Image.open(tiny.picture(0))


def long_job(**changes: object) -> Job:
    """A text that goes on for 300 tokens or until it is cancelled."""
    return Job("chat", **{"messages": ASKED, "adapter": "none", "settings": LONG, **changes})


def last(run: Run) -> dict[int, Update]:
    """The last update of each job."""
    return {update.index: update for update in run}


def texts(run: Run) -> list[str]:
    return [update.text for _, update in sorted(last(run).items())]


def wait_for(condition: Callable[[], bool]) -> None:
    assert comes_true(condition, SOON)


def busy_places(service: Service) -> int:
    return len(service._worker._active)


def log_lines(folder: Path) -> list[dict]:
    """The lines that are whole: the service may be writing the next."""
    whole, _, _ = (folder / "log").read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]


@pytest.fixture
def held(base: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The model stands still until this is set."""
    go, hidden = threading.Event(), base.llama.hidden

    def waits_for_it(*tokens: object, **options: object) -> object:
        assert go.wait(SOON)
        return hidden(*tokens, **options)

    monkeypatch.setattr(base.llama, "hidden", waits_for_it)
    yield go
    go.set()


# What is written


def test_a_run_gives_what_the_library_gives(tiny, make, photo):
    """Rows of several adapters, strengths, images, tasks and settings, side by side in one batch."""
    sees, reads, tuned = (tiny.load(folder) for folder in (tiny.sees, tiny.reads, tiny.tuned))
    hot = {"temperature": 1.2, "top_p": 0.9, "seed": 5}
    jobs = [
        (Job("caption", photo, adapter="sees"), lambda: sees.caption(photo)[0]),
        (Job("caption", photo, adapter="tuned", settings=hot), lambda: tuned.caption(photo, **hot)[0]),
        (Job("caption", photo, adapter="sees", settings={"beams": 3}), lambda: sees.caption(photo, beams=3)[0]),
        (Job("answer", photo, question="why  not ?", adapter="sees"), lambda: sees.answer(photo, "why  not ?")),
        (Job("answer", question="Why?", adapter="reads"), lambda: reads.answer(None, "Why?")),
        (
            Job("chat", messages=TALK, adapter="reads", settings={"max_new_tokens": 40}),
            lambda: reads.chat(TALK, max_new_tokens=40),
        ),
        (
            Job("chat", messages=TALK, adapter="none", settings={"max_new_tokens": 20, "stop": ["a", "e"]}),
            lambda: tiny.load().chat(TALK, max_new_tokens=20, stop=("a", "e")),
        ),
        (
            Job("chat", photo, messages=ASKED, adapter="sees", settings={"max_new_tokens": 30, "seed": None}),
            lambda: sees.chat(ASKED, photo, max_new_tokens=30),
        ),
    ]
    expected = [ask() for _, ask in jobs]
    sees.strength = 0.5
    jobs.append((Job("caption", photo, adapter="sees", strength=0.5), None))
    expected.append(sees.caption(photo)[0])
    assert len(set(expected)) > 6
    assert texts(make(max_batch=9).run([job for job, _ in jobs])) == expected
    # And in two places that they take one after the other:
    assert texts(make(max_batch=2).run([job for job, _ in jobs])) == expected


@pytest.mark.parametrize("adapter", ["sees", "tuned"])
def test_strength_0_gives_the_words_of_the_base(tiny, make, photo, adapter):
    """The base's, asked in the words of the adapter; the adapter's own stand beside them, from one batch."""
    base = tiny.load().caption(photo, examples=[])[0]  # the base, which is asked in the same template
    none, whole = texts(make().run([Job("caption", photo, adapter=adapter, strength=value) for value in (0.0, 1)]))
    assert none == base != whole


def test_jobs_of_a_run_share_a_batch(base, make, photo, monkeypatch):
    shapes, hidden = [], base.llama.hidden
    monkeypatch.setattr(base.llama, "hidden", lambda *t, **o: shapes.append(t[0].shape) or hidden(*t, **o))
    texts(
        make().run([Job("caption", photo, adapter=name, settings={"max_new_tokens": 6}) for name in ("sees", "tuned")])
    )
    assert (2, 1) in shapes
    assert all(shape[0] == 1 for shape in shapes[:2])  # both were read before the first step


def test_updates_tell_a_story(make, photo):
    jobs = [Job("caption", photo, adapter="sees"), long_job(settings={**LONG, "max_new_tokens": 25})]
    updates = list(make().run(jobs))
    for index, job in enumerate(jobs):
        mine = [update for update in updates if update.index == index]
        states = [update.state for update in mine]
        assert states == sorted(states, key=["waiting", "writing", "done"].index)
        assert states.count("done") == 1
        assert [update.finish is not None for update in mine] == [state == "done" for state in states]
        for before, after in itertools.pairwise(mine):
            assert after.text.startswith(before.text)
            assert after.tokens >= before.tokens
        assert len({update.prompt_tokens for update in mine}) == 1
        assert mine[-1].tokens <= job.settings.get("max_new_tokens", 30)
        assert 0 < mine[-1].seconds < SOON
    assert len([update for update in updates if update.index == 1]) > 5
    done = last(make().run(jobs))
    assert (done[1].finish, done[1].tokens) == ("length", 25)


def test_many_people_at_once_get_what_each_gets_alone(make, photo):
    service = make(max_batch=3)
    jobs = [
        Job(
            "answer",
            photo,
            question=f"What is {number}?",
            adapter=("sees", "tuned")[number % 2],
            strength=(1.0, 0.7)[number % 3 == 0],
            settings={"max_new_tokens": 4 + number, "temperature": 1.0, "seed": number, "beams": 1},
        )
        for number in range(10)
    ]
    expected = [texts(service.run([job]))[0] for job in jobs]
    assert len(set(expected)) > 5
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=number: found.update({n: texts(service.run([jobs[n]]))[0]}))
        for number in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert [found[number] for number in range(10)] == expected


# Adapters


def test_the_service_knows_its_adapters(tiny, make, base):
    service = make()
    assert [(info.name, info.sees, info.tasks) for info in service.adapters] == [
        ("sees", True, ("caption", "answer", "chat")),
        ("reads", False, ("chat", "answer")),
        ("tuned", True, ("caption", "answer", "chat")),
        ("none", False, ("chat", "answer")),
    ]
    assert len({info.title for info in service.adapters}) == 4
    assert [info.about and info.about.task for info in service.adapters] == ["caption", "instruct", "caption", None]
    assert service.default == {"caption": "sees", "answer": "sees", "chat": "reads"}
    assert base.about is None  # the session that it was made of stays as it was


def test_without_an_adapter_for_a_task_the_base_is_the_default(tiny, base, tmp_path):
    vision = tiny.load(tiny.sees).about.vision
    qa = tmp_path / "qa"
    tiny_session.write_adapter(qa, tiny_session.llama_config(330), base.fingerprint, "answer", "question", vision)
    defaults = []
    for adapters in ([], [tiny.reads], [qa / "adapter.safetensors"], [tiny.sees, qa]):
        service = Service(base, adapters)
        defaults.append(tuple(service.default[task] for task in ("caption", "answer", "chat")))
        service.close()
    assert defaults == [
        ("none", "none", "none"),
        ("none", "none", "reads"),
        ("qa", "qa", "none"),
        ("sees", "qa", "none"),
    ]


def test_adapters_share_base_encoder_and_features(base, make, photo, monkeypatch):
    service = make()
    sessions = service._sessions
    assert {id(session.llama) for session in sessions.values()} == {id(base.llama)}
    assert sessions["sees"].encoder is sessions["tuned"].encoder
    encoder, passes = sessions["sees"].encoder, []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda pixels: passes.append(len(pixels)) or forward(pixels))
    other = tiny_session.picture(77)
    for name in ("sees", "tuned", "sees"):
        texts(service.run([Job("caption", other, adapter=name, settings={"max_new_tokens": 2})]))
    assert passes == [1]


def test_services_that_cannot_be(tiny, base):
    with pytest.raises(ValueError, match="two adapters would be called 'sees'; rename a folder"):
        Service(base, [tiny.sees, tiny.sees / "adapter.safetensors"])
    with pytest.raises(ValueError, match="max_batch must be at least 1 and max_waiting 0, got 0 and 1"):
        Service(base, [], max_batch=0, max_waiting=1)
    with pytest.raises(FileNotFoundError, match="no adapter 'nowhere'"):
        Service(base, ["nowhere"])


# What cannot be done


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("sing"), "unknown task 'sing'; there are caption, answer, chat"),
        (Job("caption"), "a caption needs an image; choose one"),
        (Job("answer", question=" "), "the question is empty"),
        (Job("chat"), "a conversation must end with a message of the user that is not empty"),
        (Job("chat", messages=({"role": "user"},)), "a message must be "),
        (Job("answer", question="Why?", adapter="x"), "no adapter 'x'; there are sees, reads, tuned, none"),
        (Job("answer", question="Why?", strength=-1), "strength must be a number from 0 to 10, got -1"),
        (Job("answer", question="Why?", strength=float("nan")), "strength must be a number from 0 to 10, got nan"),
        (Job("answer", question="Why?", strength="1"), "strength must be a number from 0 to 10, got '1'"),
        (Job("answer", question="Why?", settings={"colour": 1}), "unknown colour; there are beams"),
        (Job("answer", question="Why?", settings={"top_p": 0}), r"top_p must be in \(0, 1\], got 0"),
        (Job("answer", question="Why?", settings={"temperature": "x"}), "temperature must be a number, got 'x'"),
        (Job("answer", question="Why?", settings={"top_p": True}), "top_p must be a number, got True"),
        (Job("answer", question="Why?", settings={"stop": "x"}), "stop must be a list of texts .* got 'x'"),
        (Job("answer", question="Why?", settings={"seed": 1.5}), "seed must be a whole number from .*, got 1.5"),
        (Job("answer", question="Why?", settings={"beams": 9}), "beams must be at most 8, got 9"),
        (Job("answer", question="Why? " * 200), "the model's context holds 400, the answer included; shorten it"),
    ],
)
def test_bad_jobs_are_refused_at_once_in_one_sentence(make, job, message):
    job = job if job.adapter != "caption" else Job(**{**vars(job), "adapter": "sees"})
    service = make()
    with pytest.raises(ValueError, match=message) as raised:
        service.run([Job("answer", question="Why?", adapter="none"), job])
    assert "\n" not in str(raised.value)
    assert busy_places(service) == 0


@pytest.mark.parametrize(
    ("adapter", "message"), [("none", "the base model alone cannot see"), ("reads", "cannot|without images")]
)
def test_only_an_adapter_that_sees_takes_an_image(make, photo, adapter, message):
    for job in (Job("caption", photo, adapter=adapter), Job("chat", photo, messages=ASKED, adapter=adapter)):
        with pytest.raises(ValueError, match=message):
            make().run([job])


def test_a_run_without_jobs_is_refused(make):
    with pytest.raises(ValueError, match="a run needs at least one job, got none"):
        make().run([])


# The queue


def test_a_full_queue_says_when_to_come_back(make, held):
    service = make(max_batch=1, max_waiting=1)
    first = service.run([long_job()])
    wait_for(lambda: not service._worker._queue)
    second = service.run([long_job()])
    with pytest.raises(Busy, match=r"Too many people are waiting; try again in about \d+ s\.") as raised:
        service.run([long_job()])
    assert 1 <= raised.value.seconds < 100
    with pytest.raises(Busy):
        service.choose([WHY], ["a", "b"])
    first.cancel()
    held.set()
    assert last(second)[0].finish == "length"
    assert last(service.run([long_job(settings={"max_new_tokens": 2})]))[0].tokens == 2


def test_those_who_wait_hear_how_many_are_ahead(make, held):
    service = make(max_batch=1, max_waiting=5)
    first = service.run([long_job()])
    wait_for(lambda: not service._worker._queue)
    second, third = service.run([long_job()]), service.run([long_job(), long_job()])
    heard = [next(second), next(third), next(third)]
    assert [(update.state, update.index, update.ahead) for update in heard] == [
        ("waiting", 0, 0),
        ("waiting", 0, 1),
        ("waiting", 1, 1),
    ]
    assert 0 < heard[0].seconds < heard[1].seconds
    assert heard[0].prompt_tokens > 3
    second.cancel()
    held.set()
    moved = next(third)  # an update that nobody read is replaced by the next: on a slow machine the text has begun
    assert (moved.index, moved.ahead, moved.prompt_tokens) == (0, 0, heard[1].prompt_tokens)
    assert moved.state in ("waiting", "writing")
    assert [update.finish for update in second] == ["cancelled"]
    first.cancel()
    assert {update.finish for update in last(third).values()} == {"length"}


def test_a_long_run_lets_others_through(make):
    """Forty photos of one visitor do not keep the next one waiting for all of them."""
    service = make(max_batch=2)
    many = service.run([long_job(settings={"max_new_tokens": 20, "seed": seed}) for seed in range(12)])
    next(many)
    done = last(service.run([long_job(settings={"max_new_tokens": 5})]))
    assert many._ticket._unfinished > 0
    assert done[0].tokens <= 5
    assert {update.finish for update in last(many).values()} <= {"length", "stop"}


def test_a_cancelled_run_stops_and_frees_its_place(make):
    service = make(max_batch=1)
    run = service.run([long_job()])
    for update in run:
        if update.tokens >= 3:
            run.cancel()
            break
    rest = list(run)
    assert rest[-1].finish == "cancelled"
    assert 3 <= rest[-1].tokens < 300
    assert rest[-1].text.startswith(update.text)
    assert list(run) == []
    assert last(service.run([long_job(settings={"max_new_tokens": 3})]))[0].finish == "length"


def leave_block(run: Run) -> None:
    with run:
        next(run)


def let_go(run: Run) -> None:
    next(run)


@pytest.mark.parametrize("leave", [leave_block, let_go])
def test_a_reader_that_is_gone_frees_its_place(make, leave, held):
    service = make(max_batch=1)
    leave(service.run([long_job(), long_job()]))
    waiting = service.run([long_job(settings={"max_new_tokens": 2})])
    gc.collect()
    began = time.monotonic()
    held.set()
    assert last(waiting)[0].tokens == 2
    cancelled = [line for line in wait_for_runs(service, 2) if "cancelled" in line["finish"]]
    assert [line["finish"] for line in cancelled] == [["cancelled", "cancelled"]]
    assert cancelled[0]["tokens"] < 20
    assert time.monotonic() - began < SOON


def wait_for_runs(service: Service, count: int) -> list[dict]:
    folder = service._worker._log.path.parent
    wait_for(lambda: sum(line["event"] == "run" for line in log_lines(folder)) == count)
    return [line for line in log_lines(folder) if line["event"] == "run"]


def test_a_reader_that_reads_no_more_frees_its_place(make, monkeypatch):
    monkeypatch.setattr(run_module, "UNREAD", 8)
    monkeypatch.setattr(run_module, "PATIENCE", 0.0)
    run = make().run([long_job()])
    wait_for(lambda: run._ticket._unfinished == 0)
    (update,) = run  # the newest one took the place of all before
    assert update.finish == "cancelled"
    assert 6 <= update.tokens < 40


def test_a_slow_reader_misses_nothing(make):
    service = make()
    expected = last(service.run([long_job()]))[0]
    run = service.run([long_job()])
    wait_for(lambda: run._ticket._unfinished == 0)
    (update,) = run
    assert (update.text, update.tokens, update.finish) == (expected.text, expected.tokens, expected.finish)


def test_a_beam_search_can_be_cancelled(base, make):
    service = make()
    run = service.run([long_job(settings={"max_new_tokens": 300, "beams": 3})])
    wait_for(lambda: next(run).state == "writing")
    run.cancel()
    assert list(run)[-1].finish in ("cancelled", "stop")
    assert wait_for_runs(service, 1)[0]["tokens"] < 300


# Choices, and looking inside


@pytest.mark.parametrize("adapter", ["sees", "tuned", "reads", "none"])
def test_choices_are_those_of_the_library(tiny, make, photo, adapter):
    session = tiny.load(None if adapter == "none" else getattr(tiny, adapter))
    session.strength = 0.8
    image = photo if adapter in ("sees", "tuned") else None
    choices = ("a dog", "grass", "the response is a man")
    beams = {"beams": 4}  # the page's slider: there is nothing to search
    job = Job("answer", image, question="What?", adapter=adapter, strength=0.8, settings=beams)
    chosen = last(make().choose([job], choices))[0]
    expected = session.answer(image, "What?", choices)
    assert (chosen.text, chosen.state, chosen.finish) == (expected.text, "done", "stop")
    assert chosen.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_the_sides_of_a_comparison_choose_in_one_pass(tiny, base, make, photo, monkeypatch):
    """Each with its own adapter, strength and prompt, as if it were alone."""
    passes, hidden = [], base.llama.hidden
    sides = [("sees", 1.0, photo), ("tuned", 0.5, photo), ("reads", 1.0, None), ("none", 1.0, None)]
    jobs = [Job("answer", image, question="What?", adapter=name, strength=value) for name, value, image in sides]
    choices = ["a dog", "grass", "the response is a man"]
    service = make()
    alone = [last(service.choose([job], choices))[0] for job in jobs]
    monkeypatch.setattr(base.llama, "hidden", lambda *t, **o: passes.append(len(t[0])) or hidden(*t, **o))
    together = last(service.choose(jobs, choices))
    assert passes == [4, 12]  # the questions, then all their choices
    assert [together[place].text for place in range(4)] == [chosen.text for chosen in alone]
    for place, chosen in enumerate(alone):
        assert together[place].probabilities == pytest.approx(chosen.probabilities, abs=1e-5)
    assert len({chosen.probabilities for chosen in alone}) == 4
    line = wait_for_runs(service, 5)[-1]
    assert (line["finish"], line["tokens"]) == (["stop"] * 4, 0)


def test_choices_wait_their_turn_and_can_be_cancelled(make, held, monkeypatch):
    """They used to be computed for nobody, with no word of how long it would take."""
    service = make(max_batch=1, max_waiting=5)
    first = service.run([long_job()])
    wait_for(lambda: not service._worker._queue)
    gone, kept = service.choose([WHY], ["a", "b"]), service.choose([WHY], ["a", "b"])
    waiting = next(kept)
    assert (waiting.state, waiting.ahead) == ("waiting", 1)
    assert waiting.seconds > 0
    gone.cancel()
    scored, score = [], worker_module.log_likelihoods
    monkeypatch.setattr(worker_module, "log_likelihoods", lambda *asked: scored.append(asked) or score(*asked))
    first.cancel()
    held.set()
    assert last(kept)[0].text in ("a", "b")
    assert [(update.finish, update.probabilities) for update in gone] == [("cancelled", ())]
    assert len(scored) == 1


def test_choices_stopped_while_they_are_scored_choose_nothing(make, monkeypatch):
    service, score, runs = make(), worker_module.log_likelihoods, []

    def stopped(*asked: object) -> list:
        found = score(*asked)
        runs[0].cancel()
        return found

    monkeypatch.setattr(worker_module, "log_likelihoods", stopped)
    begun = threading.Event()
    monkeypatch.setattr(service._worker, "_choose", after(begun, service._worker._choose))
    runs.append(service.choose([WHY], ["a", "b"]))
    begun.set()
    end = last(runs[0])[0]
    assert (end.finish, end.text, end.probabilities) == ("cancelled", "", ())


def after(event: threading.Event, function: Callable) -> Callable:
    """A function that begins when the event is set."""

    def waited(*given: object) -> object:
        assert event.wait(SOON)
        return function(*given)

    return waited


def test_bad_choices_are_refused(make):
    service, limit = make(), MOST_CHOICES
    for choices, message in (
        (["a"], "two or more, got 1"),
        ([], "two or more, got 0"),
        (["a", ""], "texts that are not empty"),
        ("ab", "a list"),
        (["a"] * (limit + 1), f"choices must be at most {limit}, got {limit + 1}"),
        (["a", "b " * 400], "and the model's context holds 400; shorten them"),
    ):
        with pytest.raises(ValueError, match=message):
            service.choose([WHY], choices)
    assert len(last(service.choose([WHY], ["a"] * limit))[0].probabilities) == limit


@pytest.mark.parametrize("adapter", ["sees", "reads"])
def test_looking_inside_looks_at_the_text_as_it_was_written(tiny, make, photo, adapter):
    """The separator of the template belongs to the answer, and the strength to the gates."""
    session = tiny.load(getattr(tiny, adapter))
    image = photo if adapter == "sees" else None
    job = Job("answer", image, question="Why?", adapter=adapter, strength=0.6)
    found = make().inside(job, "a red dog").result(SOON)
    separator = " " if adapter == "sees" else ""
    expected = look_inside(
        session,
        session.prepare("answer", question="Why?").tokens,
        session.tokenizer.encode(f"{separator}a red dog", bos=False),
        None if image is None else session.features([image]),
        0.6,
    )
    assert found == expected
    assert sum(found.prompt_share) > 0


def test_the_base_has_nothing_inside(make):
    with pytest.raises(ValueError, match="the base model alone has no gates"):
        make().inside(Job("answer", question="Why?", adapter="none"), "a dog").result(SOON)


def test_a_look_inside_that_nobody_waits_for_is_not_taken(make, held, monkeypatch):
    service = make(max_batch=1)
    first = service.run([long_job()])
    wait_for(lambda: not service._worker._queue)
    looks, taken = [service.inside(WHY, "a dog") for _ in range(2)], []
    monkeypatch.setattr("app.service.wording.written_tokens", lambda *asked: taken.append(asked) or 1 / 0)
    assert looks[0].cancel()
    first.cancel()
    held.set()
    with pytest.raises(Failure):
        looks[1].result(SOON)
    assert len(taken) == 1
    assert last(service.run([long_job(settings={"max_new_tokens": 2})]))[0].tokens == 2


# Failures


def test_what_breaks_has_a_code_that_stands_in_the_log(base, make, tmp_path, monkeypatch):
    service, hidden, broken = make(), base.llama.hidden, threading.Event()

    def breaks(*tokens: object, **options: object) -> object:
        if broken.is_set():
            raise RuntimeError("out of memory")
        return hidden(*tokens, **options)

    monkeypatch.setattr(base.llama, "hidden", breaks)
    runs = [service.run([long_job()]) for _ in range(2)]
    wait_for(lambda: all(next(run).tokens > 2 for run in runs))
    broken.set()
    codes = []
    for run in runs:
        with pytest.raises(Failure, match=r"^Something went wrong \(code [0-9a-f]{6}\); try again, or look") as raised:
            list(run)
        codes.append(raised.value.code)
        assert list(run) == []  # it is over
    with pytest.raises(Failure) as raised:  # while it is being read, not while a token is written
        list(service.run([long_job()]))
    with pytest.raises(Failure) as chosen:
        list(service.choose([WHY], ["a", "b"]))
    broken.clear()
    assert last(service.run([long_job(settings={"max_new_tokens": 4})]))[0].tokens == 4
    logged = {line["code"]: line for line in log_lines(tmp_path) if line["level"] == "error"}
    assert {*codes, raised.value.code, chosen.value.code} == {*logged}
    assert codes[0] == codes[1]
    for line in logged.values():
        assert line["error"] == "RuntimeError"
        assert "RuntimeError: out of memory" in line["traceback"]
        assert "in breaks" in line["traceback"]


def test_a_run_that_breaks_leaves_others_alone(make, photo, monkeypatch):
    service = make()
    run = service.run([long_job()])
    monkeypatch.setattr(service._sessions["sees"], "prompts", lambda images: 1 / 0)
    with pytest.raises(Failure):
        list(service.run([long_job(), Job("caption", photo, adapter="sees")]))
    assert last(run)[0].finish == "length"
    assert busy_places(service) == 0


def test_closing_ends_everything(make, held):
    service = make(max_batch=1)
    runs = [service.run([long_job(), long_job()]), service.run([long_job()])]
    next(runs[0])
    runs.append(service.choose([WHY], ["a", "b"]))
    looks = [service.inside(WHY, "a dog") for _ in range(2)]
    looks[0].cancel()
    closing = threading.Thread(target=service.close)
    closing.start()
    wait_for(lambda: service._worker._closed)
    held.set()
    closing.join(SOON)
    assert not closing.is_alive()
    assert [{update.finish for update in last(run).values()} for run in runs] == [{"cancelled"}] * 3
    with pytest.raises(Failure):
        looks[1].result(SOON)
    with pytest.raises(Failure):
        service.run([long_job()])
    service.close()  # again: nothing happens


# The log


def test_the_log_counts_and_quotes_nobody(make, photo, tmp_path):
    service = make()
    (text,) = texts(service.run([Job("answer", photo, question="Is zebra 77 here?", adapter="sees")]))
    (line,) = wait_for_runs(service, 1)
    assert line["tasks"] == ["answer"]
    assert line["adapters"] == ["sees"]
    assert line["finish"] in (["length"], ["stop"])
    assert line["tokens"] > 0
    assert line["prompt_tokens"] > 5
    assert 0 < line["seconds"] < SOON
    assert "zebra" not in (tmp_path / "log").read_text()
    assert text not in (tmp_path / "log").read_text()


def test_lines_of_many_threads_stay_whole(tmp_path, capsys):
    log = Log(tmp_path / "log")
    threads = [
        threading.Thread(target=lambda: [log.write("note", text="x" * 5000) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line["text"] for line in log_lines(tmp_path)] == ["x" * 5000] * 80
    Log().write("note")
    Log().write("note", level="error", place=tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["place"] == str(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        Log(tmp_path / "nowhere" / "log")


def test_what_nobody_foresaw_has_a_code(make, tmp_path):
    failure = make().failure(KeyError("oops"))
    (line,) = log_lines(tmp_path)
    assert (line["code"], line["error"], line["level"]) == (failure.code, "KeyError", "error")


FULL = Path("/dev/full")  # a disk without room


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_neither_the_log_nor_the_model(base, capsys):
    """The model's thread writes the log, and would have ended for everybody."""
    log = Log(FULL)
    code = log.failure(RuntimeError("out of memory"))
    log.write("note")
    told, error = capsys.readouterr().err.splitlines()
    assert told == f"the log {FULL} cannot be written: No space left on device; errors are written here meanwhile"
    assert json.loads(error)["code"] == code
    service = Service(base, [], log=log, max_batch=1, max_waiting=0)
    for _ in range(2):
        assert last(service.run([long_job(settings={"max_new_tokens": 2})]))[0].finish == "length"
    assert service._worker._thread.is_alive()
    service.close()


# Estimates


def test_waits_are_those_of_a_queue():
    assert waits([], [[5.0]], 2) == [0]
    assert waits([3.0], [[5.0]], 2) == [0]
    assert waits([3.0, 4.0], [[5.0], [1.0], [1.0]], 2) == [3, 4, 5]
    assert waits([3.0, 4.0], [[5.0, 1.0], [1.0]], 2) == [4, 5]  # two start together
    assert waits([], [[2.0] * 6, [1.0]], 2) == [0, 6]  # of six, two at a time
    assert waits([1.0, 2.0, 9.0], [[1.0]], 2) == [2]  # more than there are places for


def test_the_pace_follows_what_is_measured():
    pace = Pace()
    assert pace.remaining("chat", 10) == pytest.approx(0.5)
    for _ in range(200):
        pace.step(0.2)
        pace.text("chat", 40)
    assert pace.remaining("chat", 256) == pytest.approx(8, rel=0.01)
    assert pace.remaining("chat", 256, 30) == pytest.approx(2, rel=0.01)
    assert pace.remaining("chat", 256, 100) == pytest.approx(0.2)  # one more, at least
    assert pace.remaining("caption", 8) == pytest.approx(1.6)
