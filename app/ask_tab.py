"""The tab that answers questions about a picture, which stays while many are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr

from app import controls
from app.picture import opener, picture_input, sample_buttons
from app.questions import Asked, View, ask
from app.render import empty, outcome_html
from app.tasks import Current, Tasks, examples

# Of a shipped adapter, as its README has them.
LIMITS = {
    "qa": (
        "The adapter qa has seen rooms, people and dogs: it names things, colours and counts in a few words. "
        "What it says of anything else, of text, names and reasons, is a guess; it sees people where there are none."
    )
}
HINT = empty("Answers appear here", "Choose a picture and ask; it stays for the next question.")
QUESTIONS = ("What is in this picture?", "What color is it?", "Is there a person?")


def build_ask_tab(tasks: Tasks) -> None:
    """Builds the tab inside the tabs that are open."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            picture = picture_input("Picture to ask about", elem_id="ask-picture")
            sample_buttons(picture)
        with gr.Column(scale=6, min_width=300):
            current, outcome, latest = gr.State(Current()), gr.State(None), gr.State(None)
            history = gr.State(())  # what stands below the answer, the latest first
            pending = gr.State("")  # what is asked as soon as the picture is there
            question = gr.Textbox(
                "",
                label="Question",
                placeholder="What is the man wearing?",
                max_lines=3,
                max_length=2000,
                elem_id="ask-question",
            )
            with gr.Row(elem_classes="actions quick"):
                quick = [gr.Button(text, size="sm") for text in QUESTIONS]
            with gr.Accordion("Choices (optional)", open=False, elem_id="ask-options"):
                choices = gr.Textbox(
                    "",
                    label="Choices, one a line",
                    info="The answer is then one of them, with the probability of each.",
                    lines=3,
                    max_lines=8,
                    elem_id="ask-choices",
                )
            with gr.Row(elem_classes="actions"):
                go = gr.Button("Ask", variant="primary", scale=3, elem_id="ask-go")
                stop = controls.stop_button(current)
            result = gr.HTML(HINT, elem_id="ask-result")
            for info in tasks.adapters:
                if info.name in LIMITS:
                    gr.HTML(f'<p class="thanks">{escape(LIMITS[info.name])}</p>')
            judging = controls.judge_row(tasks, outcome)
    model = controls.model_controls(tasks, "answer")
    with gr.Accordion("Settings", open=False):
        decoding = controls.decoding_controls(tasks, "answer")
    looking = controls.inside_panel(tasks, outcome)
    earlier = gr.HTML("")  # last, since it grows
    panel = controls.Panel(result, outcome, stop)

    def write(
        path: str | None,
        text: str,
        options: str,
        before: tuple[Asked, ...],
        last: Asked | None,
        running: Any,
        *values: Any,
    ) -> Iterator[dict]:
        who, how = controls.sides(*values[:4]), controls.settings(*values[4:])
        views = ask(tasks, path, text, options.splitlines(), who, how, running, before, last)
        yield from map(shown, views)

    def shown(view: View) -> dict:
        """What to change on the page."""
        if view.latest is None:
            return controls.unchanged(stop)
        update = panel.shown(view.outcome, view.latest.question) | {latest: view.latest}
        if view.field is not None:
            update[question] = view.field
        if view.earlier is not None:
            update |= {history: view.earlier, earlier: _earlier(view.earlier)}
        return update

    def asker(text: str) -> Callable[..., Iterator[dict]]:
        """One click asks; without a picture, about the first of the samples."""

        def clicked(path: str | None, _: str, *values: Any) -> Iterator[dict]:
            if path is None and examples():
                yield {picture: opener(examples()[0])(), question: text, pending: text}
                yield controls.unchanged(question)  # or the picture would arrive twice
            else:
                yield from write(path, text, *values)

        return clicked

    def arrived(path: str | None, wanted: str, options: str, running: Any, *values: Any) -> Iterator[dict]:
        """Another picture: what was asked about the one before goes, and what is on its way is not shown."""
        running.leave()
        hint = {result: HINT, outcome: None, stop: gr.Button(interactive=False)}
        yield hint | {latest: None, history: (), earlier: "", pending: ""}
        if path is not None and wanted:
            yield from write(path, wanted, options, (), None, running, *values)

    inputs = [picture, question, choices, history, latest, current, *model, *decoding]
    outputs = [*panel.outputs, question, history, earlier, latest]
    events = [gr.on([go.click, question.submit], write, inputs, outputs, trigger_mode="multiple", **controls.QUIET)]
    for button, text in zip(quick, QUESTIONS, strict=True):
        events.append(
            button.click(asker(text), inputs, [*outputs, picture, pending], trigger_mode="multiple", **controls.QUIET)
        )
    changed = [picture, pending, choices, current, *model, *decoding]
    events.append(picture.change(arrived, changed, [*outputs, pending], trigger_mode="multiple", **controls.QUIET))
    for answering in events:
        judging(answering)
        looking(answering)


def _earlier(history: tuple[Asked, ...]) -> str:
    cards = "".join(outcome_html(asked.outcome, asked.question) for asked in history)
    return (
        f'<div class="earlier" aria-label="Earlier questions" role="region" tabindex="0">{cards}</div>' if cards else ""
    )
