"""The page in a real Chromium over a live server with a tiny random model: what visitors do, on a desk and a phone."""

from __future__ import annotations

import base64
import csv
import importlib.util
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_session
from tiny_session import Tiny
from waiting import comes_true

from app.feedback import Feedback
from app.job import Job
from app.render import AS_WRITTEN
from app.server import ServerSettings, build_server, running
from app.service import Service
from app.tasks import Tasks

CHROMIUM = shutil.which("chromium")
PATIENCE = 60_000  # milliseconds: a busy machine is slow
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]


@dataclass
class Site:
    """The live server.

    Attributes:
        pause: Seconds that each token takes besides.
        runs: The jobs of each run.
        wrong: Console errors, exceptions and requests to other hosts since the last test.
    """

    url: str
    tiny: Tiny
    feedback: Path
    pause: list[float] = field(default_factory=lambda: [0.0])
    wrong: list[str] = field(default_factory=list)
    runs: list[list[Job]] = field(default_factory=list)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from app.ui import build_page
    from mmadapter.continuous import RunningBatch

    folder = tmp_path_factory.mktemp("site")
    tiny = tiny_session.build(folder / "tiny")
    service = Service(tiny.load(), [tiny.sees, tiny.tuned, tiny.reads])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        page = build_page(Tasks(service, feedback=Feedback(folder / "feedback.jsonl")))
        with running(build_server(service, page, ServerSettings())) as url:
            site = Site(url, tiny, folder / "feedback.jsonl")
            step = RunningBatch.step

            def slow(batch: RunningBatch) -> Any:
                time.sleep(site.pause[0])
                return step(batch)

            run = service.run
            patch.setattr(RunningBatch, "step", slow)
            patch.setattr(service, "run", lambda jobs: site.runs.append(list(jobs)) or run(jobs))
            yield site
    service.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    arguments += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera, allowed
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


def visit(browser: Any, site: Site, view: dict[str, int], path: str = "") -> Any:
    """A page of its own, at a tab; what goes wrong in it is noted."""
    page = browser.new_context(viewport=view, accept_downloads=True).new_page()
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: site.wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: site.wrong.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((site.url, "data:", "blob:")) else site.wrong.append(request.url)
        ),
    )
    page.goto(site.url + path)
    return page


@pytest.fixture(scope="module")
def desk(browser: Any, site: Site) -> Any:
    page = visit(browser, site, DESK)
    page.wait_for_selector("#caption-go")
    return page


@pytest.fixture(autouse=True)
def nothing_goes_wrong(site: Site) -> Iterator[None]:
    """Errors in the console and requests to another host fail the test they happen in."""
    site.pause[0] = 0.0
    yield
    wrong, site.wrong = list(site.wrong), []
    assert wrong == []


def letters(text: str) -> str:
    """What HTML keeps of a random model's bytes."""
    return "".join(character for character in text if character.isascii() and character.isalnum())


def words(page: Any, place: str) -> str:
    """The text of the finished answer."""
    page.wait_for_selector(f"{place} [aria-busy=false]")
    return letters("".join(page.locator(f"{place} .words").all_text_contents()))


def choose(page: Any, place: str, option: str) -> None:
    """Takes an option of a dropdown."""
    page.locator(f"{place} input").click()
    page.get_by_role("option", name=option).click()
    page.wait_for_function("!document.querySelector('[role=option]')")  # the next list must be the only one


def set_number(page: Any, place: str, value: float) -> None:
    """Sets a slider by its number."""
    page.locator(f"{place} input[type=number]").fill(str(value))
    page.keyboard.press("Tab")


def watch(page: Any, *names: str) -> None:
    """Notes in every frame where the first visible ones of these stand, for `still`."""
    page.evaluate(
        """(names) => {
            const met = window.met = Object.fromEntries(names.map((name) => [name, new Set()]));
            const look = () => {
                for (const name of names) {
                    const one = [...document.querySelectorAll(name)].find((one) => one.offsetParent);
                    const { x, y, width, height } = one.getBoundingClientRect();
                    met[name].add([x + scrollX, y + scrollY, width, height].map(Math.round).join(" "));
                }
                window.watching = requestAnimationFrame(look);
            };
            look();
        }""",
        names,
    )


def still(page: Any) -> bool:
    """Whether nothing that is watched has moved or changed its size."""
    places = page.evaluate(
        """() => {
            cancelAnimationFrame(watching);
            return Object.fromEntries(Object.entries(met).map(([name, places]) => [name, [...places]]));
        }"""
    )
    assert {name: met for name, met in places.items() if len(met) > 1} == {}
    return True


def eventually(check: Callable[[], bool]) -> None:
    assert comes_true(check, PATIENCE / 1000)


def expected(site: Site, adapter: Path, strength: float = 1.0, number: int = 0) -> str:
    session = site.tiny.load(adapter)
    session.strength = strength
    return letters(session.caption(site.tiny.picture(number))[0])


