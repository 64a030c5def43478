"""Decoding against slow loops without a cache; the adapters have random gates that are not zero."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from tiny_session import random_state

from mmadapter import sampling as sampling_module
from mmadapter.adapter import Adapter, Prompts, select_prompts, stack_prompts
from mmadapter.beam import beam_search
from mmadapter.config import TUNES, AdapterConfig, LlamaConfig
from mmadapter.generate import Generated, StopText, generate, stream
from mmadapter.llama import Llama
from mmadapter.sampling import GROUP, Sampler, Sampling, prefill, top_tokens
from mmadapter.tokenizer import Tokenizer
from mmadapter.vision import ImageProjection
from mmadapter.vocabulary import Vocabulary

FEATURES = 6
# Letters, a newline, and the parts of "é", "€" and "😀", which may come in any order.
PIECES = [
    *(b"%c" % letter for letter in b"abcdeEND "),
    b"the ",
    b"\n",
    b"EN",
    b"D.",
    b"\xc3",
    b"\xa9",
    b"\xe2\x82",
    b"\xac",
    b"a\xf0\x9f",
    b"\x98",
    b"\x80b",
]
STOPS = frozenset({20, 21, 22})  # ids behind those of the pieces
ROWS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [0]]


def make_llama(vocab_size: int = 23, context: int = 64, seed: int = 1) -> Llama:
    config = LlamaConfig(
        vocab_size, width=16, layers=3, heads=4, kv_heads=2, head_width=4, hidden_width=20, context=context
    )
    return Llama.from_state_dict(config, random_state(config, seed))


def make_prompts(llama: Llama, rows: int | None, tune: str = "prompts") -> Prompts:
    """Prompts of a random adapter with random gates: for text (None), or with another image for each row."""
    torch.manual_seed(5)
    projection = ImageProjection(FEATURES, llama.config.width, 8)
    adapter = Adapter(AdapterConfig(layers=2, prompt_length=3, tune=tune), llama.config, projection=projection)
    adapter.requires_grad_(False)
    torch.nn.init.normal_(adapter.gate, std=2.0)
    if adapter.tuning is not None:
        for parameter in adapter.tuning.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    features = None if rows is None else torch.randn(rows, FEATURES)
    return adapter.prompts(llama, features)


def prompts_of_kind(llama: Llama, kind: str) -> Prompts | None:
    """Prompts for ROWS: one that all share, another image for each, or rows of several adapters, tuned and not."""
    if kind == "mixed":
        tuned = make_prompts(llama, len(ROWS), TUNES[1])
        return stack_prompts([row_prompts(tuned, 0), make_prompts(llama, None), None, row_prompts(tuned, 3)])
    return make_prompts(llama, len(ROWS) if kind.endswith("images") else None, TUNES[kind.startswith("tuned")])


KINDS = ("text", "images", "tuned text", "tuned images", "mixed")


def row_prompts(prompts: Prompts | None, row: int) -> Prompts | None:
    return select_prompts(prompts, torch.tensor([row]))


def make_tokenizer(stops: frozenset[int] = STOPS) -> Tokenizer:
    pieces = [*PIECES, *(b"" for _ in range(23 - len(PIECES)))]
    tokens = [f"token {index}" for index in range(len(pieces))]
    special = {tokens[index]: index for index in sorted(stops)}
    vocabulary = Vocabulary(tokens, pieces, special, encode_plain=lambda text: [])
    return Tokenizer(vocabulary, bos_id=None, eos_id=None, stop_ids=stops, adds_bos=False)


def next_logits(llama: Llama, tokens: Sequence[int], prompts: Prompts | None) -> torch.Tensor:
    """Logits after `tokens`, from the whole sequence: no cache, no batch, no padding."""
    return llama(torch.tensor([list(tokens)]), prompts=prompts)[0, -1]


def slow_decode(
    llama: Llama,
    row: Sequence[int],
    prompts: Prompts | None,
    choose: Callable[[list[int], torch.Tensor], int],
    max_new_tokens: int,
    stops: frozenset[int] = STOPS,
) -> list[int]:
    tokens = list(row)
    for _ in range(max_new_tokens):
        token = choose(tokens, next_logits(llama, tokens, prompts))
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(row) :]


def greedy(tokens: list[int], logits: torch.Tensor) -> int:
    return int(logits.argmax())


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_cache_equals_greedy_without(kind):
    llama = make_llama()
    prompts = prompts_of_kind(llama, kind)
    answers = generate(llama, make_tokenizer(), ROWS, Sampling(max_new_tokens=12), prompts)
    expected = [slow_decode(llama, row, row_prompts(prompts, i), greedy, 12) for i, row in enumerate(ROWS)]
    assert [answer.tokens for answer in answers] == expected
    assert len({len(tokens) for tokens in expected}) > 1  # rows end at different steps
    assert expected != [slow_decode(llama, row, None, greedy, 12) for row in ROWS]  # and the adapter matters


@pytest.mark.parametrize("kind", ["images", "mixed"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 9, "seed": 8},
        {"repetition_penalty": 1.4},
        {"beams": 3},
        {"stop": ("a", "END")},
    ],
)
def test_a_batch_equals_its_rows_one_at_a_time(settings, kind):
    llama, tokenizer = make_llama(), make_tokenizer()
    prompts = prompts_of_kind(llama, kind)
    sampling = Sampling(max_new_tokens=15, **settings)
    together = generate(llama, tokenizer, ROWS, sampling, prompts)
    alone = [generate(llama, tokenizer, [row], sampling, row_prompts(prompts, i))[0] for i, row in enumerate(ROWS)]
    assert together == alone
    assert len({len(answer.tokens) for answer in together}) > 1


def test_one_prompt_for_all_rows_is_shared():
    llama, tokenizer = make_llama(), make_tokenizer()
    prompts = make_prompts(llama, None)
    for sampling in (Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, beams=3)):
        together = generate(llama, tokenizer, ROWS, sampling, prompts)
        assert together == [generate(llama, tokenizer, [row], sampling, prompts)[0] for row in ROWS]


def spy_on_steps(monkeypatch: pytest.MonkeyPatch, llama: Llama, before: Callable[[int], None] = lambda step: None):
    """Shapes [B, T] of the tokens of each forward pass, as they come; `before` is called with the number of each."""
    shapes: list[tuple[int, ...]] = []
    hidden = llama.hidden

    def spied(tokens: torch.Tensor, **options: object) -> torch.Tensor:
        before(len(shapes))
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, **options)

    monkeypatch.setattr(llama, "hidden", spied)
    return shapes


def test_finished_rows_leave_the_batch(monkeypatch):
    llama = make_llama()
    shapes = spy_on_steps(monkeypatch, llama)
    answers = generate(llama, make_tokenizer(), ROWS, Sampling(max_new_tokens=12), make_prompts(llama, len(ROWS)))
    steps = [len(answer.tokens) + (answer.finish == "stop") for answer in answers]
    busy = [sum(count > step for count in steps) for step in range(1, max(steps))]
    assert shapes == [(4, 7), *((rows, 1) for rows in busy)]
    assert len(set(busy)) > 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 5e-324])
def test_temperature_near_zero_is_greedy(temperature):
    """A logit divided by such a number is infinite, and a softmax over infinities is NaN."""
    llama, prompts = make_llama(), make_prompts(make_llama(), 4)
    sampling = Sampling(max_new_tokens=10, temperature=temperature)
    cold = generate(llama, make_tokenizer(), ROWS, sampling, prompts)
    assert cold == generate(llama, make_tokenizer(), ROWS, Sampling(max_new_tokens=10), prompts)


def plain_nucleus(logits: list[float], top_k: int, top_p: float) -> list[float]:
    """Probabilities after top-k and then top-p, from the definitions."""
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    kept = order[: top_k or len(order)]
    total = sum(math.exp(logits[index]) for index in kept)
    nucleus, mass = {}, 0.0
    for index in kept:
        nucleus[index] = math.exp(logits[index]) / total
        mass += nucleus[index]
        if mass >= top_p:
            break
    return [nucleus.get(index, 0.0) / mass for index in range(len(logits))]


@pytest.mark.parametrize("top_k", [0, 1, 3, 12, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
def test_top_k_and_top_p_are_those_of_the_definitions(top_k, top_p):
    logits = 2 * torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    given = sampling_module._nucleus(logits, top_k, top_p)
    given = given / given.sum(-1, keepdim=True)  # multinomial normalises
    expected = torch.tensor([plain_nucleus(row, top_k, top_p) for row in logits.tolist()])
    assert ((given > 0) == (expected > 0)).all()
    torch.testing.assert_close(given, expected)


def test_sampling_follows_the_distribution():
    """Frequencies of 20,000 first tokens against temperature, top-k and top-p of the definitions."""
    llama = make_llama()
    sampling = Sampling(max_new_tokens=1, temperature=0.7, top_k=8, top_p=0.9)
    sampler = Sampler(llama, [ROWS[0]] * 20_000, sampling)
    sampler.generators = [torch.Generator().manual_seed(row) for row in range(20_000)]
    counts = torch.tensor(list(sampler.step().values())).bincount(minlength=23) / 20_000
    expected = plain_nucleus((next_logits(llama, ROWS[0], None) / 0.7).tolist(), 8, 0.9)
    torch.testing.assert_close(counts, torch.tensor(expected), atol=0.015, rtol=0)
    assert max(expected) < 0.9


@pytest.mark.parametrize("penalty", [1.3, 2.5, 0.8])
def test_repetition_penalty_is_that_of_the_definition(penalty):
    def choose(tokens: list[int], logits: torch.Tensor) -> int:
        values = logits.tolist()
        for token in set(tokens):
            values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
        return max(range(len(values)), key=values.__getitem__)

    llama = make_llama()
    prompts = make_prompts(llama, len(ROWS))
    sampling = Sampling(max_new_tokens=15, repetition_penalty=penalty)
    answers = generate(llama, make_tokenizer(), ROWS, sampling, prompts)
    expected = [slow_decode(llama, row, row_prompts(prompts, i), choose, 15) for i, row in enumerate(ROWS)]
    assert [answer.tokens for answer in answers] == expected
    assert expected != [slow_decode(llama, row, row_prompts(prompts, i), greedy, 15) for i, row in enumerate(ROWS)]


def test_a_seed_decides_what_is_drawn():
    llama, tokenizer = make_llama(), make_tokenizer()

    def draw(seed: int) -> list[Generated]:
        return generate(llama, tokenizer, ROWS, Sampling(max_new_tokens=20, temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(-3) != draw(3)


def slow_beams(
    log_probabilities: Callable[[list[int]], list[float]],
    stops: frozenset[int],
    beams: int,
    max_new_tokens: int,
    length_penalty: float,
) -> tuple[list[int], bool]:
    """Beam search in plain Python, as `beam_search` describes it, over whole sequences."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, max_new_tokens + 1):
        longer = [
            (score + step, [*tokens, token])
            for score, tokens in live
            for token, step in enumerate(log_probabilities(tokens))
        ]
        longer.sort(key=lambda beam: -beam[0])
        norm = length**length_penalty
        finished += [(score / norm, tokens[:-1]) for score, tokens in longer[:beams] if tokens[-1] in stops]
        finished = sorted(finished, key=lambda beam: -beam[0])[:beams]
        live = [beam for beam in longer if beam[1][-1] not in stops][:beams]
        if len(finished) == beams and finished[-1][0] >= live[0][0] / norm:
            break
    return (finished[0][1], True) if finished else (live[0][1], False)


