"""Decoding: greedy, sampling and beam search over a batch, with a key/value cache.

A batch is decoded by `Sampler`, a token a step, or by `beam_search`; `generate` gives whole texts, `stream` pieces.
Adaption prompts come in as keys and values (`adapter.Prompts`) that are computed once and stay for the whole text.

Shapes: B rows, W beams a row, T prompt tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadapter.adapter import Prompts, select_prompts
from mmadapter.llama import KVCache, Llama
from mmadapter.tokenizer import StreamDecoder, Tokenizer

MIN_TEMPERATURE = 1e-30  # what a lower one counts as: it must not be 0 in float32


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


def prefill(
    llama: Llama, rows: Sequence[Sequence[int]], new_tokens: int, prompts: Prompts | None
) -> tuple[KVCache, Tensor | None, Tensor]:
    """Reads the prompts of a batch, padded on the left.

    Returns:
        The cache with room for `new_tokens` more, the mask of real tokens [B, T] (None where no row is padded), and the
        logits of each row's first new token, [B, V].

    Raises:
        ValueError: There is no row, or a row is empty.
    """
    if not rows or not all(rows):
        raise ValueError("every row of a batch needs at least one token")
    longest = max(len(row) for row in rows)
    padded = [[0] * (longest - len(row)) + list(row) for row in rows]
    tokens = torch.tensor(padded, device=llama.device)  # [B, T]
    valid = None
    if any(len(row) < longest for row in rows):
        lengths = torch.tensor([len(row) for row in rows], device=llama.device)
        valid = torch.arange(longest, device=llama.device) >= longest - lengths[:, None]  # [B, T]
    cache = llama.new_cache(len(rows), longest + new_tokens)
    hidden = llama.hidden(tokens, prompts=prompts, cache=cache, valid=valid)
    return cache, valid, llama.logits(hidden[:, -1])


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


def _longer(valid: Tensor | None) -> Tensor | None:
    """The mask with one more real token a row."""
    return None if valid is None else F.pad(valid, (0, 1), value=True)


class Sampler:
    """A batch being decoded one token a step; finished rows leave it, so that they cost nothing.

    Args:
        rows: Prompt tokens of each row.
        prompts: Adaption prompts of the batch, of batch size 1 or len(rows).
        seeds: Where each row's stream of random numbers starts; None is `sampling.seed` for all, so that a row draws
            the same tokens in any batch.

    Raises:
        ValueError: There is no row, or one is empty or too long for the model's context.
    """

    def __init__(
        self,
        llama: Llama,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        prompts: Prompts | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.llama, self.sampling, self.prompts = llama, sampling, prompts
        self.active = list(range(len(rows)))
        self.limits = row_limits(llama, rows, sampling)
        self.cache, self.valid, self.logits = prefill(llama, rows, max(self.limits, default=0), prompts)
        self.seen = [list(row) for row in rows]
        seeds = [sampling.seed] * len(rows) if seeds is None else seeds
        self.generators = [torch.Generator(llama.device).manual_seed(seed) for seed in seeds]
        self.last: Tensor | None = None

    def step(self) -> dict[int, int]:
        """Chooses the next token of every active row: {row: token}."""
        if self.last is not None:
            hidden = self.llama.hidden(
                self.last[:, None], prompts=self.prompts, cache=self.cache, valid=_longer(self.valid)
            )
            self.valid = _longer(self.valid)
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
        sampling = self.sampling
        logits = _penalised(logits, [self.seen[row] for row in self.active], sampling.repetition_penalty)
        if sampling.temperature == 0:
            return logits.argmax(-1)
        # The largest is 0 before it is divided, so that no temperature, however low, makes it infinite.
        scaled = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, MIN_TEMPERATURE)
        probabilities = _nucleus(scaled, sampling.top_k, sampling.top_p)
        draws = [
            torch.multinomial(probabilities[index], 1, generator=self.generators[row])
            for index, row in enumerate(self.active)
        ]
        return torch.cat(draws)


def _penalised(logits: Tensor, seen: Sequence[list[int]], penalty: float) -> Tensor:
    """Logits [B, V] under the repetition penalty, for the tokens that each row has seen."""
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        before = row[ids]
        row[ids] = torch.where(before > 0, before / penalty, before * penalty)
    return logits


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


def beam_search(
    llama: Llama,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    prompts: Prompts | None = None,
    cancelled: Event | None = None,
) -> list[tuple[list[int], bool]]:
    """For each row the finished beam of the highest log-probability / length ** length_penalty.

    The length counts the stop token. A row ends when it has W finished beams and its best live one, at its present
    length, does not beat the worst of them; a row without a finished beam at the end gives its best live one.

    Returns:
        For each row its tokens without the stop token, and whether a stop token ended them.

    Raises:
        ValueError: A row is empty, or too long for the model's context.
    """
    W = sampling.beams
    limits = row_limits(llama, rows, sampling)
    cache, valid, logits = prefill(llama, rows, max(limits, default=0), prompts)
    V = logits.shape[-1]
    stops = torch.tensor(sorted(stop_ids), device=llama.device, dtype=torch.long)
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in rows]  # best first, W at most
    live = [[[] for _ in range(W)] for _ in rows]  # the tokens of each row's beams, best first
    active = list(range(len(rows)))
    # All beams of a row are the same at the start: only the first may be extended. Where that leaves too few, beams of
    # log-probability -inf fill up, which nothing comes of.
    scores = torch.full((len(rows), W), float("-inf"), device=llama.device)
    scores[:, 0] = 0.0
    order = torch.arange(len(rows), device=llama.device).repeat_interleave(W)
    logits = logits[order]  # [B * W, V]
    for length in range(1, max(limits) + 1):
        if cancelled is not None and cancelled.is_set():
            break
        logits = _penalised(
            logits, [[*rows[row], *beam] for row in active for beam in live[row]], sampling.repetition_penalty
        )
        total = (scores[..., None] + logits.log_softmax(-1).view(len(active), W, V)).flatten(1)  # [B, W * V]
        # Every beam has a candidate for each stop token: of W for each stop and W more, at least W go on.
        best, index = total.topk(min(W * (len(stops) + 1), W * V), dim=-1)
        stopped = torch.isin(index % V, stops).tolist()
        goes_on, next_scores, next_tokens, parents = [], [], [], []
        for place, row in enumerate(active):
            beams = []
            for rank, (score, chosen) in enumerate(zip(best[place].tolist(), index[place].tolist(), strict=True)):
                parent, token = divmod(chosen, V)
                if not stopped[place][rank]:
                    beams.append((score, parent, token))
                elif rank < W and score > float("-inf"):
                    finished[row].append((score / length**sampling.length_penalty, live[row][parent]))
            beams = beams[:W]
            live[row] = [[*live[row][parent], token] for _, parent, token in beams]
            finished[row] = sorted(finished[row], key=lambda item: -item[0])[:W]
            open_end = len(finished[row]) < W or finished[row][-1][0] < beams[0][0] / length**sampling.length_penalty
            if open_end and length < limits[row]:
                goes_on.append(row)
                next_scores.append([score for score, _, _ in beams])
                next_tokens += [token for _, _, token in beams]
                parents += [place * W + parent for _, parent, _ in beams]
        active = goes_on
        if not active:
            break
        scores = torch.tensor(next_scores, device=llama.device)
        parents = torch.tensor(parents, device=llama.device)
        # After the prefill a row has one line in the cache, which all its beams come from; later it has W.
        lines = order[parents] if length == 1 else parents
        cache.select(lines)
        prompts = select_prompts(prompts, lines)
        valid = None if valid is None else _longer(valid[lines])
        step = torch.tensor(next_tokens, device=llama.device)[:, None]  # [B * W, 1]
        logits = llama.logits(llama.hidden(step, prompts=prompts, cache=cache, valid=valid)[:, -1])
    return [(found[0][1], True) if found else (beams[0], False) for found, beams in zip(finished, live, strict=True)]


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
    texts = [_Text(tokenizer, sampling.stop) for _ in rows]
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
    text = _Text(tokenizer, sampling.stop)
    sent = 0
    for _, _, finish in _decode(llama, tokenizer, [row], sampling, prompts, cancelled, [text]):
        whole = text.finish() if finish is not None else text.text
        if len(whole) > sent:
            yield whole[sent:]
            sent = len(whole)


class _Text:
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
    texts: Sequence[_Text],
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
    text = _Text(tokenizer, sampling.stop)
    stopped = any(text.push(token) for token in tokens)
    finish = "cancelled" if cancelled is not None and cancelled.is_set() else "length"
    return Generated(text.finish(), tokens, "stop" if stopped or ended else finish)
