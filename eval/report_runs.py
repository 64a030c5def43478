"""Score files as `python -m eval.report` reads them: the record, every example, and whether two can be compared."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.published import TABLES, Published
from eval.qa_metrics import WUPS_THRESHOLDS
from mmadapter.captions import base_name, named, read_text
from mmadapter.record import file_sha256
from mmadapter.scienceqa import CLASSES

CAPTION_METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
# What every example has, by task; the first field is its name.
FIELDS = {
    "scienceqa": ("pid", "answer", "correct"),
    "caption": ("image", "caption"),
    "qa": ("id", "question", "answer", "references", "exact_match", "f1"),
    "ner": ("id", "gold", "predicted", "nowhere"),
    "instruct": ("where", "tokens", "loss", "base_loss"),
}
# What runs have in common beside the ids, where their examples have it: the question, or what is right.
SHARED = {"qa": ("question", "references", "image"), "ner": ("gold",)}
# Fields of a score file that are not null, by what they are.
OBJECTS = ("model", "by_type", "constant", "left_out", "strict", "fuzzy")
TEXTS = ("command", "adapter", "base", "split", "column", "template")
NUMBERS = {
    "scienceqa": CLASSES,
    "caption": CAPTION_METRICS,
    "qa": ("exact_match", "f1", *WUPS_THRESHOLDS),
    "ner": (),
    "instruct": ("loss", "perplexity", "base_loss", "difference"),
}
DEFAULTS = {"on_unparsed": "wrong"}  # of older files
KEPT_UNDER = ("predictions", "examples")
SIBLINGS = ("predictions", "captions")


@dataclass(frozen=True)
class Run:
    """One score file.

    Attributes:
        path: The file.
        label: What the report calls it.
        record: The file's content without its examples.
        examples: By their ids, in the order of the first run.
    """

    path: Path
    label: str
    record: dict[str, Any]
    examples: dict[str, dict[str, Any]]

    @property
    def task(self) -> str:
        return self.record["task"]

    @property
    def settings(self) -> dict[str, Any]:
        """How the model was asked, empty where the answers came from a file."""
        return self.record.get("model") or {}


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Reads score files that can be compared with one another, and aligns their examples with the first's.

    Args:
        arguments: Paths, each optionally with a name for the report before it: `NAME=FILE`.

    Raises:
        FileNotFoundError: There is no such file, or it has no examples and no file of them beside it.
        ValueError: It is no score file, or it was not scored on the test set of the first.
    """
    found = [_read_run(*_named_path(argument)) for argument in arguments]
    first = found[0]
    if len(found) > 1:
        for run in found:
            require_known_rules(run)
    for other in found[1:]:
        require_same_test_set(first, other)
    labels = [run.label for run in found]
    for tell_apart in (lambda run: f"{run.label} ({run.path.stem})", lambda run: str(run.path)):
        twice = {label for label, count in Counter(labels).items() if count > 1}
        labels = [tell_apart(run) if label in twice else label for run, label in zip(found, labels, strict=True)]
    return [
        Run(run.path, label, run.record, {own: run.examples[own] for own in first.examples})
        for run, label in zip(found, labels, strict=True)
    ]


def require_known_rules(run: Run) -> None:
    """Whether a run says what it was scored on and by which version of its task, without which none compares with it.

    Raises:
        ValueError: It does not.
    """
    for key, what in (("data_hash", "on which data"), ("version", "by which version of its task")):
        if not run.record.get(key):
            raise ValueError(
                f"{run.path} cannot be compared with other runs: it does not say {what} it was scored (no {key}); "
                "score anew with --json"
            )


def _compared(run: Run, key: str) -> object:
    """A field as two runs are compared by it."""
    value = run.record.get(key, DEFAULTS.get(key))
    if key != "version" or value != 1:
        return value
    # Version 2 of these tasks reads texts otherwise; of a run without texts it is the same as version 1.
    unread = {"scienceqa": run.settings.get("score") == "likelihood", "ner": run.record.get("texts") == 0}
    return 2 if unread.get(run.task) else value


def pictures_unknown(first: Run, other: Run) -> bool:
    """Whether one of two runs names the pictures that it saw, and the other may have seen others."""
    named_by = [run.record.get("images_hash") is not None for run in (first, other)]
    return named_by[0] != named_by[1] and not _saw_none(other if named_by[0] else first)


def _saw_none(run: Run) -> bool:
    """Whether the model was asked where it was scored, and without pictures."""
    return "images_hash" in run.record and run.record.get("predictions_hash") is None