def log_probabilities_of(
    llama: Llama, row: list[int], prompts: Prompts | None, penalty: float = 1.0
) -> Callable[[list[int]], list[float]]:
    def after(tokens: list[int]) -> list[float]:
        logits = next_logits(llama, [*row, *tokens], prompts)
        for token in set(row + tokens):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        return logits.log_softmax(-1).tolist()

    return after


@pytest.mark.parametrize(
    ("beams", "length_penalty", "penalty", "kind"),
    [
        *((*numbers, kind) for numbers in ((2, 1.0, 1.0), (3, 1.0, 1.5)) for kind in KINDS),
        (3, 0.0, 1.0, "images"),
        (4, 0.6, 1.0, "images"),
        (3, 2.0, 1.0, "images"),
    ],
)
def test_beam_search_equals_a_slow_one(beams, length_penalty, penalty, kind):
    llama = make_llama()
    prompts = prompts_of_kind(llama, kind)
    sampling = Sampling(max_new_tokens=7, beams=beams, length_penalty=length_penalty, repetition_penalty=penalty)
    expected = [
        slow_beams(log_probabilities_of(llama, row, row_prompts(prompts, i), penalty), STOPS, beams, 7, length_penalty)
        for i, row in enumerate(ROWS)
    ]
    assert beam_search(llama, ROWS, sampling, STOPS, prompts) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_over_many_lines_equals_a_slow_one(kind, monkeypatch):
    """As for a hundred lines, their logits are looked at in parts."""
    monkeypatch.setattr("mmadapter.beam.LINES", 5)
    test_beam_search_equals_a_slow_one(3, 1.0, 1.5, kind)


