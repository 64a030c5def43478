"""Score answers to ScienceQA (Lu et al. 2022, arXiv 2209.09513), from a file or of a model that is asked here."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.records import note, prepare_outputs, provenance
from eval.scienceqa_model import NORMALISATIONS, SCORES, ask_model, data_hash
from mmadapter.captions import read_text
from mmadapter.options import Parser, add_model_options, main_with_errors
from mmadapter.record import file_sha256, write_json
from mmadapter.scienceqa import (
    ANSWER_FORMS,
    CLASSES,
    FORMAT_EXAMPLES,
    Problem,
    accuracies,
    held_out,
    parse_answer,
    parse_format,
    read_problems,
)

DESCRIPTION = """\
python -m eval.scienceqa --data scienceqa --predictions predictions.jsonl --json scores.json
python -m eval.scienceqa --data scienceqa --adapter none --score likelihood --out predictions.jsonl

Accuracy on ScienceQA in percent: of all questions (avg), by subject (NAT, SOC, LAN), of those with a hint (TXT), with
an image (IMG), with neither (NO), and by school grade (G1-6, G7-12), each with the number of its questions. --data
holds problems.json, pid_splits.json and images/SPLIT/PID/FILE. Predictions are the data set's own results
({"results": {pid: index}}), {"outputs": {pid: text}}, a JSON list of texts in the order of the split, or JSON lines of
pid and answer (a text or an index). An answer that names no choice is wrong, and counted as unparsed.
"""
TASK_VERSION = 1
MODEL_ONLY = ("out", "score", "format", "answer_form", "normalise", "shots", "batch_size")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if (args.predictions is None) == (args.adapter is None):
        parser.error("give either --predictions FILE or --adapter A (none is the base model)")
    given = [name for name in MODEL_ONLY if getattr(args, name) is not None]
    if args.predictions is not None and given:
        parser.error(f"--{given[0].replace('_', '-')} is about a model that answers; it goes with --adapter")
    for name in ("batch_size", "limit", "held_out"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.held_out is not None and args.split != "train":
        parser.error("--held-out is a part of the train questions; it goes with --split train")
    try:
        args.format = None if args.format is None else parse_format(args.format)
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "eval.scienceqa", *arguments])
    return main_with_errors(lambda: run(args, command), args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m eval.scienceqa",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--predictions", metavar="FILE", type=Path, help="answers to score, one for every question")
    parser.add_argument("--split", default="test", help="of pid_splits.json (default: %(default)s)")
    parser.add_argument(
        "--held-out", metavar="N", type=int, help="with --split train: those N that training with this seed holds out"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="score the first N questions only")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write scores, provenance and every answer to OUT")
    parser.add_argument(
        "--on-unparsed",
        choices=("wrong", "random"),
        default="wrong",
        help="an answer that names no choice is wrong, or a random choice, as in published results "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    group = parser.add_argument_group("how the model is asked (default: as the adapter was trained)")
    group.add_argument(
        "--score", choices=SCORES, help="take the letter it writes, or the likeliest option (base model: letter)"
    )
    group.add_argument("--format", metavar="F", help=f"such as {FORMAT_EXAMPLES} (base model: QCM-A)")
    group.add_argument(
        "--answer-form", choices=ANSWER_FORMS, help='"The answer is B." or the text of the option (base model: letter)'
    )
    group.add_argument(
        "--normalise", choices=NORMALISATIONS, help="of an option's log-probabilities over its tokens (default: mean)"
    )
    group.add_argument("--shots", type=int, choices=range(4), help="train questions with answers shown first")
    group.add_argument("--batch-size", metavar="N", type=int, help="questions at once (default: 16)")
    group.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="keep the model's answers as JSON lines; a run that was stopped goes on from there",
    )
    add_model_options(parser)
    return parser


def run(args: argparse.Namespace, command: str) -> int:
    """Collects the answers, scores them, prints the table and writes the record."""
    prepare_outputs(args.json, args.out)
    split = read_problems(args.data, args.split)
    problems = held_out(split, args.held_out, args.seed)[1] if args.held_out is not None else split
    problems = problems[: args.limit]
    begin = time.monotonic()
    model = None
    if args.predictions is not None:
        answers = read_predictions(args.predictions, split)
    else:
        answers, model = ask_model(args, problems)
    seconds = time.monotonic() - begin
    scores = accuracies(problems, {pid: answer["answer"] for pid, answer in answers.items()})
    passed_over = len(answers.keys() - {problem.pid for problem in problems})
    if passed_over:
        note(f"{passed_over} answers to questions that are not scored here are passed over")
    final = {problem.pid: settle(problem, answers[problem.pid]["answer"], args) for problem in problems}
    scores |= {name: score for name, score in accuracies(problems, final).items() if name in CLASSES}
    part = f"{args.split}, held out with seed {args.seed}" if args.held_out is not None else args.split
    print_table(f"ScienceQA {part}", scores)
    if args.json is not None:
        record = {
            **scores,
            "task": "scienceqa",
            "version": TASK_VERSION,
            "split": args.split,
            "held_out": args.held_out,
            "limit": args.limit,
            "on_unparsed": args.on_unparsed,
            "seed": args.seed,
            "adapter": args.adapter,
            "base": None if args.adapter is None else args.llama,
            "model": model,
            **provenance(command, ("tokenizers", "timm")),
            "data_hash": data_hash(args.data),
            "predictions_hash": None if args.predictions is None else file_sha256(args.predictions),
            "seconds": round(seconds, 1),
            "predictions": [
                {**answers[problem.pid], "correct": final[problem.pid] == problem.answer} for problem in problems
            ],
        }
        write_json(args.json, record)
    return 0


def settle(problem: Problem, answer: int | None, args: argparse.Namespace) -> int | None:
    """The answer that is scored: one that names no choice may be drawn, the same in any order of questions."""
    if args.on_unparsed == "wrong" or (answer is not None and 0 <= answer < len(problem.choices)):
        return answer
    return random.Random(f"{args.seed} {problem.pid}").randrange(len(problem.choices))


def print_table(title: str, scores: Mapping[str, Any]) -> None:
    print(f"{title}: {scores['total']} questions, {scores['unparsed']} unparsed")
    for label, row in (
        ("", CLASSES),
        ("%", ["-" if scores[name] is None else f"{scores[name]:.2f}" for name in CLASSES]),
        ("n", [str(scores["n"][name]) for name in CLASSES]),
    ):
        print(f"{label:3}" + "".join(f"{cell:>8}" for cell in row))


def read_predictions(path: Path, split: Sequence[Problem]) -> dict[str, dict[str, Any]]:
    """Answers by pid, each with `pid`, `answer` (an index, None where the text names no choice) and any `text`.

    Args:
        split: All questions of the split, whose order a list of texts has. Answers to other questions keep their text
            only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has none of the formats, or a question twice.
    """
    choices = {problem.pid: problem.choices for problem in split}
    answers: dict[str, dict[str, Any]] = {}
    for place, pid, value in _predictions(path, split):
        if pid in answers:
            raise ValueError(f"{place}: pid {pid} has an answer already; give one for every question")
        if value is None or type(value) is int:
            answers[pid] = {"pid": pid, "answer": value}
        elif isinstance(value, str):
            answers[pid] = {"pid": pid, "answer": parse_answer(value, choices.get(pid, ())), "text": value}
        else:
            raise ValueError(f"{place}: an answer must be a text or the index of a choice, got {value!r:.60}")
    return answers


def _predictions(path: Path, split: Sequence[Problem]) -> Iterator[tuple[str, str, object]]:
    """Each answer of a file as it stands there: its place for errors, pid, value."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if isinstance(content, list):
        if len(content) != len(split):
            raise ValueError(f"{path} is a list of {len(content)} answers; the split has {len(split)} questions")
        for number, (problem, value) in enumerate(zip(split, content, strict=True)):
            yield f"{path}, item {number}", problem.pid, value
        return
    for name in ("results", "outputs"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            for pid, value in content[name].items():
                yield f"{path}, {name}, pid {pid}", pid, value
            return
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; every question needs an answer")
    for place, line in lines:
        try:
            record = json.loads(line)
            yield place, str(record["pid"]), record["answer"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{place}: expected {{"pid": ..., "answer": ...}}; else a file may hold one JSON list of texts, '
                '{"results": {pid: index}} or {"outputs": {pid: text}}'
            ) from None


if __name__ == "__main__":
    sys.exit(main())
