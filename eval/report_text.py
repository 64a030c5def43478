"""Numbers and sources of a report in words, the same in Markdown and on the page."""

from __future__ import annotations

from eval.published import Published
from eval.report_content import Interval


def interval_text(interval: Interval | None, decimals: int, with_signs: bool = False) -> str:
    """Such as "[67.9, 70.7]"; "" for none.

    Args:
        decimals: Of the score; its interval has one less, which is as much as resampling can tell.
    """
    if interval is None:
        return ""
    low, high = (signed(end, decimals - 1) if with_signs else f"{end:.{decimals - 1}f}" for end in interval)
    return f"[{low}, {high}]"


def signed(value: float, decimals: int) -> str:
    """A difference with its sign, and with none where it rounds to zero."""
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def p_text(p: float) -> str:
    """A p with four decimals; a smaller one only as such."""
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def commit_text(commit: object, digits: int) -> str:
    """The beginning of a commit, and whether the tree had changes beside it (`mmadapter.record.git_commit`)."""
    digest, dash, state = str(commit or "unknown").partition("-")
    return digest[:digits] + dash + state


def sources(published: Published | None) -> tuple[dict[str, int], list[str]]:
    """The number of each source of published scores, from 1, and the sources in that order."""
    listed = [] if published is None else list(dict.fromkeys(row.source for row in published.rows))
    return {source: number for number, source in enumerate(listed, 1)}, listed