@pytest.mark.parametrize("stops", [frozenset(), frozenset({22}), frozenset(range(10, 23))])
def test_beam_search_with_any_number_of_stop_tokens(stops):
    """With several stop tokens, more than half of the 2 W best continuations may be stops: too few beams went on."""
    llama = make_llama()
    expected = [slow_beams(log_probabilities_of(llama, row, None), stops, 4, 6, 1.0) for row in ROWS]
    assert beam_search(llama, ROWS, Sampling(max_new_tokens=6, beams=4), stops) == expected
    assert any(ended for _, ended in expected) == bool(stops)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 3.0])
def test_wide_beams_find_the_best_of_all_texts(length_penalty):
    """All texts of up to 4 tokens of a vocabulary of 5; there are more beams than texts."""
    llama = make_llama(vocab_size=5, seed=4)
    stops = frozenset({1, 3})
    for row in ([0, 2], [4], [2, 2, 1]):
        best = (-math.inf, [])
        after = log_probabilities_of(llama, row, None)
        for length in range(1, 5):
            for words in itertools.product((0, 2, 4), repeat=length - 1):
                score = sum(after(list(words[:place]))[word] for place, word in enumerate(words))
                for stop in stops:
                    whole = (score + after(list(words))[stop]) / length**length_penalty
                    best = max(best, (whole, list(words)))
        sampling = Sampling(max_new_tokens=4, beams=200, length_penalty=length_penalty)
        assert beam_search(llama, [row], sampling, stops) == [(best[1], True)]


