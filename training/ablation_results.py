"""What an ablation came to: the figures of each run, the table beside the paper's, the loss curves."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapter.record import git_commit, replacing, write_json

if TYPE_CHECKING:
    from training.ablations import Run
    from training.config import RunConfig

# What a run's score file says of how it came about.
SCORED = ("version", "command", "git_commit", "versions", "time", "adapter_hash", "base_hash", "data_hash")
TABLES = {"layers": "Table 3", "attention": "Table 4", "overfitting": "Table 6"}
CURVE_POINTS = 50  # the training loss of one step is mostly noise: the means over so many parts of a run are drawn
# The quantile .975 of Student's t with 1, 2, ... degrees of freedom.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)


def report(ablation: str, config: RunConfig, runs: Sequence[Run], out: Path, facts: Mapping[str, Any]) -> None:
    """Writes results.json, curves.png and table.md, and prints the table."""
    from training.plots import bands

    results: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for run in runs:
        log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        name, overfitting = run.variant.name, ablation == "overfitting"
        curves.setdefault(f"{name}, training" if overfitting else name, []).append(smoothed(log))
        if overfitting:
            # Without that of the untrained adapter, beside which nothing else would be seen to differ.
            curves.setdefault(f"{name}, validation", []).append(validations(log)[1:])
        results.setdefault(name, {**dataclasses.asdict(run.variant), "runs": []})["runs"].append(figures(run, log))
    for row in results.values():
        for key in ("train_loss", "val_loss", "accuracy"):
            row[key] = statistics.fmean(run[key] for run in row["runs"])
        row["interval"] = interval([run["accuracy"] for run in row["runs"]], row["runs"][0]["questions"])
    first, *others = results.values()
    for row in others if len(first["runs"]) > 1 else ():  # runs of a seed are scored on the same questions
        row["differences"] = [
            run["accuracy"] - other["accuracy"] for run, other in zip(row["runs"], first["runs"], strict=True)
        ]
    record = {
        **{"ablation": ablation, "variants": list(results.values()), "config": dataclasses.asdict(config)},
        **{**facts, "git_commit": git_commit()},
        "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
    }
    write_json(out / "results.json", record)
    title = f"ScienceQA, {Path(config.llama).name}: {ablation}"
    bands(curves, out / "curves.png", xlabel="step", ylabel="loss a target token", title=title)
    text = table(ablation, config, list(results.values()))
    with replacing(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, end="")


def figures(run: Run, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a run came to; its train loss is the mean over the steps of the last epoch, or of the last fifth of the run
    where that is shorter. With them stands how it was scored, and which option it chose for each question."""
    from safetensors import safe_open

    with safe_open(run.adapter, "pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    untrained = ("projection.feature_", *(() if run.config.gate_lr else ("gate",)))
    losses, scores = [line["loss"] for line in log if "loss" in line], read_scores(run)
    last = min(math.ceil(log[0]["rows"] / run.config.batch_size), math.ceil(len(losses) / 5))
    return {
        **{"seed": run.config.seed, "folder": str(run.folder)},
        "parameters": sum(size for name, size in sizes.items() if not name.startswith(untrained)),
        "train_loss": statistics.fmean(losses[-last:]),
        "val_loss": validations(log)[-1][1],
        **{"accuracy": scores["avg"], "questions": scores["total"]},
        "scored": {name: scores[name] for name in SCORED if name in scores},
        "answers": {row["pid"]: row["answer"] for row in scores.get("predictions", ())},
    }


def validations(log: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line["val_loss"]) for line in log if "val_loss" in line]


def smoothed(log: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Means of the training loss over equal parts of a run, each with the step that it ends at."""
    losses = [line["loss"] for line in log if "loss" in line]
    points = min(CURVE_POINTS, len(losses))
    ends = [len(losses) * point // points for point in range(points + 1)]
    return [(end, statistics.fmean(losses[start:end])) for start, end in itertools.pairwise(ends)]


def interval(accuracies: Sequence[float], questions: int) -> tuple[float, float]:
    """95% interval of a mean accuracy in percent: Student's t over seeds, with one seed a bootstrap over questions."""
    if len(accuracies) > 1:
        mean, half = student(accuracies)
        return mean - half, mean + half
    mean = accuracies[0]
    import numpy as np

    # Of questions drawn with replacement, of which a share is right, the number right is binomial.
    drawn = np.random.default_rng(0).binomial(questions, mean / 100, 10_000) * 100 / questions
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return low, high


def student(values: Sequence[float]) -> tuple[float, float]:
    """Mean of several values, and half the width of its 95% interval by Student's t."""
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def table(ablation: str, config: RunConfig, results: Sequence[Mapping[str, Any]]) -> str:
    """The results as Markdown, beside the paper's."""
    names = ("variant", "trained parameters", "train loss at the end", "validation loss", "accuracy, 95% interval")
    names = (*names, "against the first", f"LLaMA-7B, paper's {TABLES[ablation]}")
    lines = [" | ".join(("", *names, "")).strip(), "| --- " * len(names) + "|"]
    for row in results:
        low, high = row["interval"]
        against = "{:+.2f} ± {:.2f}".format(*student(row["differences"])) if "differences" in row else ""
        lines.append(
            f"| {row['name']} | {row['runs'][0]['parameters']:,} | {row['train_loss']:.3f} | {row['val_loss']:.3f} "
            f"| {row['accuracy']:.2f} [{low:.2f}, {high:.2f}] | {against} | {row['paper']} |"
        )
    runs = results[0]["runs"]
    part = "held out of the train split" if config.held_out else "of the val split"
    others = " (each seed holds out others)" if config.held_out else ""
    of = (
        f"{len(runs)} seeds{others}, Student's t over them and over their differences"
        if len(runs) > 1
        else "one seed, bootstrap over the questions"
    )
    lines += [
        "",
        f"{Path(config.llama).name}, {config.vision or 'without images'}. Accuracy: percent of "
        f"{runs[0]['questions']:,} questions {part}; {of}. Losses: a target token. Paper: val split, with images.",
    ]
    return "\n".join(lines) + "\n"


def read_scores(run: Run) -> dict[str, Any]:
    try:
        return json.loads(run.scores.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{run.scores} is not JSON ({error}); delete it to score the run again") from error
