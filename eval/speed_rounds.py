"""Measuring in turn: contenders take part in every round, and what is compared is compared within a round.

A machine's speed moves with its neighbours' load. Two contenders that run one after the other in the same round meet
much the same load, so the ratio of a round holds still where its two figures do not; the ratio of a case is the median
over its rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Timed(NamedTuple):
    """What one run took.

    Attributes:
        seconds: Of the part that counts.
        work: How much was done in it, such as tokens.
    """

    seconds: float
    work: float


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Attributes:
        name: As the table and the record call it.
        run: Does the work once.
        warm: Does enough of it for the first run to be like the others; None is one run.
    """

    name: str
    run: Callable[[], Timed]
    warm: Callable[[], object] | None = None


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        contender: Whose.
        quantity: What the value is, by its unit: "tokens/s", "s", "MB at the peak" ...
        round: In which round; samples of one round are compared with each other.
        value: Work a second where the quantity ends in "/s", else seconds for each piece of work, or what was counted.
        seconds: That were taken, None for what is no time.
        work: That was done in them.
    """

    contender: str
    quantity: str
    round: int
    value: float
    seconds: float | None = None
    work: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two contenders that are set against each other.

    Attributes:
        of: The first, by name.
        to: The second.
        quantity: In what.
        aim: What the ratio should be at least, None for no aim.
        at_most: The aim is an upper limit.
        difference: First minus second, in the quantity's unit, in place of first over second.
    """

    of: str
    to: str
    quantity: str
    aim: float | None = None
    at_most: bool = False
    difference: bool = False

    @property
    def name(self) -> str:
        return f"{self.of} {'-' if self.difference else '/'} {self.to}"


@dataclass(frozen=True)
class Spread:
    """The median of some values, and the outermost of them."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Case:
    """What was measured about one question.

    Attributes:
        name: As `--only` takes it.
        title: What was done, with its sizes.
        samples: All of them.
        comparisons: What the case is about.
        left_out: Who could not take part, and why.
        facts: Sizes, counts and whatever else goes into the record.
        notes: Lines below the table.
    """

    name: str
    title: str
    samples: list[Sample]
    comparisons: list[Comparison] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def interleave(contenders: Sequence[Contender], rounds: int, quantity: str) -> list[Sample]:
    """Lets every contender run once a round, after a warm-up of each; every other round goes backwards.

    Raises:
        ValueError: There are no rounds.
    """
    if rounds < 1:
        raise ValueError(f"a case needs at least one round, got {rounds}")
    for contender in contenders:
        (contender.warm or contender.run)()
    samples = []
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            seconds, work = contender.run()
            value = work / seconds if quantity.endswith("/s") else seconds / work
            samples.append(Sample(contender.name, quantity, number, value, seconds, work))
    return samples


def values(samples: Sequence[Sample], contender: str, quantity: str) -> dict[int, float]:
    """A contender's values by round."""
    return {s.round: s.value for s in samples if (s.contender, s.quantity) == (contender, quantity)}


def spread(numbers: Sequence[float]) -> Spread:
    return Spread(statistics.median(numbers), min(numbers), max(numbers))


def compare(samples: Sequence[Sample], comparison: Comparison) -> Spread | None:
    """The ratios (or differences) of the rounds that both took part in; None where one of them did not at all."""
    first = values(samples, comparison.of, comparison.quantity)
    second = values(samples, comparison.to, comparison.quantity)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    if comparison.difference:
        return spread([first[number] - second[number] for number in shared])
    return spread([first[number] / second[number] for number in shared])


def reached(comparison: Comparison, found: Spread) -> bool | None:
    """Whether the median keeps to the aim; None where there is none."""
    if comparison.aim is None:
        return None
    return found.median <= comparison.aim if comparison.at_most else found.median >= comparison.aim


def table(case: Case) -> str:
    """Medians, the outermost values and the ratios of a case, with its aims and who was left out."""
    names = [name for sample in case.samples for name in (sample.contender, sample.quantity)]
    names += [comparison.name for comparison in case.comparisons]
    width = max((len(name) for name in names), default=0)
    lines = [f"{case.name}: {case.title}"]
    for quantity in dict.fromkeys(sample.quantity for sample in case.samples):
        lines.append(f"  {quantity:<{width}}  {'median':>9}  {'lowest':>9}  {'highest':>9}")
        for contender in dict.fromkeys(s.contender for s in case.samples if s.quantity == quantity):
            found = spread(list(values(case.samples, contender, quantity).values()))
            lines.append(f"  {contender:<{width}}  {_numbers(found)}")
        for comparison in case.comparisons:
            found = compare(case.samples, comparison) if comparison.quantity == quantity else None
            if found is not None:
                lines.append(f"  {comparison.name:<{width}}  {_numbers(found)}{_verdict(comparison, found)}")
    lines += [f"  {note}" for note in case.notes]
    lines += [f"  left out: {name}: {reason}" for name, reason in case.left_out.items()]
    return "\n".join(lines)


def _numbers(found: Spread) -> str:
    return "  ".join(f"{_number(value):>9}" for value in (found.median, found.lowest, found.highest))


def _number(value: float) -> str:
    """Three digits that count, and none lost before the point."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _verdict(comparison: Comparison, found: Spread) -> str:
    met = reached(comparison, found)
    if met is None:
        return ""
    return f"  aim: {'at most' if comparison.at_most else 'at least'} {comparison.aim:g}, {'met' if met else 'missed'}"


def record(case: Case) -> dict[str, object]:
    """The case as the record keeps it: every sample, and the ratios as the table shows them."""
    ratios = []
    for comparison in case.comparisons:
        found = compare(case.samples, comparison)
        if found is not None:
            ratios.append({**vars(comparison), **vars(found), "met": reached(comparison, found)})
    return {
        "name": case.name,
        "title": case.title,
        "samples": [vars(sample) for sample in case.samples],
        "comparisons": ratios,
        "left_out": case.left_out,
        "facts": case.facts,
        "notes": case.notes,
    }
