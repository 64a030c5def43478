"""What all tabs have in common: the adapter and its strength, decoding, Stop, thumbs, the look inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from app.inside import inside_html
from app.outcome import AUTOMATIC, BASE, Outcome, Side
from app.render import by_side, empty, outcome_html, problem, side_name
from app.service import Busy, Failure
from app.tasks import Current, Tasks, sentence

NOBODY = ""  # compare with: nobody
ONLY = ("The answer", 0)  # which one to judge, where there is one
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def adapter_choices(tasks: Tasks, task: str) -> list[tuple[str, str]]:
    """(title, name) of the adapters that suit a task, the base model last."""
    choices = [
        (info.title, info.name) for info in tasks.adapters if task != "caption" or info.sees or info.name == BASE
    ]
    return [("Automatic", AUTOMATIC), *choices] if task == "chat" else choices


def model_controls(tasks: Tasks, task: str) -> list[Component]:
    """Adapter, strength, and what to compare with: the first four inputs of every task, see `sides`."""
    choices = adapter_choices(tasks, task)
    first = AUTOMATIC if task == "chat" else tasks.service.default[task]
    strength = {"minimum": 0, "maximum": 2, "step": 0.05, "value": 1}
    with gr.Row(elem_classes="model"):
        adapter = gr.Dropdown(
            choices,
            value=first,
            label="Adapter",
            info="Switches at once; the base stays.",
            filterable=False,
            elem_id=f"{task}-adapter",
        )
        power = gr.Slider(**strength, label="Strength", info="0: the base model", elem_id=f"{task}-strength")
        against = gr.Dropdown(
            [("Nothing", NOBODY), *choices],
            value=NOBODY,
            label="Compare with",
            info="Side by side, in one batch.",
            filterable=False,
            elem_id=f"{task}-against",
        )
        against_power = gr.Slider(**strength, label="Its strength", info="Of the other one", interactive=False)
    against.change(
        lambda name: gr.Slider(interactive=name not in (NOBODY, BASE)), against, against_power, queue=False, **QUIET
    )
    return [adapter, power, against, against_power]


def sides(adapter: str, strength: float | None, against: str, against_strength: float | None) -> list[Side]:
    """Who is asked; a strength that was emptied is 1."""

    def side(name: str, factor: float | None) -> Side:
        return Side(name, 1.0 if factor is None else float(factor))

    first = side(adapter, strength)
    return [first] if against in (None, NOBODY) else [first, side(against, against_strength)]


def decoding_controls(tasks: Tasks, task: str) -> list[Component]:
    """Sliders of decoding, see `settings`."""
    start = tasks.defaults(task)
    longest = 1024 if task == "chat" else 120
    with gr.Row():
        temperature = gr.Slider(
            0, 2, start["temperature"], step=0.05, label="Temperature", info="0: the likeliest word"
        )
        top_p = gr.Slider(0.05, 1, start["top_p"], step=0.05, label="Top-p", info="Leaves out unlikely words")
        length = gr.Slider(1, longest, start["max_new_tokens"], step=1, label="Most tokens", info="Of an answer")
        seed = gr.Number(start["seed"], precision=0, minimum=0, label="Seed", info="Same seed, same text")
        beams = gr.Slider(
            1,
            8,
            start["beams"],
            step=1,
            label="Beams",
            info="1 streams; more search first",
            visible=task != "chat",
        )
    return [temperature, top_p, length, seed, beams]


def settings(
    temperature: float | None, top_p: float | None, length: float | None, seed: float | None, beams: float | None
) -> dict[str, Any]:
    """Fields of `Sampling`; what was emptied is the adapter's own, the seed 0."""
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": None if length is None else int(length),
        "beams": None if beams is None else int(beams),
    }
    return {name: value for name, value in given.items() if value is not None} | {"seed": int(seed or 0)}


@dataclass(frozen=True)
class Panel:
    """Where the answers of a task go.

    Attributes:
        result: HTML of the outcome.
        outcome: The outcome itself, a State.
        stop: The Stop button.
    """

    result: gr.HTML
    outcome: gr.State
    stop: gr.Button

    @property
    def outputs(self) -> list[Component]:
        return [self.result, self.outcome, self.stop]

    def shown(self, outcome: Outcome | None, question: str = "") -> dict[Component, Any]:
        """What to change on the page for an outcome, given by `tasks.as_a_turn`."""
        if outcome is None:
            return unchanged(self.stop)
        return {
            self.result: outcome_html(outcome, question),
            self.outcome: outcome,
            self.stop: gr.Button(interactive=not outcome.done),
        }


