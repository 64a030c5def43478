"""Rows that join and leave a running batch against the same rows alone; the adapters have gates that are not zero."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from test_generate import ROWS, make_llama, make_prompts, make_tokenizer, row_prompts

from mmadapter import continuous
from mmadapter.adapter import PromptKV, Prompts
from mmadapter.config import TUNES
from mmadapter.continuous import RunningBatch, Step
from mmadapter.generate import generate, stream
from mmadapter.llama import KVCache, Llama
from mmadapter.sampling import Sampling

SETTINGS = (
    {},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.3, "top_p": 0.8, "top_k": 9, "seed": 8},
    {"temperature": 1.0, "repetition_penalty": 1.3, "seed": -5},
    {"repetition_penalty": 1.4},
    {"stop": ("a", "END")},
    {"max_new_tokens": 3},
    {"max_new_tokens": 1},
)


def all_prompts(llama: Llama) -> list[Prompts | None]:
    """One for a row each: images, tuned with images, text, tuned text, another strength, the base."""
    images, tuned = make_prompts(llama, 4), make_prompts(llama, 4, TUNES[1])
    text, tuned_text = make_prompts(llama, None), make_prompts(llama, None, TUNES[1])
    third = row_prompts(images, 2)
    weaker = Prompts(tuple(half_as_strong(layer) for layer in third.layers), third.tuning)
    return [row_prompts(images, 0), row_prompts(tuned, 1), text, tuned_text, weaker, None, row_prompts(images, 3)]


def half_as_strong(layer: PromptKV | None) -> PromptKV | None:
    return None if layer is None else dataclasses.replace(layer, gate=0.5 * layer.gate)


def alone(llama: Llama, row: Sequence[int], sampling: Sampling, prompts: Prompts | None) -> tuple[str, int, str]:
    (answer,) = generate(llama, make_tokenizer(), [row], sampling, prompts)
    return answer.text, len(answer.tokens), answer.finish


class Collected:
    """Texts, counts and ends of the rows of a batch, by row."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.ends: dict[int, Step] = {}

    def take(self, steps: Sequence[Step]) -> None:
        for step in steps:
            assert step.row not in self.ends  # nothing comes after the end
            self.texts[step.row] = self.texts.get(step.row, "") + step.text
            if step.finish is not None:
                self.ends[step.row] = step

    def result(self, row: int) -> tuple[str, int, str]:
        return self.texts[row], self.ends[row].tokens, self.ends[row].finish


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_come_and_go_equal_rows_alone(seed, monkeypatch):
    """Joining shifts the keys of the shorter, leaving takes out padding, growing copies: a row must not notice."""
    monkeypatch.setattr(continuous, "CHUNK", 4)
    rng, llama = random.Random(seed), make_llama()
    prompts, batch, found = all_prompts(llama), RunningBatch(llama, make_tokenizer()), Collected()
    expected, running, cancelled, most = {}, [], set(), 0
    for turn in range(60):
        while turn < 40 and rng.random() < 0.4:
            tokens = [rng.randrange(23) for _ in range(rng.randrange(1, 12))]
            sampling = Sampling(**{"max_new_tokens": 15, **rng.choice(SETTINGS)})
            given = rng.choice(prompts)
            row = batch.add(tokens, sampling, given)
            assert row not in expected
            expected[row] = alone(llama, tokens, sampling, given)
            running.append(row)
        if running and rng.random() < 0.1:
            row = running.pop(rng.randrange(len(running)))
            found.take([batch.cancel(row)])
            assert batch.cancel(row) is None
            cancelled.add(row)
        most = max(most, len(batch))
        found.take(batch.step())
        running = [row for row in running if row not in found.ends]
        assert len(batch) == len(running)
    assert len(batch) == 0
    assert batch.step() == []
    assert most > 3
    assert cancelled
    for row, (text, tokens, finish) in expected.items():
        if row in cancelled:
            assert found.ends[row].finish == "cancelled"
            assert text.startswith(found.texts[row]) or finish == "stop"  # a stop text may have been held back
            assert found.ends[row].tokens <= tokens
        else:
            assert found.result(row) == (text, tokens, finish)
    assert {finish for _, _, finish in expected.values()} == {"stop", "length"}
    assert len({text for text, _, _ in expected.values()}) > 5


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=9), Sampling(9, 1.1, 0.9, seed=3)])
def test_a_text_does_not_depend_on_when_its_row_joins(sampling):
    llama = make_llama()
    prompts = all_prompts(llama)
    for delay in range(6):
        batch, found = RunningBatch(llama, make_tokenizer()), Collected()
        first = batch.add(ROWS[2], Sampling(max_new_tokens=20), prompts[1])
        for _ in range(delay):
            found.take(batch.step())
        rows = [batch.add(row, sampling, given) for row, given in zip(ROWS, prompts, strict=False)]
        while len(batch):
            found.take(batch.step())
        assert found.result(first) == alone(llama, ROWS[2], Sampling(max_new_tokens=20), prompts[1])
        for number, row, given in zip(rows, ROWS, prompts, strict=False):
            assert found.result(number) == alone(llama, row, sampling, given)


