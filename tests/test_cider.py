"""CIDEr-D as a reward: the figures are pycocoevalcap's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer

from training.cider import CiderD, words

WORDS = ["a", "the", "dog", "dogs", "man", "runs", "on", "grass", "red", "ball", "with", "in", "two", "jumps"]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 14))) + rng.choice([".", "", " ."])


def references(images: int = 30) -> list[list[str]]:
    rng = random.Random(0)
    return [[sentence(rng) for _ in range(rng.randrange(1, 6))] for _ in range(images)]


def corpus_scores(texts: list[str], all_references: list[list[str]]) -> tuple[float, np.ndarray]:
    """pycocoevalcap's mean and each caption's score, over the words that we see."""
    scorer = CiderScorer(n=4, sigma=6.0)
    for text, captions in zip(texts, all_references, strict=True):
        scorer += (" ".join(words(text)), [" ".join(words(caption)) for caption in captions])
    return scorer.compute_score()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_scores_are_those_of_pycocoevalcap(seed):
    """Three captions of each of 30 images: random ones, people's own, and parts of these said twice."""
    rng = random.Random(seed)
    given = references()
    texts = [sentence(rng) for _ in given]
    texts[::3] = [rng.choice(captions) for captions in given[::3]]
    texts[1::5] = [" ".join([rng.choice(captions)] * 2) for captions in given[1::5]]
    mean, each = corpus_scores(texts, given)
    reward = CiderD(given)
    ours = [reward.score(image, text) for image, text in enumerate(texts)]
    assert ours == pytest.approx(each.tolist(), abs=1e-9)
    assert sum(ours) / len(ours) == pytest.approx(mean, abs=1e-9)
    assert max(ours) > 1, "texts without a common word would all score 0 in both"


def test_a_score_does_not_depend_on_the_captions_scored_before():
    reward = CiderD(references())
    first = reward.score(3, "a dog runs.")
    reward.score(4, "two dogs on the grass.")
    assert reward.score(3, "a dog runs.") == first


def test_the_only_reference_of_an_image_scores_ten():
    given = [["a brown dog runs."], ["two men play chess."], ["a red ball on grass."]]
    assert CiderD(given).score(0, "A brown dog runs .") == pytest.approx(10)


def test_each_image_is_scored_against_its_own_references():
    given = [["a brown dog runs."], ["two men play chess."], ["a red ball on grass."]]
    reward = CiderD(given)
    assert reward.score(1, "a brown dog runs.") < 1 < reward.score(0, "a brown dog runs.")


@pytest.mark.parametrize("text", ["", "   ", "!?", "zebra"])
def test_a_caption_that_shares_nothing_scores_zero(text):
    assert CiderD(references()).score(0, text) == 0


def test_saying_it_twice_earns_less():
    """Without clipping, self-critical training learns to stutter."""
    given = references()
    reward = CiderD(given)
    assert reward.score(0, given[0][0]) > reward.score(0, f"{given[0][0]} {given[0][0]}")


def test_the_full_stop_is_a_word_and_is_paid_for():
    """Without it self-critical training learns captions that break off: no reward is lost at a missing end."""
    assert words("A dog, running. It's 2 o'clock!") == ["a", "dog", "running", ".", "it's", "2", "o'clock"]
    given = [["a brown dog runs."], ["two men play chess."], ["red balls on grass"]]
    reward = CiderD(given)
    assert reward.score(0, "a brown dog runs.") > reward.score(0, "a brown dog runs")