def test_a_picture_gets_its_caption_word_by_word(desk: Any, site: Site) -> None:
    site.pause[0] = 0.05
    desk.locator("#caption-picture input[type=file]").set_input_files(site.tiny.picture(0))
    desk.wait_for_selector("#caption-result .caret")
    desk.wait_for_function("document.querySelector('#caption-result .words').textContent.length > 3")
    early = letters(desk.locator("#caption-result .words").text_content())
    final = words(desk, "#caption-result")
    assert final == expected(site, site.tiny.sees)
    assert len(early) < len(final)
    assert final.startswith(early)


def test_a_picture_is_pasted(browser: Any, site: Site) -> None:
    page = visit(browser, site, DESK)
    page.wait_for_selector("#caption-go")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    data = base64.b64encode(site.tiny.picture(1).read_bytes()).decode()
    page.evaluate(
        """async (data) => {
            const picture = await (await fetch("data:image/png;base64," + data)).blob();
            await navigator.clipboard.write([new ClipboardItem({"image/png": picture})]);
        }""",
        data,
    )
    page.get_by_label("Paste from clipboard").first.click()
    assert words(page, "#caption-result") == expected(site, site.tiny.sees, number=1)
    page.context.close()


def test_the_camera_takes_a_picture(browser: Any, site: Site) -> None:
    page = visit(browser, site, DESK)
    page.wait_for_selector("#caption-go")
    page.get_by_label("Capture from camera").first.click()
    page.locator("#caption-picture").get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#caption-picture video')?.videoWidth > 0")
    page.locator("#caption-picture").get_by_label("capture photo").click()
    assert words(page, "#caption-result")
    page.context.close()


def test_an_answer_is_copied(desk: Any, site: Site) -> None:
    desk.context.grant_permissions(["clipboard-read", "clipboard-write"])
    desk.locator("#caption-result button.copy").click()
    desk.locator("#caption-result button.copy", has_text="Copied").wait_for()
    assert letters(desk.evaluate("navigator.clipboard.readText()")) == expected(site, site.tiny.sees)


def test_stop_stays_where_it_is_while_captions_grow(desk: Any) -> None:
    stop, result = desk.locator("button.stop-now:visible").first, desk.locator("#caption-result")
    desk.get_by_role("button", name="Settings").first.click()
    count = desk.locator("#caption-count input[type=range]")

    def set_to_5() -> bool:
        """A slider that has just come into view may still be given its first value."""
        set_number(desk, "#caption-count", 5)
        time.sleep(0.2)
        return count.input_value() == "5"

    eventually(set_to_5)
    before, height = stop.bounding_box(), result.bounding_box()["height"]
    desk.click("#caption-go")
    desk.wait_for_function("document.querySelectorAll('#caption-result .words').length == 5")
    words(desk, "#caption-result")
    assert result.bounding_box()["height"] > height
    assert stop.bounding_box()["y"] == before["y"]
    set_number(desk, "#caption-count", 1)
    desk.get_by_role("button", name="Settings").first.click()


def test_a_picture_that_goes_takes_its_caption_with_it(browser: Any, site: Site) -> None:
    """What was still on its way would take the place of the hint."""
    page = visit(browser, site, DESK)
    page.wait_for_selector("#caption-go")
    site.pause[0] = 0.1
    page.locator("#caption-picture input[type=file]").set_input_files(site.tiny.picture(0))
    page.wait_for_function("document.querySelector('#caption-result .words')?.textContent.length > 3")
    page.locator("#caption-picture").get_by_label(re.compile("Clear|Remove")).first.click()
    page.get_by_text("Captions appear here").wait_for()
    time.sleep(1)  # several tokens
    assert page.get_by_text("Captions appear here").is_visible()
    assert page.locator("button.stop-now:visible").first.is_disabled()
    page.context.close()


def test_strength_0_gives_the_words_of_the_base(desk: Any, site: Site) -> None:
    set_number(desk, "#caption-strength", 0)
    desk.click("#caption-go")
    base = expected(site, site.tiny.sees, 0.0)
    assert base != expected(site, site.tiny.sees)
    eventually(lambda: words(desk, "#caption-result") == base)
    set_number(desk, "#caption-strength", 1)


