"""Score answers to ScienceQA (Lu et al. 2022, arXiv 2209.09513), from a file or of a model that is asked here."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.kept import Answered, scored_file
from eval.records import (
    PICTURE_PACKAGES,
    Start,
    add_out_option,
    add_result_options,
    check_options,
    check_result_options,
    note,
    prepare_outputs,
    result_record,
    write_result,
)
from eval.scienceqa_model import NORMALISATIONS, SCORES, ask_model, data_hash
from mmadapter.captions import named, read_text
from mmadapter.options import Parser, add_model_options, main_with_errors
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
pid and answer (a text or an index) or LLaVA's of question_id and text.

A text names a choice as a whole ("B", "(B)", "B.", "B)", "B:" or the option's text; b is B), else by the last "answer
is X" in it, X a letter or an option's text, whichever is longer, else by what stands before "BECAUSE:", else by the
letter that it begins with ("B. Louisiana"). X is not the beginning of a longer word or number (1 is not in 1.5). A
letter with another option's text right behind it ("The answer is A. Virginia", "A magnet") names none, nor does an
option's text with another letter in brackets. A text that names none is wrong, and counted and shown as unparsed.
"""
TASK_VERSION = 2  # of 1 the texts were read by other rules
UNPARSED_SHOWN, UNPARSED_WIDTH = 3, 70  # answers, and characters of each
MODEL_ONLY = ("out", "score", "format", "answer_form", "normalise", "shots", "batch_size")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    check_options(parser, args, model_only=MODEL_ONLY, from_one=("batch_size", "limit", "held_out"))
    check_result_options(parser, args)
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
    add_result_options(parser, "every answer")
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
    add_out_option(group)
    add_model_options(parser)
    return parser


def run(args: argparse.Namespace, command: str) -> int:
    """Collects the answers, scores them, prints the table and writes the record."""
    started = Start.now()
    prepare_outputs(args.json, args.examples, args.out)
    split = read_problems(args.data, args.split)
    problems = held_out(split, args.held_out, args.seed)[1] if args.held_out is not None else split
    problems = problems[: args.limit]
    if args.predictions is not None:
        scored = (problem.pid for problem in problems)
        asked = Answered(read_predictions(args.predictions, split), *scored_file(args.predictions, "pid", scored))
    else:
        asked = ask_model(args, problems)
    answers = asked.answers
    unanswered = [problem.pid for problem in problems if problem.pid not in answers]
    if unanswered:
        raise ValueError(
            f"{args.predictions}: {named(unanswered, 'pid')} without an answer, of {len(problems)} to score; every "
            "question needs one"
        )
    scores = accuracies(problems, {pid: answer["answer"] for pid, answer in answers.items()})
    passed_over = len(answers.keys() - {problem.pid for problem in problems})
    if passed_over:
        note(f"{passed_over} answers to questions that are not scored here are passed over")
    drawn = {}
    if args.on_unparsed == "random":
        unread = [problem for problem in problems if not names_choice(problem, answers[problem.pid]["answer"])]
        drawn = {problem.pid: draw_choice(problem, args.seed) for problem in unread}
    final = {problem.pid: drawn.get(problem.pid, answers[problem.pid]["answer"]) for problem in problems}
    scores |= {name: score for name, score in accuracies(problems, final).items() if name in CLASSES}
    read_pictures = args.adapter not in (None, "none") and any(problem.image is not None for problem in problems)
    part = f"{args.split}, held out with seed {args.seed}" if args.held_out is not None else args.split
    scores["IMG_by_hint"] = images_by_hint(problems, final)
    print_table(f"ScienceQA {part}", scores)
    show_unparsed(problems, answers, args.on_unparsed)
    if args.json is not None:
        record = result_record(
            args,
            command,
            started,
            task="scienceqa",
            version=TASK_VERSION,
            scores=scores,
            settings={
                "split": args.split,
                "held_out": args.held_out,
                "on_unparsed": args.on_unparsed,
                # Whoever was asked, and with which seed: this command's chose what is scored, or how.
                **({"seed": args.seed} if args.held_out is not None or args.on_unparsed == "random" else {}),
            },
            model=asked.model,
            made=asked.made,
            data_hash=data_hash(args.data),
            images_hash=asked.images_hash,
            predictions=[
                {
                    **answers[problem.pid],
                    **({"drawn": final[problem.pid]} if problem.pid in drawn else {}),
                    "correct": final[problem.pid] == problem.answer,
                }
                for problem in problems
            ],
            packages=("tokenizers", "timm", *(PICTURE_PACKAGES if read_pictures else ())),
        )
        write_result(args, record)
    return 0


