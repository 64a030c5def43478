"""What each task reports: its columns, its chart, and the scores of a run as sums over examples.

A score whose sums the examples do not hold, as in older files, has a value alone: neither interval nor test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.caption_sums import caption_sums
from eval.hipe import Span
from eval.ner_metrics import MATCHES, Counts, count_spans
from eval.qa_metrics import answer_type
from eval.report_runs import CAPTION_METRICS, Run, shot_count
from eval.statistics import Ratio, Sums
from mmadapter.captions import CaptionedImage, read_captions
from mmadapter.record import file_sha256
from mmadapter.scienceqa import CLASSES, Problem, accuracies, held_out, read_problems

Gold = Mapping[str, Problem] | Mapping[str, CaptionedImage]  # by the ids of examples
QA_METRICS = {"exact_match": "exact match", "f1": "F1", "wups_0.9": "WUPS 0.9", "wups_0.0": "WUPS 0.0"}
NER_COUNTS = ("TP", "FP", "FN")
CLASS_OF = {
    "avg": "all",
    "NAT": "natural science",
    "SOC": "social science",
    "LAN": "language science",
    "TXT": "with a hint",
    "IMG": "with an image",
    "NO": "with neither",
    "G1-6": "grades 1 to 6",
    "G7-12": "grades 7 to 12",
}


@dataclass(frozen=True)
class Score:
    """One number of a run.

    Attributes:
        value: As the score file has it, None where it was left out.
        sums: The same from the examples, None where they do not add up to it.
        cluster: What the sums are of in place of single examples, "" for examples.
        paired: Whether the sums are of all the examples of the first run, in its order, so that a test may pair them.
        count: How many examples (or entities) it is of.
        curve: What turns what the sums give into the value; it must not change their order.
    """

    value: float | None
    sums: Sums | None = None
    cluster: str = ""
    paired: bool = True
    count: int | None = None
    curve: Callable[[float], float] = float


@dataclass(frozen=True)
class Layout:
    """How a task is shown.

    Attributes:
        title: Of the data set or task.
        example: What an example is called.
        counted: What the numbers below the classes count.
        main: The score that counts, of `columns`.
        columns: Names of scores, with the table's headings.
        tested: Those of them that paired tests are about.
        chart: Names of scores that the bar chart shows, with their labels.
        chart_title: What it shows.
        full: Where the chart's axis ends.
        decimals: Digits that scores are shown with.
        unit: Of the scores: a sentence for the reader.
        main_unit: What stands behind the score that counts.
    """

    title: str
    example: str
    counted: str
    main: str
    columns: dict[str, str]
    tested: tuple[str, ...]
    chart: dict[str, str]
    chart_title: str
    full: float
    decimals: int
    unit: str
    main_unit: str


def layout(runs: Sequence[Run]) -> Layout:
    """How the runs' task is shown; classes and metrics that no run has are left out."""
    return {"scienceqa": _scienceqa_layout, "caption": _caption_layout, "qa": _qa_layout, "ner": _ner_layout}.get(
        runs[0].task, _instruct_layout
    )(runs)


def _scienceqa_layout(runs: Sequence[Run]) -> Layout:
    present = {name: name for name in CLASSES if _any(runs, name)}
    return Layout(
        title="ScienceQA",
        example="question",
        counted="questions",
        main="avg",
        columns=present,
        tested=tuple(present),
        chart={name: f"{name} · {CLASS_OF[name]}" for name in present},
        chart_title="Accuracy by class",
        full=100.0,
        decimals=2,
        unit="Scores are percent of the questions; avg is over all of them.",
        main_unit="% right",
    )


def _caption_layout(runs: Sequence[Run]) -> Layout:
    present = {
        name: name.replace("Bleu_", "BLEU-").replace("ROUGE_", "ROUGE-") for name in CAPTION_METRICS if _any(runs, name)
    }
    values = [run.record[name] for run in runs for name in present if run.record.get(name) is not None]
    return Layout(
        title="Captions",
        example="image",
        counted="images",
        main="CIDEr",
        columns=present,
        tested=tuple(present),
        chart=present,
        chart_title="Scores by metric",
        full=max(1.0, math.ceil(2 * max(values, default=0.0)) / 2),
        decimals=4,
        unit="Scores are from 0 to 1, CIDEr to 10; higher is better.",
        main_unit="CIDEr",
    )


def _qa_layout(runs: Sequence[Run]) -> Layout:
    columns = {name: label for name, label in QA_METRICS.items() if _any(runs, name)}
    types = dict.fromkeys(kind for run in runs for kind in run.record.get("by_type", {}))
    return Layout(
        title="Questions and answers",
        example="question",
        counted="questions",
        main="f1",
        columns=columns,
        tested=tuple(columns),
        chart={f"f1 of {kind}": kind for kind in types} if len(types) > 1 else {},
        chart_title="F1 by type of answer",
        full=100.0,
        decimals=2,
        unit="Scores are in percent.",
        main_unit="F1",
    )


