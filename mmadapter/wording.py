"""How each task is put to a model: the words of its prompt, as tokens, and its decoding settings.

An adapter is asked in the template it was trained with, the base model in its own; no model is needed for any of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mmadapter.choices import choice_texts
from mmadapter.prompts import CAPTION_INSTRUCTION, Template, question_text, template
from mmadapter.sampling import Sampling
from mmadapter.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mmadapter.checkpoint import AdapterFile

DEFAULTS = {
    "caption": {"max_new_tokens": 30, "stop": ("\n",)},
    "answer": {"max_new_tokens": 30, "stop": ("\n",)},
    # PAPER: decoding of instructions. The penalty is ours: without it small models say one thing again and again.
    "chat": {"max_new_tokens": 256, "temperature": 0.1, "top_p": 0.75, "repetition_penalty": 1.1},
}


class Prepared(NamedTuple):
    """A task as it is put to the model; what the adapter adds comes from `Session.prompts`.

    Attributes:
        tokens: Of the prompt.
        sampling: Decoding settings.
    """

    tokens: list[int]
    sampling: Sampling


def prepare(
    tokenizer: Tokenizer,
    about: AdapterFile | None,
    task: str,
    settings: Mapping[str, object],
    *,
    examples: Sequence[str] = (),
    question: str = "",
    messages: str | Sequence[Mapping] = (),
) -> Prepared:
    """A task in the words of the adapter that is asked, or of the base (`about` is None), with its settings.

    Args:
        task: "caption", "answer" or "chat".
        settings: See `task_sampling`.
        examples: Captions put before the question, of a caption.
        question: Of an answer.
        messages: Of a chat, see `chat_tokens`.

    Raises:
        ValueError: The task or a setting is unknown, a setting is out of range, the question is empty or the
            conversation is none.
    """
    sampling = task_sampling(about, task, settings)
    if task == "caption":
        return Prepared(caption_tokens(tokenizer, about, examples), sampling)
    if task == "answer":
        return Prepared(answer_tokens(tokenizer, about, question), sampling)
    return Prepared(chat_tokens(tokenizer, about, messages), sampling)


def caption_tokens(tokenizer: Tokenizer, about: AdapterFile | None, examples: Sequence[str] = ()) -> list[int]:
    """The prompt of a caption, behind `examples` of captions."""
    form = _template(about, "plain")
    question = form.render(CAPTION_INSTRUCTION)
    shots = "".join(f"{question}{form.separator}{example}\n" for example in examples)
    return tokenizer.encode(shots + question)


def answer_tokens(tokenizer: Tokenizer, about: AdapterFile | None, question: str) -> list[int]:
    """The prompt of a question.

    Raises:
        ValueError: The question is empty.
    """
    check_question(question)
    return tokenizer.encode(_template(about, "plain").render(question_text(question)))


def choice_tokens(
    tokenizer: Tokenizer, about: AdapterFile | None, question: str, choices: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The prompt of a question and, for each of its choices, the tokens of that answer.

    Raises:
        ValueError: The question is empty, there are not two choices, or one is empty.
    """
    check_question(question)
    if isinstance(choices, str) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"choices must be a list of texts that are not empty, got {choices!r}")
    if len(choices) < 2:
        raise ValueError(f"choices must be two or more, got {len(choices)}")
    text, endings = choice_texts(about, question, choices)
    # An adapter has learnt to stop after its answer; what the base would write next is not known.
    end = [tokenizer.eos_id] if about is not None else []
    return tokenizer.encode(text), [[*tokenizer.encode(ending, bos=False), *end] for ending in endings]


def check_question(question: str) -> None:
    """Raises ValueError where a question is empty."""
    if not question.strip():
        raise ValueError("the question is empty")


def chat_tokens(tokenizer: Tokenizer, about: AdapterFile | None, messages: str | Sequence[Mapping]) -> list[int]:
    """The prompt of a conversation.

    Without an adapter, the model's own chat template is used where it has one. An adapter is asked in the template it
    was trained with: the last message is the instruction and earlier ones are its input.

    Raises:
        ValueError: A message is not of that form, or the last one is not the user's or empty.
    """
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f'a message must be {{"role": TEXT, "content": TEXT}}, got {turn!r}')
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise ValueError("a conversation must end with a message of the user that is not empty")
    if about is None and tokenizer.chat_template is not None:
        return tokenizer.encode(tokenizer.render_chat(turns), bos=False, special=True)
    earlier = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns[:-1])
    return tokenizer.encode(_template(about, "alpaca").render(turns[-1]["content"], earlier))


def written_tokens(tokenizer: Tokenizer, about: AdapterFile | None, task: str, text: str) -> list[int]:
    """Tokens of a text as the model would have written it behind the prompt of a task."""
    if task == "chat" and about is None and tokenizer.chat_template is not None:
        return tokenizer.encode(text, bos=False)
    form = _template(about, "alpaca" if task == "chat" else "plain")
    return tokenizer.encode(form.separator + text, bos=False)


def task_sampling(about: AdapterFile | None, task: str, settings: Mapping[str, object]) -> Sampling:
    """Decoding settings: those given, then the adapter's own, then the task's.

    Raises:
        ValueError: An unknown task or setting, or a setting out of range.
    """
    if task not in DEFAULTS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(DEFAULTS)}")
    trained_for = {"instruct": "chat"}.get(about.task, about.task) if about is not None else None
    own = about.generation if trained_for == task else {}
    given = {key: value for key, value in settings.items() if value is not None}
    fields = {field.name for field in dataclasses.fields(Sampling)}
    unknown = sorted((given.keys() | own.keys()) - fields)
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(sorted(fields))}")
    if given.get("temperature") and "beams" not in given:
        own = {**own, "beams": 1}  # who asks for a temperature wants to sample
    if given.get("beams", 1) != 1 and "temperature" not in given:
        own = {**own, "temperature": 0.0}  # and who asks for beams does not
    return Sampling(**(DEFAULTS[task] | own | given))


def tidy(task: str, text: str) -> str:
    """A generated text as it is shown: a caption on one line, whatever was generated, any other text without the white
    space at its ends. Of a text that grows, the tidy one grows, too."""
    return " ".join(text.split()) if task == "caption" else text.strip()


def _template(about: AdapterFile | None, otherwise: str) -> Template:
    return template(about.template if about is not None else otherwise)
