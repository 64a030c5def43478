"""Score named entities in historical newspapers as the HIPE shared tasks do, from a file or of a model asked here."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.hipe import (
    COLUMN,
    Document,
    Passage,
    Span,
    known_types,
    passages,
    read_hipe,
    read_labels,
    spans_of,
)
from eval.kept import UNKNOWN, Made, scored_file
from eval.ner_metrics import MATCHES, Counts, count_spans, scores
from eval.ner_model import BATCH_SIZE, MAX_NEW_TOKENS, ask_model
from eval.ner_texts import LONG, OTHER, PROMPTS, REPAIRED, SHORT, UNPARSED, Parsed, likely_prompt, parse, read_texts
from eval.records import (
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
from mmadapter.captions import read_text
from mmadapter.options import Parser, add_model_options, main_with_errors
from mmadapter.prompts import TEMPLATES
from mmadapter.record import file_sha256

DESCRIPTION = """\
python -m eval.ner --gold HIPE-2022-v2.1-hipe2020-test-fr.tsv --predictions response.tsv --json scores.json
python -m eval.ner --gold HIPE-2022-v2.1-hipe2020-test-fr.tsv --adapter none --prompt iob --out texts.jsonl

Precision, recall and F1 of entities, by type and of all (micro over entities, counted within each document): strict
takes type and both boundaries, fuzzy the type and some overlap. PER, PERSON and pers are one type, and so on. Gold is
HIPE-2022's TSV. Predictions are such a TSV with the same tokens, or a model's texts as JSON lines
{"id": ..., "text": ...}: a JSON list of {"entity": ..., "text": ...}, or one IOB label a word. The id is the document's
(a text about all of it), or DOCUMENT#N for its passage N, from 0, as --out keeps them: a passage has as many whole
sentences as --passage-words allows, or printed lines where no sentence fits or the file marks none. A text that cannot
be read is counted as unparsed, one with too few or too many labels as short or long, and these have no entities; one
that can be mended in one way only is counted as repaired, such as one or two labels too few at the end, after an O.
"""
TASK_VERSION = 2  # of 1 the texts were read by other rules
PASSAGE_WORDS = 60
MODEL_ONLY = ("train", "out", "template", "shots", "batch_size", "max_new_tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    check_options(
        parser, args, model_only=MODEL_ONLY, from_one=("batch_size", "limit", "max_new_tokens", "passage_words")
    )
    check_result_options(parser, args)
    if args.adapter is not None and args.column != COLUMN:
        parser.error(f"a model is asked for the entities of {COLUMN}; --column {args.column} goes with --predictions")
    if args.shots and args.train is None:
        parser.error("--shots needs examples; give a TSV of them with --train")
    command = shlex.join(["python", "-m", "eval.ner", *arguments])
    return main_with_errors(lambda: run(args, command), args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m eval.ner",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gold", metavar="FILE", type=Path, required=True, help="documents and their entities, TSV")
    parser.add_argument("--predictions", metavar="FILE", type=Path, help="entities to score, of every document")
    parser.add_argument(
        "--column", metavar="NAME", default=COLUMN, help="such as NE-COARSE-METO, NE-FINE-LIT (default: %(default)s)"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="score the first N documents only")
    add_result_options(parser, "every entity")
    parser.add_argument(
        "--prompt",
        choices=PROMPTS,
        help="what a model writes: a list of entities, or labels (default: as the adapter was trained, base model: "
        "json; of a file: as it says, else the one that more texts can be read in)",
    )
    parser.add_argument(
        "--passage-words",
        metavar="N",
        type=int,
        default=PASSAGE_WORDS,
        help="longest passage that a model is asked about (default: %(default)s)",
    )
    group = parser.add_argument_group("how the model is asked")
    group.add_argument("--template", choices=TEMPLATES, help="prompt template (default: the adapter's; base: plain)")
    group.add_argument("--shots", type=int, choices=range(4), help="passages of --train with answers shown first")
    group.add_argument("--train", metavar="FILE", type=Path, help="documents that the shots are taken from, TSV")
    group.add_argument("--seed", type=int, default=0, help="chooses the shots (default: %(default)s)")
    group.add_argument("--batch-size", metavar="N", type=int, help=f"passages at once (default: {BATCH_SIZE})")
    group.add_argument("--max-new-tokens", metavar="N", type=int, help=f"longest answer (default: {MAX_NEW_TOKENS})")
    add_out_option(group)
    add_model_options(parser)
    return parser


def run(args: argparse.Namespace, command: str) -> int:
    """Collects the entities, scores them, prints the table and writes the record."""
    started = Start.now()
    prepare_outputs(args.json, args.examples, args.out)
    gold = read_hipe(args.gold, args.column)
    documents = gold[: args.limit]
    types = known_types(gold)
    prompt = model = None
    made = Made((UNKNOWN,))
    asked: list[Passage] = []
    texts: dict[str, str] = {}
    parsed: dict[str, Parsed] = {}
    if args.predictions is not None and not holds_json(args.predictions):
        if args.prompt is not None:
            raise ValueError(f"{args.predictions} is TSV; --prompt is about a model's texts, in JSON lines")
        predicted = read_labels(args.predictions, args.column, gold, documents)
    else:
        if args.predictions is not None:
            asked, texts, passed_over = read_texts(args.predictions, gold, documents, args.passage_words)
            model, made = scored_file(args.predictions, "id", (passage.id for passage in asked))
            said = model and model.get("prompt")
            prompt = args.prompt or (said if said in PROMPTS else likely_prompt(asked, texts, types))
            if passed_over:
                note(f"{passed_over} texts of documents that are not scored here are passed over")
        else:
            asked = [passage for document in documents for passage in passages(document, args.passage_words)]
            train = [] if args.train is None else read_hipe(args.train)
            answered = ask_model(args, asked, train, types, args.passage_words)
            texts, model, made = answered.answers, answered.model, answered.made
            prompt = model["prompt"]
        parsed = {passage.id: parse(texts[passage.id], passage, prompt, types) for passage in asked}
        predicted = spans_by_document(asked, parsed)

    nowhere = {document.id: [] for document in documents}
    for passage in asked:
        nowhere[passage.document.id] += parsed[passage.id].nowhere
    each = {
        document.id: count_spans(spans_of(document.labels), predicted[document.id], nowhere[document.id])
        for document in documents
    }
    total = Counts()
    for counts in each.values():
        total.update(counts)
    summary = {
        **scores(total),
        "documents": len(documents),
        "spans": sum(len(spans_of(document.labels)) for document in documents),
        **text_counts(asked, parsed),
    }
    print_table(f"{args.gold.name}, {args.column}", summary)
    if args.json is not None:
        record = result_record(
            args,
            command,
            started,
            task="ner",
            version=TASK_VERSION,
            scores=summary,
            settings={
                "column": args.column,
                "prompt": prompt,
                "passage_words": args.passage_words if asked else None,
                "train_hash": None if args.train is None else file_sha256(args.train),
            },
            model=model,
            made=made,
            data_hash=file_sha256(args.gold),
            predictions=[
                {
                    "id": document.id,
                    **{match: all_counts(each[document.id], match) for match in MATCHES},
                    "gold": [described(document, span) for span in spans_of(document.labels)],
                    "predicted": [described(document, span) for span in predicted[document.id]],
                    "nowhere": nowhere[document.id],
                    "texts": [
                        {"id": passage.id, "text": texts[passage.id], "status": parsed[passage.id].status}
                        for passage in asked
                        if passage.document is document
                    ],
                }
                for document in documents
            ],
            packages=("tokenizers",),
        )
        write_result(args, record)
    return 0


def holds_json(path: Path) -> bool:
    """Whether predictions are JSON lines; else they are TSV."""
    return read_text(path).lstrip().startswith(("{", "["))


def spans_by_document(asked: Sequence[Passage], parsed: Mapping[str, Parsed]) -> dict[str, list[Span]]:
    """The entities of all passages, counted from the first token of their document."""
    found: dict[str, list[Span]] = {passage.document.id: [] for passage in asked}
    for passage in asked:
        found[passage.document.id] += [
            Span(span.type, passage.start + span.start, passage.start + span.end) for span in parsed[passage.id].spans
        ]
    return found


def text_counts(asked: Sequence[Passage], parsed: Mapping[str, Parsed]) -> dict[str, int]:
    """How many texts there are and what had to be done to them; all 0 for predictions that are no texts.

    `cut` is how many gold entities reach over the end of a passage, so that no text can have them whole.
    """
    statuses = Counter(parsed[passage.id].status for passage in asked)
    ends = {(passage.document.id, passage.end) for passage in asked}
    documents = {passage.document.id: passage.document for passage in asked}
    return {
        "texts": len(asked),
        "unparsed": statuses[UNPARSED],
        "short": statuses[SHORT],
        "long": statuses[LONG],
        "repaired": statuses[REPAIRED],
        "not_found": sum(len(parsed[passage.id].nowhere) for passage in asked),
        "cut": sum(
            any((name, place) in ends for place in range(span.start + 1, span.end))
            for name, document in documents.items()
            for span in spans_of(document.labels)
        ),
    }


def all_counts(counts: Counts, match: str) -> dict[str, int]:
    """A document's counts over all types."""
    return {
        name: sum(n for key, n in counts.items() if key[0] == match and key[2] == name) for name in ("TP", "FP", "FN")
    }


