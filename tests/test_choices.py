"""Log-likelihoods of given endings, against the plain computation of one row at a time."""

from __future__ import annotations

import pytest
import tiny
import torch

from mmadapter.adapter import select_prompts
from mmadapter.checkpoint import AdapterFile
from mmadapter.choices import Scores, choice_texts, log_likelihoods
from mmadapter.config import AdapterConfig

ROWS = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (9, 4, 17, 6)]
LENGTHS = [(1, 3), (5, 1, 1, 2), (2, 2, 7), (4,)]
ENDINGS = [
    [tiny.tokens(1, length, seed=100 * row + place)[0].tolist() for place, length in enumerate(lengths)]
    for row, lengths in enumerate(LENGTHS)
]


def naive(llama, row, ending, prompts):
    """The sum of the ending's log-probabilities, from the logits of question and ending in one uncached row."""
    logits = llama(torch.tensor([row + ending]), prompts=prompts)[0]
    log_probabilities = logits.log_softmax(-1)
    return sum(log_probabilities[len(row) - 1 + place, token].item() for place, token in enumerate(ending))


def random_prompts(kind):
    """Prompts of batch 1 (text), or of one row a question, each with an image of its own and one without."""
    llama = tiny.llama()
    if kind == "base":
        return llama, None
    adapter = tiny.adapter(llama.config, image=kind == "images")
    if kind == "text":
        return llama, adapter.prompts(llama)
    has_image = torch.tensor([True, True, False, True])
    return llama, adapter.prompts(llama, tiny.features(4), has_image=has_image)


@pytest.mark.parametrize("kind", ["base", "text", "images"])
def test_equals_one_row_at_a_time(kind):
    """Left padding of questions, right padding of endings and repeated cache rows must not show in any number."""
    llama, prompts = random_prompts(kind)
    with torch.inference_mode():
        found = log_likelihoods(llama, ROWS, ENDINGS, prompts)
        assert [len(scores.total) for scores in found] == [2, 4, 3, 1]
        for index, (row, endings, scores) in enumerate(zip(ROWS, ENDINGS, found, strict=True)):
            own = select_prompts(prompts, torch.tensor([index]))
            expected = torch.tensor([naive(llama, row, ending, own) for ending in endings])
            torch.testing.assert_close(scores.total, expected, atol=1e-4, rtol=0)
            assert scores.tokens.tolist() == [len(ending) for ending in endings]
            assert scores.total.dtype == torch.float32


def test_the_prompts_matter():
    """The parity above would hold, too, if prompts and images were dropped on both sides."""
    totals = {}
    for kind in ("base", "text", "images"):
        llama, prompts = random_prompts(kind)
        totals[kind] = torch.cat([scores.total for scores in log_likelihoods(llama, ROWS, ENDINGS, prompts)])
    assert (totals["base"] - totals["text"]).abs().min() > 1e-3
    with_image = torch.tensor([True] * 6 + [False] * 3 + [True])
    assert ((totals["text"] - totals["images"]).abs() > 1e-3).equal(with_image)


def test_questions_of_one_length_and_endings_of_one_token():
    """No padding, and nothing to read after the questions."""
    llama, prompts = random_prompts("text")
    rows = [ROWS[0], ROWS[0][::-1]]
    every = [[token] for token in range(llama.config.vocab_size)]
    for scores in log_likelihoods(llama, rows, [every, every], prompts):
        assert scores.total.exp().sum().item() == pytest.approx(1, abs=1e-5)
    found = log_likelihoods(llama, rows, [ENDINGS[0], ENDINGS[2]], prompts)
    expected = [naive(llama, rows[1], ending, prompts) for ending in ENDINGS[2]]
    assert found[1].total.tolist() == pytest.approx(expected, abs=1e-4)


def test_questions_are_read_once_and_logits_made_only_where_needed(monkeypatch):
    llama, prompts = random_prompts("text")
    read, projected = [], []
    hidden, logits = type(llama).hidden, type(llama).logits
    monkeypatch.setattr(
        type(llama), "hidden", lambda self, tokens, **more: read.append(tokens.shape) or hidden(self, tokens, **more)
    )
    monkeypatch.setattr(
        type(llama), "logits", lambda self, states: projected.append(states.shape[:-1]) or logits(self, states)
    )
    log_likelihoods(llama, ROWS, ENDINGS, prompts)
    assert read == [(4, 17), (10, 6)]
    assert projected == [(4,), (sum(sum(lengths) - len(lengths) for lengths in LENGTHS),)]


def test_mean():
    scores = Scores(torch.tensor([-6.0, -3.0]), torch.tensor([3, 1]))
    assert scores.mean().tolist() == [-2.0, -3.0]


def test_a_question_and_ending_that_just_fit_the_context():
    llama = tiny.llama(tiny.config(context=12))
    row, ending = ROWS[0], [1, 2, 3]
    assert log_likelihoods(llama, [row], [[ending]])[0].total.item() == pytest.approx(
        naive(llama, row, ending, None), abs=1e-4
    )
    with pytest.raises(ValueError, match="question and ending have 13 tokens and the model's context holds 12"):
        log_likelihoods(llama, [row, row], [[[1]], [[1], [*ending, 4]]])


@pytest.mark.parametrize(
    ("rows", "endings", "message"),
    [
        ([[1]], [[[2]], [[3]]], "1 questions need as many lists of endings, got 2"),
        ([[1]], [[]], "every question needs at least one ending"),
        ([[1]], [[[2], []]], "every ending at least one token"),
        ([[1], []], [[[2]], [[2]]], "every question needs at least one token"),
        ([], [], "there must be at least one question"),
    ],
)
def test_bad_input(rows, endings, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(tiny.llama(), rows, endings)


def test_an_adapter_is_asked_in_the_form_it_was_trained_in():
    """A ScienceQA adapter that was shown the app's form of options would be asked what it never learnt."""
    config = AdapterConfig(1)
    asked = [
        choice_texts(about, " which is larger ?", ["the sun", "the moon"])
        for about in (
            None,
            AdapterFile(config, task="answer", template="question"),
            AdapterFile(config, task="scienceqa", template="bare", training={"answer_form": "text", "format": "QM-A"}),
            AdapterFile(config, task="scienceqa", template="bare"),
        )
    ]
    assert asked == [
        ("Which is larger?\nOptions: (A) the sun (B) the moon:", [" the sun", " the moon"]),
        ("Question: Which is larger?\nAnswer:", [" the sun", " the moon"]),
        (
            "Question: which is larger ?\nOptions: (A) the sun (B) the moon\nAnswer:",
            [" the sun", " the moon"],
        ),
        (
            "Question: which is larger ?\nContext: N/A\nOptions: (A) the sun (B) the moon\nAnswer:",
            [" The answer is A.", " The answer is B."],
        ),
    ]
