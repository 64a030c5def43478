"""The page's named endpoints, for `gradio_client`: /caption, /answer and /chat, with plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.outcome import AUTOMATIC, Outcome, Side
from app.picture import Refusal, picture_input
from app.tasks import Tasks


def add_endpoints(tasks: Tasks) -> None:
    """Adds the endpoints to the page that is open; their inputs are components that nobody sees."""
    with gr.Column(visible=False):
        image = picture_input("image")
        text = gr.Textbox(label="text")
        choices = gr.JSON(label="choices", value=None)
        messages = gr.JSON(label="messages")
        adapter = gr.Textbox(tasks.service.default["caption"], label="adapter")
        answerer = gr.Textbox(tasks.service.default["answer"], label="adapter")
        talker = gr.Textbox(AUTOMATIC, label="adapter")
        strength = gr.Number(1.0, label="strength")
        settings = gr.JSON(label="settings", value={})
        written, found = gr.Textbox(label="written"), gr.JSON(label="found")

    def caption(image: str, adapter: str, strength: float, settings: dict | None) -> str:
        """Captions a picture."""
        how = _object(settings)
        return _last(tasks.caption(image, [Side(adapter, strength)], how)).answers[0].text

    def answer(
        image: str | None, question: str, choices: list | None, adapter: str, strength: float, settings: dict | None
    ) -> dict[str, Any]:
        """Answers a question: {"text"}, and with choices {"text", "index", "probabilities"}."""
        how, options = _object(settings), _texts(choices)
        got = _last(tasks.ask(image, question, [Side(adapter, strength)], how, options)).answers[0]
        if not got.choices:
            return {"text": got.text}
        return {"text": got.text, "index": got.choices.index(got.text), "probabilities": list(got.probabilities)}

    def chat(
        message: str, messages: list | None, image: str | None, adapter: str, strength: float, settings: dict | None
    ) -> Iterator[str]:
        """Goes on with a conversation, `messages` being its earlier ones; gives the text so far, again and again."""
        how, said = _object(settings), [*_list("messages", messages), {"role": "user", "content": message}]
        for outcome in tasks.chat([said], image, [Side(adapter, strength)], how):
            yield _checked(outcome).answers[0].text

    for function, inputs, output in (
        (caption, [image, adapter, strength, settings], written),
        (answer, [image, text, choices, answerer, strength, settings], found),
        (chat, [text, messages, image, talker, strength, settings], written),
    ):
        gr.on([], function, inputs, output, api_name=function.__name__)


def _object(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict | None):
        raise Refusal('Settings must be an object such as {"beams": 4}.')
    return settings or {}


def _list(name: str, given: Any) -> list:
    if not isinstance(given, list | None):
        raise Refusal(f"The {name} must be a list.")
    return given or []


def _texts(choices: Any) -> list[str]:
    given = _list("choices", choices)
    if not all(isinstance(choice, str | int | float) for choice in given):
        raise Refusal("The choices must be texts.")
    return [str(choice) for choice in given]


def _last(outcomes: Iterator[Outcome]) -> Outcome:
    *_, last = outcomes
    return _checked(last)


def _checked(outcome: Outcome) -> Outcome:
    if outcome.error:
        raise Refusal(outcome.error)
    return outcome