def test_another_adapter_and_a_comparison(desk: Any, site: Site) -> None:
    choose(desk, "#caption-adapter", "(tuned)")
    desk.click("#caption-go")
    tuned = expected(site, site.tiny.tuned)
    eventually(lambda: words(desk, "#caption-result") == tuned)
    choose(desk, "#caption-against", "(sees)")
    desk.click("#caption-go")
    desk.wait_for_function("document.querySelectorAll('#caption-result article').length == 2")
    eventually(lambda: words(desk, "#caption-result") == tuned + expected(site, site.tiny.sees))
    left, right = (desk.locator("#caption-result article").nth(place).bounding_box() for place in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    choose(desk, "#caption-against", "Nothing")
    choose(desk, "#caption-adapter", "(sees)")


def test_looking_inside_draws_the_gates(desk: Any) -> None:
    desk.get_by_role("button", name="Look inside").first.click()
    desk.wait_for_selector("svg[role=img]")
    assert desk.locator("svg[role=img]").count() >= 2
    desk.get_by_role("button", name="Look inside").first.click()


def test_thumbs_and_a_comment_are_kept(desk: Any, site: Site) -> None:
    desk.get_by_role("button", name="Good answer").first.click()
    eventually(lambda: site.feedback.exists() and len(site.feedback.read_text().splitlines()) == 1)
    desk.get_by_label("Comment").first.fill("so so")
    desk.keyboard.press("Enter")
    eventually(lambda: len(site.feedback.read_text().splitlines()) == 2)
    up, comment = (json.loads(line) for line in site.feedback.read_text().splitlines())
    assert (up["verdict"], up["task"], comment["comment"]) == ("up", "caption", "so so")


def test_the_chosen_side_of_a_comparison_is_judged(desk: Any, site: Site) -> None:
    choose(desk, "#caption-against", "Base model")
    desk.click("#caption-go")
    desk.wait_for_function("document.querySelectorAll('#caption-result article').length == 2")
    words(desk, "#caption-result")
    choose(desk, ".judged", "2: base model")
    desk.get_by_role("button", name="Bad answer").first.click()
    eventually(lambda: len(site.feedback.read_text().splitlines()) == 3)
    last = json.loads(site.feedback.read_text().splitlines()[-1])
    assert last["verdict"] == "down"
    assert letters(last["text"]) == letters(desk.locator("#caption-result .words").nth(1).text_content())
    choose(desk, "#caption-against", "Nothing")


def test_many_files_become_a_table_and_files(desk: Any, site: Site, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    desk.get_by_role("button", name="Many pictures at once").click()
    desk.locator("#caption-files input[type=file]").set_input_files(
        [*(site.tiny.picture(number) for number in range(3)), broken]
    )
    desk.wait_for_function("document.querySelector('#caption-files').innerText.includes('broken')")
    desk.click("#caption-all")
    desk.wait_for_selector("a[download='captions.csv']")
    assert desk.locator(".files tbody tr").count() == 4
    thumbnails = [picture.bounding_box() for picture in desk.locator(".files img.thumb").all()]
    assert [(box["width"], box["height"]) for box in thumbnails] == [(56, 56)] * 3
    with desk.expect_download() as download:
        desk.click("a[download='captions.csv']")
    path = tmp_path / "captions.csv"
    download.value.save_as(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png", "broken.png"]
    assert letters(rows[1]["caption"]) == expected(site, site.tiny.sees, number=1)
    assert rows[3]["error"]
    assert not rows[3]["caption"]
    with desk.expect_download() as download:
        desk.click("a[download='captions.jsonl']")
    download.value.save_as(tmp_path / "captions.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[:3] == [{"image": row["image"], "caption": row["caption"]} for row in rows[:3]]
    assert lines[3:] == [{"image": "broken.png", "error": rows[3]["error"]}]


def test_a_question_by_keyboard_and_its_choices(desk: Any, site: Site) -> None:
    desk.get_by_role("tab", name="Ask").click()
    desk.wait_for_selector("#ask-go")
    assert desk.url.endswith("?tab=ask")
    desk.locator("#ask-picture input[type=file]").set_input_files(site.tiny.picture(1))
    desk.wait_for_selector("#ask-picture img")
    desk.locator("#ask-question textarea").fill("What is it?")
    desk.keyboard.press("Enter")
    words(desk, "#ask-result")
    assert "What is it?" in desk.locator("#ask-result").inner_text()
    desk.locator("#ask-options button").first.click()
    desk.locator("#ask-choices textarea").fill("a dog\na cat")
    desk.locator("#ask-question textarea").fill("And now?")
    desk.click("#ask-go")
    desk.wait_for_selector("#ask-result .best")
    shares = [int(text.rstrip("%")) for text in desk.locator("#ask-result .line span:last-child").all_text_contents()]
    assert 99 <= sum(shares) <= 101
    assert "What is it?" in desk.locator(".earlier").inner_text()


def test_a_quick_question_is_asked_by_one_click(browser: Any, site: Site) -> None:
    page = visit(browser, site, DESK, "/?tab=ask")
    page.get_by_role("button", name="What color is it?").click()  # of a sample, since there is no picture
    page.locator("#ask-result", has_text="What color is it?").wait_for()
    assert words(page, "#ask-result")
    assert page.locator("#ask-picture img").count() == 1
    page.get_by_role("button", name="Is there a person?").click()
    page.locator("#ask-result", has_text="Is there a person?").wait_for()
    assert words(page, "#ask-result")
    assert "What color is it?" in page.locator(".earlier").inner_text()
    (first,), (second,) = site.runs[-2:]
    assert [job.question for job in (first, second)] == ["What color is it?", "Is there a person?"]
    assert first.image.tobytes() == second.image.tobytes()
    page.context.close()


def test_no_answer_stands_below_another_picture(browser: Any, site: Site) -> None:
    page = visit(browser, site, DESK, "/?tab=ask")
    page.wait_for_selector("#ask-go")
    page.locator("#ask-picture input[type=file]").set_input_files(site.tiny.picture(0))
    page.wait_for_selector("#ask-picture img")
    site.pause[0] = 0.1
    page.locator("#ask-question textarea").fill("What is it?")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#ask-result .words')?.textContent.length > 3")
    page.locator("#tab-ask").get_by_role("button", name="Cat").click()
    page.get_by_text("Answers appear here").wait_for()
    time.sleep(1)  # several tokens
    assert page.get_by_text("Answers appear here").is_visible()
    assert page.locator("button.stop-now:visible").first.is_disabled()
    page.context.close()


def test_stop_ends_a_chat_and_nothing_jumps(desk: Any, site: Site) -> None:
    site.pause[0] = 0.1
    desk.get_by_role("tab", name="Chat").click()
    desk.wait_for_selector("#chat-text")
    before = desk.locator("#chat-text").bounding_box()["y"]
    desk.locator("#chat-text textarea").fill("Tell me about alpacas.")
    desk.keyboard.press("Enter")
    stop = desk.locator("button.stop-now:visible")
    eventually(stop.is_enabled)
    desk.locator("#chat-0 .bot").first.wait_for()
    assert abs(desk.locator("#chat-text").bounding_box()["y"] - before) < 1
    desk.keyboard.press("Escape")  # presses the same Stop
    desk.locator("#chat-status", has_text="stopped").wait_for()
    assert stop.is_disabled()
    assert abs(desk.locator("#chat-text").bounding_box()["y"] - before) < 1


def test_retry_and_undo(desk: Any, site: Site) -> None:
    site.pause[0] = 0.05
    stop = desk.locator("button.stop-now:visible")
    desk.locator("#chat-0 button[aria-label=Retry]").click()
    eventually(stop.is_enabled)
    stop.click()
    eventually(stop.is_disabled)
    desk.locator("#chat-0 button[aria-label=Undo]").click()
    eventually(lambda: desk.locator("#chat-text textarea").input_value() == "Tell me about alpacas.")


def test_undo_while_an_answer_is_written_stays_undone(desk: Any, site: Site) -> None:
    site.pause[0] = 0.05
    desk.locator("#chat-text textarea").press("Enter")
    desk.locator("#chat-0 .bot").first.wait_for()
    stop = desk.locator("button.stop-now:visible")
    eventually(stop.is_enabled)
    desk.locator("#chat-0 button[aria-label=Undo]").click()
    eventually(lambda: desk.locator("#chat-text textarea").input_value() == "Tell me about alpacas.")
    eventually(stop.is_disabled)
    time.sleep(0.5)  # several tokens
    assert desk.locator("#chat-0 .bot").count() == 0
    assert stop.is_disabled()


def test_chat_is_shown_and_copied_as_written_and_edited(desk: Any, site: Site) -> None:
    """And the system prompt stands before all of it."""
    said = "if a < b: `x<y &lt;` <b>bold</b> &lt; ![x](http://host.invalid/a.png)"
    desk.context.grant_permissions(["clipboard-read", "clipboard-write"])
    desk.get_by_label("System prompt").fill("Be brief.")
    desk.locator("#chat-text textarea").fill(said)
    desk.keyboard.press("Enter")
    desk.locator("#tab-chat .thanks", has_text="tokens ·").wait_for()
    assert site.runs[-1][0].messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": said},
    )
    shown = desk.locator("#chat-0 .user").first.inner_text().replace(AS_WRITTEN, "")
    assert "if a < b: x<y &lt; <b>bold</b> &lt; !x" in shown
    assert desk.locator("#chat-0 .user code").first.inner_text().replace(AS_WRITTEN, "") == "x<y &lt;"
    desk.locator("#chat-0").get_by_label("Copy message").first.click()
    eventually(lambda: desk.evaluate("navigator.clipboard.readText()") == said)
    desk.locator("#chat-0").get_by_label("Edit").first.click()
    desk.locator("#chat-0 textarea").first.fill("Say it again.")
    desk.locator("#chat-0").get_by_label("Submit").first.click()
    eventually(lambda: site.runs[-1][0].messages[-1]["content"] == "Say it again.")
    assert len(site.runs[-1][0].messages) == 2
    eventually(desk.locator("button.stop-now:visible").is_disabled)


def test_two_sides_chat_side_by_side(desk: Any, site: Site) -> None:
    desk.get_by_role("button", name="New conversation").click()
    choose(desk, "#chat-against", "(sees)")
    desk.locator("#chat-text textarea").fill("Hello.")
    desk.keyboard.press("Enter")
    desk.locator("#tab-chat .thanks", has_text=re.compile("tokens · .*sees: .*tokens · ")).wait_for()
    assert [job.adapter for job in site.runs[-1]][1:] == ["sees"]
    for side in (0, 1):
        assert letters(desk.locator(f"#chat-{side} .bot").first.inner_text())
    left, right = (desk.locator(f"#chat-{side}").bounding_box() for side in (0, 1))
    assert left["x"] + left["width"] <= right["x"]
    choose(desk, "#chat-against", "Nothing")


@pytest.mark.parametrize("view", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("tab", ["caption", "ask"])
def test_nothing_jumps_while_an_answer_is_written(browser: Any, site: Site, tab: str, view: dict[str, int]) -> None:
    """Neither longer text than fits nor the choice of what is judged moves what is below; the end of a text is seen."""
    page = visit(browser, site, view, f"/?tab={tab}")
    page.wait_for_selector(f"#{tab}-go")
    fixed = [f"#{tab}-result", ".stop-now", ".thumb-up", ".thumbs > :last-child", ".judged"]
    page.add_style_tag(content=".words { font-size: 5rem !important; }")  # longer than fits

    def go() -> None:
        if tab == "ask":
            page.locator("#ask-question textarea").fill("What is it?")
            page.click("#ask-go")
        else:
            page.click("#caption-go")

    watch(page, *fixed, ".model")
    page.locator(f"#{tab}-picture input[type=file]").set_input_files(site.tiny.picture(0))
    page.wait_for_selector(f"#{tab}-picture img")
    if tab == "ask":
        go()
    words(page, f"#{tab}-result")
    card = page.locator(f"#{tab}-result .text")
    assert card.evaluate("(box) => box.scrollHeight > box.clientHeight")
    eventually(lambda: card.evaluate("(box) => box.scrollTop + box.clientHeight >= box.scrollHeight - 1"))
    assert still(page)

    choose(page, "#answer-against" if tab == "ask" else "#caption-against", "(tuned)")
    if view == DESK:  # on a phone the second card stands below the first
        watch(page, *fixed, ".model")
    go()
    page.wait_for_function("(place) => document.querySelectorAll(place).length == 2", arg=f"#{tab}-result article")
    if view == PHONE:
        watch(page, *fixed)
    words(page, f"#{tab}-result")
    eventually(page.locator(".judged input:visible").is_enabled)
    assert still(page)
    page.context.close()


@pytest.mark.parametrize("view", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_jumps_in_the_chat(browser: Any, site: Site, view: dict[str, int]) -> None:
    """Neither a status of two sides and their notes nor an error moves the message box."""
    page = visit(browser, site, view, "/?tab=chat")
    page.wait_for_selector("#chat-text")
    fixed = ["#chat-0", "#chat-text", ".stop-now", ".thumb-up", ".thumbs > :last-child", ".model"]
    site.pause[0] = 0.02
    page.locator("#chat-picture input[type=file]").set_input_files(site.tiny.picture(0))
    page.wait_for_selector("#chat-picture img")
    for against in (None, "Base model"):
        if against is not None:
            choose(page, "#chat-against", against)
            page.locator("#chat-1").wait_for()
        watch(page, *fixed)
        page.click("#chat-send")
        page.locator("#chat-status [role=alert]").wait_for()
        page.locator("#chat-text textarea").fill("Hello.")
        page.click("#chat-send")
        page.locator("#chat-status", has_text="tokens …").wait_for()
        page.keyboard.press("Escape")
        page.wait_for_selector("#chat-status [aria-busy=false]")
        if against is not None:
            page.locator("#chat-status", has_text="cannot see").wait_for()
            eventually(page.locator(".judged input:visible").is_enabled)
        assert still(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= view["width"]
    page.context.close()


def test_a_screen_reader_hears_an_answer_once_when_it_is_written(browser: Any, site: Site) -> None:
    """Not each token, and from an element that stays: one that comes with its text is not always read."""
    page = visit(browser, site, DESK)
    page.wait_for_selector("#aloud", state="attached")
    page.evaluate(
        """() => {
            window.heard = [];
            const live = "[role=status], [role=log]:not([aria-live=off]), [aria-live=polite], [aria-live=assertive]";
            new MutationObserver((records) => records.forEach(({ target, addedNodes }) => {
                const element = target.closest ? target : target.parentElement;
                const come = [...addedNodes].filter((one) => one.matches);
                const within = come.flatMap((one) => [one, ...one.querySelectorAll("*")]);
                for (const region of [element?.closest(live), ...within.filter((one) => one.matches(live))])
                    if (region) heard.push(region.id + ": " + region.innerText);
            })).observe(document.body, { childList: true, characterData: true, subtree: true });
        }"""
    )

    def heard() -> str:
        """What has been heard, if only once, and from that element."""
        eventually(lambda: bool(page.evaluate("heard")))
        texts = page.evaluate("heard.splice(0)")
        assert len(texts) == 1, texts
        (text,) = texts
        assert text.startswith("aloud: ")
        return letters(text)

    site.pause[0] = 0.02
    page.locator("#caption-picture input[type=file]").set_input_files(site.tiny.picture(0))
    caption = words(page, "#caption-result")
    assert letters("aloud: sees") + caption in heard()
    page.get_by_role("button", name="Good answer").first.click()
    assert heard() == letters("aloud: Thank you, that is kept.")

    page.get_by_role("tab", name="Ask").click()
    page.get_by_role("button", name="Is there a person?").click()
    page.locator("#ask-result", has_text="Is there a person?").wait_for()
    answer = words(page, "#ask-result")
    assert letters("aloud: sees") + answer in heard()

    page.get_by_role("tab", name="Chat").click()
    page.locator("#chat-text textarea").fill("Hello.")
    page.keyboard.press("Enter")
    page.locator("#chat-status", has_text="tokens …").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector("#chat-status [aria-busy=false]")
    assert heard().startswith("aloud" + letters(page.locator("#chat-0 .bot .prose").inner_text()))
    page.context.close()


@pytest.mark.parametrize("tab", ["Caption", "Ask", "Chat"])
def test_everything_has_a_name(desk: Any, tab: str) -> None:
    """Buttons, inputs and pictures say what they are to a screen reader."""
    desk.get_by_role("tab", name=tab).click()
    desk.wait_for_selector(f"#tab-{tab.lower()}-button[aria-selected=true]")
    nameless = desk.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, img")].filter((one) => {
            if (!one.offsetParent || one.type === "file" || one.getAttribute("aria-hidden") === "true") return false;
            if (one.tagName === "IMG") return !one.hasAttribute("alt");
            const label = one.closest("label") || document.querySelector(`label[for="${one.id}"]`);
            const name = one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.title;
            return !(name || one.innerText || (label && label.innerText));
        }).map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    assert desk.evaluate("document.documentElement.lang") == "en"


ORDER = {
    "caption": "caption-picture Astronaut caption-go Good Comment caption-adapter caption-strength Settings",
    "ask": "ask-picture Astronaut ask-question What ask-options ask-go Good Comment answer-adapter Look",
    "chat": "chat-0 chat-text chat-send Good Comment chat-picture System chat-new chat-adapter chat-against Look",
}


@pytest.mark.parametrize("tab", ORDER)
def test_the_tab_key_goes_down_the_page(browser: Any, site: Site, tab: str) -> None:
    page = visit(browser, site, DESK, f"/?tab={tab}")
    page.wait_for_selector(f"#tab-{tab}-button[aria-selected=true]")
    page.wait_for_selector(f"#{tab}-{'send' if tab == 'chat' else 'go'}")
    page.evaluate("document.activeElement.blur()")
    met = []
    for _ in range(45):
        page.keyboard.press("Tab")
        met.append(
            page.evaluate(
                """() => {
                    const one = document.activeElement;
                    const block = one.closest("[id^=caption-], [id^=ask-], [id^=answer-], [id^=chat-]");
                    const name = one.ariaLabel || one.labels?.[0]?.innerText || one.innerText;
                    return block ? block.id : name.split(/\\s/)[0];
                }"""
            )
        )
    places = [met.index(name) for name in ("Light", tab.capitalize(), *ORDER[tab].split())]
    assert places == sorted(places), met
    page.context.close()


def test_a_phone_captions_a_picture_stops_and_turns_the_strength(browser: Any, site: Site) -> None:
    page = visit(browser, site, PHONE)
    page.wait_for_selector("#caption-go")
    site.pause[0] = 0.1
    page.locator("#caption-picture input[type=file]").set_input_files(site.tiny.picture(0))
    page.wait_for_function("document.querySelector('#caption-result .words')?.textContent.length > 3")
    stop = page.locator("button.stop-now:visible").first
    assert stop.bounding_box()["height"] >= 36
    stop.click()
    page.locator("#caption-result footer", has_text="stopped").wait_for()
    site.pause[0] = 0.0
    set_number(page, "#caption-strength", 0)
    page.click("#caption-go")
    base = expected(site, site.tiny.sees, 0.0)
    eventually(lambda: words(page, "#caption-result") == base)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.context.close()


@pytest.mark.parametrize("view", [DESK, PHONE], ids=["desk", "phone"])
def test_a_visit_to_all_tabs(browser: Any, site: Site, tmp_path: Path, view: dict[str, int]) -> None:
    """A caption as it is written, another adapter, none, two side by side; many files; a question; a chat."""
    page = visit(browser, site, view)
    page.wait_for_selector("#caption-go")
    site.pause[0] = 0.05
    page.locator("#caption-picture input[type=file]").set_input_files(site.tiny.picture(0))
    page.wait_for_function("document.querySelector('#caption-result .words')?.textContent.length > 3")
    early = letters(page.locator("#caption-result .words").text_content())
    sees, tuned = expected(site, site.tiny.sees), expected(site, site.tiny.tuned)
    assert words(page, "#caption-result") == sees
    assert sees.startswith(early)
    assert len(early) < len(sees)

    site.pause[0] = 0.0
    choose(page, "#caption-adapter", "(tuned)")
    page.click("#caption-go")
    eventually(lambda: words(page, "#caption-result") == tuned)
    choose(page, "#caption-against", "(sees)")
    page.click("#caption-go")
    eventually(lambda: words(page, "#caption-result") == tuned + sees)
    choose(page, "#caption-against", "Nothing")
    set_number(page, "#caption-strength", 0)
    page.click("#caption-go")
    base = expected(site, site.tiny.tuned, 0.0)
    eventually(lambda: words(page, "#caption-result") == base)

    page.get_by_role("button", name="Many pictures at once").click()
    page.locator("#caption-files input[type=file]").set_input_files([site.tiny.picture(0), site.tiny.picture(1)])
    page.wait_for_function("document.querySelectorAll('#caption-files .file').length == 2")
    page.click("#caption-all")
    with page.expect_download() as download:
        page.click("a[download='captions.csv']")
    download.value.save_as(tmp_path / "captions.csv")
    with open(tmp_path / "captions.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0.png", "1.png"]
    assert letters(rows[0]["caption"]) == base

    page.get_by_role("tab", name="Ask").click()
    page.locator("#ask-picture input[type=file]").set_input_files(site.tiny.picture(1))
    page.wait_for_selector("#ask-picture img")
    page.locator("#ask-question textarea").fill("What is it?")
    page.click("#ask-go")
    page.locator("#ask-result", has_text="What is it?").wait_for()
    assert words(page, "#ask-result")

    page.get_by_role("tab", name="Chat").click()
    page.locator("#chat-text textarea").fill("Hello.")
    page.click("#chat-send")
    page.wait_for_selector("#chat-status [aria-busy=false]")
    assert letters(page.locator("#chat-0 .bot").first.inner_text())
    assert page.evaluate("document.documentElement.scrollWidth") <= view["width"]
    page.context.close()


def test_the_arrow_keys_move_a_slider(browser: Any, site: Site) -> None:
    page = visit(browser, site, DESK)
    page.wait_for_selector("#caption-go")
    page.locator("#caption-picture input[type=file]").set_input_files(site.tiny.picture(0))
    words(page, "#caption-result")
    page.locator("#caption-strength input[type=range]").focus()
    for _ in range(20):  # by 0.05 each
        page.keyboard.press("ArrowLeft")
    eventually(lambda: page.locator("#caption-strength input[type=number]").input_value() == "0")
    page.locator("#caption-go").press("Enter")
    base = expected(site, site.tiny.sees, 0.0)
    eventually(lambda: words(page, "#caption-result") == base)
    page.context.close()


def test_stop_of_a_batch_keeps_what_is_done(browser: Any, site: Site, tmp_path: Path) -> None:
    files = [shutil.copy(site.tiny.picture(0), tmp_path / f"{number}.png") for number in range(20)]
    page = visit(browser, site, DESK)
    page.wait_for_selector("#caption-go")
    page.get_by_role("button", name="Many pictures at once").click()
    page.locator("#caption-files input[type=file]").set_input_files(files)
    page.wait_for_function("document.querySelectorAll('#caption-files .file').length == 20")
    site.pause[0] = 0.1
    page.click("#caption-all")
    page.locator(".files .head", has_text=re.compile("^[1-9][0-9]* of 20")).wait_for()
    page.locator("#caption-many .stop-now").click()
    page.locator(".files .head", has_text="Stopped.").wait_for()
    with page.expect_download() as download:
        page.click("a[download='captions.jsonl']")
    download.value.save_as(tmp_path / "captions.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < len(rows) < 20
    assert {letters(row["caption"]) for row in rows} == {expected(site, site.tiny.sees)}
    assert page.locator(".files .head").inner_text().startswith(f"{len(rows)} of 20 done")
    page.context.close()


def test_stop_ends_a_question_with_choices(browser: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits while the model is busy with another's; that one goes on, and can be looked into."""
    from app import worker

    score, begun, go_on = worker.log_likelihoods, threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(PATIENCE / 1000)
        return score(*arguments)

    monkeypatch.setattr(worker, "log_likelihoods", held)
    first, second = (visit(browser, site, DESK, "/?tab=ask") for _ in range(2))
    for page in (first, second):
        page.wait_for_selector("#ask-go")
        page.locator("#ask-picture input[type=file]").set_input_files(site.tiny.picture(1))
        page.wait_for_selector("#ask-picture img")
        page.locator("#ask-options button").first.click()
        page.locator("#ask-choices textarea").fill("a dog\na cat")
        page.locator("#ask-question textarea").fill("Which?")
        page.click("#ask-go")
        page.wait_for_selector("#ask-result [aria-busy=true]")
        assert begun.wait(PATIENCE / 1000)
    stop = second.locator("button.stop-now:visible")
    eventually(stop.is_enabled)
    stop.click()
    go_on.set()
    second.locator("#ask-result footer", has_text="stopped").wait_for()
    eventually(stop.is_disabled)
    assert "%" not in second.locator("#ask-result").inner_text()
    first.wait_for_selector("#ask-result .best")
    first.locator("button:visible", has_text="Look inside").click()
    first.wait_for_selector("#tab-ask svg[role=img]")
    for page in (first, second):
        page.context.close()


def test_a_chat_by_one_click_is_judged_and_looked_into(browser: Any, site: Site) -> None:
    """And then one about a picture."""
    page = visit(browser, site, DESK, "/?tab=chat")
    page.locator("#chat-0 button", has_text="Why is the sky blue?").click()
    page.wait_for_selector("#chat-status [aria-busy=false]")
    (job,) = site.runs[-1]
    assert job.messages == ({"role": "user", "content": "Why is the sky blue?"},)
    page.locator("#chat-0").get_by_label("Like", exact=True).click()
    page.locator("#chat-status", has_text="Thank you").wait_for()
    page.get_by_role("button", name="Bad answer").locator("visible=true").click()
    page.locator(".said:visible", has_text="Thank you").first.wait_for()
    judged = [json.loads(line) for line in site.feedback.read_text().splitlines()[-2:]]
    assert [(one["task"], one["verdict"]) for one in judged] == [("chat", "up"), ("chat", "down")]
    page.locator("button:visible", has_text="Look inside").click()
    page.wait_for_selector("#tab-chat svg[role=img]")

    page.locator("#chat-picture input[type=file]").set_input_files(site.tiny.picture(2))
    page.wait_for_selector("#chat-picture img")
    page.click("#chat-new")
    page.locator("#chat-text textarea").fill("What is it?")
    page.keyboard.press("Enter")
    page.locator("#chat-status", has_text="sees: ").wait_for()
    page.wait_for_selector("#chat-status [aria-busy=false]")
    (job,) = site.runs[-1]
    assert (job.adapter, job.image is None) == ("sees", False)
    assert letters(page.locator("#chat-0 .bot").first.inner_text())
    page.context.close()


@pytest.mark.parametrize("tab", ["caption", "ask", "chat"])
def test_a_phone_sees_a_tab_by_its_link(browser: Any, site: Site, tab: str) -> None:
    page = visit(browser, site, PHONE, f"/?tab={tab}&__theme=dark")
    page.wait_for_selector(f"#{tab}-{'text' if tab == 'chat' else 'go'}")
    page.wait_for_selector(f"#tab-{tab}-button[aria-selected=true]")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    background, text = page.evaluate(
        "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('h1')).color]"
    )
    assert contrast(background, text) > 7
    if tab == "caption":
        page.click("button:has-text('Cat')")
        assert words(page, "#caption-result")
    page.context.close()


def test_the_theme_button_is_remembered(browser: Any, site: Site) -> None:
    page = visit(browser, site, DESK)
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate("document.body.classList.contains('dark')")
    page.reload()
    page.wait_for_function("document.body.classList.contains('dark')")
    page.wait_for_selector("#caption-go")
    primary = page.evaluate(
        "() => { const style = getComputedStyle(document.querySelector('#caption-go')); "
        "return [style.backgroundColor, style.color]; }"
    )
    assert contrast(*primary) >= 4.5
    page.context.close()


# Visible texts, placeholders and icons that can be used: what it is, its colour, what is behind, the least contrast.
COLOURS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const behind = (one) => one ? [...behind(one.parentElement), getComputedStyle(one).backgroundColor] : ["white"];
    const over = (colours) => {  // as they are painted, one over the other
        canvas.clearRect(0, 0, 1, 1);
        colours.forEach((colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); });
        return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)].join(",")})`;
    };
    const met = [];
    const note = (what, one, colour, least) => {
        const under = behind(one);
        met.push([what.slice(0, 60), over([...under, colour]), over(under), least]);
    };
    for (const one of document.querySelectorAll("body *")) {
        if (!one.checkVisibility({ visibilityProperty: true }) || one.closest(":disabled, #aloud")) continue;
        const style = getComputedStyle(one), hint = getComputedStyle(one, "::placeholder");
        if (one.placeholder) note("placeholder " + one.placeholder, one, hint.color, 4.5);
        if (one.matches("input, textarea") && one.value) note("value " + one.value, one, style.color, 4.5);
        if (one.tagName === "svg" && one.closest("button")) {
            const { stroke, fill } = getComputedStyle(one.querySelector("path, polyline, line, rect, circle") || one);
            const button = one.closest("button");
            note("icon of " + (button.ariaLabel || button.innerText), one, stroke === "none" ? fill : stroke, 3);
        }
        const own = [...one.childNodes].filter((node) => node.nodeType === 3 && node.textContent.trim());
        if (own.length && !one.closest("svg, script, style, [aria-hidden=true]")) {
            const large = parseFloat(style.fontSize) >= (style.fontWeight >= 700 ? 18.66 : 24);
            note(own[0].textContent.trim(), one, style.color, large ? 3 : 4.5);
        }
    }
    return met;
}"""


@pytest.mark.parametrize("tab", ["Caption", "Ask", "Chat"])
def test_everything_can_be_read_in_both_themes(desk: Any, tab: str) -> None:
    """Contrasts of WCAG 2 AA, with what the tests above left on the page."""
    desk.get_by_role("tab", name=tab).click()
    desk.wait_for_selector(f"#tab-{tab.lower()}-button[aria-selected=true]")
    closed = desk.locator(f"#tab-{tab.lower()} button.label-wrap:not(.open)")
    closed.evaluate_all("(buttons) => buttons.forEach((button) => button.click())")
    eventually(lambda: closed.count() == 0)
    for theme in ("dark", "light") if desk.evaluate("document.body.matches('.dark')") else ("light", "dark"):
        desk.evaluate("(dark) => document.body.classList.toggle('dark', dark)", theme == "dark")
        time.sleep(0.5)  # colours fade over
        met = desk.evaluate(COLOURS)
        kinds = {what.split()[0] for what, *_ in met}
        assert {"placeholder", "icon", "value", tab} <= kinds
        weak = [(what, *pair, contrast(*pair)) for what, *pair, least in met if contrast(*pair) < least]
        assert not weak, (theme, weak)
    desk.evaluate("document.body.classList.remove('dark')")


def contrast(first: str, second: str) -> float:
    """Of two CSS colours, from 1 to 21 (WCAG 2)."""

    def luminance(colour: str) -> float:
        parts = [int(float(part)) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