def test_one_beam_is_greedy():
    llama, tokenizer = make_llama(), make_tokenizer()
    prompts = make_prompts(llama, len(ROWS))
    searched = beam_search(llama, ROWS, Sampling(max_new_tokens=12), STOPS, prompts)
    answers = generate(llama, tokenizer, ROWS, Sampling(max_new_tokens=12), prompts)
    assert searched == [(answer.tokens, answer.finish == "stop") for answer in answers]
    assert {ended for _, ended in searched} == {True, False}


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_has_at_most_max_new_tokens(beams):
    llama, tokenizer = make_llama(), make_tokenizer(frozenset())
    for count in (1, 4):
        answers = generate(llama, tokenizer, ROWS, Sampling(max_new_tokens=count, beams=beams))
        assert [(len(answer.tokens), answer.finish) for answer in answers] == [(count, "length")] * 4


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_ends_with_the_context(beams):
    """The room is each row's own: a long row must not shorten the others of its batch."""
    llama, tokenizer = make_llama(context=16), make_tokenizer(frozenset())
    rows = [[1] * 13, [2, 3], [4] * 15]
    answers = generate(llama, tokenizer, rows, Sampling(max_new_tokens=9, beams=beams))
    assert [(len(answer.tokens), answer.finish) for answer in answers] == [(3, "length"), (9, "length"), (1, "length")]
    for row, answer in zip(rows, answers, strict=True):
        assert answer == generate(llama, tokenizer, [row], Sampling(max_new_tokens=9, beams=beams))[0]
    huge = generate(llama, tokenizer, [[2, 3]], Sampling(max_new_tokens=10**12, beams=beams))  # no room is set aside
    assert len(huge[0].tokens) == 14


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_as_long_as_the_context_is_refused(beams):
    llama, tokenizer = make_llama(context=16), make_tokenizer()
    message = "the text has 16 tokens and the model's context holds 16, the answer included; shorten it"
    with pytest.raises(ValueError, match=message):
        generate(llama, tokenizer, [[1], [2] * 16], Sampling(beams=beams))
    with pytest.raises(ValueError, match=message):  # before the first piece is asked for
        stream(llama, tokenizer, [2] * 16, Sampling())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_rows_without_a_token_are_refused(rows, beams):
    with pytest.raises(ValueError, match="every row of a batch needs at least one token"):
        generate(make_llama(), make_tokenizer(), rows, Sampling(beams=beams))


