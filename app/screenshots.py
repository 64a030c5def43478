"""Takes the pictures of the page that the README shows, with the real default model."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapter.options import Parser, add_model_options, load_session, main_with_errors

if TYPE_CHECKING:
    from playwright.sync_api import Page

DESCRIPTION = """\
python -m app.screenshots --out assets/screenshots

Starts the app with the default model, uses it in a headless Chromium, and writes caption.png, compare.png, inside.png,
batch.png, ask.png, chat.png, chat-compare.png and phone.png. Needs playwright and a chromium.
"""
IMAGES = Path(__file__).resolve().parents[1] / "assets" / "images"
DESK, PHONE = (1180, 800), (390, 844)
PATIENCE = 300_000  # milliseconds


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        prog="python -m app.screenshots", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--chromium", metavar="FILE", default=shutil.which("chromium"), help="default: %(default)s")
    add_model_options(parser)
    args = parser.parse_args(argv)
    return main_with_errors(lambda: run(args), args.debug)


def run(args: argparse.Namespace) -> int:
    if args.chromium is None or not Path(args.chromium).is_file():
        raise FileNotFoundError(f"no chromium at {args.chromium}; install it or name one with --chromium")
    args.out.mkdir(parents=True, exist_ok=True)
    with serving(args) as url:
        take(url, args.out, args.chromium)
    return 0


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[str]:
    """The app at an address of its own."""
    from app.cli import offered_adapters
    from app.feedback import Feedback
    from app.log import Log
    from app.server import ServerSettings, build_server, running
    from app.service import Service

    wanted, args.adapter = args.adapter, "none"
    session = load_session(args)
    with tempfile.TemporaryDirectory(prefix="mmadapter-screenshots-") as folder:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)  # read when Gradio is imported
        from app.tasks import Tasks
        from app.ui import build_page

        service = Service(session, offered_adapters(session, wanted), log=Log(Path(folder) / "log.jsonl"))
        page = build_page(Tasks(service, feedback=Feedback(Path(folder) / "feedback.jsonl")))
        try:
            with running(build_server(service, page, ServerSettings())) as url:
                yield url
        finally:
            service.close()


def take(url: str, out: Path, chromium: str) -> None:
    """All the pictures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )

        def visit(size: tuple[int, int], path: str, **options: Any) -> Page:
            view = {"width": size[0], "height": size[1]}
            page = browser.new_context(viewport=view, device_scale_factor=1.5, **options).new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(url + path)
            page.wait_for_selector("#tabs")
            page.wait_for_timeout(1000)
            return page

        page = visit(DESK, "/?tab=caption")
        page.get_by_role("button", name="Admiral").click()
        page.wait_for_selector("#caption-result [aria-busy=false]")
        shoot(page, out / "caption.png")
        choose(page, "#caption-against", "Base model")
        page.click("#caption-go")
        page.wait_for_function("document.querySelectorAll('#caption-result article').length == 2")
        page.wait_for_selector("#caption-result [aria-busy=false]")
        shoot(page, out / "compare.png")
        inside = page.get_by_role("button", name="Look inside")
        inside.click()
        page.wait_for_selector("svg[role=img]")
        inside.evaluate("button => button.scrollIntoView()")
        shoot(page, out / "inside.png")

        page = visit(DESK, "/?tab=caption")
        many = page.get_by_role("button", name="Many pictures at once")
        many.click()
        page.locator("#caption-files input[type=file]").set_input_files(sorted(IMAGES.glob("*.jpg")))
        page.wait_for_selector("#caption-files .file")
        page.click("#caption-all")
        page.wait_for_selector("a[download='captions.csv']")
        many.evaluate("button => button.scrollIntoView()")
        shoot(page, out / "batch.png")

        page = visit(DESK, "/?tab=ask")
        page.locator("#ask-picture input[type=file]").set_input_files(IMAGES / "chelsea.jpg")
        page.wait_for_selector("#ask-picture img")
        ask(page, "What is in this picture?")
        page.locator("#ask-options button").first.click()
        page.locator("#ask-choices textarea").fill("a cat\na dog\na horse")
        ask(page, "Which animal is it?")
        shoot(page, out / "ask.png")

        page = visit(DESK, "/?tab=chat", color_scheme="dark")
        say(page, "Give me two tips for taking better photos.")
        shoot(page, out / "chat.png")

        page = visit(DESK, "/?tab=chat")
        choose(page, "#chat-against", "Base model")
        page.locator("#chat-1").wait_for()
        say(page, "Write a haiku about rain.")
        page.evaluate("scrollTo(0, 0)")
        shoot(page, out / "chat-compare.png")

        page = visit(PHONE, "/?tab=caption", color_scheme="dark")
        page.get_by_role("button", name="Coffee").click()
        page.wait_for_selector("#caption-result [aria-busy=false]")
        shoot(page, out / "phone.png")
        browser.close()


def choose(page: Page, place: str, option: str) -> None:
    """Takes an option of a dropdown."""
    page.locator(f"{place} input").click()
    page.get_by_role("option", name=option).click()


def say(page: Page, message: str) -> None:
    """Sends a message of a new conversation and waits for what it is answered."""
    page.locator("#chat-text textarea").fill(message)
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat-status [aria-busy=false]")


def ask(page: Page, question: str) -> None:
    """Asks and waits for the answer."""
    page.locator("#ask-question textarea").fill(question)
    page.keyboard.press("Enter")
    page.wait_for_function("(text) => document.querySelector('#ask-result').innerText.includes(text)", arg=question)
    page.wait_for_selector("#ask-result [aria-busy=false]")


def shoot(page: Page, path: Path) -> None:
    """What the window shows, once it stands still."""
    page.wait_for_timeout(700)
    page.screenshot(path=path)
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
