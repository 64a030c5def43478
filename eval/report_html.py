"""A report as one page of HTML: no scripts, nothing loaded from elsewhere, pictures inside.

All text that comes from files is escaped, and a content security policy forbids what should not be there anyway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from eval.report_chart import chart
from eval.report_content import Cell, Comparison, Report, Row
from eval.report_gallery import Card, Said, Section
from eval.report_style import SERIES, STYLE
from eval.report_text import commit_text, interval_text, p_text, signed, sources
from mmadapter.scienceqa import LETTERS

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LONG_CONTEXT = 220  # characters; a longer one is folded
CHIP = '<span class="chip" aria-hidden="true"></span>'


def page(report: Report, about: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        about: What `eval.records.provenance` says of the report itself.
    """
    picture = chart(report)
    parts = [("results", "Results", _results(report))]
    if report.comparisons:
        parts.append(("tests", "Tests", _tests(report)))
    if picture:
        parts.append(("chart", report.layout.chart_title, picture))
    if report.gallery is not None:
        parts += [(section.name, section.title, _section(section)) for section in report.gallery.sections]
    parts.append(("made", "How it was made", _made(report, about)))
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in parts)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{escape(title)}</h2>\n{content}\n'
        "</section>"
        for name, title, content in parts
    )
    hashes = {commit_text(row.run.record.get("git_commit"), 8) for row in report.rows}
    commits = f"commit{'s' if len(hashes) > 1 else ''} {', '.join(sorted(hashes))}"
    detail = [f"{report.examples:,} {report.layout.example}s", report.data, commits]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<title>{escape(report.title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(report.layout.title)}</h1>
<p class="detail">{escape(" · ".join(filter(None, detail)))}</p>
{_heads(report)}
<nav aria-label="Parts of this page"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _heads(report: Report) -> str:
    """The score that counts, of every run, large."""
    name, decimals = report.layout.main, report.layout.decimals
    items = []
    for place, row in enumerate(report.rows):
        cell = row.cells[name]
        value = "–" if cell.value is None else f"{cell.value:.{decimals}f}"
        lines = [f'<span class="interval">{interval_text(cell.interval, decimals)}</span>']
        for comparison in report.comparisons:
            if comparison.run is row.run and comparison.column == name:
                change = f"{signed(comparison.difference, decimals)} against {report.rows[0].run.label}, "
                lines.append(f'<span class="change">{escape(change + _p_equals(comparison.p))}</span>')
        items.append(
            f'<li class="series-{place % SERIES}"><span class="name">{CHIP}{escape(row.run.label)}</span>'
            f'<span class="value">{value} <span class="unit">{escape(report.layout.main_unit)}</span></span>'
            f"{''.join(lines)}</li>"
        )
    return f'<ul class="heads">{"".join(items)}</ul>'


def _p_equals(p: float) -> str:
    """A p in a sentence, which does not break within it."""
    text = p_text(p)
    return f"p {text if text.startswith('<') else f'= {text}'}".replace(" ", "\N{NO-BREAK SPACE}")


def _results(report: Report) -> str:
    """The table of runs and published rows, and what to know of it."""
    columns, decimals = report.layout.columns, report.layout.decimals
    numbers, listed = sources(report.published)
    head = "".join(
        f'<th scope="col" class="number">{escape(label)}{_count(report, name)}</th>' for name, label in columns.items()
    )
    rows = "\n".join(
        f'<tr class="series-{place % SERIES}"><th scope="row">{CHIP}{escape(row.run.label)}'
        f'<span class="how">{escape(row.how)}</span></th>'
        + "".join(_cell(row.cells[name], decimals) for name in columns)
        + "</tr>"
        for place, row in enumerate(report.rows)
    )
    bodies = f"<tbody>\n{rows}\n</tbody>\n"
    if report.published is not None:
        lines = "\n".join(
            f'<tr><th scope="row">{escape(row.model)}<sup><a href="#source-{numbers[row.source]}" '
            f'aria-label="source {numbers[row.source]}">{numbers[row.source]}</a></sup>'
            f'<span class="how">{escape(row.detail)}</span></th>'
            + "".join(f'<td class="number">{escape(row.scores.get(name, ""))}</td>' for name in columns)
            + "</tr>"
            for row in report.published.rows
        )
        title = f"Published, {report.published.title}"
        bodies += (
            f'<tbody class="published">\n<tr><th scope="rowgroup" colspan="{len(columns) + 1}">{escape(title)}</th>'
            f"</tr>\n{lines}\n</tbody>\n"
        )
    cited = ""
    if listed:
        items = "".join(f'<li id="source-{number}">{escape(source)}</li>' for number, source in enumerate(listed, 1))
        cited = f'<h3>Sources of published rows</h3><ol class="notes">{items}</ol>'
    counted = (
        f'<span class="how">{escape(report.layout.counted)}</span>'
        if any(name in report.counts for name in columns)
        else ""
    )
    notes = "".join(f"<li>{escape(text)}</li>" for text in report.notes)
    return (
        f'<div class="wide" role="region" aria-labelledby="results-title" tabindex="0">\n<table>\n'
        f'<thead><tr><th scope="col">Run{counted}</th>{head}</tr></thead>\n{bodies}</table>\n</div>\n'
        f'<ul class="notes">{notes}</ul>{cited}'
    )


def _count(report: Report, name: str) -> str:
    return f'<span class="how">{report.counts[name]:,}</span>' if name in report.counts else ""


def _cell(cell: Cell, decimals: int) -> str:
    if cell.value is None:
        return '<td class="number">–</td>'
    interval = interval_text(cell.interval, decimals)
    below = f'<span class="interval">{interval}</span>' if interval else ""
    return f'<td class="number">{cell.value:.{decimals}f}{below}</td>'


def _tests(report: Report) -> str:
    """Paired tests, a part of the table for each run."""
    decimals = report.layout.decimals

    def line(comparison: Comparison) -> str:
        detail = f' <span class="how">{escape(comparison.detail)}</span>' if comparison.detail else ""
        return (
            f'<tr><th scope="row">{escape(report.layout.columns[comparison.column])}</th>'
            f'<td class="number">{signed(comparison.difference, decimals)}</td>'
            f'<td class="number">{interval_text(comparison.interval, decimals, True)}</td>'
            f'<td class="number">{escape(p_text(comparison.p))}</td><td>{escape(comparison.test)}{detail}</td></tr>'
        )

    bodies = []
    for place, row in enumerate(report.rows):
        lines = [line(comparison) for comparison in report.comparisons if comparison.run is row.run]
        if lines:
            bodies.append(
                f'<tbody class="series-{place % SERIES}">\n<tr><th scope="rowgroup" colspan="5">{CHIP}'
                f"{escape(row.run.label)} minus {escape(report.rows[0].run.label)}</th></tr>\n"
                + "\n".join(lines)
                + "\n</tbody>\n"
            )
    titles = (
        ("Score", ""),
        *((title, ' class="number"') for title in ("Difference", "95% interval", "p")),
        ("Test", ""),
    )
    head = "".join(f'<th scope="col"{css}>{title}</th>' for title, css in titles)
    return (
        f'<div class="wide" role="region" aria-labelledby="tests-title" tabindex="0">\n<table class="grouped">\n'
        f"<thead><tr>{head}</tr></thead>\n{''.join(bodies)}</table>\n</div>"
    )


def _section(section: Section) -> str:
    cards = "\n".join(_card(card) for card in section.cards)
    return f'<p>{escape(section.about)}</p>\n<div class="cards">\n{cards}\n</div>'


def _card(card: Card) -> str:
    """An example: its picture, what it asks, what every run said, what people say."""
    parts = []
    if card.uri:
        alt = card.references[0] if card.references and not card.question else f"Picture {card.picture}"
        parts.append(
            f'<img src="{card.uri}" alt="{escape(alt)}" width="{card.size[0]}" height="{card.size[1]}" '
            'decoding="async">'
        )
    elif card.picture:
        parts.append(f'<p class="lost">{escape(card.picture)}</p>')
    if card.context:
        context = f'<p class="context">{escape(card.context)}</p>'
        if len(card.context) > LONG_CONTEXT:
            context = f"<details><summary>Context</summary>{context}</details>"
        parts.append(context)
    if card.question:
        parts.append(f'<p class="question">{escape(card.question)}</p>')
    if card.choices:
        options = "".join(
            f'<li{" class=right" if right else ""}><span class="letter">{LETTERS[place]}</span>'
            f"<span>{escape(text)}{_hidden(' (right)') if right else ''}</span></li>"
            for place, (text, right) in enumerate(card.choices)
        )
        parts.append(f'<ol class="choices">{options}</ol>')
    parts.append('<dl class="said">' + "".join(_said(place, said) for place, said in enumerate(card.said)) + "</dl>")
    if card.references:
        references = "".join(f"<li>{escape(text)}</li>" for text in card.references)
        by = "People wrote" if not card.question else "Right"
        parts.append(f'<p class="by">{by}</p><ul class="references">{references}</ul>')
    parts.append(f'<p class="id">{escape(card.id)}</p>')
    return f"<article>{''.join(parts)}</article>"


def _said(place: int, said: Said) -> str:
    mark = ""
    if said.right is not None:
        sign, word = ("✓", "right: ") if said.right else ("✗", "wrong: ")
        css = "good" if said.right else "bad"
        mark = f'<span class="{css}" aria-hidden="true">{sign}</span>{_hidden(word)} '
    score = f' <span class="score">{escape(said.score)}</span>' if said.score else ""
    text = escape(said.text) if said.text.strip() else "<em>nothing</em>"
    return f'<div class="series-{place % SERIES}"><dt>{CHIP}{escape(said.label)}</dt><dd>{mark}{text}{score}</dd></div>'


def _hidden(text: str) -> str:
    """For those who hear the page."""
    return f'<span class="hidden">{escape(text)}</span>'


def _made(report: Report, about: Mapping[str, Any]) -> str:
    """What each score file is recorded with."""
    runs = "".join(_provenance(row) for row in report.rows)
    fields = _fields({"command": about["command"], **{key: about[key] for key in ("git_commit", "time", "versions")}})
    return f"{runs}<details><summary>This report</summary>{fields}</details>"


def _provenance(row: Row) -> str:
    record = row.run.record
    keys = ("command", "git_commit", "time", "seconds", "model", "seed", "data_hash", "predictions_hash", "versions")
    fields = {"file": str(row.run.path), **{key: record[key] for key in keys if record.get(key) is not None}}
    return f"<details><summary>{escape(row.run.label)}</summary>{_fields(fields)}</details>"


def _fields(fields: Mapping[str, Any]) -> str:
    lines: Sequence[str] = [
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd><code>{escape(_shown(value))}</code></dd>"
        for key, value in fields.items()
    ]
    return f'<dl class="fields">{"".join(lines)}</dl>'


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(own)}" for key, own in value.items() if own not in (None, [], {}))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
