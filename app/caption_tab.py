"""The tab that captions: one picture, or many files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from app import controls
from app.picture import picture_input, sample_buttons
from app.render import empty, files_html
from app.tasks import MOST_CAPTIONS, Current, Tasks, as_a_turn

HINT = empty("Captions appear here", "Choose a picture, or click one of the samples.")


def build_caption_tab(tasks: Tasks) -> None:
    """Builds the tab inside the tabs that are open."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            picture = picture_input("Picture to caption", elem_id="caption-picture")
            sample_buttons(picture)
        with gr.Column(scale=6, min_width=300):
            current, outcome = gr.State(Current()), gr.State(None)
            with gr.Row(elem_classes="actions"):  # above what grows, so that Stop stays where it is
                go = gr.Button("Caption", variant="primary", scale=3, elem_id="caption-go")
                stop = controls.stop_button(current)
            result = gr.HTML(HINT, elem_id="caption-result")
            judging = controls.judge_row(tasks, outcome)
    model = controls.model_controls(tasks, "caption")
    with gr.Accordion("Settings", open=False):
        count = gr.Slider(
            1,
            MOST_CAPTIONS,
            1,
            step=1,
            label="Captions",
            info="The first is the likeliest, the others are drawn.",
            elem_id="caption-count",
        )
        decoding = controls.decoding_controls(tasks, "caption")
    looking = controls.inside_panel(tasks, outcome)
    panel = controls.Panel(result, outcome, stop)
    inputs = [picture, current, count, *model, *decoding]

    def write(path: str | None, running: Any, number: int | None, *values: Any) -> Iterator[dict]:
        who, how = controls.sides(*values[:4]), controls.settings(*values[4:])
        outcomes = as_a_turn(tasks.caption(path, who, how, int(number or 1), running), running)
        yield from map(panel.shown, outcomes)

    def arrived(path: str | None, *values: Any) -> Iterator[dict]:
        if path is None:
            values[0].leave()
            yield {result: HINT, outcome: None, stop: gr.Button(interactive=False)}
        else:
            yield from write(path, *values)

    for event, answer in ((go.click, write), (picture.change, arrived)):
        answering = event(answer, inputs, panel.outputs, trigger_mode="multiple", **controls.QUIET)
        judging(answering)
        looking(answering)
    _many_files(tasks, model, decoding)


def _many_files(tasks: Tasks, model: list, decoding: list) -> None:
    """Many files at once, with the adapter and settings above."""
    with gr.Accordion("Many pictures at once", open=False, elem_id="caption-many"):
        current = gr.State(Current())
        files = gr.File(
            file_count="multiple", file_types=["image"], label="Pictures", height=150, elem_id="caption-files"
        )
        with gr.Row(elem_classes="actions"):
            go = gr.Button("Caption all", variant="primary", scale=3, elem_id="caption-all")
            stop = controls.stop_button(current)
        table = gr.HTML(empty("A table appears here", "With a CSV and a JSON lines file to download at the end."))

    def write(paths: list[str] | None, running: Any, *values: Any) -> Iterator[tuple]:
        who, how = controls.sides(*values[:4])[0], controls.settings(*values[4:])
        for state in tasks.files(paths or [], who, how, running):
            yield files_html(state), gr.Button(interactive=not state.finished)

    go.click(write, [files, current, *model, *decoding], [table, stop], **controls.QUIET)
