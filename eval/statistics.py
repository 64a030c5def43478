"""How sure a score is: bootstrap intervals over examples, and paired tests between two runs over the same examples.

A score is what a formula makes of sums over examples. Most are a ratio of two, which takes in means (the denominators
are 1), loss a token (losses over tokens) and micro-averaged F1 (2 TP over 2 TP + FP + FN); BLEU and METEOR take more.
A ratio of nothing is 0, of all examples as of a resample, as the precision of a run that predicts nothing is.
Shapes: n examples, S sums, R resamples, r of them at once. Memory stays small: resamples are drawn in portions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    def pooled(self, groups: Sequence[object]) -> Ratio:
        """The same score with groups of examples in place of examples, such as all questions about one picture.

        Args:
            groups: Of each example, [n]. They come in the order of their first examples.
        """
        number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
        places = [number[group] for group in groups]
        return Ratio(*(np.bincount(places, part, len(number)) for part in (self.numerator, self.denominator)))

    @property
    def columns(self) -> np.ndarray:
        """What each example adds to either sum, float64 [n, 2]."""
        return np.stack([self.numerator, self.denominator], axis=1)

    def formula(self, sums: np.ndarray) -> np.ndarray:
        """Scores [...] of sums [..., 2]."""
        return _divide(sums[..., 0], sums[..., 1])

    @property
    def value(self) -> float:
        """The score; 0 where there is nothing below the line."""
        return float(_divide(self.numerator.sum(), self.denominator.sum()))

    def __len__(self) -> int:
        return len(self.numerator)


@dataclass(frozen=True)
class Pooled:
    """A score that takes more than two sums, such as BLEU.

    Attributes:
        columns: What each example adds to each sum, float64 [n, S].
        formula: Makes scores [...] of sums [..., S].
    """

    columns: np.ndarray
    formula: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The score."""
        return float(self.formula(self.columns.sum(axis=0)))

    def __len__(self) -> int:
        return len(self.columns)


Sums = Ratio | Pooled


def bootstrap_interval(
    score: Sums, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile interval of a score, from examples drawn again with replacement (Efron 1979).

    Args:
        level: Of 0.95, a fortieth of the resampled scores lies below the interval and a fortieth above.

    Returns:
        None where all examples agree: whatever is drawn, the score is the same, which says nothing of how sure it is.
    """
    if len(score) < 2:
        return None
    columns = score.columns
    columns = columns[np.lexsort(columns.T[::-1])]  # so that the order of a file decides nothing
    values = np.concatenate([score.formula(_drawn(columns, rows)) for rows in _draws(len(score), resamples, seed)])
    return _quantiles(values, level, abs(score.value))


def difference_interval(
    first: Sums, second: Sums, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile interval of `second` minus `first`, each resample drawing the same examples for both.

    Returns:
        None where every example has the same difference.

    Raises:
        ValueError: They are not of the same number of examples.
    """
    _require_pairs(first, second)
    if len(first) < 2:
        return None
    pair = (first, second)
    columns = [score.columns for score in pair]
    values = []
    for rows in _draws(len(first), resamples, seed):
        one, other = (score.formula(_drawn(own, rows)) for score, own in zip(pair, columns, strict=True))
        values.append(other - one)
    return _quantiles(np.concatenate(values), level, max(abs(first.value), abs(second.value)))


def permutation_test(first: Sums, second: Sums, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
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
    columns = first.columns  # [n, S]
    moved = second.columns - columns
    sums = columns.sum(axis=0)  # [S]
    total = sums + second.columns.sum(axis=0)
    as_far = 1
    for size in _portions(len(first), resamples):
        exchanged = generator.integers(0, 2, (size, len(first)), dtype=np.int8) @ moved  # [r, S]
        one, other = sums + exchanged, total - sums - exchanged
        apart = np.abs(first.formula(one) - second.formula(other))
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
    """0 where the denominator is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator == 0, 0.0, numerator / denominator)


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


def _drawn(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """All sums of each resample, float64 [r, S], of what each example adds [n, S] and places of examples [r, n]."""
    r, n = rows.shape
    times = np.bincount((rows + n * np.arange(r)[:, None]).ravel(), minlength=r * n).reshape(r, n)
    return times @ columns


def _quantiles(values: np.ndarray, level: float, size: float) -> tuple[float, float] | None:
    """The interval that holds the middle part of the values.

    Args:
        size: Of the scores that the values are of: they are the same if they differ by less than a billionth of it.
    """
    if np.ptp(values) <= 1e-9 * size:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _require_pairs(first: Sums, second: Sums) -> None:
    if len(first) != len(second):
        raise ValueError(f"paired tests need the same examples, got {len(first)} and {len(second)}")
