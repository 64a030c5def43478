"""The tab that answers questions about a picture, which stays while many are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from app import controls
from app.outcome import Outcome
from app.picture import opener, picture_input, sample_buttons
from app.render import empty, outcome_html
from app.tasks import Tasks, examples

HINT = empty("Answers appear here", "Choose a picture and ask; it stays for the next question.")
QUESTIONS = ("What is in this picture?", "What color is it?", "Is there a person?")
KEPT = 30  # earlier questions that stay on the page


def build_ask_tab(tasks: Tasks) -> None:
    """Builds the tab inside the tabs that are open."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            picture = picture_input("Picture to ask about", elem_id="ask-picture")
            sample_buttons(picture)
        with gr.Column(scale=6, min_width=300):
            current, outcome, asked = controls.new_current(), gr.State(None), gr.State("")
            history = gr.State(())  # (question, outcome) of what stands below the answer, the latest first
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
            judging = controls.judge_row(tasks, outcome)
            earlier = gr.HTML("")
    model = controls.model_controls(tasks, "answer")
    with gr.Accordion("Settings", open=False):
        decoding = controls.decoding_controls(tasks, "answer")
    looking = controls.inside_panel(tasks, outcome)
    panel = controls.Panel(result, outcome, stop, current)

    def write(
        path: str | None,
        text: str,
        options: str,
        before: tuple,
        last: tuple[str, Outcome | None],
        running: Any,
        *values: Any,
    ) -> Iterator[dict]:
        who, how = controls.sides(*values[:4]), controls.settings(*values[4:])
        outcomes = tasks.ask(path, text, who, how, options.splitlines(), running)
        first = True
        for update in panel.show(outcomes, running, text.strip()):
            if outcome not in update:
                yield update
                return
            failed = bool(update[outcome].error)
            if first and not failed:
                first = False
                if last and last[1] is not None and last[1].answers:
                    before = (last, *before)[:KEPT]
                update |= {question: "", history: before, earlier: _earlier(before)}
            elif failed and not first:
                update |= {question: text}  # to be asked again
            yield update | {asked: (text.strip(), None if failed else update[outcome])}

    def asker(text: str) -> Callable[..., Iterator[dict]]:
        """One click asks; without a picture, about the first of the samples."""

        def ask(path: str | None, _: str, *values: Any) -> Iterator[dict]:
            if path is None and examples():
                yield {picture: opener(examples()[0])(), question: text, pending: text}
                yield {question: text}  # Gradio sends the last update twice, and the picture would arrive twice
            else:
                yield from write(path, text, *values)

        return ask

    def arrived(path: str | None, wanted: str, options: str, running: Any, *values: Any) -> Iterator[dict]:
        """Another picture: what was asked about the one before goes, and what is on its way is not shown."""
        running.leave()
        hint = {result: HINT, outcome: None, stop: gr.Button(interactive=False)}
        yield hint | {asked: "", history: (), earlier: "", pending: ""}
        if path is not None and wanted:
            yield from write(path, wanted, options, (), "", running, *values)

    inputs = [picture, question, choices, history, asked, current, *model, *decoding]
    outputs = [*panel.outputs, question, history, earlier, asked]
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


def _earlier(history: tuple[tuple[str, Outcome], ...]) -> str:
    cards = "".join(outcome_html(outcome, question) for question, outcome in history)
    return (
        f'<div class="earlier" aria-label="Earlier questions" role="region" tabindex="0">{cards}</div>' if cards else ""
    )