def first_complete(text: str, stops: Sequence[str]) -> str | None:
    """What stands before the stop text that a reader who reads character by character sees complete first."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


def test_stop_texts_are_cut_however_the_text_comes():
    rng = random.Random(0)
    stopped = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab\n", k=rng.randrange(30)))
        stops = ["".join(rng.choices("ab\n", k=rng.randrange(1, 6))) for _ in range(rng.randrange(4))]
        cutter, given, places = StopText(stops), "", [0]
        while places[-1] < len(text) and not cutter.stopped:
            places.append(places[-1] + rng.randrange(1, 5))
            given += cutter.push(text[places[-2] : places[-1]])
            assert not any(stop in given for stop in stops)
        given += cutter.flush()
        expected = first_complete(text, stops)
        assert given == (text if expected is None else expected)
        assert cutter.stopped == (expected is not None)
        stopped += cutter.stopped
    assert 500 < stopped < 2500


def test_only_what_may_become_a_stop_text_is_held_back():
    cutter = StopText(["END.", "\n\n"])
    assert [cutter.push(piece) for piece in ("one", " E", "N", "d", "\n", "x\n")] == ["one", " ", "", "ENd", "", "\nx"]
    assert (cutter.flush(), cutter.flush(), cutter.stopped) == ("\n", "", False)


class Scripted:
    """Stands in for a Llama: whatever it reads, it says the tokens of a script, one after the other."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.said = list(script), 0
        self.config = SimpleNamespace(context=1000)
        self.device = torch.device("cpu")

    def new_cache(self, batch: int, capacity: int, most: int) -> SimpleNamespace:
        return SimpleNamespace(select=lambda rows: None)

    def hidden(self, tokens: torch.Tensor, **options: object) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), 23)
        logits[:, self.script[self.said]] = 5.0
        self.said += 1
        return logits


def spell(text: str) -> list[int]:
    """Ids of the pieces that spell the text, the longest first."""
    data, ids = text.encode(), []
    while data:
        token = max((i for i, piece in enumerate(PIECES) if data.startswith(piece)), key=lambda i: len(PIECES[i]))
        ids.append(token)
        data = data.removeprefix(PIECES[token])
    return ids


def both_ways(script: Sequence[int], **settings: object) -> tuple[Generated, list[str]]:
    """The scripted answer whole, and in pieces."""
    tokenizer, sampling = make_tokenizer(), Sampling(**settings)
    answer = generate(Scripted(script), tokenizer, [[0]], sampling)[0]
    return answer, list(stream(Scripted(script), tokenizer, [0], sampling))


