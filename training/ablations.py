"""The paper's ablations on ScienceQA: how many layers are adapted, how the gates start, how long training goes on.

Each variant is trained with several seeds by the command line of `training.scienceqa` and scored by that of
`eval.scienceqa`, each a process of its own whose output lies in a file beside the run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mmadapter.options import Parser, main_with_errors
from mmadapter.record import file_sha256
from mmadapter.scienceqa import read_problems
from training.ablation_results import STUDENT_T, TABLES, read_scores, report
from training.config import RunConfig, read_config

DESCRIPTION = """\
python -m training.ablations layers --data scienceqa
python -m training.ablations attention --data scienceqa --smoke

Repeats an ablation of the LLaMA-Adapter paper on ScienceQA: a third, two thirds or all of the layers adapted (its Table
3), attention that starts at zero or at random (Table 4, Figure 7), or 15, 30 and 60 epochs (Table 6; here of 96
questions). It writes the table (table.md), the loss curves (curves.png) and every run's figures (results.json).
Stopped, it goes on with the same command. A run that is done may be copied from one ablation's folder to another's:
with the shipped run file layers-30 and zero-initialised are the same.
"""
RUN_FILE = Path(__file__).resolve().parent / "configs" / "ablation.toml"
OFTEN_SEEN = 96  # training rows that the ablation of over-fitting goes through again and again
SMOKE: dict[str, Any] = {
    **{"steps": 4, "batch_size": 4, "warmup": 1, "held_out": 8, "validation_rows": 8, "eval_every": 2, "save_every": 2}
}


@dataclass(frozen=True)
class Variant:
    """One row of a table: its name, the settings it changes, and what the paper has for it."""

    name: str
    changes: dict[str, Any]
    paper: str


@dataclass(frozen=True)
class Run:
    """A variant with one seed.

    Attributes:
        config: All settings.
        flags: Those that are not the run file's, as options of the training command.
        folder: Of adapter, log and scores.
    """

    variant: Variant
    config: RunConfig
    flags: list[str]
    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter.safetensors"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    def output(self, what: str) -> Path:
        """Where a child process of that kind leaves what it prints."""
        return self.folder.with_name(f"{self.folder.name}.{what}.txt")

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.config.seed}"


class Stopped(Exception):  # noqa: N818 - no error: someone asked for it
    """This command was asked to end by the signal whose number is the argument."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 1 after an error, or 128 and the number of the signal that stopped it."""
    parser = build_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    if arguments.seeds is not None and not 1 <= arguments.seeds <= len(STUDENT_T) + 1:
        parser.error(f"--seeds must be 1 to {len(STUDENT_T) + 1}, got {arguments.seeds}")
    command = shlex.join(["python", "-m", "training.ablations", *given])
    return main_with_errors(lambda: run_ablation(arguments, command), arguments.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m training.ablations",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ablation", choices=tuple(TABLES), help="what is varied")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="ScienceQA's folder")
    parser.add_argument("--out", metavar="DIR", type=Path, help="of runs and results (default: runs/ablation_NAME)")
    parser.add_argument("--config", metavar="FILE", type=Path, default=RUN_FILE, help="run file (default: %(default)s)")
    parser.add_argument("--seeds", metavar="N", type=int, help="runs of each variant (default: 3; with --smoke 1)")
    parser.add_argument("--smoke", action="store_true", help="a few steps and questions, to see that it runs")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_ablation(arguments: argparse.Namespace, command: str) -> int:
    """Makes the runs that are missing, then results, plot and table."""
    read_problems(arguments.data, "train")  # what is wrong with the data is said before anything starts
    config, common = read_config(arguments.config, {}), {}
    if arguments.smoke:
        common = {**SMOKE, "held_out": min(config.held_out, SMOKE["held_out"])}
        config = read_config(arguments.config, common)
    rows = variants(arguments.ablation, config)
    name = f"ablation_{arguments.ablation}{'_smoke' if arguments.smoke else ''}"
    out = arguments.out or Path("runs") / name
    runs = []
    for seed in range(config.seed, config.seed + (arguments.seeds or (1 if arguments.smoke else 3))):
        for variant in rows:  # all of them with one seed first: then a stop leaves something to compare
            changes = {**common, **variant.changes, "seed": seed}
            flags = [text for key, value in changes.items() for text in (f"--{key.replace('_', '-')}", str(value))]
            resolved = dataclasses.replace(config, **variant.changes, seed=seed)
            runs.append(Run(variant, resolved, flags, out / f"{variant.name}-seed{seed}"))
    out.mkdir(parents=True, exist_ok=True)
    try:
        with passing_signals() as asked:
            make_runs(runs, arguments, asked)
    except Stopped as stopped:
        note("stopped; the same command goes on from there")
        return 128 + stopped.args[0]
    report(arguments.ablation, config, runs, out, {"command": command, "smoke": arguments.smoke})
    return 0


