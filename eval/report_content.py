"""What a report says, before it is Markdown or a page: a table, paired tests, a chart, a gallery and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.published import Published
from eval.report_gallery import Gallery, make_gallery
from eval.report_runs import Run, data_name, pictures_unknown, published_table
from eval.report_tasks import Layout, Score, how, layout, read_gold, scores
from eval.statistics import (
    RESAMPLES,
    Ratio,
    Sums,
    bootstrap_interval,
    difference_interval,
    mcnemar,
    permutation_test,
)

Interval = tuple[float, float]
SCORED_BY = {
    "likelihood": "By likelihood: the answer is the option whose tokens the model finds likeliest, by the mean or sum "
    "of their log-probabilities.",
    "letter": "By letter: the answer is what the model writes, read by the benchmark's rules; one that names no option "
    "is unparsed, and wrong.",
}


@dataclass(frozen=True)
class Cell:
    """A score, None where it was left out, and its 95% interval, None where there is none."""

    value: float | None
    interval: Interval | None = None


@dataclass(frozen=True)
class Row:
    """A run in the table; its cells are those of the table and of the chart, by the names of scores."""

    run: Run
    how: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Comparison:
    """A paired test of a run against the first.

    Attributes:
        run: The run that is compared.
        column: The score.
        difference: The run's minus the first's.
        interval: 95%, of the difference.
        p: Two-sided.
        test: Its name.
        detail: What the test saw, "" if there is nothing to add.
    """

    run: Run
    column: str
    difference: float
    interval: Interval | None
    p: float
    test: str
    detail: str


@dataclass(frozen=True)
class Report:
    """All that is shown.

    Attributes:
        examples: How many there are in the test set.
        counts: How many examples or entities a column, or a part of the chart, is of; only where these differ.
    """

    layout: Layout
    data: str
    examples: int
    rows: tuple[Row, ...]
    counts: dict[str, int]
    published: Published | None
    comparisons: tuple[Comparison, ...]
    gallery: Gallery | None
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The data set and its part, in a line."""
        return f"{self.layout.title}: {self.data}" if self.data else self.layout.title