def require_same_test_set(first: Run, other: Run) -> None:
    """Whether two runs answer the same questions under the same rules.

    Raises:
        ValueError: They do not; the message says in what they differ.
    """
    names = f"{other.path} cannot be compared with {first.path}:"
    if other.task != first.task:
        raise ValueError(f"{names} its task is {other.task}, the other's {first.task}; report each task by itself")
    differing = [
        ("version", "it was scored by version {} of the task, the other by {}; score both anew"),
        ("data_hash", "it was scored on other data (SHA-256 {} against {}); score both on the same files"),
        ("split", "it was scored on split {}, the other on {}; score both on one split"),
        ("held_out", "it holds out {} rows, the other {}; score both on the same rows"),
        ("column", "its entities are of column {}, the other's of {}; score both on one column"),
        ("limit", "it was scored with --limit {}, the other with {}; score both on the same examples"),
        ("on_unparsed", "its answers that name no choice count as {}, the other's as {}; score both with one"),
        ("tokenizer", "its captions were cut into words by the tokenizer {}, the other's by {}; score both with one"),
    ]
    if first.record.get("held_out") is not None:  # the seed chooses those held out
        differing.append(("seed", "its rows are those held out by seed {}, the other's by {}; take one seed"))
    for key, message in differing:
        ours, theirs = (_compared(run, key) for run in (other, first))
        if ours != theirs:
            raise ValueError(f"{names} {message.format(_shown(ours), _shown(theirs))}")
    ours, theirs = (run.record.get("images_hash") for run in (other, first))
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"{names} its model saw other pictures (SHA-256 {_shown(ours)} against {_shown(theirs)}); ask both about "
            "the same ones"
        )
    here, there = other.examples.keys(), first.examples.keys()
    if here != there:
        sides = [
            f"{named(sorted(only), 'example')} only in {run.path}"
            for only, run in ((here - there, other), (there - here, first))
            if only
        ]
        raise ValueError(f"{names} {'; '.join(sides)}; score both on the same examples")
    for own in first.examples:
        for field in SHARED.get(first.task, ()):
            ours, theirs = (run.examples[own].get(field) for run in (other, first))
            if None not in (ours, theirs) and ours != theirs:
                raise ValueError(
                    f"{names} {field} of example {own} is {ours!r:.60}, the other's is {theirs!r:.60}; score both on "
                    "the same files"
                )
    if first.task == "instruct":
        tokens = [sum(example["tokens"] for example in run.examples.values()) for run in (other, first)]
        if tokens[0] != tokens[1]:
            raise ValueError(
                f"{names} its loss is over {tokens[0]} tokens, the other's over {tokens[1]}: a loss a token compares "
                "under one tokenizer and template only"
            )


def published_table(run: Run, name: str | None) -> tuple[Published | None, str]:
    """The published scores over a run's test set, or None and why there are none.

    Args:
        name: Of a table, "none", or None for the one whose test set the run's record fits.

    Raises:
        ValueError: There is no table of that name for the run's task.
    """
    tables = [table for table in TABLES if table.task == run.task]
    if name == "none":
        return None, ""
    if name is not None:
        chosen = [table for table in tables if table.name == name]
        if not chosen:
            there = ", ".join(table.name for table in tables) or "none"
            raise ValueError(f"no published table {name!r} for the task {run.task}; there is: {there}")
        return chosen[0], ""
    record = run.record
    gold = _gold_name(record).lower()
    for table in tables:
        if (
            all(part in gold for part in table.file)
            and (not table.split or record.get("split") in table.split)
            and table.examples in (None, len(run.examples))
            and record.get("limit") is None
            and (not table.column or record.get("column") == table.column)
        ):
            return table, ""
    if not tables:
        return None, "We know of no published scores for this task."
    known = ", ".join(f"{table.title} (--published {table.name})" for table in tables)
    return None, f"Published scores are over other test sets than this one: {known}."


def data_name(run: Run) -> str:
    """The test set in words, such as "ScienceQA, split test: 4,241 questions"."""
    record = run.record
    parts = [f"split {record['split']}"] if record.get("split") else []
    if record.get("held_out") is not None:
        parts.append(f"{record['held_out']} rows held out by seed {record.get('seed')}")
    if record.get("limit") is not None:
        parts.append(f"the first {record['limit']}")
    return ", ".join(filter(None, [_gold_name(record), *parts]))


