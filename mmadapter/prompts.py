"""The prompt templates of training, evaluation and the app: one place, so that what was trained is what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CAPTION_INSTRUCTION = "Generate caption for this image"  # PAPER: the instruction of LLaMA-Adapter's captions


@dataclass(frozen=True)
class Template:
    """How an instruction, and an input where there is one, become the text before the response.

    Attributes:
        with_input: Format of `{instruction}` and `{input}`.
        without_input: Format of `{instruction}` alone.
        separator: What stands between that text and the response; it is tokenised with the response.
    """

    with_input: str
    without_input: str
    separator: str = ""

    def render(self, instruction: str, context: str = "") -> str:
        """The text before the response."""
        if context:
            return self.with_input.format(instruction=instruction, input=context)
        return self.without_input.format(instruction=instruction)


TEMPLATES = {
    # The two prompts of Stanford Alpaca, which LLaMA-Adapter was trained with.
    "alpaca": Template(
        with_input=(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        ),
        without_input=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:"
        ),
    ),
    # The instruction alone: a tenth of Alpaca's tokens, for tasks of one fixed instruction.
    "plain": Template(with_input="{instruction}:\n{input}\n", without_input="{instruction}:", separator=" "),
    # A question, perhaps about a text, in the form that base models know.
    "question": Template(
        with_input="{input}\nQuestion: {instruction}\nAnswer:",
        without_input="Question: {instruction}\nAnswer:",
        separator=" ",
    ),
    # A text that is a whole prompt already, such as ScienceQA's (mmadapter/scienceqa.py).
    "bare": Template(with_input="{instruction}\n{input}", without_input="{instruction}", separator=" "),
}


def template(name: str) -> Template:
    """The template called `name`.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"no prompt template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def question_text(question: str, choices: Sequence[str] | None = None) -> str:
    """A question, with lettered options where there are some, as an instruction (PAPER: question, then options).

    The question is put as people write: a capital at the start, one blank between words, none before the question mark
    (some data sets, such as DAQUAR, have it otherwise).
    """
    words = " ".join(question.split()).replace(" ?", "?")
    asked = words[:1].upper() + words[1:]
    if not choices:
        return asked
    options = " ".join(f"({chr(ord('A') + index)}) {choice}" for index, choice in enumerate(choices))
    return f"{asked}\nOptions: {options}"
