"""Outcomes as HTML. Everything that a person or the model wrote is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from app.outcome import AUTOMATIC, BASE, Answer, FileRow, Files, Outcome, Side

AS_WRITTEN = "\u2060"  # a word joiner: nobody sees it; page.js takes it out of what is copied
LATEST = 8  # rows of a table before and after the place that the batch has reached


def side_name(side: Side) -> str:
    return {BASE: "base model", AUTOMATIC: "automatic"}.get(side.adapter, side.adapter)


def empty(title: str, hint: str) -> str:
    """The place of an answer before there is one; as high as a short answer."""
    return f'<div class="empty"><strong>{escape(title)}</strong><span>{escape(hint)}</span></div>'


def problem(text: str) -> str:
    """An error, said to screen readers at once."""
    return f'<div class="problem" role="alert">{escape(text)}</div>'


def outcome_html(outcome: Outcome, question: str = "") -> str:
    """The answers side by side, those of one side in one card; page.js says them when they are no longer busy."""
    if outcome.error:
        return problem(outcome.error)
    sides = by_side(outcome.answers)
    cards = "".join(_card(answers, question) for answers in sides)
    busy = "false" if outcome.done else "true"
    return f'<div class="answers{" two" if len(sides) > 1 else ""}" aria-busy="{busy}">{cards}</div>'


def by_side(answers: Sequence[Answer]) -> list[list[Answer]]:
    """The answers of each side; by place, not by value, since an adapter may be compared with itself."""
    sides: list[list[Answer]] = []
    for answer in answers:
        if sides and sides[-1][0].side is answer.side:
            sides[-1].append(answer)
        else:
            sides.append([answer])
    return sides


def files_html(files: Files) -> str:
    """The table of a batch, its progress, and links that hold the files to download: the server keeps none."""
    total = len(files.rows)
    if not total:
        return problem(files.note)
    status = f"{files.done} of {total} done in {files.seconds:.0f} s"
    if files.note:
        status += f" · {files.note}"
    links = ""
    if files.finished and files.done:
        links = _download("captions.csv", "text/csv", files.as_csv(), "Download CSV")
        links += _download("captions.jsonl", "application/jsonl", files.as_json_lines(), "Download JSON lines")
    rows = files.rows
    if not files.finished:  # the page is sent again for every caption: only those that were done last are in it
        rows = rows[max(0, files.done - LATEST) : files.done + LATEST]
    body = "".join(_file_row(row) for row in rows)
    return (
        f'<div class="files" aria-busy="{"false" if files.finished else "true"}">'
        f'<div class="head"><span>{escape(status)}</span>{links}</div>'
        f'<progress max="{total}" value="{files.done}" aria-label="Captions done"></progress>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Captions of the files"><table>'
        '<thead><tr><th scope="col">Picture</th><th scope="col">Caption</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>"
    )


def status_text(answer: Answer) -> str:
    """How an answer is getting on, in a few words."""
    if answer.state == "waiting":
        about = f"about {max(1, round(answer.seconds))} s"
        if not answer.ahead:  # the next one, though the model may be full
            return f"Waiting: {about}" if answer.seconds >= 1 else "Starting …"
        people = "1 request" if answer.ahead == 1 else f"{answer.ahead} requests"
        return f"Waiting: {people} before yours, {about}"
    words = f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}"
    if not answer.done:
        return f"{words} …"
    if answer.probabilities:
        return f"{answer.seconds:.1f} s"
    ending = {"length": " · longest length reached", "cancelled": " · stopped"}.get(answer.finish or "", "")
    return f"{words} · {answer.seconds:.1f} s{ending}"


def _card(answers: Sequence[Answer], question: str) -> str:
    first = answers[0]
    name = side_name(first.side)
    badge = "" if first.side.adapter == BASE else f'<span class="badge">strength {first.side.strength:g}</span>'
    asked = f'<p class="question">{escape(question)}</p>' if question else ""
    note = f'<p class="note">{escape(first.note)}</p>' if first.note else ""
    body = _choices(first) if first.choices else "".join(_words(answer) for answer in answers)
    slowest = max(answers, key=lambda answer: (not answer.done, answer.seconds))
    copy = ""
    if all(answer.done for answer in answers) and any(answer.text for answer in answers) and not first.choices:
        copy = '<button type="button" class="copy" data-do="copy">Copy</button>'
    return (
        f'<article class="answer" aria-label="Answer of {escape(name)}"><header><span class="who">{escape(name)}</span>'
        f'{badge}</header><div class="text">{asked}{body}{note}</div>'
        f"<footer><span>{escape(status_text(slowest))}</span>{copy}</footer></article>"
    )


def _words(answer: Answer) -> str:
    text = escape(answer.text)
    if not answer.done:
        text += '<span class="caret" aria-hidden="true"></span>'
    elif not answer.text:
        text = "<em>nothing was written</em>"
    return f'<p class="words">{text}</p>'


def _choices(answer: Answer) -> str:
    lines = []
    best = max(answer.probabilities, default=0.0)
    for choice, share in zip(answer.choices, answer.probabilities or [0.0] * len(answer.choices), strict=True):
        mark = " best" if answer.done and share == best else ""
        percent = f"{share:.0%}" if answer.done else ""
        lines.append(
            f'<li><div class="line{mark}"><span>{escape(choice)}</span><span>{percent}</span></div>'
            f'<div class="bar" aria-hidden="true"><i style="width:{share:.1%}"></i></div></li>'
        )
    return f'<ul class="choices">{"".join(lines)}</ul>'


def _file_row(row: FileRow) -> str:
    picture = '<span class="thumb"></span>'
    if row.picture is not None:
        data = io.BytesIO()
        row.picture.save(data, "JPEG", quality=80)
        source = base64.b64encode(data.getvalue()).decode()
        picture = f'<img class="thumb" alt="" src="data:image/jpeg;base64,{source}">'
    text = escape(row.caption) or (f'<span class="bad">{escape(row.error)}</span>' if row.error else "…")
    return f'<tr><td>{picture}</td><td><div>{text}</div><div class="name">{escape(row.name)}</div></td></tr>'


def _download(name: str, kind: str, content: str, label: str) -> str:
    data = base64.b64encode(content.encode()).decode()
    return f'<a download="{name}" href="data:{kind};base64,{data}">{label}</a>'


def chat_text(text: str) -> str:
    """What somebody wrote as Markdown that fetches nothing and holds no HTML, inside code and outside of it."""
    for mark in ("<", "&", "!["):
        text = text.replace(mark, mark[0] + AS_WRITTEN + mark[1:])
    return text