def short_hash(value: object) -> str:
    """The beginning of a data hash, or of each of several."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return ", ".join(str(one)[:12] for one in values)


def _named_path(argument: str) -> tuple[str | None, Path]:
    name, equals, path = argument.partition("=")
    if equals and name and not Path(argument).exists():
        return name, Path(path)
    return None, Path(argument)


def _read_run(name: str | None, path: Path) -> Run:
    expected = "give what an evaluation such as eval.scienceqa wrote with --json"
    try:
        record = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {expected}") from None
    if not isinstance(record, dict) or not isinstance(record.get("task"), str) or record["task"] not in FIELDS:
        got = f"task {record.get('task')!r}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path} is no score file of {', '.join(FIELDS)}: it holds {got}; {expected}")
    _require_kinds(path, record)
    examples, source = None, path
    for key in KEPT_UNDER:
        examples = record.pop(key, None) if examples is None else examples
    if examples is None:
        examples, source = _sibling_examples(path, record)
    return Run(path, name or _label(record, path), record, _by_id(source, examples, record["task"]))


def _require_kinds(path: Path, record: dict[str, Any]) -> None:
    """Raises a ValueError where a field is not of its kind: a text where a score is to be, say."""
    wanted = [(name, dict, "an object") for name in OBJECTS] + [(name, str, "a text") for name in TEXTS]
    wanted += [(name, (int, float), "a number") for name in NUMBERS[record["task"]]]
    wanted += [("n", dict, "an object")] if record["task"] == "scienceqa" else []  # of each class
    found = [(name, record.get(name), kind, what) for name, kind, what in wanted]
    for part in ("by_type", "strict", "fuzzy"):
        rows = record.get(part)
        for name, row in rows.items() if isinstance(rows, dict) else ():
            found.append((f"{part} {name}", row, dict, "an object"))
            scores = row.items() if isinstance(row, dict) else ()
            found += [(f"{part} {name} {score}", value, (int, float), "a number") for score, value in scores]
    settings = record.get("model")
    shots = settings.get("shots") if isinstance(settings, dict) else None
    found += [("shots", record.get("shots"), (int, list), "a number"), ("model shots", shots, (int, list), "a list")]
    for name, value, kind, what in found:
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{path}: {name} must be {what}, got {value!r:.60}; score anew with --json")


def _sibling_examples(path: Path, record: dict[str, Any]) -> tuple[list[Any], Path]:
    """Examples beside `scores-X.json`: the lines of its `predictions_file`, or of `{predictions,captions}-X.jsonl`.

    Raises:
        FileNotFoundError: There is none of these.
        ValueError: It is not the file that the record has the SHA-256 of, or not JSON lines.
    """
    own = record.get("predictions_file")
    siblings = [path.parent / base_name(own)] if isinstance(own, str) and own else []
    siblings += [
        path.with_name(
            (path.stem.replace("scores", kind, 1) if "scores" in path.stem else f"{kind}-{path.stem}") + ".jsonl"
        )
        for kind in SIBLINGS
    ]
    for sibling in siblings:
        if sibling.is_file():
            if record.get("predictions_file_hash") not in (None, file_sha256(sibling)):
                raise ValueError(
                    f"{sibling} is not what {path} was written with: its SHA-256 is another; score anew with --examples"
                )
            lines = []
            for number, line in enumerate(read_text(sibling).split("\n"), 1):
                if line.strip():
                    try:
                        lines.append(json.loads(line))
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise ValueError(f"{sibling}, line {number} is not JSON ({error})") from None
            return lines, sibling
    names = " nor ".join(sibling.name for sibling in siblings)
    raise FileNotFoundError(f"{path} holds no examples, and there is neither {names} beside it; score anew with --json")


def _by_id(path: Path, examples: object, task: str) -> dict[str, dict[str, Any]]:
    if not isinstance(examples, list) or not examples or not all(isinstance(example, dict) for example in examples):
        raise ValueError(f"{path}: the examples must be a list of objects that is not empty; score anew with --json")
    field = FIELDS[task][0]
    found = {}
    for number, example in enumerate(examples, 1):
        missing = [name for name in FIELDS[task] if name not in example]
        if missing:
            raise ValueError(f"{path}: example {number} has no {', '.join(missing)}; score anew with --json")
        if not isinstance(example.get(field), str):
            raise ValueError(f"{path}: example {number} has no {field} that is text, got {example.get(field)!r:.60}")
        found[example[field]] = example
    if len(found) < len(examples):
        twice = [own for own, count in Counter(example[field] for example in examples).items() if count > 1]
        raise ValueError(f"{path}: {named(twice, field)} of more than one example; each must stand there once")
    return found


def _label(record: dict[str, Any], path: Path) -> str:
    """What was scored, in a word or two."""
    settings = record.get("model") or {}
    adapter = record.get("adapter") or settings.get("adapter")
    if adapter is None:
        return base_name(_option(record, "--predictions")) or path.stem
    base = record.get("base") or settings.get("llama") or "base model"
    label = f"{base} alone" if adapter == "none" else "/".join(Path(adapter).parts[-2:])
    shots = shot_count(record)
    return f"{label}, {shots} shot{'s' if shots > 1 else ''}" if shots else label


def shot_count(record: dict[str, Any]) -> int:
    """Examples that the model was shown before each question."""
    shots = (record.get("model") or {}).get("shots", record.get("shots")) or 0
    return len(shots) if isinstance(shots, list) else int(shots)


def _gold_name(record: dict[str, Any]) -> str:
    """The file name of what the answers were compared with, as the command gave it, "" where it cannot be told."""
    return base_name(_option(record, "--annotations") or _option(record, "--gold"))


def _option(record: dict[str, Any], option: str) -> str:
    """The value of an option of the command that gave the record, "" if it is not there."""
    try:
        words = shlex.split(str(record.get("command", "")))
    except ValueError:  # a command that somebody edited
        return ""
    for place, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and place + 1 < len(words):
            return words[place + 1]
    return ""


def _shown(value: object) -> str:
    """A field of the record for comparing and for errors."""
    if isinstance(value, dict | list) or (isinstance(value, str) and len(value) == 64):
        return short_hash(value)
    return "none" if value is None else str(value)