def _ner_layout(runs: Sequence[Run]) -> Layout:
    columns = {f"{match}.{name}": f"{match} {name}" for match in ("strict", "fuzzy") for name in ("P", "R", "F1")}
    types = sorted({kind for run in runs for kind in run.record.get("strict", {})} - {"ALL"})
    return Layout(
        title="Named entities",
        example="document",
        counted="entities",
        main="strict.F1",
        columns=columns,
        tested=tuple(columns),
        chart={f"strict.F1 of {kind}": kind for kind in types},
        chart_title="Strict F1 by type",
        full=1.0,
        decimals=4,
        unit="Scores are from 0 to 1, micro-averaged over entities.",
        main_unit="strict F1",
    )


def _instruct_layout(runs: Sequence[Run]) -> Layout:
    return Layout(
        title="Instructions",
        example="row",
        counted="rows",
        main="loss",
        columns={
            "loss": "loss a token",
            "perplexity": "perplexity",
            "base_loss": "loss of the base",
            "difference": "adapter minus base",
        },
        tested=("loss",),
        chart={},
        chart_title="",
        full=1.0,
        decimals=4,
        unit="Loss is in nats a token; lower is better.",
        main_unit="nats a token",
    )


def scores(run: Run, gold: Gold | None) -> dict[str, Score]:
    """Every score that the table, the chart or a test may show.

    Args:
        gold: What `read_gold` gave; of ScienceQA it tells which questions a class has.

    Raises:
        ValueError: The examples do not give the scores of the file, or lack something: they are not its own.
    """
    of_task = {"scienceqa": _scienceqa, "caption": _caption, "qa": _qa, "ner": _ner, "instruct": _instruct}[run.task]
    try:
        found = of_task(run, gold)
        made = {name: score.curve(score.sums.value) for name, score in found.items() if score.sums is not None}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{run.path}: an example or score is not as eval.{run.task} writes it ({error!r})") from None
    for name, value in made.items():
        if found[name].value is not None:
            _require_same(run, name, value, found[name].value)
    return found


def _require_same(run: Run, name: str, made: float, kept: float) -> None:
    if abs(made - kept) > 1e-6 * max(1.0, abs(kept)):
        raise ValueError(
            f"{run.path}: its examples give {name} {made:.6g}, the file says {kept:.6g}; do they belong together? "
            "score anew with --json"
        )


def read_gold(run: Run, data: Path) -> Gold:
    """The questions, or the photos with their captions, that the runs were scored on.

    Args:
        data: ScienceQA's folder, or the captions' annotation file.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It is of other data than the runs, or the task keeps its references in the score file.
    """
    if run.task == "scienceqa":
        names = ("problems.json", "pid_splits.json")
        record = run.record
        problems = read_problems(data, record["split"])
        _require_data(data, run, {name: file_sha256(data / name) for name in names})
        if record.get("held_out") is not None:
            problems = held_out(problems, record["held_out"], record["seed"])[1]
        return {problem.pid: problem for problem in problems}
    if run.task == "caption":
        images = read_captions(data)
        _require_data(data, run, file_sha256(data))
        return {image.file_name: image for image in images}
    raise ValueError(f"--data is for scores of eval.scienceqa and eval.caption; {run.path} is of eval.{run.task}")


def how(run: Run) -> str:
    """How the answers came about and were scored, in a few words."""
    record, settings = run.record, run.settings
    if not settings and run.task not in ("instruct",):
        parts = ["answers from a file" if run.task != "caption" else "captions from a file"]
    elif run.task == "scienceqa":
        score = f"scored by {settings.get('score')}"
        parts = [f"{score} ({settings['normalise']})" if settings.get("normalise") else score]
        parts += [str(settings["format"])] if settings.get("format") else []
    elif run.task == "caption":
        beams = settings.get("beams")
        parts = ["the adapter's beams" if beams is None else "greedy" if beams == 1 else f"{beams} beams"]
    else:
        parts = [f"template {form}"] if (form := settings.get("template", record.get("template"))) else []
    shots = shot_count(record)
    parts += [f"{shots} shot{'s' if shots > 1 else ''}"] if shots else []
    for name, said in (("unparsed", "unparsed"), ("short", "with too few labels"), ("long", "with too many labels")):
        parts += [f"{record[name]} {said}"] if record.get(name) else []
    parts += ["unparsed drawn at random"] if record.get("on_unparsed") == "random" else []
    return ", ".join(parts)


def _any(runs: Sequence[Run], name: str) -> bool:
    return any(run.record.get(name) is not None for run in runs)


