"""Continuous batching: texts join a running batch, and leave it, at any step.

Every row has its own prompt, adapter, image, strength and decoding settings, and gives the text that it gives alone
(`generate.generate`), but for the rounding of bfloat16. A row is read alone, then its keys and values move in beside
those of the others.

Shapes: B rows in the batch, S tokens of its longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmadapter.adapter import Prompts, stack_prompts
from mmadapter.generate import AnswerText
from mmadapter.llama import KVCache, Llama
from mmadapter.sampling import Sampling, choose, longer, prefill, row_limits
from mmadapter.tokenizer import Tokenizer

CHUNK = 128  # tokens that the cache grows by


@dataclass(frozen=True)
class Step:
    """What a step brought to one row.

    Attributes:
        row: As `RunningBatch.add` numbered it.
        text: The new piece of its text, perhaps empty; it never ends inside a character or what may be a stop text.
        tokens: Generated so far, without the stop token.
        finish: "stop", "length" or "cancelled" where the row has ended, as in `generate.Generated`; else None.
    """

    row: int
    text: str
    tokens: int
    finish: str | None


@dataclass
class _Row:
    number: int
    sampling: Sampling
    limit: int
    prompts: Prompts | None
    seen: list[int]
    read: int  # tokens in the cache
    generator: torch.Generator
    text: AnswerText
    cache: KVCache  # its own until it is in the batch's
    place: int  # in `cache`
    logits: Tensor | None  # of the first new token, [1, V], until it is chosen
    tokens: int = 0
    sent: int = 0  # characters

    def step(self, finish: str | None) -> Step:
        whole = self.text.finish() if finish is not None else self.text.text
        piece, self.sent = whole[self.sent :], len(whole)
        return Step(self.number, piece, self.tokens, finish)


class RunningBatch:
    """The rows being written; `len` is their number."""

    def __init__(self, llama: Llama, tokenizer: Tokenizer) -> None:
        self._llama, self._tokenizer = llama, tokenizer
        self._rows: list[_Row] = []  # those in the cache, in its order
        self._joining: list[_Row] = []  # those read and not yet in it
        self._cache: KVCache | None = None
        self._valid: Tensor | None = None  # True where the cache holds a real token, [B, S]; None: everywhere
        self._prompts: Prompts | None = None
        self._last: list[int] = []  # the token of each row that is not in the cache yet
        self._added = 0

    def __len__(self) -> int:
        return len(self._rows) + len(self._joining)

    @torch.inference_mode()
    def add(self, row_tokens: Sequence[int], sampling: Sampling, prompts: Prompts | None = None) -> int:
        """Reads a prompt; its text begins with the next `step`.

        Args:
            row_tokens: Of the prompt.
            prompts: What an adapter adds to this row, of batch size 1. Rows that are given the same object share it.

        Returns:
            The number of the row; no other row of this batch ever has the same.

        Raises:
            ValueError: The row is empty or too long for the model's context, or beams were asked for. The batch goes on
                as it was.
        """
        if sampling.beams > 1:
            raise ValueError("beam search decides on the whole text and cannot join a batch; set beams to 1")
        (limit,) = row_limits(self._llama, [row_tokens], sampling)
        cache, _, logits = prefill(self._llama, [row_tokens], min(limit, CHUNK), prompts)
        number, self._added = self._added, self._added + 1
        generator = torch.Generator(self._llama.device).manual_seed(sampling.seed)
        text = AnswerText(self._tokenizer, sampling.stop)
        seen = list(row_tokens)
        self._joining.append(_Row(number, sampling, limit, prompts, seen, len(seen), generator, text, cache, 0, logits))
        return number

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """Writes one token of every row; rows that end leave the batch."""
        logits = [self._read_last()] if self._rows else []
        rows = self._rows + self._joining
        logits = torch.cat([*logits, *(row.logits for row in self._joining)]) if rows else None  # [B, V]
        steps, kept, last = [], [], []
        for place, row in enumerate(rows):
            token = int(choose(logits[place : place + 1], row.sampling, [row.seen], [row.generator]))
            finish = self._take(row, token)
            steps.append(row.step(finish))
            if finish is None:
                kept.append(row)
                last.append(token)
        if len(kept) < len(rows) or self._joining:
            self._gather(kept)
        self._last = last
        return steps

    @torch.inference_mode()
    def cancel(self, row: int) -> Step | None:
        """Takes a row out; the step holds what is left of its text. None where the row has ended already."""
        for index, waiting in enumerate(self._joining):
            if waiting.number == row:
                del self._joining[index]
                return waiting.step("cancelled")
        for index, running in enumerate(self._rows):
            if running.number == row:
                del self._last[index]
                self._gather(self._rows[:index] + self._rows[index + 1 :], joined=False)
                return running.step("cancelled")
        return None

    def _take(self, row: _Row, token: int) -> str | None:
        """Adds a token to a row; how the row ended, None where it goes on."""
        row.seen.append(token)
        if token in self._tokenizer.stop_ids:
            return "stop"
        row.tokens += 1
        if row.text.push(token):
            return "stop"
        return "length" if row.tokens == row.limit else None

    def _read_last(self) -> Tensor:
        """Reads the last token of every row in the batch: logits of the next, [B, V]."""
        if self._cache.length == self._cache.capacity:
            self._gather(self._rows, joined=False)
        tokens = torch.tensor(self._last, device=self._llama.device)[:, None]  # [B, 1]
        self._valid = longer(self._valid)
        hidden = self._llama.hidden(tokens, prompts=self._prompts, cache=self._cache, valid=self._valid)
        for row in self._rows:
            row.read += 1
        return self._llama.logits(hidden[:, -1])

    def _gather(self, rows: list[_Row], joined: bool = True) -> None:
        """Makes `rows` the batch: keys and values aligned on the right, with no padding that all rows have.

        Args:
            joined: Whether those that were joining are among them, or have ended.
        """
        self._rows = rows
        if joined:
            self._joining = []
        if not rows:
            self._cache = self._valid = self._prompts = None
            return
        length = max(row.read for row in rows)
        cache = rows[0].cache
        # A row that is alone in its cache already stays where it is.
        if len(rows) > 1 or cache.keys.shape[1] > 1 or cache.length == cache.capacity:
            cache = self._llama.new_cache(len(rows), length + CHUNK)
            for place, row in enumerate(rows):
                begin, past = length - row.read, row.cache.length
                for new, old in ((cache.keys, row.cache.keys), (cache.values, row.cache.values)):
                    new[:, place, :, :begin] = 0  # masked, but a NaN would pass the mask
                    new[:, place, :, begin:length] = old[:, row.place, :, past - row.read : past]
            cache.length = length
        for place, row in enumerate(rows):
            row.cache, row.place, row.logits = cache, place, None
        self._cache = cache
        self._prompts = stack_prompts([row.prompts for row in rows])
        self._valid = None
        if any(row.read < length for row in rows):
            reads = torch.tensor([row.read for row in rows], device=self._llama.device)
            self._valid = torch.arange(length, device=self._llama.device) >= length - reads[:, None]  # [B, S]
