"""The page's tasks, its HTML and its wiring, over a service without a model."""

from __future__ import annotations

import csv
import gc
import io
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from fake_service import FakeService
from PIL import Image

from app.chat_tab import bubbles
from app.conversation import Turn, spoken
from app.feedback import Feedback
from app.job import AdapterInfo, Busy, Failure, Job
from app.outcome import AUTOMATIC, BASE, Answer, FileRow, Files, Outcome, Side
from app.render import files_html, outcome_html, status_text
from app.tasks import AT_ONCE, Current, Tasks
from app.uploads import Limits

GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 30, "seed": 0, "beams": 1}
CAPTION = Side("caption")


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def tasks(service: FakeService) -> Tasks:
    return Tasks(service)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def last(outcomes: Iterator[Any]) -> Any:
    *_, final = outcomes
    return final


def test_a_caption_streams_and_ends(tasks: Tasks, photo: Path) -> None:
    outcomes = list(tasks.caption(photo, [CAPTION], GREEDY))
    texts = [outcome.answers[0].text for outcome in outcomes]
    assert texts[-1] == "caption by caption 1 seeing 40x30"
    assert [outcome.done for outcome in outcomes] == [False] * (len(outcomes) - 1) + [True]
    assert outcomes[0].answers[0].state == "waiting"
    assert len(set(texts)) == 7  # nothing, then a word more each time
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))


def test_two_sides_and_several_captions_are_one_run(tasks: Tasks, service: FakeService, photo: Path) -> None:
    """A comparison has to come from one batch; two runs would also show the second side late."""
    sides = [CAPTION, Side("other", 0.5)]
    final = last(tasks.caption(photo, sides, GREEDY, count=3))
    assert len(service.runs) == 1
    jobs = service.runs[0]
    assert [(job.adapter, job.strength) for job in jobs] == [("caption", 1.0)] * 3 + [("other", 0.5)] * 3
    assert [job.settings["seed"] for job in jobs] == [0, 1, 2] * 2
    assert [job.settings["temperature"] > 0 for job in jobs] == [False, True, True] * 2
    assert final.answers[3].text == "caption by other 0.5 seeing 40x30"
    html = outcome_html(final)
    assert html.count("<article") == 2
    assert html.count('class="words"') == 6


def test_the_base_model_captions_through_an_adapter_without_strength(
    tasks: Tasks, service: FakeService, photo: Path
) -> None:
    final = last(tasks.caption(photo, [Side(BASE, 1.0)], GREEDY))
    (job,) = service.runs[0]
    assert (job.adapter, job.strength) == ("caption", 0.0)
    assert final.answers[0].side.adapter == BASE
    assert "cannot see" in final.answers[0].note
    assert "base model" in outcome_html(final)


def test_a_temperature_switches_beams_off(tasks: Tasks, service: FakeService, photo: Path) -> None:
    """Both sliders can be moved; `Sampling` refuses the two together."""
    last(tasks.caption(photo, [CAPTION], GREEDY | {"beams": 4}))
    last(tasks.caption(photo, [CAPTION], GREEDY | {"beams": 4, "temperature": 0.5}))
    assert [run[0].settings["beams"] for run in service.runs] == [4, 1]


def test_a_model_that_cannot_see_is_asked_without_the_picture(tasks: Tasks, service: FakeService, photo: Path) -> None:
    final = last(tasks.ask(photo, "What?", [CAPTION, Side(BASE)], GREEDY))
    assert [job.image is None for job in service.runs[0]] == [False, True]
    assert [bool(answer.note) for answer in final.answers] == [False, True]


def test_choices_are_scored(tasks: Tasks, photo: Path) -> None:
    final = last(tasks.ask(photo, "Which?", [CAPTION], GREEDY, ["a cat", " ", "a dog"]))
    (answer,) = final.answers
    assert (answer.text, answer.choices) == ("a cat", ("a cat", "a dog"))
    assert (answer.state, answer.finish) == ("done", "stop")
    assert answer.probabilities == pytest.approx((2 / 3, 1 / 3))
    html = outcome_html(final, "Which?")
    assert "67%" in html
    assert "33%" in html
    assert "width:66.7%" in html


