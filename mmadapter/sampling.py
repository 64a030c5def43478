"""Decoding settings, and decoding a batch a token a step: greedy or sampling, with a key/value cache.

What an adapter adds comes in ready for the model (`adapter.Prompts`); it is computed once and stays for the whole text.

Shapes: B rows, T prompt tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadapter.adapter import Prompts, select_prompts
from mmadapter.llama import KVCache, Llama

MOST_BEAMS = 1000  # far beyond what helps; memory grows with them
MIN_TEMPERATURE = 1e-30  # what a lower one counts as: it must not be 0 in float32
GROUP = 128  # tokens that are searched together for the largest logits
SHARED = 32  # tokens from which on the common beginning of a batch is read by itself


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Longest text, in tokens.
        temperature: 0 takes the likeliest token (greedy).
        top_p: Nucleus: the likeliest tokens that together have this probability (arXiv 1904.09751).
        top_k: Only that many likeliest tokens; 0 is all.
        repetition_penalty: Logits of tokens that have occurred, in the prompt too, are divided by it, or multiplied if
            negative (arXiv 1909.05858); 1 is none.
        beams: Width of the beam search; 1 is none. It is deterministic and takes no temperature, top_p or top_k.
        length_penalty: A finished beam's log-probability is divided by its length in tokens to this power.
        seed: Of the sampling; every row of a batch draws from a stream of its own that starts there.
        stop: Texts that end the answer; they are not part of it. A beam goes on past one and is cut there at the end.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("beams", 1), ("top_k", 0), ("seed", -(2**63))):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value < 2**63:
                raise ValueError(f"{name} must be a whole number from {low}, got {value!r}")
        if self.beams > MOST_BEAMS:
            raise ValueError(f"beams must be at most {MOST_BEAMS}, got {self.beams}")
        # Written so that NaN, which compares as false, is refused.
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive and finite, got {self.repetition_penalty}")
        if not -10 <= self.length_penalty <= 10:
            raise ValueError(f"length_penalty must be from -10 to 10, got {self.length_penalty}")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beam search takes no temperature; set beams to 1 or temperature to 0")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a list of texts that are not empty, got {self.stop!r}")


def prefill(
    llama: Llama, rows: Sequence[Sequence[int]], new_tokens: int, prompts: Prompts | None, lines: int = 1
) -> tuple[KVCache, Tensor | None, Tensor]:
    """Reads the prompts of a batch. What all rows begin with, such as examples, is read once; then padding follows.

    Args:
        new_tokens: That each row will have room for.
        lines: That each row will become, beams or endings (`KVCache.select`).

    Returns:
        The cache with room for `new_tokens` more, the mask of real tokens [B, T] (None where no row is padded), and the
        logits of each row's first new token, [B, V].

    Raises:
        ValueError: There is no row, or a row is empty.
    """
    if not rows or not all(rows):
        raise ValueError("every row of a batch needs at least one token")
    B, longest = len(rows), max(len(row) for row in rows)
    shared = _shared_length(rows) if prompts is None or prompts.batch == 1 else 0
    lengths = torch.tensor([len(row) for row in rows], device=llama.device)
    valid = None
    if int(lengths.min()) < longest:
        places = torch.arange(longest, device=llama.device)
        valid = (places < shared) | (places >= longest - lengths[:, None] + shared)  # [B, T]
    cache = llama.new_cache(1 if shared else B, longest + new_tokens, most=B * lines)
    if shared:
        llama.hidden(torch.tensor([rows[0][:shared]], device=llama.device), prompts=prompts, cache=cache)
        cache.select(torch.zeros(B, dtype=torch.long, device=llama.device))
    padded = [[0] * (longest - len(row)) + list(row[shared:]) for row in rows]
    hidden = llama.hidden(torch.tensor(padded, device=llama.device), prompts=prompts, cache=cache, valid=valid)
    return cache, valid, llama.logits(hidden[:, -1])


def _shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, the last of a row left to be read; 0 where they are too few to pay."""
    if len(rows) == 1:
        return 0
    first, *_, last = sorted(map(list, rows))  # what these two share, all share
    most = min(len(row) for row in rows) - 1
    shared = next((place for place in range(most) if first[place] != last[place]), most)
    return shared if shared >= SHARED else 0


def row_limits(llama: Llama, rows: Sequence[Sequence[int]], sampling: Sampling) -> list[int]:
    """The most new tokens of each row: `max_new_tokens`, or fewer where the model's context has no room for them.

    Raises:
        ValueError: A row leaves no room for one token.
    """
    context = llama.config.context
    longest = max((len(row) for row in rows), default=0)
    if longest >= context:
        raise ValueError(
            f"the text has {longest} tokens and the model's context holds {context}, the answer included; shorten it"
        )
    return [min(sampling.max_new_tokens, context - len(row)) for row in rows]