def test_a_character_of_several_tokens_comes_whole():
    text = "€ca😀bé "
    answer, pieces = both_ways([*spell(text), 21])
    assert (answer.text, answer.finish, answer.tokens) == (text, "stop", spell(text))
    assert pieces == ["€", "c", "a", "😀b", "é", " "]
    assert len(spell(text)) > len(pieces)


def test_a_character_that_never_ends_is_one_replacement():
    answer, pieces = both_ways([*spell("ab"), PIECES.index(b"\xe2\x82"), 20])
    assert answer.text == "ab\ufffd" == "".join(pieces)
    answer, pieces = both_ways([*spell("ab"), PIECES.index(b"\xe2\x82")], max_new_tokens=3)
    assert (answer.text, answer.finish) == ("ab\ufffd", "length")
    assert answer.text == "".join(pieces)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abEND.abc", ("END",), "ab"),  # "EN" and "D."
        ("abEND.abc", ("bE", "END."), "a"),
        ("the ENENDc", ("END",), "the EN"),
        ("the EN", ("END",), "the EN"),  # a start of a stop text, and no more
        ("a😀b", ("😀",), "a"),  # inside a character
        ("ab\ncd", ("\n",), "ab"),
        ("\n \nab\ncd", ("\n",), "ab"),  # a line break before the answer does not end it
        ("  a b", (), "a b"),
        (" \n", ("\n",), ""),
    ],
)
def test_stop_texts_never_show_in_text_or_pieces(text, stop, expected):
    answer, pieces = both_ways([*spell(text), 22], stop=stop)
    assert answer.text == expected == "".join(pieces)
    assert answer.finish == "stop"
    assert all(pieces)


def test_pieces_joined_are_the_text():
    """Random texts of broken and whole characters, with stop texts, stop tokens and limits."""
    rng = random.Random(1)
    kinds = set()
    for _ in range(300):
        script = [rng.randrange(23) if rng.random() < 0.3 else rng.randrange(20) for _ in range(20)]
        stop = tuple(rng.sample(("a", "END", "é", "the b", "\ufffd\n", "\n\n"), rng.randrange(3)))
        answer, pieces = both_ways(script, stop=stop, max_new_tokens=rng.randrange(1, 20))
        assert "".join(pieces) == answer.text
        assert all(pieces)
        assert not any(text in answer.text for text in stop)
        kinds.add((answer.finish, "\ufffd" in answer.text))
    assert len(kinds) == 4


def test_streaming_a_model_equals_its_whole_answer():
    llama, tokenizer = make_llama(), make_tokenizer(frozenset({22}))
    prompts = make_prompts(llama, 1)
    for seed in range(20):
        sampling = Sampling(max_new_tokens=25, temperature=1.2, top_p=0.9, seed=seed, stop=("END", "b\n"))
        answer = generate(llama, tokenizer, [ROWS[0]], sampling, prompts)[0]
        assert "".join(stream(llama, tokenizer, ROWS[0], sampling, prompts)) == answer.text


def test_beam_search_does_not_stream():
    with pytest.raises(ValueError, match="beam search decides on the whole text and cannot stream; set beams to 1"):
        stream(make_llama(), make_tokenizer(), [1], Sampling(beams=2))


def test_a_beam_is_cut_at_a_stop_text():
    llama, tokenizer = make_llama(), make_tokenizer(frozenset())
    settings = {"max_new_tokens": 12, "beams": 3}
    whole = generate(llama, tokenizer, ROWS[2:3], Sampling(**settings))[0]
    assert (len(whole.tokens), whole.finish) == (12, "length")
    start = len(whole.text) // 2
    stop = whole.text[start : start + 2]
    cut = generate(llama, tokenizer, ROWS[2:3], Sampling(**settings, stop=(stop,)))[0]
    assert (cut.text, cut.finish) == (whole.text[: whole.text.index(stop)], "stop")
    assert len(stop) == 2