def show_unparsed(problems: Sequence[Problem], answers: Mapping[str, Mapping[str, Any]], counted: str) -> None:
    """Says on standard error how many answers name no choice, and what the first of them are."""
    unparsed = [problem.pid for problem in problems if not names_choice(problem, answers[problem.pid]["answer"])]
    if unparsed:
        few = []
        for pid in unparsed[:UNPARSED_SHOWN]:
            text = str(answers[pid].get("text", answers[pid]["answer"]))
            few.append(f"pid {pid}: {text if len(text) <= UNPARSED_WIDTH else f'{text[:UNPARSED_WIDTH]}...'!r}")
        what = "is wrong" if counted == "wrong" else "counts as a choice drawn by --seed"
        noun = "answer that names no choice" if len(unparsed) == 1 else "answers that name no choice"
        more = "; ..." if len(unparsed) > UNPARSED_SHOWN else ""
        note(f"{len(unparsed)} {noun}, each of which {what}: {'; '.join(few)}{more}")


def names_choice(problem: Problem, answer: int | None) -> bool:
    return answer is not None and 0 <= answer < len(problem.choices)


def draw_choice(problem: Problem, seed: int) -> int:
    """A choice in place of an answer that names none, the same in any order of questions."""
    return random.Random(f"{seed} {problem.pid}").randrange(len(problem.choices))


def images_by_hint(problems: Sequence[Problem], final: Mapping[str, int | None]) -> dict[str, dict[str, Any]]:
    """IMG of the questions with a hint and of those without, whose shares differ between the splits."""
    found = {}
    for name, wanted in (("with", True), ("without", False)):
        own = [problem for problem in problems if problem.image is not None and bool(problem.hint) == wanted]
        found[name] = {"IMG": accuracies(own, final)["avg"], "n": len(own)}
    return found


def print_table(title: str, scores: Mapping[str, Any]) -> None:
    print(f"{title}: {scores['total']} questions, {scores['unparsed']} unparsed")
    for label, row in (
        ("", CLASSES),
        ("%", ["-" if scores[name] is None else f"{scores[name]:.2f}" for name in CLASSES]),
        ("n", [str(scores["n"][name]) for name in CLASSES]),
    ):
        print(f"{label:3}" + "".join(f"{cell:>8}" for cell in row))
    parts = [
        f"{name} a hint {own['IMG']:.2f} (n {own['n']})" for name, own in scores["IMG_by_hint"].items() if own["n"]
    ]
    if parts:
        print(f"IMG {', '.join(parts)}")


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
    for place, pid, value, text in _predictions(path, split):
        if pid in answers:
            raise ValueError(f"{place}: pid {pid} has an answer already; give one for every question")
        if value is None or type(value) is int:
            answers[pid] = {"pid": pid, "answer": value, **({} if text is None else {"text": text})}
        elif isinstance(value, str):
            answers[pid] = {"pid": pid, "answer": parse_answer(value, choices.get(pid, ())), "text": value}
        else:
            raise ValueError(f"{place}: an answer must be a text or the index of a choice, got {value!r:.60}")
    return answers


def _predictions(path: Path, split: Sequence[Problem]) -> Iterator[tuple[str, str, object, str | None]]:
    """Each answer of a file as it stands there: its place for errors, pid, value, and the text that an index is of."""
    text = read_text(path)
    twice: set[str] = set()

    def noting_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
        counts = Counter(key for key, _ in pairs)
        twice.update(key for key, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=noting_repeats)
    except ValueError:
        content = None
    if isinstance(content, list):
        if len(content) != len(split):
            raise ValueError(
                f"{path} is a list of {len(content)} answers; the split has {len(split)} questions, and each needs one"
            )
        for number, (problem, value) in enumerate(zip(split, content, strict=True)):
            yield f"{path}, item {number}", problem.pid, value, None
        return
    for name in ("results", "outputs"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            repeated = sorted(twice & content[name].keys())
            if repeated:
                raise ValueError(f"{path}, {name}: {named(repeated, 'pid')} more than once; give one answer each")
            outputs = content.get("outputs")
            for pid, value in content[name].items():
                output = outputs.get(pid) if isinstance(outputs, dict) else None
                yield f"{path}, {name}, pid {pid}", pid, value, output if isinstance(output, str) else None
            return
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; every question needs an answer")
    for place, line in lines:
        try:
            record = json.loads(line)
            # LLaVA's lines have other names for the two.
            names = ("pid", "answer") if "pid" in record else ("question_id", "text")
            pid, value = (record[name] for name in names)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{place}: got {line.strip()!r:.60}, expected {{"pid": ..., "answer": ...}}; else a file may hold one '
                'JSON list of texts, {"results": {pid: index}}, {"outputs": {pid: text}} or lines of {"question_id": '
                '..., "text": ...}'
            ) from None
        yield place, str(pid), value, record["text"] if isinstance(record.get("text"), str) else None


if __name__ == "__main__":
    sys.exit(main())
