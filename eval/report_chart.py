"""The bar chart of a report, as SVG: a bar for each run and class, its interval, and marks of published scores.

Places along the axis are percentages and everything else is pixels, so that on a phone the bars get shorter and the
text stays as large as it is.
"""

from __future__ import annotations

from html import escape

from eval.report_content import Cell, Report
from eval.report_style import SERIES
from eval.report_text import interval_text

BAR, GAP = 15, 4  # pixels
ROOM = 88.0  # percent of the width that the axis takes; the rest is for the numbers
STEPS = 4


def chart(report: Report) -> str:
    """The chart with its legend, "" where there is nothing to draw."""
    names = {
        name: label
        for name, label in report.layout.chart.items()
        if any(row.cells[name].value is not None for row in report.rows)
    }
    if not names:
        return ""
    groups = "".join(
        f'<div class="group"><div class="label">{escape(label)}{_count(report, name)}</div>'
        f"{_bars(report, name, label)}</div>"
        for name, label in names.items()
    )
    return (
        f'{_legend(report, list(names))}\n<div class="chart">{groups}'
        f'<div class="group axis" aria-hidden="true"><div class="label"></div>{_axis(report)}</div></div>'
    )


def _count(report: Report, name: str) -> str:
    if name not in report.counts:
        return ""
    return f'<span class="how">{report.counts[name]:,}</span>'


def _marks(report: Report, name: str) -> list[tuple[int, str, float]]:
    """Published scores that have a mark, with the number of their style."""
    rows = [] if report.published is None else [row for row in report.published.rows if row.marked]
    return [(place, row.model, float(row.scores[name])) for place, row in enumerate(rows) if name in row.scores]


def _bars(report: Report, name: str, label: str) -> str:
    height = len(report.rows) * (BAR + GAP) + GAP
    marks = [
        f'<line class="mark mark-{place % 4}" x1="{_place(report, value)}" x2="{_place(report, value)}" y1="0" '
        f'y2="{height}"/>'
        for place, _, value in _marks(report, name)
    ]
    bars, told = [], []
    for place, row in enumerate(report.rows):
        cell = row.cells[name]
        if cell.value is None:
            continue
        bars.append(_bar(report, cell, place))
        told.append(f"{row.run.label} {_words(report, cell)}")
    told += [f"published {model} {value:g}" for _, model, value in _marks(report, name)]
    return (
        f'<svg role="img" aria-label="{escape(label)}: {escape("; ".join(told))}" width="100%" height="{height}">'
        f"{_grid(height)}{''.join(bars)}{''.join(marks)}</svg>"
    )


def _bar(report: Report, cell: Cell, place: int) -> str:
    """One run's bar, its interval as a line with two ends, and its value at the right, where nothing is drawn."""
    top = GAP + place * (BAR + GAP)
    middle = top + BAR / 2
    parts = [f'<rect x="0" y="{top}" width="{_place(report, cell.value)}" height="{BAR}" rx="2"/>']
    if cell.interval is not None:
        low, high = (_place(report, value) for value in cell.interval)
        parts.append(
            f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>'
            + "".join(
                f'<line class="whisker" x1="{x}" x2="{x}" y1="{middle - 4}" y2="{middle + 4}"/>' for x in (low, high)
            )
        )
    number = f"{cell.value:.{1 if report.layout.full == 100 else 3}f}"
    parts.append(f'<text x="100%" y="{middle}" dy="0.36em" text-anchor="end">{number}</text>')
    return f'<g class="series-{place % SERIES}">{"".join(parts)}</g>'


def _grid(height: int) -> str:
    return "".join(
        f'<line class="grid" x1="{ROOM * step / STEPS:g}%" x2="{ROOM * step / STEPS:g}%" y1="0" y2="{height}"/>'
        for step in range(STEPS + 1)
    )


def _axis(report: Report) -> str:
    texts = "".join(
        f'<text x="{ROOM * step / STEPS:g}%" y="13" text-anchor="{"middle" if step else "start"}">'
        f"{report.layout.full * step / STEPS:g}</text>"
        for step in range(STEPS + 1)
    )
    return f'<svg width="100%" height="18">{texts}</svg>'


def _legend(report: Report, names: list[str]) -> str:
    runs = "".join(
        f'<li class="series-{place % SERIES}"><span class="chip" aria-hidden="true"></span>{escape(row.run.label)}</li>'
        for place, row in enumerate(report.rows)
    )
    seen = {place: model for name in names for place, model, _ in _marks(report, name)}
    marks = "".join(
        f'<li><svg class="sample" width="14" height="16" aria-hidden="true"><line class="mark mark-{place % 4}" x1="7" '
        f'x2="7" y1="0" y2="16"/></svg>{escape(model)}, published</li>'
        for place, model in sorted(seen.items())
    )
    whisker = ""
    if any(row.cells[name].interval for row in report.rows for name in names):
        whisker = (
            '<li><svg class="sample" width="22" height="16" aria-hidden="true"><line class="whisker" x1="2" x2="20" '
            'y1="8" y2="8"/><line class="whisker" x1="2" x2="2" y1="4" y2="12"/><line class="whisker" x1="20" x2="20" '
            'y1="4" y2="12"/></svg>95% interval</li>'
        )
    return f'<ul class="legend">{runs}{whisker}{marks}</ul>'


def _place(report: Report, value: float) -> str:
    """Where a value lies on the axis; what is beyond its end is drawn at its end."""
    return f"{ROOM * min(max(value / report.layout.full, 0.0), 1.0):.3f}%"


def _words(report: Report, cell: Cell) -> str:
    interval = interval_text(cell.interval, report.layout.decimals)
    return f"{cell.value:.{report.layout.decimals}f} {interval}".strip()