def spy(monkeypatch: pytest.MonkeyPatch, llama: Llama) -> tuple[list[tuple], list[int]]:
    """Each pass's (rows, tokens, whether there is a mask of padding), and the rows of each cache that was made."""
    passes, caches, hidden, new_cache = [], [], llama.hidden, llama.new_cache

    def spied(tokens: torch.Tensor, **options: object) -> torch.Tensor:
        passes.append((*tokens.shape, options["valid"] is not None))
        return hidden(tokens, **options)

    def counted(batch: int, capacity: int, most: int | None = None) -> KVCache:
        caches.append(batch)
        return new_cache(batch, capacity, most)

    monkeypatch.setattr(llama, "hidden", spied)
    monkeypatch.setattr(llama, "new_cache", counted)
    return passes, caches


def test_a_row_alone_costs_what_a_stream_costs(monkeypatch):
    llama = make_llama()
    prompts, sampling = row_prompts(make_prompts(llama, 4), 0), Sampling(max_new_tokens=12, temperature=1.0, seed=4)
    passes, caches = spy(monkeypatch, llama)
    pieces = list(stream(llama, make_tokenizer(frozenset()), ROWS[0], sampling, prompts))
    streamed = ([*passes], [*caches])
    passes.clear()
    caches.clear()
    batch, found = RunningBatch(llama, make_tokenizer(frozenset())), Collected()
    row = batch.add(ROWS[0], sampling, prompts)
    while len(batch):
        found.take(batch.step())
    assert found.texts[row] == "".join(pieces)
    assert (passes, caches) == streamed
    assert len(passes) == 12
    assert caches == [1]


def test_the_last_row_is_without_padding_and_mask_again(monkeypatch):
    llama = make_llama()
    passes, _ = spy(monkeypatch, llama)
    batch = RunningBatch(llama, make_tokenizer(frozenset()))
    batch.add(ROWS[2], Sampling(max_new_tokens=3))
    batch.add(ROWS[3], Sampling(max_new_tokens=6))
    while len(batch):
        batch.step()
    assert passes == [(1, 7, False), (1, 1, False), *[(2, 1, True)] * 2, *[(1, 1, False)] * 3]
    passes.clear()
    for _ in range(2):  # rows of one length need none either
        batch.add(ROWS[0], Sampling(max_new_tokens=3))
    while len(batch):
        batch.step()
    assert passes[2:] == [(2, 1, False)] * 2


def test_rows_that_share_prompts_keep_them_once(monkeypatch):
    llama = make_llama()
    prompts = make_prompts(llama, None)
    taken, hidden = [], llama.hidden

    def spied(tokens: torch.Tensor, **options: object) -> torch.Tensor:
        taken.append(options["prompts"])
        return hidden(tokens, **options)

    monkeypatch.setattr(llama, "hidden", spied)
    batch = RunningBatch(llama, make_tokenizer())
    for row in ROWS:
        batch.add(row, Sampling(max_new_tokens=3), prompts)
    while len(batch):
        batch.step()
    assert len(taken) > 4
    assert all(given is prompts for given in taken)


