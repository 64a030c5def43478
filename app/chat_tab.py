"""The tab that talks: text, or about a picture; with one model, or with two side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import controls
from app.outcome import Answer, Outcome, Side
from app.picture import picture_input
from app.render import AS_WRITTEN, chat_text, problem, side_name, status_text
from app.tasks import Tasks

STARTERS = ("Tell me about alpacas.", "Write a haiku about rain.", "Why is the sky blue?")
HEIGHT = 480
GONE = "The server was started anew and does not know this conversation any more; please begin a new one."


@dataclass(frozen=True)
class Turn:
    """What the user said and what each side answered; a turn from before a comparison has one answer for both.

    Attributes:
        retries: How often another answer was asked for; each is drawn with a seed of its own.
    """

    user: str
    answers: tuple[Answer, ...] = ()
    retries: int = 0

    def answer(self, side: int) -> Answer | None:
        return self.answers[min(side, len(self.answers) - 1)] if self.answers else None


Talk = tuple[Turn, ...]


def spoken(talk: Talk, side: int, system: str = "") -> list[dict[str, str]]:
    """A conversation as the model gets it, the last turn without its answer if it has none."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in talk:
        messages.append({"role": "user", "content": turn.user})
        answer = turn.answer(side)
        if answer is not None:
            messages.append({"role": "assistant", "content": answer.text})
    return messages


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
    """One line below the conversation: how the answer is getting on, or what went wrong."""
    if outcome.error:
        return problem(outcome.error)
    pieces = [f"{side_name(answer.side)}: {status_text(answer)}" for answer in outcome.answers]
    notes = sorted({answer.note for answer in outcome.answers if answer.note})
    return controls.thanks(" · ".join(pieces + notes))


def build_chat_tab(tasks: Tasks) -> None:
    """Builds the tab inside the tabs that are open."""
    current, outcome, talk = controls.new_current(), gr.State(None), gr.State(())
    with gr.Row(equal_height=False):
        with gr.Column(scale=8, min_width=300):
            with gr.Row(elem_classes="chats"):
                chatbots = [_chatbot(0), _chatbot(1)]
            status = gr.HTML(controls.thanks(""))
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

    def answer(before: Talk, said: str, values: Sequence[Any], retries: int = 0) -> Iterator[dict]:
        """Adds a turn and writes its answers."""
        path, prompt, running, *rest = values
        if not said.strip():
            yield {status: problem("Please write a message first.")}
            return
        who, how = controls.sides(*rest[:4]), controls.settings(*rest[4:])
        how["seed"] += retries
        after = (*before, Turn(said.strip()))
        asked = [spoken(after, side, prompt) for side in range(len(who))]
        first, turn = True, running.turn()
        for state in tasks.chat(asked, path, who, how, running):
            if running.turns != turn:  # undone, or another answer was asked for meanwhile
                yield {stop: gr.skip()}  # Gradio sends the last update twice
                return
            update: dict = {text: ""} if first and not state.error else {}
            first = False
            if state.error:
                update |= {talk: before, text: said} | _shown(chatbots, before, who)
            else:
                after = (*before, Turn(said.strip(), state.answers, retries))
                update |= {talk: after} | _shown(chatbots, after, who)
            yield update | {
                outcome: state,
                status: status_html(state),
                stop: gr.Button(interactive=not state.done),
            }

    ended = {outcome: None, status: controls.thanks(""), stop: gr.update(interactive=False)}  # a Button would be built
    context = [picture, system, current, *model, *decoding]
    outputs = [*chatbots, talk, text, outcome, status, stop]

    def say(said: str, before: Talk, *values: Any) -> Iterator[dict]:
        yield from answer(before, said, values)

    def retry(event: gr.RetryData, before: Talk, *values: Any) -> Iterator[dict]:
        turn = _turn(event.index)
        if turn >= len(before):
            yield {status: problem(GONE)}
        else:
            yield from answer(before[:turn], before[turn].user, values, before[turn].retries + 1)

    def edit(event: gr.EditData, before: Talk, *values: Any) -> Iterator[dict]:
        yield from answer(before[: _turn(event.index)], str(event.value).replace(AS_WRITTEN, ""), values)

    def undo(event: gr.UndoData, before: Talk, running: Any, *model: Any) -> dict:
        running.leave()
        turn = _turn(event.index)
        if turn >= len(before):
            return ended | {status: problem(GONE)}
        kept = before[:turn]
        return ended | {talk: kept, text: before[turn].user} | _shown(chatbots, kept, controls.sides(*model))

    def start(event: gr.SelectData, before: Talk, *values: Any) -> Iterator[dict]:
        yield from answer(before, event.value["text"], values)

    def forget(running: Any, *model: Any) -> dict:
        running.leave()
        return ended | {talk: ()} | _shown(chatbots, (), controls.sides(*model))

    def compared(before: Talk, *model: Any) -> dict:
        return _shown(chatbots, before, controls.sides(*model))

    def judge(side: int) -> Callable[..., str]:
        def judged(event: gr.LikeData, shown: Talk) -> str:
            turn = _turn(event.index)
            found = shown[turn].answer(side) if turn < len(shown) else None
            if found is None:
                return controls.thanks("There is no answer to judge yet.")
            verdicts: Mapping[Any, str] = {True: "up", False: "down", "Like": "up", "Dislike": "down"}
            verdict = verdicts.get(event.liked)
            return controls.thanks(tasks.judge(found, verdict) if verdict else "The judgement was taken back.")

        return judged

    quiet = controls.QUIET
    answering = [
        gr.on([send.click, text.submit], say, [text, talk, *context], outputs, trigger_mode="multiple", **quiet)
    ]
    for side, chatbot in enumerate(chatbots):
        answering.append(chatbot.retry(retry, [talk, *context], outputs, **quiet))
        answering.append(chatbot.edit(edit, [talk, *context], outputs, **quiet))
        answering.append(chatbot.example_select(start, [talk, *context], outputs, **quiet))
        chatbot.undo(undo, [talk, current, *model], outputs, **quiet)
        if tasks.feedback is not None:
            chatbot.like(judge(side), talk, status, queue=False, **quiet)
    for event in answering:
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


def _shown(chatbots: Sequence[gr.Chatbot], talk: Talk, who: Sequence[Side]) -> dict:
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