@pytest.mark.parametrize("beams", [1, 3])
def test_cancelling_from_another_thread_stops_within_a_step(monkeypatch, beams):
    llama, tokenizer, cancelled = make_llama(), make_tokenizer(frozenset()), threading.Event()

    def cancel_at_the_fourth(step: int) -> None:
        if step == 4:
            thread = threading.Thread(target=cancelled.set)
            thread.start()
            thread.join()

    shapes = spy_on_steps(monkeypatch, llama, cancel_at_the_fourth)
    answers = generate(llama, tokenizer, ROWS, Sampling(max_new_tokens=30, beams=beams), cancelled=cancelled)
    assert len(shapes) == 5
    tokens_so_far = 5 if beams == 1 else 4  # a beam search has yet to choose what follows the last pass
    assert [(len(answer.tokens), answer.finish) for answer in answers] == [(tokens_so_far, "cancelled")] * 4
    if beams == 1:
        monkeypatch.undo()
        short = generate(llama, tokenizer, ROWS, Sampling(max_new_tokens=tokens_so_far))
        assert [answer.text for answer in answers] == [answer.text for answer in short]


def test_cancelling_a_stream_gives_what_was_there():
    tokenizer, cancelled = make_tokenizer(), threading.Event()
    pieces = []
    for piece in stream(Scripted(spell("abcdEEEE") * 9), tokenizer, [0], Sampling(stop=("cdE!",)), cancelled=cancelled):
        pieces.append(piece)
        if len(pieces) == 2:
            thread = threading.Thread(target=cancelled.set)
            thread.start()
            thread.join()
    assert pieces == ["a", "b"]
    held = stream(Scripted(spell("abcd")), tokenizer, [0], Sampling(stop=("bcd!",)), cancelled=cancelled)
    assert list(held) == []  # cancelled before the first token


