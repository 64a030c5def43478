"""A server that asks for credentials, as `--auth` makes it: by browser, by `gradio_client`, by OpenAI's client."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fake_service import FakeService
from PIL import Image

from app.server import ServerSettings, build_server, running
from app.tasks import Tasks

USER, PASSWORD = "anna", "open sesame"
CHROMIUM = shutil.which("chromium")
CAPTION = "caption by caption 1 seeing 40x30"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a live server."""
    from app.ui import build_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        service = FakeService(pause=0.02)
        server = build_server(service, build_page(Tasks(service)), ServerSettings(auth=(USER, PASSWORD)))
        with running(server) as url:
            yield url


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def test_gradios_client_with_the_password_as_the_readme_has_it(locked: str, photo: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AuthenticationError

    headers = {"Authorization": f"Bearer {PASSWORD}"}
    client = Client(locked, headers=headers, analytics_enabled=False, verbose=False)
    assert client.predict(handle_file(photo), api_name="/caption") == CAPTION
    chat = list(client.submit("Hello.", [], None, api_name="/chat"))
    assert len(chat) > 1
    assert "Hello." in str(chat[-1])
    for wrong in ({}, {"Authorization": "Bearer sesame"}):
        with pytest.raises(AuthenticationError, match="credentials"):
            Client(locked, headers=wrong, analytics_enabled=False, verbose=False)


def test_openais_client_with_the_password_as_its_key(locked: str) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{locked}/v1", api_key=key, max_retries=0, http_client=httpx.Client())

    asked = {"model": "base", "messages": [{"role": "user", "content": "Hello."}]}
    known = client(PASSWORD)
    assert "base" in [model.id for model in known.models.list()]
    answer = known.chat.completions.create(**asked).choices[0].message.content
    assert "Hello." in answer
    pieces = [chunk.choices[0].delta.content or "" for chunk in known.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == answer
    for key in ("none", USER):
        with pytest.raises(openai.AuthenticationError, match="user and password"):
            client(key).chat.completions.create(**asked)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_the_page_in_a_browser_that_was_told_the_password(locked: str, photo: Path) -> None:
    """All that the page sends afterwards carries it: the upload, the queue, the stream, the picture it shows again."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        known = browser.new_context(http_credentials={"username": USER, "password": PASSWORD})
        known.set_default_timeout(60_000)
        page, wrong = known.new_page(), []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        assert page.goto(locked).status == 200
        page.wait_for_selector("#caption-go")
        page.evaluate(
            """() => {
                window.met = new Set();
                new MutationObserver(() => met.add(document.querySelector("#caption-result .words")?.textContent))
                    .observe(document.body, { childList: true, subtree: true });
            }"""
        )
        page.locator("#caption-picture input[type=file]").set_input_files(photo)
        page.wait_for_selector("#caption-result [aria-busy=false]")
        assert page.locator("#caption-result .words").inner_text() == CAPTION
        assert page.evaluate("met.size") > 2  # word by word
        page.wait_for_function("document.querySelector('#caption-picture img')?.naturalWidth == 40")
        assert wrong == []

        for options in ({}, {"http_credentials": {"username": USER, "password": "sesame"}}):
            stranger, met = browser.new_context(**options).new_page(), []
            stranger.on("response", lambda response, met=met: met.append(response.status))
            with contextlib.suppress(Error):  # a refusal is a page or an error, as Chromium likes
                stranger.goto(locked)
            assert set(met) <= {401}
            assert stranger.locator("button").count() == 0
        browser.close()