def variants(ablation: str, config: RunConfig) -> list[Variant]:
    """The rows of an ablation's table.

    Raises:
        ValueError: The base has fewer than three layers.
    """
    if ablation == "layers":
        from mmadapter.weights import read_config as read_base

        total = read_base(config.llama).layers
        if total < 3:
            raise ValueError(f"{config.llama} has {total} layers; to adapt thirds of them takes a base of at least 3")
        counts = (round(total / 3), round(2 * total / 3), total)
        paper = ("55.95 (10 layers, 0.97M parameters)", "73.36 (20 layers, 1.37M)", "83.85 (30 layers, 1.79M)")
        return [Variant(f"layers-{n}", {"layers": n}, said) for n, said in zip(counts, paper, strict=True)]
    if ablation == "attention":
        always = {"gate": "identity", "gate_init": 1.0, "gate_lr": 0.0}  # the prompts take full part from the start
        return [
            Variant("zero-initialised", {"gate_init": 0.0}, "83.85"),
            Variant("randomly-initialised", always, "40.77"),
        ]
    paper = (
        "82.08 (15 epochs; train loss .022, validation loss .136)",
        *("83.85 (30 epochs; .004, .241)", "83.94 (60 epochs; .001, .282)"),
    )
    # The paper's numbers of epochs, over so few rows that they take no longer than the runs of the other ablations.
    unit, amounts = ("steps", [config.steps * n for n in (1, 2, 4)]) if config.steps else ("epochs", [15.0, 30.0, 60.0])
    return [
        Variant(f"{unit}-{n:g}", {"train_rows": OFTEN_SEEN, unit: n}, said)
        for n, said in zip(amounts, paper, strict=True)
    ]


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# The runs


def make_runs(runs: Sequence[Run], arguments: argparse.Namespace, asked: list[int]) -> None:
    """Trains and scores the runs that are not there yet.

    Args:
        asked: From `passing_signals`.

    Raises:
        ValueError: A folder holds an adapter of other settings, or another process is at work in it.
        ChildProcessError: A child process failed.
        Stopped: A signal came. The child process has saved.
    """
    hashes = [file_sha256(arguments.data / name) for name in ("problems.json", "pid_splits.json")]
    todo = [run for run in runs if not (is_trained(run, hashes) and is_scored(run))]
    minutes = {} if arguments.smoke else estimate(todo, arguments, asked)
    expected, began = 0.0, time.monotonic()
    for number, run in enumerate(runs, 1):
        if run not in todo:
            note(f"run {number} of {len(runs)}: {run}: done ({run.folder})")
            continue
        left = sum(minutes.get(other.variant.name, 0.0) for other in runs[number - 1 :] if other in todo)
        if expected:  # by what the runs up to here took
            left *= (time.monotonic() - began) / 60 / expected
        note(f"run {number} of {len(runs)}: {run}" + (f"; {duration(left)} left" if minutes else ""))
        if not is_trained(run, hashes):
            call("training", run, [*training_command(run, arguments), "--out", str(run.folder)], asked)
        call("scoring", run, scoring_command(run, arguments), asked)
        expected += minutes.get(run.variant.name, 0.0)


def training_command(run: Run, arguments: argparse.Namespace) -> list[str]:
    return ["training.scienceqa", "--config", str(arguments.config), "--data", str(arguments.data), *run.flags]


def scoring_command(run: Run, arguments: argparse.Namespace) -> list[str]:
    """Scores the questions that the run's training kept aside."""
    import torch

    config = run.config
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    part = ("--split", "train", "--held-out", str(config.held_out)) if config.held_out else ("--split", "val")
    return [
        *("eval.scienceqa", "--data", str(arguments.data), *part, "--seed", str(config.seed), "--score", "likelihood"),
        *(("--limit", str(SMOKE["held_out"])) if arguments.smoke else ()),
        *("--llama", config.llama, "--dtype", config.dtype, "--device", device, "--adapter", str(run.adapter)),
        *("--out", str(run.folder / "predictions.jsonl"), "--json", str(run.scores)),
    ]