def test_rows_that_ended_before_the_cancelling_keep_their_reason(monkeypatch):
    llama, tokenizer, cancelled = make_llama(), make_tokenizer(), threading.Event()
    prompts = make_prompts(llama, len(ROWS))
    whole = generate(llama, tokenizer, ROWS, Sampling(max_new_tokens=12), prompts)
    first_to_end = min(len(answer.tokens) for answer in whole)
    spy_on_steps(monkeypatch, llama, lambda step: cancelled.set() if step == first_to_end + 1 else None)
    answers = generate(llama, tokenizer, ROWS, Sampling(max_new_tokens=12), prompts, cancelled)
    for answer, full in zip(answers, whole, strict=True):
        assert answer.tokens == full.tokens[: len(answer.tokens)]
        assert answer.finish == ("stop" if len(full.tokens) == first_to_end else "cancelled")
    assert len({answer.finish for answer in answers}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number from 1, got 2.5"),
        ({"beams": 0}, "beams must be a whole number from 1, got 0"),
        ({"beams": 1001}, "beams must be at most 1000, got 1001"),
        ({"top_k": -1}, "top_k must be a whole number from 0, got -1"),
        ({"seed": 2**64}, "seed must be a whole number from"),
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, got -0.1"),
        ({"temperature": math.nan}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": math.inf}, "temperature must be at least 0 and finite, got inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite, got 0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be positive and finite, got nan"),
        ({"length_penalty": 1000.0}, "length_penalty must be from -10 to 10, got 1000.0"),
        ({"beams": 2, "temperature": 0.5}, "beam search takes no temperature; set beams to 1 or temperature to 0"),
        ({"stop": ("",)}, r"stop must be a list of texts that are not empty, got \(''"),
        ({"stop": "END"}, "stop must be a list of texts that are not empty, got 'END'"),  # not E, N and D
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


# ---- What all rows begin with is read once.

BEGINNING = [7, 7, 2, 9, 1, 12]
BEGUN = {
    "rows of several lengths": [[*BEGINNING, *row] for row in ROWS],
    "rows of one length": [[*BEGINNING, 3, 1], [*BEGINNING, 4, 1]],
    "one row ends where the others go on": [[*BEGINNING, 5], [*BEGINNING, 5, 3]],
    "equal rows": [[*BEGINNING, 5], [*BEGINNING, 5]],
}


@pytest.mark.parametrize("tune", [None, *TUNES])
@pytest.mark.parametrize("rows", BEGUN.values(), ids=BEGUN)
@torch.no_grad()
def test_a_common_beginning_is_read_once(
    rows: list[list[int]], tune: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = make_llama()
    prompts = None if tune is None else make_prompts(llama, None, tune)
    _, _, apart = prefill(llama, rows, 3, prompts)
    read, hidden = [], llama.hidden
    monkeypatch.setattr(llama, "hidden", lambda tokens, **more: read.append(tokens.shape) or hidden(tokens, **more))
    monkeypatch.setattr(sampling_module, "SHARED", 5)
    cache, valid, together = prefill(llama, rows, 3, prompts)
    torch.testing.assert_close(together, apart)
    longest = max(map(len, rows))
    begun = next(shape[1] for shape in read if shape[0] == 1)
    assert begun >= 6
    assert read == [(1, begun), (len(rows), longest - begun)]
    assert cache.length == longest
    assert cache.keys.shape[1] == len(rows)
    assert valid is None or valid.sum(1).tolist() == [len(row) for row in rows]
    sampling = Sampling(max_new_tokens=4)
    shared = generate(llama, make_tokenizer(), rows, sampling, prompts)
    monkeypatch.setattr(sampling_module, "SHARED", 50)
    assert shared == generate(llama, make_tokenizer(), rows, sampling, prompts)


@pytest.mark.parametrize("tune", TUNES)
@torch.no_grad()
def test_rows_with_pictures_of_their_own_share_nothing(tune: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "SHARED", 5)
    llama = make_llama()
    rows = BEGUN["rows of several lengths"]
    prompts = make_prompts(llama, len(rows), tune)
    _, _, logits = prefill(llama, rows, 3, prompts)
    for index, row in enumerate(rows):
        alone = prefill(llama, [row], 3, select_prompts(prompts, torch.tensor([index])))[2]
        torch.testing.assert_close(logits[index], alone[0])


# ---- Fast paths of the beam search against the plain ones.


@pytest.mark.parametrize("vocabulary", [5 * GROUP, 5 * GROUP + 1, 3 * GROUP])
def test_the_top_tokens_are_those_of_topk(vocabulary: int) -> None:
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(4))
    logits[1] = float("-inf")
    logits[1, [3, 4, GROUP]] = torch.tensor([1.0, 3.0, 2.0])  # fewer than are asked for, two of them in one group
    values, tokens = top_tokens(logits, 4)
    assert torch.equal(values, logits.topk(4).values)
    assert torch.equal(logits.gather(1, tokens), values)
    assert all(len(set(row)) == 4 for row in tokens.tolist())


def test_what_beams_have_in_common_is_not_copied() -> None:
    cache = make_llama().new_cache(3, 4)
    cache.length = 3
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    before = [tensor.clone() for tensor in (cache.keys, cache.values)]
    cache.select(torch.tensor([0, 2, 1]), start=2)
    for tensor, old in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(tensor[:, :, :, :2], old[:, :, :, :2])
        assert torch.equal(tensor[:, :, :, 2], old[:, [0, 2, 1], :, 2])


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2, 1], [1], [0, 0, 1, 1, 2]])
def test_rows_of_a_cache_are_selected(rows: list[int]) -> None:
    cache = make_llama().new_cache(3, 4)
    cache.length = 2
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(rows))))
    expected = [tensor[:, rows, :, :2].clone() for tensor in (cache.keys, cache.values)]
    cache.select(torch.tensor(rows))
    for tensor, copied in zip((cache.keys, cache.values), expected, strict=True):
        assert tensor.shape[1] == len(rows)
        assert torch.equal(tensor[:, :, :, :2], copied)
