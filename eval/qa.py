"""Score answers to questions: exact match and F1 as SQuAD has them, and WUPS for questions about pictures."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import qa_metrics
from eval.kept import Answered, scored_file
from eval.qa_files import Question, of_split, read_answers, read_gold
from eval.qa_metrics import WUPS_THRESHOLDS, Similarity
from eval.qa_model import BATCH_SIZE, ask_model
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
from mmadapter.options import Parser, add_model_options, main_with_errors
from mmadapter.prompts import TEMPLATES
from mmadapter.record import file_sha256

DESCRIPTION = """\
python -m eval.qa --gold daquar/questions.json --predictions answers.jsonl --json scores.json
python -m eval.qa --gold daquar/questions.json --adapter none --shots 3 --out answers.jsonl

Exact match and F1 in percent, after SQuAD's normalisation (lower case, no punctuation, no articles); of several
reference answers the best one counts. Where questions have pictures, also WUPS at 0.9 and 0.0, for which nltk and its
WordNet must be installed. Gold is SQuAD's JSON, or rows of question and answer, and where there are any image, split,
context and id: JSON, JSON lines or CSV. Predictions are {id: text}, JSON lines of id or index and answer, or a JSON
list of texts in the order of the gold file's split; an id is the gold file's own or the place in the split, from 0.
Beside the scores stands what the commonest training answer gets as the answer to everything.
"""
TASK_VERSION = 1
SCORES = ("exact_match", "f1", *WUPS_THRESHOLDS)
TYPES = ("number", "one word", "several words", "unanswerable")
MODEL_ONLY = ("images", "out", "template", "shots", "batch_size", "max_new_tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    check_options(parser, args, model_only=MODEL_ONLY, from_one=("batch_size", "limit", "max_new_tokens"))
    check_result_options(parser, args)
    command = shlex.join(["python", "-m", "eval.qa", *arguments])
    return main_with_errors(lambda: run(args, command), args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m eval.qa",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gold", metavar="FILE", type=Path, required=True, help="questions and their answers")
    parser.add_argument("--predictions", metavar="FILE", type=Path, help="answers to score, one for every question")
    parser.add_argument("--split", help="of the gold file, where its rows name one (default: test)")
    parser.add_argument("--limit", metavar="N", type=int, help="score the first N questions only")
    add_result_options(parser, "every answer")
    parser.add_argument(
        "--train",
        metavar="FILE",
        type=Path,
        help="train questions, for --shots and the commonest answer (default: the gold file's split train)",
    )
    group = parser.add_argument_group("how the model is asked")
    group.add_argument(
        "--images", metavar="DIR", type=Path, help="pictures (default: beside the gold file, or images/)"
    )
    group.add_argument("--template", choices=TEMPLATES, help="prompt template (default: the adapter's; base: plain)")
    group.add_argument("--shots", type=int, choices=range(4), help="train questions with answers shown first")
    group.add_argument("--seed", type=int, default=0, help="chooses the shots (default: %(default)s)")
    group.add_argument("--batch-size", metavar="N", type=int, help=f"questions at once (default: {BATCH_SIZE})")
    group.add_argument("--max-new-tokens", metavar="N", type=int, help="longest answer (default: the adapter's, or 30)")
    add_out_option(group)
    add_model_options(parser)
    return parser


def run(args: argparse.Namespace, command: str) -> int:
    """Collects the answers, scores them, prints the table and writes the record."""
    started = Start.now()
    prepare_outputs(args.json, args.examples, args.out)
    gold = read_gold(args.gold)
    known, split = of_split(gold, args.split)
    questions = known[: args.limit]
    source = gold if args.train is None else read_gold(args.train)
    train = [q for q in source.questions if q.split == "train" or (source is not gold and q.split == "")]
    if args.predictions is not None:
        given = read_answers(args.predictions, gold, known, questions)
        asked = Answered(given, *scored_file(args.predictions, "id", given))
    else:
        asked = ask_model(args, gold, split, questions, train)
    answers = asked.answers
    similarity = wups_similarity(questions)
    each = [score(gold.as_said(answers[question.id]), question, similarity) for question in questions]
    programs = {} if similarity is None else {"wordnet": qa_metrics.open_wordnet().get_version()}
    read_pictures = args.adapter not in (None, "none") and any(question.image for question in questions)
    total = means(each)
    kinds = [qa_metrics.answer_type(question.answers[0]) for question in questions]
    by_type = {
        kind: means([scores for scores, own in zip(each, kinds, strict=True) if own == kind])
        for kind in TYPES
        if kind in kinds
    }
    constant = None
    if train:
        commonest = Counter(source.as_said(question.answers[0]) for question in train).most_common(1)[0][0]
        constant = {
            "answer": commonest,
            **means([score(gold.as_said(commonest), question, similarity) for question in questions]),
        }
    yes_no = {
        "references": yes_no_share([gold.as_said(question.answers[0]) for question in questions]),
        "answers": yes_no_share([gold.as_said(answers[question.id]) for question in questions]),
    }
    print_table(f"{args.gold.name}{f', {split}' if split else ''}", total, by_type, constant)
    if any(yes_no.values()):
        print(f"yes or no: {yes_no['references']:.2f}% of the references, {yes_no['answers']:.2f}% of the answers")
    if args.json is not None:
        record = result_record(
            args,
            command,
            started,
            task="qa",
            version=TASK_VERSION,
            scores={**total, "by_type": by_type, "constant": constant, "yes_no": yes_no},
            settings={"split": split, "train_hash": None if args.train is None else file_sha256(args.train)},
            model=asked.model,
            made=asked.made,
            data_hash=file_sha256(args.gold),
            images_hash=asked.images_hash,
            predictions=[
                {
                    "id": question.id,
                    "question": question.text,
                    **({"image": question.image} if question.image else {}),
                    "references": question.answers,
                    "answer": answers[question.id],
                    **scores,
                }
                for question, scores in zip(questions, each, strict=True)
            ],
            packages=("tokenizers", "timm", "nltk", *(PICTURE_PACKAGES if read_pictures else ())),
            **programs,
        )
        write_result(args, record)
    return 0


def wups_similarity(questions: Sequence[Question]) -> Similarity | None:
    """What WUPS compares words with; None, with the reason on standard error, where it cannot be had.

    Only questions about pictures have answers that are sets of things.
    """
    if not any(question.image for question in questions):
        return None
    try:
        return qa_metrics.wordnet_similarity()
    except LookupError as error:
        note(f"WUPS is left out: {error}")
        return None


def score(answer: str, question: Question, similarity: Similarity | None) -> dict[str, float | None]:
    """All scores of one answer, in percent."""
    references = question.answers
    scores: dict[str, float | None] = {
        "exact_match": 100 * qa_metrics.exact_match(answer, references),
        "f1": 100 * qa_metrics.f1(answer, references),
    }
    for name, threshold in WUPS_THRESHOLDS.items():
        scores[name] = None
        if similarity is not None:
            scores[name] = 100 * qa_metrics.wups(answer, references, similarity, threshold)
    return scores


def yes_no_share(answers: Sequence[str]) -> float:
    """How many of the answers are yes or no, in percent: such questions are right half of the time by chance."""
    return 100 * sum(qa_metrics.normalise(answer) in ("yes", "no") for answer in answers) / len(answers)


def means(each: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """The mean of every score and, as `total`, how many there are; null stays null."""
    columns = {name: [scores[name] for scores in each] for name in SCORES}
    return {
        **{name: None if None in column else sum(column) / len(column) for name, column in columns.items()},
        "total": len(each),
    }


def print_table(
    title: str, total: Mapping[str, Any], by_type: Mapping[str, Mapping[str, Any]], constant: Mapping[str, Any] | None
) -> None:
    print(f"{title}: {total['total']} questions")
    rows = {"all": total, **by_type}
    if constant is not None:
        rows[f'always "{constant["answer"]:.40}"'] = constant
    width = max(map(len, rows))
    print(" " * width + "".join(f"{name:>13}" for name in (*SCORES, "n")))
    for name, scores in rows.items():
        cells = ["-" if scores[key] is None else f"{scores[key]:.2f}" for key in SCORES]
        print(f"{name:{width}}" + "".join(f"{cell:>13}" for cell in (*cells, str(scores["total"]))))


if __name__ == "__main__":
    sys.exit(main())