def test_choices_wait_and_stop_as_any_run_does(tasks: Tasks, service: FakeService, photo: Path) -> None:
    """Both sides are one run, which says how long it waits, and which Stop and a closed tab end."""
    sides, choices = [CAPTION, Side("other", 0.5)], ["a cat", "a dog"]
    outcomes = list(tasks.ask(photo, "Which?", sides, GREEDY, choices))
    assert [[job.adapter for job in run] for run in service.runs] == [["caption", "other"]]
    assert "Waiting: 2 requests before yours, about 3 s" in outcome_html(outcomes[1])
    assert [answer.text for answer in outcomes[-1].answers] == ["a cat", "a cat"]

    current = Current()
    outcomes = tasks.ask(photo, "Which?", sides, GREEDY, choices, current)
    next(outcomes)
    next(outcomes)
    current.stop()
    stopped = last(outcomes)
    assert [answer.finish for answer in stopped.answers] == ["cancelled", "cancelled"]
    assert "%" not in outcome_html(stopped)
    assert "stopped" in outcome_html(stopped)

    outcomes = tasks.ask(photo, "Which?", sides, GREEDY, choices)
    next(outcomes)
    next(outcomes)
    outcomes.close()
    assert service.made[-1].cancelled.is_set()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tasks, photo: tasks.caption(None, [CAPTION], {}), "Please choose a picture to caption first."),
        (lambda tasks, photo: tasks.caption(photo, [CAPTION], {}, count=9), "from 1 to 5"),
        (lambda tasks, photo: tasks.caption(photo, [Side("nobody")], {}), "no adapter 'nobody'"),
        (lambda tasks, photo: tasks.caption(photo.with_name("gone.png"), [CAPTION], {}), "one.png is not there"),
        (lambda tasks, photo: tasks.ask(photo, "  ", [CAPTION], {}), "Please enter a question first."),
        (lambda tasks, photo: tasks.ask(photo, "x", [CAPTION], {}, ["one"]), "at least two choices"),
    ],
)
def test_bad_input_is_a_sentence(tasks: Tasks, service: FakeService, photo: Path, call: Any, message: str) -> None:
    (outcome,) = call(tasks, photo)
    assert message in outcome.error
    assert outcome.done
    assert outcome.answers == ()
    assert service.runs == []
    assert 'role="alert"' in outcome_html(outcome)


