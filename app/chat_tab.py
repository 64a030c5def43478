"""The tab that talks: text, or about a picture; with one model, or with two side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from app import controls
from app.conversation import Setting, Talk, View, begin_anew, judge, say, say_again, say_otherwise, take_back
from app.outcome import Outcome, Side
from app.picture import picture_input
from app.render import AS_WRITTEN, chat_text, problem, side_name, status_text
from app.tasks import Current, Tasks

STARTERS = ("Tell me about alpacas.", "Write a haiku about rain.", "Why is the sky blue?")
HEIGHT = 480


def bubbles(talk: Talk, side: int) -> list[dict[str, str]]:
    """A conversation as the page shows it; two messages a turn, so that a place tells the turn."""
    shown = []
    for turn in talk:
        answer = turn.answer(side)
        text = "" if answer is None else chat_text(answer.text)
        if not text:
            text = "*(nothing was written)*" if answer is not None and answer.done else "…"
        shown += [{"role": "user", "content": chat_text(turn.user)}, {"role": "assistant", "content": text}]
    return shown


def status_html(outcome: Outcome) -> str:
    """Below the conversation: how the answer is getting on, or what went wrong."""
    if outcome.error:
        return problem(outcome.error)
    pieces = [f"{side_name(answer.side)}: {status_text(answer)}" for answer in outcome.answers]
    notes = sorted({answer.note for answer in outcome.answers if answer.note})
    busy = "false" if outcome.done else "true"
    return f'<div aria-busy="{busy}">{controls.thanks(" · ".join(pieces + notes))}</div>'


def build_chat_tab(tasks: Tasks) -> None:
    """Builds the tab inside the tabs that are open."""
    current, outcome, talk = gr.State(Current()), gr.State(None), gr.State(())
    with gr.Row(equal_height=False):
        with gr.Column(scale=8, min_width=300):
            with gr.Row(elem_classes="chats"):
                chatbots = [_chatbot(0), _chatbot(1)]
            status = gr.HTML(controls.thanks(""), elem_id="chat-status")
            with gr.Row(elem_classes="actions say"):
                text = gr.Textbox(
                    "",
                    label="Message",
                    show_label=False,
                    container=False,
                    placeholder="Write a message, Enter sends it",
                    max_lines=6,
                    max_length=8000,
                    scale=7,
                    elem_id="chat-text",
                )
                send = gr.Button("Send", variant="primary", scale=2, elem_id="chat-send")
                stop = controls.stop_button(current)
            judging = controls.judge_row(tasks, outcome)
        with gr.Column(scale=4, min_width=280):
            picture = picture_input("Picture (optional)", 200, elem_id="chat-picture")
            system = gr.Textbox(
                "",
                label="System prompt",
                lines=2,
                max_lines=6,
                max_length=4000,
                placeholder="Optional: how it should answer",
            )
            new = gr.Button("New conversation", size="sm", elem_id="chat-new")
    model = controls.model_controls(tasks, "chat")
    with gr.Accordion("Settings", open=False):
        decoding = controls.decoding_controls(tasks, "chat")
    looking = controls.inside_panel(tasks, outcome)

    def shown(view: View, who: Sequence[Side]) -> dict:
        """What to change on the page."""
        if view == View():
            return controls.unchanged(stop)
        update: dict = {}
        if view.talk is not None:
            update |= {talk: view.talk} | _conversations(chatbots, view.talk, who)
        if view.field is not None:
            update[text] = view.field
        if view.outcome is not None or view.over:
            writing = view.outcome is not None and not view.outcome.done
            update |= {outcome: view.outcome, stop: gr.update(interactive=writing)}  # a Button would be built
        if view.problem:
            line = problem(view.problem)
        else:
            line = controls.thanks("") if view.outcome is None else status_html(view.outcome)
        return update | {status: line}

    def answering(values: Sequence[Any], write: Callable[[Setting], Iterator[View]]) -> Iterator[dict]:
        """The updates of what is written, given the values of `context`."""
        path, prompt, running, *rest = values
        setting = Setting(path, prompt, controls.sides(*rest[:4]), controls.settings(*rest[4:]), running)
        for view in write(setting):
            yield shown(view, setting.sides)

    context = [picture, system, current, *model, *decoding]
    outputs = [*chatbots, talk, text, outcome, status, stop]

    def send_message(said: str, before: Talk, *values: Any) -> Iterator[dict]:
        yield from answering(values, lambda setting: say(tasks, before, said, setting))

    def retry(event: gr.RetryData, before: Talk, *values: Any) -> Iterator[dict]:
        yield from answering(values, lambda setting: say_again(tasks, before, _turn(event.index), setting))

    def edit(event: gr.EditData, before: Talk, *values: Any) -> Iterator[dict]:
        said = str(event.value).replace(AS_WRITTEN, "")
        yield from answering(values, lambda setting: say_otherwise(tasks, before, _turn(event.index), said, setting))

    def start(event: gr.SelectData, before: Talk, *values: Any) -> Iterator[dict]:
        yield from answering(values, lambda setting: say(tasks, before, event.value["text"], setting))

    def undo(event: gr.UndoData, before: Talk, running: Any, *model: Any) -> dict:
        return shown(take_back(before, _turn(event.index), running), controls.sides(*model))

    def forget(running: Any, *model: Any) -> dict:
        return shown(begin_anew(running), controls.sides(*model))

    def compared(before: Talk, *model: Any) -> dict:
        return _conversations(chatbots, before, controls.sides(*model))

    def judged_on(side: int) -> Callable[..., str]:
        def judged(event: gr.LikeData, said: Talk) -> str:
            verdicts: Mapping[Any, str] = {True: "up", False: "down", "Like": "up", "Dislike": "down"}
            return controls.thanks(judge(tasks, said, _turn(event.index), side, verdicts.get(event.liked)))

        return judged

    quiet = controls.QUIET
    sent = gr.on(
        [send.click, text.submit], send_message, [text, talk, *context], outputs, trigger_mode="multiple", **quiet
    )
    events = [sent]
    for side, chatbot in enumerate(chatbots):
        events.append(chatbot.retry(retry, [talk, *context], outputs, **quiet))
        events.append(chatbot.edit(edit, [talk, *context], outputs, **quiet))
        events.append(chatbot.example_select(start, [talk, *context], outputs, **quiet))
        chatbot.undo(undo, [talk, current, *model], outputs, **quiet)
        if tasks.feedback is not None:
            chatbot.like(judged_on(side), talk, status, queue=False, **quiet)
    for event in events:
        judging(event)
        looking(event)
    gr.on([new.click, chatbots[0].clear], forget, [current, *model], outputs, **quiet)
    for control in (model[0], model[2]):
        control.change(compared, [talk, *model], chatbots, **quiet)


def _chatbot(side: int) -> gr.Chatbot:
    return gr.Chatbot(
        label="Conversation" if side == 0 else "The other",
        height=HEIGHT,
        visible=side == 0,
        editable="user",
        buttons=["copy"],
        placeholder="<strong>Say something</strong><br>or begin with one of these",
        examples=[{"text": text} for text in STARTERS],
        elem_id=f"chat-{side}",
    )


def _conversations(chatbots: Sequence[gr.Chatbot], talk: Talk, who: Sequence[Side]) -> dict:
    """Both conversations; the second is there where two are compared."""
    names = [f"{side_name(side)}, strength {side.strength:g}" for side in who]
    two = len(who) > 1
    return {
        chatbots[0]: gr.Chatbot(bubbles(talk, 0), label=names[0] if two else "Conversation"),
        chatbots[1]: gr.Chatbot(bubbles(talk, 1), label=names[-1], visible=True)
        if two
        else gr.Chatbot([], visible=False),
    }


def _turn(index: Any) -> int:
    """The turn of the message at a place."""
    return int(index[0] if isinstance(index, (list, tuple)) else index) // 2