def build(
    runs: Sequence[Run],
    *,
    data: Path | None = None,
    images: Path | None = None,
    published: str | None = None,
    cards: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Report:
    """Computes everything that a report shows.

    Args:
        runs: What `read_runs` gave; tests are against the first.
        data: ScienceQA's folder or the captions' annotations.
        images: Folder of the pictures.
        published: Name of a table of published scores, "none", or None for the one that fits.
        cards: Examples in a section of the gallery; 0 for no gallery.

    Raises:
        FileNotFoundError: The data are not there.
        ValueError: They are not the data of the runs, a run's examples do not give its scores, or there is no such
            published table.
    """
    gold = None if data is None else read_gold(runs[0], data)
    shown = layout(runs)
    table, why_none = published_table(runs[0], published)
    found = [scores(run, gold) for run in runs]
    names = dict.fromkeys((*shown.columns, *shown.chart))
    rows = tuple(
        Row(run, how(run), {name: _cell(own.get(name, Score(None)), resamples, seed) for name in names})
        for run, own in zip(runs, found, strict=True)
    )
    comparisons = tuple(
        _compare(run, name, found[0][name], own[name], resamples, seed)
        for run, own in zip(runs[1:], found[1:], strict=True)
        for name in shown.tested
        if _can_pair(found[0].get(name), own.get(name))
    )
    counts = {}
    for part in (shown.columns, shown.chart):
        own = {name: found[0][name].count for name in part if name in found[0] and found[0][name].count is not None}
        counts |= own if len(set(own.values())) > 1 else {}
    gallery = make_gallery(runs, gold, images, count=cards, seed=seed) if cards else None
    notes = _notes(shown, runs, found, rows, comparisons, table, resamples, seed)
    notes += [why_none] if why_none else []
    notes += [table.caveat] if table is not None and table.caveat else []
    if cards and gallery is None and runs[0].task == "scienceqa":
        notes.append("The questions are not shown: give the data set's folder as --data.")
    if gallery is not None:
        notes += _not_given(gallery, runs[0].task, gold is not None, images is not None)
    if gallery is not None and gallery.lost:
        notes.append(f"{len(gallery.lost)} pictures of the gallery were not found or cannot be read.")
    return Report(
        layout=shown,
        data=data_name(runs[0]),
        examples=len(runs[0].examples),
        rows=rows,
        counts=counts,
        published=table,
        comparisons=comparisons,
        gallery=gallery,
        notes=tuple(notes),
    )


def _cell(score: Score, resamples: int, seed: int) -> Cell:
    if score.value is None or score.sums is None:
        return Cell(score.value)
    interval = bootstrap_interval(score.sums, resamples=resamples, seed=seed)
    return Cell(score.value, None if interval is None else (score.curve(interval[0]), score.curve(interval[1])))


def _can_pair(first: Score | None, second: Score | None) -> bool:
    able = all(
        score is not None and score.value is not None and score.sums is not None and score.paired
        for score in (first, second)
    )
    return able and len(first.sums) == len(second.sums)


def _compare(run: Run, name: str, first: Score, second: Score, resamples: int, seed: int) -> Comparison:
    """The paired test that suits the score: McNemar's where examples are right or wrong, else by permutation."""
    one, two = first.sums, second.sums
    detail = ""
    means = _is_mean(one) and _is_mean(two)
    if means and _is_binary(one, two):
        outcome = mcnemar(one.numerator > 0, two.numerator > 0)
        p, test = outcome.p, "McNemar, exact"
        detail = f"only this one right: {outcome.only_second}; only the first: {outcome.only_first}"
    else:
        p = permutation_test(one, two, resamples=resamples, seed=seed)
        # Means too, where each cluster has as many examples in both runs.
        test = "sign permutation" if means or first.cluster else "approximate randomisation"
        test += f" by {first.cluster}" if first.cluster else ""
    interval = difference_interval(one, two, resamples=resamples, seed=seed)
    return Comparison(run, name, second.value - first.value, interval, p, test, detail)


def _is_mean(score: Sums) -> bool:
    return isinstance(score, Ratio) and bool((score.denominator == 1).all())


def _is_binary(*scores: Ratio) -> bool:
    """Whether every example has nothing or the same full mark."""
    marks = np.unique(np.concatenate([score.numerator for score in scores]))
    return len(marks) <= 2 and bool((marks >= 0).all()) and (len(marks) < 2 or marks[0] == 0)


def _notes(
    shown: Layout,
    runs: Sequence[Run],
    found: Sequence[dict[str, Score]],
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    table: Published | None,
    resamples: int,
    seed: int,
) -> list[str]:
    """What a reader has to know to read the numbers."""
    task = runs[0].task
    cells = [row.cells[name] for row in rows for name in shown.columns]
    notes = [shown.unit]
    cluster = next((score.cluster for own in found for score in own.values() if score.cluster), "")
    drawn = cluster or shown.example
    if any(cell.interval for cell in cells):
        over = "the questions of each class" if task == "scienceqa" else f"{drawn}s"
        over += f", each with all its {shown.example}s" if cluster else ""
        notes.append(
            f"In brackets: 95% intervals, the percentile bootstrap over {over} ({resamples:,} "
            f"resamples, seed {seed}). They say how much a score depends on which {drawn}s were drawn, not on "
            "how the model was trained."
        )
    bare = [
        label
        for name, label in shown.columns.items()
        if all(own.get(name, Score(None)).sums is None for own in found)
        and any(own.get(name, Score(None)).value is not None for own in found)
    ]
    if bare:
        notes.append(
            f"{', '.join(bare)}: without interval and test, as the score files have no such score of each "
            f"{shown.example}."
        )
    if any(
        own[name].sums is not None and row.cells[name].value is not None and row.cells[name].interval is None
        for own, row in zip(found, rows, strict=True)
        for name in shown.columns
    ):
        notes.append(f"A score that all {drawn}s agree on has no interval: resampling cannot tell how sure it is.")
    if task == "qa" and (constant := runs[0].record.get("constant")):
        marks = [
            f"{label} {constant[name]:.{shown.decimals}f}"
            for name, label in shown.columns.items()
            if constant.get(name) is not None
        ]
        notes.append(f"The commonest training answer, “{constant['answer']}”, to every question: {', '.join(marks)}.")
    if task == "caption" and any(cell.interval for cell in cells):
        notes.append("CIDEr weighs words by the references of the whole set; resampling leaves these weights alone.")
    if task == "scienceqa":
        notes += [text for score, text in SCORED_BY.items() if any(run.settings.get("score") == score for run in runs)]
        notes += _uncounted(found[0], table)
    if len(runs) > 1 and comparisons:
        notes.append(
            f"Tests are paired by {drawn}, two-sided, each run against {runs[0].label}; p is not corrected for "
            "the number of tests."
        )
    unknown = [run.label for run in runs[1:] if pictures_unknown(runs[0], run)]
    if unknown:
        notes.append(
            f"That {', '.join(unknown)} saw the pictures that {runs[0].label} saw cannot be told: not both score files "
            "have the pictures' hash."
        )
    left_out: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for why in (run.record.get("left_out") or {}).items():
            left_out.setdefault(why, []).append(run.label)
    notes += [f"{metric} was left out of {', '.join(own)}: {why}." for (metric, why), own in left_out.items()]
    return notes


def _not_given(gallery: Gallery, task: str, gold: bool, images: bool) -> list[str]:
    """What the gallery lacks because an option was not given, and which."""
    notes = []
    # ScienceQA's pictures are in its data; without them it has no gallery.
    if task != "scienceqa" and not images and any(card.picture for part in gallery.sections for card in part.cards):
        notes.append("The pictures are not shown: give their folder as --images.")
    if task == "caption" and not gold:
        notes.append("What people wrote is not shown: give the captions' annotations as --data.")
    return notes


def _uncounted(found: dict[str, Score], table: Published | None) -> list[str]:
    """Which classes of ScienceQA lack questions because the data do not say their subject or grade."""
    total = found["avg"].count
    notes = []
    for names, what in ((("NAT", "SOC", "LAN"), "subject"), (("G1-6", "G7-12"), "grade")):
        known = sum(found[name].count for name in names)
        if known < total:
            others = "; published rows are over all of them" if table is not None else ""
            notes.append(
                f"{', '.join(names)} are over the {known:,} of {total:,} questions whose {what} is known{others}."
            )
    return notes