def _require_data(data: Path, run: Run, digest: object) -> None:
    if digest != run.record.get("data_hash"):
        raise ValueError(
            f"{data} is not what {run.path} was scored on: its SHA-256 is another; give that data, or no --data"
        )


def _scienceqa(run: Run, gold: Gold | None) -> dict[str, Score]:
    record = run.record
    right = [100.0 * example["correct"] for example in run.examples.values()]
    counts = record["n"]
    found = {"avg": Score(record["avg"], Ratio.mean(right), count=len(right))}
    for name in CLASSES[1:]:
        value, count = record[name], counts[name]
        sums = None
        if gold is not None and count:
            sums = Ratio.mean([own for own, member in zip(right, _members(name, run, gold), strict=True) if member])
        elif count:  # the bootstrap of a proportion needs no more than how many were right
            sums = Ratio.share(round(value * count / 100), count, factor=100.0)
        found[name] = Score(value, sums, paired=gold is not None, count=count)
    return found


def _members(name: str, run: Run, gold: Gold) -> list[bool]:
    """Which examples are of a class, as the benchmark itself decides."""
    return [accuracies([gold[pid]], {pid: gold[pid].answer})["n"][name] > 0 for pid in run.examples]


def _caption(run: Run, gold: Gold | None) -> dict[str, Score]:
    sums = caption_sums(list(run.examples.values()))
    return {name: Score(run.record.get(name), sums.get(name), count=len(run.examples)) for name in CAPTION_METRICS}


def _qa(run: Run, gold: Gold | None) -> dict[str, Score]:
    """Means over questions. Those about one picture are drawn and exchanged together, as they are alike."""
    examples = list(run.examples.values())
    pictures = [example.get("image") or ("question", place) for place, example in enumerate(examples)]
    cluster = "picture" if len(set(pictures)) < len(pictures) else ""
    found = {}
    for name in QA_METRICS:
        own = [example.get(name) for example in examples]
        sums = None if None in own else Ratio.mean(own).pooled(pictures)
        found[name] = Score(run.record.get(name), sums, cluster, count=len(own))
    kinds = [answer_type(example["references"][0]) for example in examples]
    for kind, means in run.record.get("by_type", {}).items():
        places = [place for place, one in enumerate(kinds) if one == kind]
        sums = Ratio.mean([examples[place]["f1"] for place in places]).pooled([pictures[place] for place in places])
        found[f"f1 of {kind}"] = Score(means["f1"], sums, cluster, count=len(places))
    return found


def _ner(run: Run, gold: Gold | None) -> dict[str, Score]:
    """Micro averages over documents, each of which is counted anew from its entities."""
    each = [
        count_spans(_spans(example["gold"]), _spans(example["predicted"]), example["nowhere"])
        for example in run.examples.values()
    ]
    found = {}
    for match in MATCHES:
        for kind, score in run.record[match].items():
            suffix = "" if kind == "ALL" else f" of {kind}"
            columns = [[_number_of(counts, match, kind, name) for counts in each] for name in NER_COUNTS]
            for name in ("P", "R", "F1"):
                ratio = _ner_ratio(name, columns)
                found[f"{match}.{name}{suffix}"] = Score(score[name], ratio, count=score["TP"] + score["FN"])
    return found


def _spans(entities: Sequence[Mapping[str, Any]]) -> list[Span]:
    return [Span(*(entity[field] for field in Span._fields)) for entity in entities]


def _number_of(counts: Counts, match: str, kind: str, name: str) -> int:
    if kind != "ALL":
        return counts[match, kind, name]
    return sum(number for key, number in counts.items() if (key[0], key[2]) == (match, name))


def _ner_ratio(name: str, counts: Sequence[Sequence[int]]) -> Ratio:
    """Precision, recall or F1 from TP, FP and FN, each of every document."""
    right, wrong, missed = np.array(counts, dtype=np.float64)  # [documents] each
    return {
        "P": Ratio(right, right + wrong),
        "R": Ratio(right, right + missed),
        "F1": Ratio(2 * right, 2 * right + wrong + missed),
    }[name]


def _instruct(run: Run, gold: Gold | None) -> dict[str, Score]:
    examples = list(run.examples.values())
    columns = {
        name: np.array([row[name] for row in examples], dtype=np.float64) for name in ("tokens", "loss", "base_loss")
    }
    tokens = columns["tokens"]
    loss, base = (Ratio(columns[name] * tokens, tokens) for name in ("loss", "base_loss"))
    record: dict[str, Any] = run.record
    return {
        "loss": Score(record["loss"], loss, count=len(tokens)),
        "perplexity": Score(record["perplexity"], loss, count=len(tokens), curve=math.exp),
        "base_loss": Score(record["base_loss"], base, count=len(tokens)),
        "difference": Score(record["difference"], Ratio(loss.numerator - base.numerator, tokens), count=len(tokens)),
    }