def estimate(todo: Sequence[Run], arguments: argparse.Namespace, asked: list[int]) -> dict[str, float]:
    """Says how many minutes each variant trains, from a dry run of it, and returns them."""
    minutes: dict[str, float] = {}
    for run in todo:
        if run.variant.name not in minutes:
            note(f"trying two steps of {run.variant.name}")
            call("estimate", run, [*training_command(run, arguments), "--dry-run"], asked)
            minutes[run.variant.name] = minutes_of(run.output("estimate").read_text(encoding="utf-8"))
            run.output("estimate").unlink()
    if todo:
        shortest, longest = (f"{value:.0f}" for value in (min(minutes.values()), max(minutes.values())))
        each = shortest if shortest == longest else f"{shortest} to {longest}"
        total = duration(sum(minutes[run.variant.name] for run in todo))
        note(f"{len(todo)} runs of about {each} minutes, {total} in all; validation and scoring come on top")
    return minutes


def minutes_of(dry_run: str) -> float:
    """Minutes that training takes, from what `--dry-run` printed.

    Raises:
        ValueError: It printed something else.
    """
    steps = re.search(r"^steps +([\d,]+) of", dry_run, re.MULTILINE)
    seconds = re.search(r"^time +([\d.]+) s a step", dry_run, re.MULTILINE)
    if steps is None or seconds is None:
        raise ValueError(f"a dry run says its steps and their seconds; this one ends {dry_run[-80:]!r}")
    return int(steps[1].replace(",", "")) * float(seconds[1]) / 60


def duration(minutes: float) -> str:
    return f"about {minutes:.0f} minutes" if minutes < 100 else f"about {minutes / 60:.1f} hours"


def is_trained(run: Run, hashes: list[str]) -> bool:
    """Whether the run's adapter is there.

    Args:
        hashes: SHA-256 of the data's files.

    Raises:
        ValueError: One of other settings or data is.
    """
    if not run.adapter.is_file():
        return False
    from mmadapter.checkpoint import read_about
    from training.engine import FREE

    facts = read_about(run.adapter).training
    # Lists, no tuples; a setting that came after the run was at its default.
    default, wanted = (json.loads(json.dumps(dataclasses.asdict(config))) for config in (RunConfig(), run.config))
    kept = default | facts.get("run", {})
    free = set(FREE) - {"ship"}  # training may go on with another choice of weights, a finished one has made it
    changed = [name for name in wanted if name not in free and kept[name] != wanted[name]]
    changed += ["data"] if facts.get("data_hash") != hashes else []
    if changed:
        raise ValueError(
            f"{run.adapter} was made with another {', '.join(changed)}; choose another --out or delete {run.folder}"
        )
    return True


def is_scored(run: Run) -> bool:
    """Whether there are scores of the adapter that is there."""
    return run.scores.is_file() and read_scores(run)["model"]["adapter_hash"] == file_sha256(run.adapter)


# The child processes


@contextlib.contextmanager
def passing_signals() -> Iterator[list[int]]:
    """While it lasts, SIGTERM and Ctrl-C do not end this process: they are noted in the list that it gives."""
    asked: list[int] = []

    def noted(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {kind: signal.signal(kind, noted) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def call(what: str, run: Run, command: Sequence[str], asked: list[int]) -> None:
    """Runs a module of the project as a child process, waits for it, and passes signals on to it.

    The child is in a session of its own, so that a terminal's Ctrl-C does not reach it as well: its first one saves, a
    second one ends it at once.

    Args:
        command: Name of the module, and its arguments.
        asked: From `passing_signals`.

    Raises:
        ValueError: A child of an earlier command, or of another one, is still at work there.
        ChildProcessError: The child failed.
        Stopped: A signal came.
    """
    import fcntl

    signals, output = 0, run.output(what)
    with open(output, "a", encoding="utf-8") as file:
        try:  # the child shares this lock and holds it for as long as it lives, also when this process is killed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {output}; wait until it ends, or end it") from None
        file.truncate(0)
        child = subprocess.Popen(
            [sys.executable, "-m", *command],
            **{"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True},
            env={**os.environ, "TQDM_MININTERVAL": "10"},  # the bar is for a file
        )
        while child.poll() is None:
            for number in asked[signals:]:
                child.send_signal(number)
                signals += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.2)
    if asked:
        raise Stopped(asked[0])
    if child.returncode:
        raise ChildProcessError(f"{what} of {run} failed: {last_error(output, child.returncode)}; see {output}")


def last_error(output: Path, status: int) -> str:
    """The error that a child process ended with; where it named none, its last line, or how it ended."""
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line] or [f"exit status {status}"])[-1]


if __name__ == "__main__":
    sys.exit(main())
