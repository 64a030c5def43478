"""From token rows to answers: `generate` gives whole texts, `stream` pieces.

A batch is decoded a token a step by `sampling.Sampler`, or by `beam.beam_search`. What an adapter adds comes in ready
for the model (`adapter.Prompts`); it is computed once and stays for the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

import torch

from mmadapter.adapter import Prompts
from mmadapter.beam import beam_search
from mmadapter.llama import Llama
from mmadapter.sampling import Sampler, Sampling, row_limits
from mmadapter.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        text: Without stop texts, special tokens and white space at its beginning.
        tokens: Generated ids, without the stop token.
        finish: "stop" (stop token or stop text), "length" (max_new_tokens or the end of the context) or "cancelled".
    """

    text: str
    tokens: list[int]
    finish: str


class StopText:
    """Cuts a growing text at the stop text that is complete first, and holds back what may become one.

    Of two that are complete at once the longer counts, so that the result does not depend on how the text is cut into
    pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Takes the next piece and returns what is sure to be part of the text."""
        text = self.held + piece
        places = [(text.find(stop), stop) for stop in self.stop]
        found = [(place + len(stop), place) for place, stop in places if place >= 0]  # end, start
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and did not become a stop text."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@torch.inference_mode()
def generate(
    llama: Llama,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    prompts: Prompts | None = None,
    cancelled: Event | None = None,
) -> list[Generated]:
    """Answers a batch of prompts.

    Args:
        rows: Prompt tokens of each row; they may differ in length.
        prompts: Adaption prompts, of batch size 1 or len(rows).
        cancelled: Set from another thread to stop after the token in work; the texts so far are returned.

    Raises:
        ValueError: A row is empty, or too long for the model's context.
    """
    if sampling.beams > 1:
        found = beam_search(llama, rows, sampling, tokenizer.stop_ids, prompts, cancelled)
        return [_beam_result(tokenizer, tokens, ended, sampling, cancelled) for tokens, ended in found]
    results: list[Generated | None] = [None] * len(rows)
    tokens: list[list[int]] = [[] for _ in rows]
    texts = [AnswerText(tokenizer, sampling.stop) for _ in rows]
    for row, token, finish in _decode(llama, tokenizer, rows, sampling, prompts, cancelled, texts):
        if token is not None:
            tokens[row].append(token)
        if finish is not None:
            results[row] = Generated(texts[row].finish(), tokens[row], finish)
    return [result for result in results if result is not None]


def stream(
    llama: Llama,
    tokenizer: Tokenizer,
    row: Sequence[int],
    sampling: Sampling,
    prompts: Prompts | None = None,
    cancelled: Event | None = None,
) -> Iterator[str]:
    """Answers one prompt piece by piece; no piece ends inside a character or inside what may be a stop text.

    Raises:
        ValueError: The row is too long for the model's context, or beams were asked for.
    """
    if sampling.beams > 1:
        raise ValueError("beam search decides on the whole text and cannot stream; set beams to 1")
    row_limits(llama, [row], sampling)
    return _pieces(llama, tokenizer, row, sampling, prompts, cancelled)


@torch.inference_mode()
def _pieces(
    llama: Llama,
    tokenizer: Tokenizer,
    row: Sequence[int],
    sampling: Sampling,
    prompts: Prompts | None,
    cancelled: Event | None,
) -> Iterator[str]:
    text = AnswerText(tokenizer, sampling.stop)
    sent = 0
    for _, _, finish in _decode(llama, tokenizer, [row], sampling, prompts, cancelled, [text]):
        whole = text.finish() if finish is not None else text.text
        if len(whole) > sent:
            yield whole[sent:]
            sent = len(whole)


class AnswerText:
    """The text of one row, from its tokens; white space before its first word is dropped.

    Models put a line break before an answer, which as a stop text would end it before it has begun.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.decoder, self.stop, self.text, self.begun = StreamDecoder(tokenizer), StopText(stop), "", False

    def push(self, token: int) -> bool:
        """Adds a token; True when a stop text has ended the answer."""
        piece = self.decoder.push(token)
        piece = piece if self.begun else piece.lstrip()
        self.begun = self.begun or bool(piece)
        self.text += self.stop.push(piece)
        return self.stop.stopped

    def finish(self) -> str:
        if not self.stop.stopped:
            self.text += self.stop.push(self.decoder.flush())
            self.text += self.stop.flush()
        return self.text


def _decode(
    llama: Llama,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    prompts: Prompts | None,
    cancelled: Event | None,
    texts: Sequence[AnswerText],
) -> Iterator[tuple[int, int | None, str | None]]:
    """Events of a batch: (row, new token or None, how the row ended or None)."""
    sampler = Sampler(llama, rows, sampling, prompts)
    for count in range(1, max(sampler.limits) + 1):
        if cancelled is not None and cancelled.is_set():
            break
        finished = set()
        for row, token in sampler.step().items():
            if token in tokenizer.stop_ids:
                finished.add(row)
                yield row, None, "stop"
            elif texts[row].push(token):
                finished.add(row)
                yield row, token, "stop"
            elif count == sampler.limits[row]:
                finished.add(row)
                yield row, token, "length"
            else:
                yield row, token, None
        sampler.drop(finished)
        if not sampler.active:
            return
    for row in sampler.active:
        yield row, None, "cancelled"


def _beam_result(
    tokenizer: Tokenizer, tokens: list[int], ended: bool, sampling: Sampling, cancelled: Event | None
) -> Generated:
    text = AnswerText(tokenizer, sampling.stop)
    stopped = any(text.push(token) for token in tokens)
    finish = "cancelled" if cancelled is not None and cancelled.is_set() else "length"
    return Generated(text.finish(), tokens, "stop" if stopped or ended else finish)