def test_no_file_of_the_server_is_named_in_an_error(tasks: Tasks, tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    (outcome,) = tasks.caption(text, [CAPTION], {})
    assert outcome.error
    assert str(tmp_path) not in outcome.error


def test_too_large_a_picture_is_refused(service: FakeService, photo: Path) -> None:
    (outcome,) = Tasks(service, limits=Limits(max_pixels=100)).caption(photo, [CAPTION], {})
    assert "pixels" in outcome.error
    assert service.runs == []


def test_a_full_queue_and_a_failure_are_shown(tasks: Tasks, service: FakeService, photo: Path) -> None:
    service.busy = 1
    assert last(tasks.caption(photo, [CAPTION], GREEDY)).error == str(Busy(4.0))
    service.broken = True
    assert "ab12cd" in last(tasks.caption(photo, [CAPTION], GREEDY)).error
    assert "ab12cd" in str(Failure("ab12cd"))


def test_what_nobody_foresaw_is_told_by_its_code(
    tasks: Tasks, service: FakeService, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio would say no more than "Error", and the log would not know of it."""

    def breaks(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(service, "run", breaks)
    monkeypatch.setattr(service, "choose", breaks)
    tasks.feedback = breaks  # has no `add`
    final = last(tasks.files([photo], CAPTION, GREEDY))
    said = [
        last(tasks.caption(photo, [CAPTION], GREEDY)).error,
        last(tasks.ask(photo, "Why?", [CAPTION], GREEDY)).error,
        last(tasks.ask(photo, "Why?", [CAPTION], GREEDY, ["a", "b"])).error,
        last(tasks.chat([[]], None, [CAPTION], GREEDY)).error,
        final.note,
        tasks.judge(Answer(CAPTION, Job("answer")), "up"),
    ]
    assert final.finished
    codes = [text for text in said if "Something went wrong (code f0e1d2)" in text]
    assert len(codes) == len(service.failures) == len(said)
    assert "oops" not in "".join(said)


def test_stop_ends_the_run_with_what_is_there(tasks: Tasks, service: FakeService, photo: Path) -> None:
    current = Current()
    outcomes = tasks.caption(photo, [CAPTION], GREEDY, current=current)
    for outcome in outcomes:
        if outcome.answers[0].tokens == 2:
            current.stop()
            break
    final = last(outcomes)
    assert (final.answers[0].text, final.answers[0].finish) == ("caption by", "cancelled")
    assert "stopped" in status_text(final.answers[0])


def test_stop_before_the_run_is_in_the_queue_is_not_forgotten(tasks: Tasks, service: FakeService, photo: Path) -> None:
    current = Current()
    outcomes = tasks.caption(photo, [CAPTION], GREEDY, current=current)
    next(outcomes)
    current.stop()
    final = last(outcomes)
    assert service.made[0].cancelled.is_set()
    assert (final.answers[0].text, final.answers[0].finish) == ("", "cancelled")
    assert (
        last(tasks.caption(photo, [CAPTION], GREEDY, current=current)).answers[0].finish == "stop"
    )  # the next goes on


def test_a_task_from_before_does_not_stop_the_one_after_it(tasks: Tasks, service: FakeService, photo: Path) -> None:
    current = Current()
    first, second = (tasks.caption(photo, [CAPTION], GREEDY, current=current) for _ in range(2))
    next(first)
    next(second)
    next(second)
    assert last(first).answers[0].finish == "cancelled"
    assert last(second).answers[0].finish == "stop"


def test_a_closed_page_frees_its_place(tasks: Tasks, service: FakeService, photo: Path) -> None:
    outcomes = tasks.caption(photo, [CAPTION], GREEDY)
    next(outcomes)
    next(outcomes)
    outcomes.close()
    assert service.made[0].cancelled.is_set()


def test_a_session_has_one_run_at_a_time(tasks: Tasks, service: FakeService, photo: Path) -> None:
    current = Current()
    first, second = (tasks.caption(photo, [CAPTION], GREEDY, current=current) for _ in range(2))
    for outcomes in (first, second):
        next(outcomes)
        next(outcomes)
    assert [run.cancelled.is_set() for run in service.made] == [True, False]


def test_automatic_chat_takes_what_suits(tasks: Tasks, service: FakeService, photo: Path) -> None:
    said = [[{"role": "user", "content": "hello"}]]
    last(tasks.chat(said, None, [Side(AUTOMATIC)], {}))
    last(tasks.chat(said, photo, [Side(AUTOMATIC)], {}))
    assert [run[0].adapter for run in service.runs] == ["none", "caption"]


def test_files(tasks: Tasks, service: FakeService, photo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    states = list(tasks.files([photo] * AT_ONCE + [broken, photo], CAPTION, GREEDY))
    assert [len(run) for run in service.runs] == [AT_ONCE, 1]
    final = states[-1]
    assert (final.done, final.finished) == (AT_ONCE + 2, True)
    assert [state.done for state in states] == sorted(state.done for state in states)
    rows = [json.loads(line) for line in final.as_json_lines().splitlines()]
    assert rows[0] == {"image": "photo.png", "caption": "caption by caption 1 seeing 40x30"}
    assert rows[AT_ONCE].keys() == {"image", "error"}
    assert final.as_csv().splitlines()[1] == "photo.png,caption by caption 1 seeing 40x30,"
    html = files_html(final)
    assert 'download="captions.csv"' in html
    assert 'download="captions.jsonl"' in html
    assert html.count("<tr>") == AT_ONCE + 3


def test_a_batch_says_how_long_it_waits(tasks: Tasks, service: FakeService, photo: Path) -> None:
    service.busy = 1
    states = list(tasks.files([photo], CAPTION, GREEDY))
    notes = [state.note for state in states]
    assert notes[0] == notes[-1] == ""
    assert "Others are served first: about 4 s." in notes  # of the full queue
    assert "Others are served first: about 3 s." in notes  # of its place in it
    assert "about 3 s" in files_html(next(state for state in states if state.note.endswith("3 s.")))


def test_questions_about_one_picture_share_it(tasks: Tasks, service: FakeService, photo: Path) -> None:
    """Decoded once, and no longer in memory than an answer that refers to it."""
    answers = [last(tasks.ask(photo, word, [CAPTION], GREEDY)).answers[0] for word in ("a", "b")]
    assert answers[0].job.image is answers[1].job.image
    other = photo.with_name("other.png")
    Image.new("RGB", (8, 8)).save(other)
    assert last(tasks.caption(other, [CAPTION], GREEDY)).answers[0].job.image.size == (8, 8)
    del answers
    service.runs.clear()
    service.made.clear()
    gc.collect()
    assert [*tasks._pictures] == []


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_of_the_csv_is_no_formula(start: str) -> None:
    """A spreadsheet would run it: `=HYPERLINK(...)` as a file's name, say. JSON lines keep what was written."""
    rows = FileRow(f"{start}1.png", caption=f"{start}2 dogs"), FileRow("a=b.png", error=f"{start}3")
    files = Files(rows, finished=True)
    table = list(csv.reader(io.StringIO(files.as_csv().removeprefix("\ufeff"), newline="")))
    assert table[1:] == [[f"'{start}1.png", f"'{start}2 dogs", ""], ["a=b.png", "", f"'{start}3"]]
    assert json.loads(files.as_json_lines().splitlines()[0]) == {"image": f"{start}1.png", "caption": f"{start}2 dogs"}


def test_a_stopped_batch_keeps_what_is_done(tasks: Tasks, photo: Path) -> None:
    current = Current()
    states = tasks.files([photo] * (AT_ONCE + 1), CAPTION, GREEDY, current)
    for state in states:
        if state.done:
            current.stop()
            break
    final = last(states)
    assert final.finished
    assert 0 < final.done <= AT_ONCE
    assert final.note == "Stopped."
    assert len(final.as_csv().splitlines()) == final.done + 1


def test_stop_between_the_runs_of_a_batch_is_not_forgotten(
    tasks: Tasks, service: FakeService, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While pictures are read there is no run to cancel, and the next one used to begin as if nothing had been said."""
    current, read, count = Current(), tasks._read, itertools.count(1)

    def reads(*what: Any) -> Image.Image:
        if next(count) == AT_ONCE + 2:
            current.stop()
        return read(*what)

    monkeypatch.setattr(tasks, "_read", reads)
    final = last(tasks.files([photo] * (3 * AT_ONCE), CAPTION, GREEDY, current))
    assert final.note == "Stopped."
    assert final.done == AT_ONCE
    assert next(count) == AT_ONCE + 3  # no picture after that was read
    assert len(service.runs) == 1


class Waits(threading.Event):
    """Lets no time pass."""

    waited = 0

    def wait(self, timeout: float | None = None) -> bool:
        Waits.waited += 1
        return self.is_set()


def test_a_batch_waits_for_its_turn(
    tasks: Tasks, service: FakeService, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.tasks.Event", Waits)
    service.busy = 2
    assert last(tasks.files([photo], CAPTION, GREEDY)).done == 1
    assert Waits.waited == 2


def test_stop_ends_the_wait_for_a_turn(tasks: Tasks, service: FakeService, photo: Path) -> None:
    service.busy, current = 1000, Current()
    states = tasks.files([photo], CAPTION, GREEDY, current)
    next(states)
    began = time.monotonic()
    stopping = threading.Timer(0.2, current.stop)
    stopping.start()
    final = last(states)
    stopping.join()
    assert final.note == "Stopped."
    assert time.monotonic() - began < 3  # the wait alone is 4 s
    assert service.busy == 999


def test_no_files_is_said(tasks: Tasks) -> None:
    (state,) = tasks.files([], CAPTION, GREEDY)
    assert state.note == "Please choose some pictures first."
    assert state.finished
    assert 'role="alert"' in files_html(state)


def test_everything_written_is_escaped() -> None:
    job = Job("answer")
    mean = '<img src=x onerror="alert(1)">'
    answer = Answer(Side(mean), job, text=mean, state="done", note=mean)
    chosen = Answer(Side("a"), job, text=mean, state="done", choices=(mean, "b"), probabilities=(0.5, 0.5))
    files = Files((FileRow(mean, caption=mean), FileRow(mean, error=mean)), finished=True, note=mean)
    for html in (
        outcome_html(Outcome((answer, chosen)), mean),
        outcome_html(Outcome(error=mean)),
        files_html(files),
    ):
        assert "<img" not in html
        assert "&lt;img" in html


def test_a_turn_from_before_a_comparison_serves_both_sides() -> None:
    def answer(text: str) -> Answer:
        return Answer(Side("a"), Job("chat"), text=text, state="done")

    talk = (Turn("one", (answer("1"),)), Turn("two", (answer("2a"), answer("2b"))), Turn("three"))
    assert [message["content"] for message in spoken(talk, 0)] == ["one", "1", "two", "2a", "three"]
    assert [message["content"] for message in spoken(talk, 1)] == ["one", "1", "two", "2b", "three"]
    assert spoken(talk, 0, " be brief ")[0] == {"role": "system", "content": "be brief"}
    assert [message["content"] for message in bubbles(talk, 1)] == ["one", "1", "two", "2b", "three", "…"]


def test_feedback_is_kept_without_the_picture(service: FakeService, photo: Path, tmp_path: Path) -> None:
    file = tmp_path / "feedback.jsonl"
    tasks = Tasks(service, feedback=Feedback(file))
    answer = last(tasks.ask(photo, "What?", [CAPTION], GREEDY)).answers[0]
    assert tasks.judge(answer, "up") == "Thank you, that is kept."
    assert tasks.judge(answer, None, " nice ") == "Thank you, your comment is kept."
    up, comment = (json.loads(line) for line in file.read_text().splitlines())
    assert (up["verdict"], up["question"], up["adapter"]) == ("up", "What?", "caption")
    assert (comment["verdict"], comment["comment"]) == (None, "nice")
    assert Tasks(service).judge(answer, "up") == "Feedback is not kept here."


def test_inside_needs_an_adapter(tasks: Tasks, photo: Path) -> None:
    final = last(tasks.caption(photo, [CAPTION, Side(BASE)], GREEDY))
    assert tasks.inside(final.answers[0]).first_layer == 2
    with pytest.raises(ValueError, match="base model alone has no adapter"):
        tasks.inside(final.answers[1])


def test_a_look_inside_that_waits_ends_with_the_next(tasks: Tasks, service: FakeService, photo: Path) -> None:
    """Nobody sees what a closed page looked for, and it would keep the model."""
    answer = last(tasks.caption(photo, [CAPTION], GREEDY)).answers[0]
    found, current, looks = service.inside(answer.job, ""), Current(), []
    service.inside = lambda job, text: looks.append(Future() if not looks else found) or looks[-1]
    said = []

    def look() -> None:
        try:
            tasks.inside(answer, current)
        except ValueError as error:
            said.append(str(error))

    first = threading.Thread(target=look, daemon=True)
    first.start()
    while current._run is None:
        time.sleep(0.01)
    assert tasks.inside(answer, current).first_layer == 2
    first.join(10)
    assert said == ["This look inside was ended; open it again."]
    assert looks[0].cancelled()


@pytest.fixture(scope="module")
def page() -> Any:
    from app.ui import build_page

    return build_page(Tasks(FakeService()))


def test_the_page_is_built_without_a_model(page: Any) -> None:
    endpoints = {
        name: [parameter["parameter_name"] for parameter in info["parameters"]]
        for name, info in page.get_api_info()["named_endpoints"].items()
    }
    assert endpoints == {
        "/caption": ["image", "adapter", "strength", "settings"],
        "/answer": ["image", "question", "choices", "adapter", "strength", "settings"],
        "/chat": ["message", "messages", "image", "adapter", "strength", "settings"],
    }
    assert page.get_api_info()["unnamed_endpoints"] == {}


def test_the_page_says_what_the_qa_adapter_does_not_know(page: Any) -> None:
    from app.ask_tab import LIMITS
    from app.ui import build_page

    service = FakeService()
    service.adapters.append(AdapterInfo("qa", "Questions (qa)", ("answer",), True, None))
    pages = build_page(Tasks(service)), page
    told = [[LIMITS["qa"] in str(getattr(block, "value", "")) for block in one.blocks.values()] for one in pages]
    assert [any(one) for one in told] == [True, False]


def test_values_of_a_wrong_kind_are_refused_by_the_endpoints_in_a_sentence(page: Any, photo: Path) -> None:
    import gradio as gr

    endpoints = {block.api_name: block.fn for block in page.fns.values()}
    with pytest.raises(gr.Error, match="Settings must be an object such as"):
        endpoints["caption"](photo, "caption", 1.0, "x")
    with pytest.raises(gr.Error, match="The choices must be a list"):
        endpoints["answer"](photo, "Which?", "ab", "caption", 1.0, None)
    with pytest.raises(gr.Error, match="The choices must be texts"):
        endpoints["answer"](photo, "Which?", ["a", {"path": "b"}], "caption", 1.0, None)
    with pytest.raises(gr.Error, match="The messages must be a list") as refused:
        next(endpoints["chat"]("Hello", 5, None, AUTOMATIC, 1.0, {}))
    assert not refused.value.print_exception
    answer = endpoints["answer"](photo, "Which?", ["a", "b"], "caption", 1.0, None)
    assert (answer["text"], answer["index"]) == ("a", 0)


def test_what_was_emptied_is_left_to_the_adapter() -> None:
    """The box beside a slider can be cleared."""
    from app.controls import settings, sides

    assert settings(None, None, None, None, None) == {"seed": 0}
    assert settings(0.5, 0.9, 20.0, 3, 1) == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_new_tokens": 20,
        "seed": 3,
        "beams": 1,
    }
    assert sides("caption", None, "other", None) == [Side("caption", 1.0), Side("other", 1.0)]
    assert sides("caption", 0.0, "", 1.0) == [Side("caption", 0.0)]


def test_every_input_has_a_label(page: Any) -> None:
    """A screen reader says the label; a hidden one counts."""
    inputs = ("textbox", "dropdown", "slider", "number", "image", "file", "chatbot", "json")
    blocks = [block for block in page.blocks.values() if block.get_block_name() in inputs]
    assert len(blocks) > 30
    assert [block for block in blocks if not block.label] == []


def test_pictures_from_the_web_are_not_fetched(page: Any) -> None:
    """Gradio fetches a URL that stands where an uploaded file is expected, for any input."""
    import asyncio

    import gradio as gr

    for block in page.blocks.values():
        with pytest.raises(gr.Error, match="not fetched"):
            asyncio.run(block.async_move_resource_to_block_cache("HTTP://127.0.0.1/x.png"))


def test_the_page_names_no_other_host() -> None:
    from app import style

    for text in (style.CSS, style.HEAD, style.theme()._get_theme_css()):
        own = re.sub("xmlns=['\"]http://www.w3.org/2000/svg['\"]", "", text)  # a name, not an address
        assert "http://" not in own
        assert "https://" not in own
        assert "@import" not in own
