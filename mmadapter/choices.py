"""How likely a model finds each of several given answers: multiple choice by log-likelihood.

Shapes: B questions, E endings of all questions together, T tokens of the longest ending, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadapter import scienceqa
from mmadapter.adapter import Prompts, select_prompts
from mmadapter.llama import Llama
from mmadapter.prompts import question_text, template
from mmadapter.sampling import prefill
from mmadapter.scienceqa import Problem, parse_format, prompt_text

if TYPE_CHECKING:
    from mmadapter.checkpoint import AdapterFile


@dataclass(frozen=True)
class Scores:
    """The endings of one question.

    Attributes:
        total: Log-probability of each ending, its tokens' summed, float32 [number of endings].
        tokens: How many tokens each ending has, [number of endings].
    """

    total: Tensor
    tokens: Tensor

    def mean(self) -> Tensor:
        """Log-probability a token: long endings are not at a disadvantage."""
        return self.total / self.tokens


def choice_texts(about: AdapterFile | None, question: str, choices: Sequence[str]) -> tuple[str, list[str]]:
    """A question as text to read, and each choice as text to answer, as the adapter was trained to have them.

    An adapter of ScienceQA has its own prompt format; one that was trained on questions without options is asked
    without them; every other model, the base (None) included, is shown the options.
    """
    form = template(about.template if about is not None else "plain")
    task = about.task if about is not None else ""
    endings = list(choices)
    if task == "scienceqa":
        problem = Problem(pid="", question=question, choices=tuple(choices), answer=0)
        text = prompt_text(problem, parse_format(about.training.get("format", "QCM-A")))
        endings = scienceqa.choice_texts(problem, about.training.get("answer_form", "letter"))
    else:
        text = question_text(question, None if task == "answer" else choices)
    return form.render(text), [(form.separator or " ") + ending for ending in endings]


@torch.inference_mode()
def log_likelihoods(
    llama: Llama,
    rows: Sequence[Sequence[int]],
    endings: Sequence[Sequence[Sequence[int]]],
    prompts: Prompts | None = None,
) -> list[Scores]:
    """Scores the endings of a batch of questions; each question is read once, whatever the number of its endings.

    Memory grows with the number of questions, and with the number of endings times the length of the longest question.

    Args:
        rows: Tokens of each question.
        endings: For each question its possible endings, as tokens.
        prompts: Adaption prompts, of batch size 1 or len(rows).

    Raises:
        ValueError: A question or an ending is empty, a question has no ending, the two lists differ in length, or
            question and ending together are too long for the model's context.
    """
    _check(llama, rows, endings)
    flat = [list(ending) for group in endings for ending in group]
    longest = max(len(ending) for ending in flat)
    most = max(map(len, endings))
    cache, valid, logits = prefill(llama, rows, longest - 1, prompts, most)  # the last token of an ending is not read
    owner = torch.tensor([row for row, group in enumerate(endings) for _ in group], device=llama.device)  # [E]
    lengths = torch.tensor([len(ending) for ending in flat], device=llama.device)  # [E]
    tokens = torch.tensor([ending + [0] * (longest - len(ending)) for ending in flat], device=llama.device)  # [E, T]
    total = _log_probabilities(logits, owner, tokens[:, 0])  # [E]
    if longest > 1:
        cache.select(owner)
        if valid is not None:  # the padding on the right of an ending counts as real: nothing real looks that far
            valid = F.pad(valid[owner], (0, longest - 1), value=True)
        hidden = llama.hidden(tokens[:, :-1], prompts=select_prompts(prompts, owner), cache=cache, valid=valid)
        real = torch.arange(1, longest, device=llama.device) < lengths[:, None]  # [E, T - 1]
        logits = llama.logits(hidden[real])  # [real tokens, V]
        each = _log_probabilities(logits, torch.arange(len(logits), device=llama.device), tokens[:, 1:][real])
        total = total + torch.zeros(real.shape, device=llama.device).masked_scatter(real, each).sum(1)
    counts = [len(group) for group in endings]
    return [Scores(*pair) for pair in zip(total.split(counts), lengths.split(counts), strict=True)]


def _log_probabilities(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """log softmax of the rows of index `rows` [n] of logits [B, V], at `tokens` [n]: float32 [n]."""
    return logits[rows, tokens] - logits.logsumexp(-1)[rows]


def _check(llama: Llama, rows: Sequence[Sequence[int]], endings: Sequence[Sequence[Sequence[int]]]) -> None:
    if not rows or not all(rows):
        raise ValueError("there must be at least one question, and every question needs at least one token")
    if len(rows) != len(endings):
        raise ValueError(f"{len(rows)} questions need as many lists of endings, got {len(endings)}")
    if not all(group and all(group) for group in endings):
        raise ValueError("every question needs at least one ending, and every ending at least one token")
    length = max(len(row) + max(map(len, group)) for row, group in zip(rows, endings, strict=True))
    if length > llama.config.context:
        raise ValueError(
            f"question and ending have {length} tokens and the model's context holds {llama.config.context}; "
            "shorten them"
        )