def longer(valid: Tensor | None) -> Tensor | None:
    """The mask with one more real token a row."""
    return None if valid is None else F.pad(valid, (0, 1), value=True)


class Sampler:
    """A batch being decoded one token a step; finished rows leave it, so that they cost nothing.

    Args:
        rows: Prompt tokens of each row.
        prompts: What an adapter adds to the batch, of batch size 1 or len(rows).

    Raises:
        ValueError: There is no row, or one is empty or too long for the model's context.
    """

    def __init__(
        self,
        llama: Llama,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        prompts: Prompts | None = None,
    ) -> None:
        self.llama, self.sampling, self.prompts = llama, sampling, prompts
        self.active = list(range(len(rows)))
        self.limits = row_limits(llama, rows, sampling)
        self.cache, self.valid, self.logits = prefill(llama, rows, max(self.limits, default=0), prompts)
        self.seen = [list(row) for row in rows]
        # One for each row, so that a row draws the same tokens in any batch.
        self.generators = [torch.Generator(llama.device).manual_seed(sampling.seed) for _ in rows]
        self.last: Tensor | None = None

    def step(self) -> dict[int, int]:
        """Chooses the next token of every active row: {row: token}."""
        if self.last is not None:
            hidden = self.llama.hidden(
                self.last[:, None], prompts=self.prompts, cache=self.cache, valid=longer(self.valid)
            )
            self.valid = longer(self.valid)
            self.logits = self.llama.logits(hidden[:, -1])
        self.last = self._choose(self.logits)
        chosen = self.last.tolist()
        for row, token in zip(self.active, chosen, strict=True):
            self.seen[row].append(token)
        return dict(zip(self.active, chosen, strict=True))

    def drop(self, finished: set[int]) -> None:
        """Takes rows out of the batch."""
        if not finished:
            return
        kept = [index for index, row in enumerate(self.active) if row not in finished]
        self.active = [self.active[index] for index in kept]
        if not kept:
            return
        rows = torch.tensor(kept, device=self.llama.device)
        self.cache.select(rows)
        self.prompts = select_prompts(self.prompts, rows)
        self.valid = None if self.valid is None else self.valid[rows]
        self.last = self.last[rows]

    def _choose(self, logits: Tensor) -> Tensor:
        """[B, V] -> token ids [B]."""
        seen, generators = zip(*((self.seen[row], self.generators[row]) for row in self.active), strict=True)
        return choose(logits, self.sampling, seen, generators)


def choose(
    logits: Tensor, sampling: Sampling, seen: Sequence[list[int]], generators: Sequence[torch.Generator]
) -> Tensor:
    """The next token of each row, [B].

    Args:
        logits: [B, V].
        seen: Tokens that each row has had, for the repetition penalty.
        generators: Of each row's draws.
    """
    logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The largest is 0 before it is divided, so that no temperature, however low, makes it infinite.
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, MIN_TEMPERATURE)
    probabilities = _nucleus(scaled, sampling.top_k, sampling.top_p)
    draws = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators, strict=True)]
    return torch.cat(draws)


def penalised(logits: Tensor, seen: Sequence[list[int]], penalty: float) -> Tensor:
    """Logits [B, V] under the repetition penalty, for the tokens that each row has seen."""
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        before = row[ids]
        row[ids] = torch.where(before > 0, before / penalty, before * penalty)
    return logits


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` logits of each row [B, V] and their token ids, both [B, count], largest first.

    They lie in the `count` groups with the largest maxima; to look there alone is, on a CPU, many times faster.
    """
    V = logits.shape[1]
    if logits.device.type != "cpu" or V % GROUP or count * GROUP >= V:
        return logits.topk(count, dim=-1)
    grouped = logits.view(len(logits), -1, GROUP)  # [B, groups, GROUP]
    groups = grouped.amax(-1).topk(count, dim=-1).indices  # [B, count]
    within = grouped.gather(1, groups[..., None].expand(-1, -1, GROUP)).flatten(1)  # [B, count * GROUP]
    values, places = within.topk(count, dim=-1)
    return values, groups.gather(1, places // GROUP) * GROUP + places % GROUP


def _nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [B, V] with all but the top-k, then all but the nucleus of top-p, set to zero."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, indices = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # what the likelier tokens have together
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, indices, ordered)
    return probabilities