def described(document: Document, span: Span) -> dict[str, Any]:
    return {**span._asdict(), "text": document.text(span.start, span.end)}


def print_table(title: str, summary: Mapping[str, Any]) -> None:
    print(f"{title}: {summary['documents']} documents, {summary['spans']} entities")
    if summary["texts"]:
        labels = f"{summary['short']} with too few labels, {summary['long']} with too many, "
        print(
            f"{summary['texts']} texts: {summary['unparsed']} unparsed, "
            f"{labels if summary['short'] or summary['long'] else ''}{summary['repaired']} repaired; "
            f"{summary['not_found']} predicted entities not found in their passage"
        )
    if OTHER in summary["strict"]:
        print(f"{OTHER}: of types that were not asked for")
    if summary["cut"]:
        print(f"{summary['cut']} gold entities reach over the end of a passage")
    width = max(map(len, (*MATCHES, *summary["strict"])))
    for match in MATCHES:
        print(f"{match:{width}}" + "".join(f"{name:>8}" for name in ("P", "R", "F1", "TP", "FP", "FN")))
        for kind, row in summary[match].items():
            rates = "".join(f"{row[name]:8.3f}" for name in ("P", "R", "F1"))
            print(f"{kind:{width}}" + rates + "".join(f"{row[name]:8}" for name in ("TP", "FP", "FN")))


if __name__ == "__main__":
    sys.exit(main())
