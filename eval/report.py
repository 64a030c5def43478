"""One report of several runs over one test set: a table beside published scores, intervals, tests, and examples."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.published import TABLES
from eval.records import note, prepare_outputs, provenance
from eval.report_content import Cell, Report, build
from eval.report_html import page
from eval.report_runs import read_runs, short_hash
from eval.report_text import commit_text, interval_text, p_text, signed, sources
from eval.statistics import RESAMPLES
from mmadapter.options import Parser, main_with_errors
from mmadapter.record import replacing

DESCRIPTION = """\
python -m eval.report assets/adapters/scienceqa-text/scores-test.json assets/adapters/scienceqa/scores-test.json
python -m eval.report base=base.json ours=scores.json --data scienceqa --out report.md --html report.html

One table of runs over one test set, beside scores that others published over it: with bootstrap 95% intervals, and a
paired test of each run against the first. A RUN is what eval.scienceqa, eval.caption, eval.qa, eval.ner or
eval.instruct wrote with --json; NAME=FILE gives it a name. Examples that are not in scores-X.json are read from the
file beside it that --examples wrote, or from predictions-X.jsonl or captions-X.jsonl. Runs over different test sets or
pictures, by different rules, or that do not say over which, are refused. Markdown goes to standard output or --out;
--html writes one page, with its pictures inside, that works offline: the table, a chart, and the best, worst and random
examples of the first run with what every run said.
"""
MARKS = str.maketrans({character: "\\" + character for character in "\\`*_{}[]<>|#~$&"})


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.resamples < 100:
        parser.error("--resamples must be at least 100")
    if args.gallery < 0:
        parser.error("--gallery must be at least 0, which is none")
    if args.images is not None and args.html is None:
        parser.error("--images is for the page; it goes with --html")
    for option, suffixes in (("html", (".html", ".htm")), ("out", (".md", ".markdown", ".txt"))):
        path = getattr(args, option)
        if path is not None and path.suffix.lower() not in suffixes:
            parser.error(f"--{option} must name a file that ends in {suffixes[0]}, got {path}")
    command = shlex.join(["python", "-m", "eval.report", *arguments])
    return main_with_errors(lambda: run(args, command), args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m eval.report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a score file, or NAME=FILE")
    parser.add_argument(
        "--data",
        metavar="PATH",
        type=Path,
        help="what was scored, for tests by class and for the examples: ScienceQA's folder or the caption annotations",
    )
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="the pictures, for --html (ScienceQA: default the data's images/)"
    )
    parser.add_argument("--out", metavar="FILE.md", type=Path, help="write the Markdown there")
    parser.add_argument("--html", metavar="FILE.html", type=Path, help="write the page there")
    parser.add_argument(
        "--published",
        metavar="NAME",
        help=f"published scores: {', '.join(table.name for table in TABLES)}, or none (default: those of the test set)",
    )
    parser.add_argument(
        "--gallery", metavar="N", type=int, default=12, help="examples in each part of the page (default: %(default)s)"
    )
    parser.add_argument(
        "--resamples",
        metavar="N",
        type=int,
        default=RESAMPLES,
        help="of the bootstrap and of permutation tests (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(args: argparse.Namespace, command: str) -> int:
    """Reads the runs, computes the report and writes it."""
    prepare_outputs(args.out, args.html)
    report = build(
        read_runs(args.runs),
        data=args.data,
        images=args.images,
        published=args.published,
        cards=args.gallery if args.html is not None else 0,
        resamples=args.resamples,
        seed=args.seed,
    )
    about = provenance(command, ("numpy",))
    if report.gallery is not None:
        for name in report.gallery.lost[:3]:
            note(f"no picture {name}: it is not in --images, or cannot be read")
    if args.html is not None:
        _write(args.html, page(report, about))
    text = markdown(report)
    if args.out is not None:
        _write(args.out, f"{text}\nMade by `{command}` at commit {about['git_commit']}.\n")
    else:
        print(text, end="")
    return 0


def markdown(report: Report) -> str:
    """The report without its pictures; what comes from files is text here too, whatever marks it holds."""
    columns = report.layout.columns
    lines = [f"# {_plain(report.title)}", "", f"{report.examples:,} {report.layout.example}s.", ""]
    numbers, listed = sources(report.published)
    head = ["run", "how", *columns.values()]
    lines += ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * len(columns)]
    if any(name in report.counts for name in columns):
        counts = [f"{report.counts[name]:,}" if name in report.counts else "" for name in columns]
        lines.append("| " + " | ".join([f"*{report.layout.counted}*", "", *counts]) + " |")
    for row in report.rows:
        cells = [_cell(row.cells[name], report.layout.decimals) for name in columns]
        lines.append("| " + " | ".join([_plain(row.run.label), _plain(row.how), *cells]) + " |")
    if report.published is not None:
        for published in report.published.rows:
            cells = [published.scores.get(name, "") for name in columns]
            label = f"*published:* {_plain(published.model)} ({numbers[published.source]})"
            lines.append("| " + " | ".join([label, _plain(published.detail), *cells]) + " |")
        lines += ["", *(f"({number}) {_plain(source)}  " for number, source in enumerate(listed, 1))]
    if report.comparisons:
        lines += ["", f"## Against {_plain(report.rows[0].run.label)}", ""]
        lines += ["| run | score | difference | p | test |", "| --- | --- | ---: | ---: | --- |"]
        for comparison in report.comparisons:
            decimals = report.layout.decimals
            difference = (
                f"{signed(comparison.difference, decimals)} {interval_text(comparison.interval, decimals, True)}"
            )
            test = f"{comparison.test} ({comparison.detail})" if comparison.detail else comparison.test
            cells = [_plain(comparison.run.label), columns[comparison.column], difference, p_text(comparison.p), test]
            lines.append("| " + " | ".join(cell.strip() for cell in cells) + " |")
    lines += ["", *(f"- {_plain(text)}" for text in report.notes), ""]
    lines += ["| run | file | commit | data |", "| --- | --- | --- | --- |"]
    for row in report.rows:
        record = row.run.record
        commit = commit_text(record.get("git_commit"), 12)
        cells = [_plain(row.run.label), _plain(str(row.run.path)), commit, short_hash(record.get("data_hash"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(cell: Cell, decimals: int) -> str:
    if cell.value is None:
        return "-"
    return f"{cell.value:.{decimals}f} {interval_text(cell.interval, decimals)}".strip()


def _plain(text: str) -> str:
    """A text of one line that Markdown shows as it is."""
    return re.sub(r"\s+", " ", text).strip().translate(MARKS)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