def unchanged(some: Component) -> dict[Component, Any]:
    """A last update: Gradio sends that twice, and the second time it must not hide what came since."""
    return {some: gr.skip()}


def stop_button(current: gr.State) -> gr.Button:
    """Stops within a token; Escape presses it."""
    stop = gr.Button("Stop", variant="stop", interactive=False, elem_classes="stop-now", scale=1)
    stop.click(lambda running: running.stop(), current, None, queue=False, **QUIET)
    return stop


def judge_row(tasks: Tasks, outcome: gr.State) -> Callable[[Any], None]:
    """Thumbs and a comment on the answer, or on the chosen one of several; nothing where feedback is not kept.

    Returns:
        What to chain after each answer, so that there is one to choose.
    """
    if tasks.feedback is None:
        return lambda event: None

    def judge(verdict: str | None) -> Callable[[Outcome | None, str, int | None], tuple[str, str]]:
        def kept(shown: Outcome | None, comment: str, place: int | None) -> tuple[str, str]:
            if shown is None or not shown.answers or not shown.done:
                return thanks("There is no answer to judge yet."), comment
            if verdict is None and not comment.strip():
                return thanks("Write a comment first."), comment
            chosen = shown.answers[place if place is not None and place < len(shown.answers) else 0]
            return thanks(tasks.judge(chosen, verdict, comment)), ""

        return kept

    with gr.Row(elem_classes="thumbs"):
        which = gr.Dropdown(
            [ONLY],
            value=0,
            label="Which answer to judge",
            show_label=False,
            container=False,
            filterable=False,
            interactive=False,
            elem_classes="judged",
        )
        up = gr.Button("Good answer", size="sm", elem_classes="thumb-up")
        down = gr.Button("Bad answer", size="sm", elem_classes="thumb-down")
        comment = gr.Textbox(
            placeholder="A comment on the answer, Enter keeps it",
            show_label=False,
            label="Comment",
            container=False,
            max_lines=1,
        )
    said = gr.HTML(thanks(""), elem_classes="said")
    for verdict, event in (("up", up.click), ("down", down.click), (None, comment.submit)):
        event(judge(verdict), [outcome, comment, which], [said, comment], queue=False, **QUIET)

    def offer(shown: Outcome | None) -> gr.Dropdown:
        answers = () if shown is None else shown.answers
        if len(answers) < 2:
            return gr.Dropdown([ONLY], value=0, interactive=False)
        names = [f"{number}: {side_name(answer.side)}" for number, answer in enumerate(answers, 1)]
        return gr.Dropdown(list(zip(names, range(len(names)), strict=True)), value=0, interactive=True)

    return lambda event: event.then(offer, outcome, which, **QUIET)


def thanks(text: str) -> str:
    """A line that page.js says to screen readers."""
    return f'<div class="thanks">{escape(text)}</div>'


def inside_panel(tasks: Tasks, outcome: gr.State) -> Callable[..., Any]:
    """The look inside, measured when it is opened; returns what to chain after each answer to keep it up to date."""
    hint = empty("Look inside", "Ask something; then this shows what the adapter did to the answer.")
    with gr.Accordion("Look inside: gates, attention, scales", open=False) as accordion:
        view = gr.HTML(hint)
    is_open, current = gr.State(False), gr.State(Current())

    def look(shown: Outcome | None, running: Current) -> str:
        if shown is None or not shown.answers or not shown.done or shown.error:
            return hint
        pieces = []
        firsts = [answers[0] for answers in by_side(shown.answers)]
        adapted = [answer for answer in firsts if answer.side.adapter != BASE] or firsts
        for answer in adapted:
            title = (
                f"<h3>{escape(answer.side.adapter)}, strength {answer.side.strength:g}</h3>" if len(adapted) > 1 else ""
            )
            try:
                pieces.append(title + inside_html(tasks.inside(answer, running)))
            except (ValueError, Busy, Failure) as error:
                pieces.append(title + problem(sentence(error)))
        return "".join(pieces)

    def opened(shown: Outcome | None, running: Current) -> tuple[bool, str]:
        return True, look(shown, running)

    accordion.expand(opened, [outcome, current], [is_open, view], show_progress="minimal", api_visibility="private")
    accordion.collapse(lambda: False, None, is_open, queue=False, **QUIET)

    def refresh(event: Any) -> None:
        def refreshed(shown: Outcome | None, wanted: bool, running: Current) -> str:
            return look(shown, running) if wanted else hint

        event.then(refreshed, [outcome, is_open, current], view, **QUIET)

    return refresh
