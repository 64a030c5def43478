"""How sure a score is: bootstrap intervals over examples, and paired tests between two runs over the same examples.

Every score here is a ratio of two sums over examples, which takes in means (the denominators are 1), loss a token
(losses over tokens) and micro-averaged F1 (2 TP over 2 TP + FP + FN).
Shapes: n examples, R resamples. Memory stays small: resamples are drawn in portions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
PORTION = 2_000_000  # numbers drawn at once


@dataclass(frozen=True)
class Ratio:
    """A score as its examples give it.

    Attributes:
        numerator: What each example adds above the line, float64 [n].
        denominator: And below it, float64 [n].
    """

    numerator: np.ndarray
    denominator: np.ndarray

    @classmethod
    def mean(cls, values: Sequence[float]) -> Ratio:
        """The mean of a value of each example."""
        numerator = np.asarray(values, dtype=np.float64)
        return cls(numerator, np.ones_like(numerator))

    @classmethod
    def share(cls, count: int, of: int, factor: float = 1.0) -> Ratio:
        """`count` examples with the value `factor`, the others with 0: all that the bootstrap needs of a proportion.

        Which examples they are is not known, so it must not be paired with another run's.
        """
        return cls.mean(np.repeat([factor, 0.0], [count, of - count]))

    @property
    def value(self) -> float:
        """The score; nan where there is nothing below the line."""
        return float(_divide(self.numerator.sum(), self.denominator.sum()))

    def __len__(self) -> int:
        return len(self.numerator)


def bootstrap_interval(
    score: Ratio, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile interval of a score, from examples drawn again with replacement (Efron 1979).

    Args:
        level: Of 0.95, a fortieth of the resampled scores lies below the interval and a fortieth above.

    Returns:
        None where all examples agree: whatever is drawn, the score is the same, which says nothing of how sure it is.
    """
    if _constant(score):
        return None
    order = np.lexsort((score.denominator, score.numerator))  # so that the order of a file decides nothing
    score = Ratio(score.numerator[order], score.denominator[order])
    values = np.concatenate([_divide(*_drawn(score, rows)) for rows in _draws(len(score), resamples, seed)])
    return _quantiles(values, level)


def difference_interval(
    first: Ratio, second: Ratio, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile interval of `second` minus `first`, each resample drawing the same examples for both.

    Returns:
        None where every example has the same difference.

    Raises:
        ValueError: They are not of the same number of examples.
    """
    _require_pairs(first, second)
    if np.array_equal(first.denominator, second.denominator):
        if _constant(Ratio(second.numerator - first.numerator, first.denominator)):
            return None
    elif _constant(first) and _constant(second):
        return None
    values = np.concatenate(
        [_divide(*_drawn(second, rows)) - _divide(*_drawn(first, rows)) for rows in _draws(len(first), resamples, seed)]
    )
    return _quantiles(values, level)


def permutation_test(first: Ratio, second: Ratio, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of the hypothesis that it does not matter which of two runs an example's result is from.

    Each resample exchanges the two runs' results of a random half of the examples: for means this is the
    sign-permutation test, for ratios approximate randomisation (Noreen 1989; Yeh 2000, arXiv cs/0008005). The two
    scores as they are count as one of the resamples, so that p is at least 1 / (resamples + 1).

    Raises:
        ValueError: They are not of the same number of examples.
    """
    _require_pairs(first, second)
    seen = abs(first.value - second.value)
    if not seen > 0:
        return 1.0
    generator = np.random.default_rng(seed)
    moved = np.stack([second.numerator - first.numerator, second.denominator - first.denominator], axis=1)  # [n, 2]
    sums = np.array([first.numerator.sum(), first.denominator.sum()])
    total = sums + np.array([second.numerator.sum(), second.denominator.sum()])
    as_far = 1
    for size in _portions(len(first), resamples):
        exchanged = generator.integers(0, 2, (size, len(first)), dtype=np.int8) @ moved  # [size, 2]
        one, other = sums + exchanged, total - sums - exchanged
        apart = np.abs(_divide(one[:, 0], one[:, 1]) - _divide(other[:, 0], other[:, 1]))
        # The same difference, summed in another order, must not count as a smaller one.
        as_far += int(np.count_nonzero(apart >= seen * (1 - 1e-9)))
    return as_far / (resamples + 1)


@dataclass(frozen=True)
class Discordant:
    """The examples that decide McNemar's test, and its exact two-sided p."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Discordant:
    """McNemar's exact test between two runs' right and wrong answers (McNemar 1947).

    Of the examples that one run alone has right, as many should be the first's as the second's: a fair coin.

    Raises:
        ValueError: They are not of the same number of examples.
    """
    right, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if right.shape != other.shape:
        raise ValueError(f"paired tests need the same examples, got {len(right)} and {len(other)}")
    one, two = int((right & ~other).sum()), int((other & ~right).sum())
    return Discordant(one, two, _coin(min(one, two), one + two))


def _coin(heads: int, throws: int) -> float:
    """Probability of at most `heads` heads or at most as many tails in throws of a fair coin, at most 1."""
    term = total = 1  # in whole numbers: no rounding, however small the probability
    for k in range(1, heads + 1):
        term = term * (throws - k + 1) // k
        total += term
    return min(1.0, 2 * total / 2**throws)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """nan where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def _constant(score: Ratio) -> bool:
    """Whether any resample has the score of the whole, but for rounding."""
    size = np.abs(score.numerator).max(initial=0.0)
    return bool(np.abs(score.numerator - score.value * score.denominator).max(initial=0.0) <= 1e-12 * size)


def _portions(n: int, resamples: int) -> Iterator[int]:
    """How many resamples are drawn at once, until they are all drawn."""
    most = max(1, PORTION // max(1, n))
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


def _draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Places of drawn examples, int [r, n], in all `resamples` rows of them."""
    generator = np.random.default_rng(seed)
    for size in _portions(n, resamples):
        yield generator.integers(0, n, (size, n), dtype=np.int32)


def _drawn(score: Ratio, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sums of each resample, float64 [r]."""
    numerator = score.numerator[rows].sum(axis=1)
    if (score.denominator == 1).all():
        return numerator, np.full_like(numerator, len(score))
    return numerator, score.denominator[rows].sum(axis=1)


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float] | None:
    """The interval that holds the middle part of the values; resamples that have no score are passed over."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _require_pairs(first: Ratio, second: Ratio) -> None:
    if len(first) != len(second):
        raise ValueError(f"paired tests need the same examples, got {len(first)} and {len(second)}")