def test_what_lies_in_fresh_memory_does_not_matter(monkeypatch):
    """Padding is masked, but 0 * NaN is NaN."""
    llama = make_llama()
    expected = [alone(llama, row, Sampling(max_new_tokens=8), None) for row in ROWS]
    new_cache = llama.new_cache

    def poisoned(batch: int, capacity: int, most: int | None = None) -> KVCache:
        cache = new_cache(batch, capacity, most)
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
        return cache

    monkeypatch.setattr(llama, "new_cache", poisoned)
    batch, found = RunningBatch(llama, make_tokenizer()), Collected()
    rows = [batch.add(row, Sampling(max_new_tokens=8)) for row in ROWS]
    while len(batch):
        found.take(batch.step())
    assert [found.result(row) for row in rows] == expected


def test_pieces_end_where_those_of_a_stream_end():
    """No piece ends inside a character or inside what may be a stop text."""
    llama = make_llama()
    sampling = Sampling(max_new_tokens=25, temperature=1.5, seed=11, stop=("END", "aab"))
    batch, pieces = RunningBatch(llama, make_tokenizer(frozenset())), []
    batch.add(ROWS[1], sampling)
    batch.add(ROWS[0], Sampling(max_new_tokens=30))
    while len(batch):
        pieces += [step.text for step in batch.step() if step.row == 0 and step.text]
    assert pieces == list(stream(llama, make_tokenizer(frozenset()), ROWS[1], sampling))
    assert len(pieces) > 3


def test_a_cancelled_row_gives_what_was_held_back():
    """Text that may have become a stop text is text after all."""
    llama, tokenizer = make_llama(), make_tokenizer(frozenset())
    settings = {"temperature": 1.0, "seed": 1}
    (whole,) = generate(llama, tokenizer, [ROWS[3]], Sampling(max_new_tokens=4, **settings))
    batch = RunningBatch(llama, tokenizer)
    row = batch.add(ROWS[3], Sampling(max_new_tokens=9, stop=(whole.text + "never",), **settings))
    assert [step.text for _ in range(4) for step in batch.step()] == [""] * 4
    assert batch.cancel(row) == Step(row, whole.text, 4, "cancelled")
    assert whole.text == "the the the the "
    waiting = batch.add(ROWS[0], Sampling(max_new_tokens=9))
    assert batch.cancel(waiting) == Step(waiting, "", 0, "cancelled")
    assert batch.cancel(99) is None
    assert len(batch) == 0


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ([], {}, "every row of a batch needs at least one token"),
        ([1] * 64, {}, "the text has 64 tokens and the model's context holds 64, the answer included; shorten it"),
        ([1], {"beams": 2}, "beam search decides on the whole text and cannot join a batch; set beams to 1"),
    ],
)
def test_a_row_that_cannot_join_leaves_the_batch_as_it_was(tokens, settings, message):
    llama = make_llama()
    batch, found = RunningBatch(llama, make_tokenizer()), Collected()
    row = batch.add(ROWS[0], Sampling(max_new_tokens=8))
    found.take(batch.step())
    with pytest.raises(ValueError, match=message):
        batch.add(tokens, Sampling(max_new_tokens=8, **settings))
    while len(batch):
        found.take(batch.step())
    assert found.result(row) == alone(llama, ROWS[0], Sampling(max_new_tokens=8), None)


def test_a_text_ends_where_the_context_ends():
    llama = make_llama(context=20)
    batch, found = RunningBatch(llama, make_tokenizer(frozenset())), Collected()
    rows = [batch.add([3] * length, Sampling(max_new_tokens=50)) for length in (19, 5, 12)]
    while len(batch):
        found.take(batch.step())
    assert [found.ends[row].tokens for row in rows] == [1, 15, 8]
    assert {found.ends[row].finish for row in rows} == {"length"}
