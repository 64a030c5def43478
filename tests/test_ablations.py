"""The ablations: real runs of a tiny LLaMA; with stand-ins for training and scoring what is run, resumed and reported;
with a program in the place of Python how child processes are watched."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_training import write_llama, write_run_file

import eval.scienceqa
import training.scienceqa
from mmadapter.checkpoint import AdapterFile, read_about, save_adapter
from mmadapter.config import AdapterConfig
from mmadapter.record import file_sha256
from training import ablation_results, ablations
from training.config import add_overrides, overrides_of, read_config

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
QUESTIONS = 24

# Takes the place of the Python interpreter; sleeps until so many signals came, or fails, as its plan says.
CHILD = """\
import json, os, signal, sys, time
from pathlib import Path

notes, module = Path({notes!r}), sys.argv[2]
with open(notes / "calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
plan = json.loads((notes / "plan").read_text())
if plan.get("sleep") == module:
    caught = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda number, frame: caught.append(number))
    print("asleep", flush=True)
    (notes / "asleep").write_text(str(os.getsid(0)))
    began = time.monotonic()
    while len(caught) < plan["signals"] and time.monotonic() < began + 60:
        time.sleep(0.02)
    time.sleep(0.5)  # for one signal too many
    (notes / "caught").write_text(json.dumps(caught))
    sys.exit(128 + sum(caught[:1]))
if plan.get("fail") == module:
    print("a bar\\rerror: the loss is nan at step 2\\n" + plan.get("after", ""), file=sys.stderr, flush=True)
    if plan.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(1)
"""


class Calls(list[list[str]]):
    """Module and arguments of each call; what was to be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict = {}

    def take(self) -> list[list[str]]:
        """The calls since the last time that this was asked."""
        taken = self[:]
        self.clear()
        return taken

    def names(self) -> list[str]:
        """Likewise, what each call was, and of which run."""
        found = []
        for module, *argv in self.take():
            if "--dry-run" in argv:
                found.append("estimate")
            elif module == "training.scienceqa":
                found.append(f"train {Path(option(argv, '--out')).name}")
            else:
                found.append(f"score {Path(option(argv, '--adapter')).parent.name}")
        return found


def train(argv: list[str]) -> str:
    """Stands in for `training.scienceqa`: reads its options, leaves what it leaves, and returns what it prints."""
    parser = argparse.ArgumentParser()
    for name in ("--config", "--data", "--out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dry-run", action="store_true")
    add_overrides(parser)
    arguments = parser.parse_args(argv)
    config = read_config(arguments.config, overrides_of(arguments))
    if arguments.dry_run:
        return f"steps       1,200 of 4 rows\ntime        0.{config.layers}0 s a step, 99 minutes in all"
    rows, out = 10, arguments.out
    steps, _ = config.schedule(rows)
    # The loss of a step is its number, so that a mean says over which steps it is.
    log = [{"step": 0, "rows": rows}, {"step": 0, "val_loss": 9.0}]
    log += [{"step": step, "loss": float(step)} for step in range(1, steps + 1)]
    log += [{"step": steps, "val_loss": config.layers + config.seed / 10}]
    out.mkdir()
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    state = {
        "prompt": torch.zeros(config.layers, 3, 5),
        "gate": torch.zeros(config.layers, 4),
        "projection.feature_mean": torch.zeros(7),
    }
    hashes = [file_sha256(arguments.data / name) for name in ("problems.json", "pid_splits.json")]
    facts = {"run": dataclasses.asdict(config), "data_hash": hashes}
    save_adapter(out / "adapter.safetensors", state, AdapterFile(AdapterConfig(config.layers), training=facts))
    return ""


def score(argv: list[str]) -> str:
    """Stands in for `eval.scienceqa`."""
    arguments = eval.scienceqa.build_parser().parse_args(argv)
    model = {"adapter_hash": file_sha256(Path(arguments.adapter))}
    arguments.json.write_text(json.dumps({"avg": 50.0 + 10 * arguments.seed, "total": 40, "model": model}))
    return ""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with `llama/`, a ScienceQA folder `data/` and a run file `tiny.toml`."""
    folder = tmp_path_factory.mktemp("world")
    write_llama(folder / "llama")
    problems = {}
    for number in range(QUESTIONS + 4):
        split = "train" if number < QUESTIONS else "val"
        problems[str(number)] = {
            **{"question": f"Which is {number % 3}?", "choices": ["none", "one", "two"], "answer": number % 3},
            **{"hint": "A dog runs." if number % 2 else "", "subject": "natural science", "grade": "grade3"},
            **{"image": "image.png" if number % 4 == 0 else None, "split": split},
        }
        if number % 4 == 0:
            (folder / "data" / "images" / split / str(number)).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "data" / "images" / split / str(number) / "image.png")
    (folder / "data" / "problems.json").write_text(json.dumps(problems))
    pids = list(problems)
    (folder / "data" / "pid_splits.json").write_text(json.dumps({"train": pids[:QUESTIONS], "val": pids[QUESTIONS:]}))
    tiny = {"llama": str(folder / "llama"), "template": "bare", "answer_form": "text", "steps": 0, "held_out": 10}
    write_run_file(folder / "tiny.toml", **{**tiny, "epochs": 2.0, "ema": 0.0, "seed": 0})
    return folder


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """Puts the stand-ins in the place of the child processes; nothing is drawn."""
    made = Calls()

    def call(what, run, command, asked):
        module, *argv = command
        made.append(command)
        run.output(what).write_text({"training.scienceqa": train, "eval.scienceqa": score}[module](argv))

    monkeypatch.setattr(ablations, "call", call)
    monkeypatch.setattr(
        "training.plots.bands", lambda named, out, **labels: made.drawn.update(labels, named=named, out=out)
    )
    return made


@pytest.fixture
def child(tmp_path, monkeypatch) -> Path:
    """Child processes are `CHILD`; gives the folder of its plan and of what it writes down."""
    notes = tmp_path / "notes"
    notes.mkdir()
    program = notes / "python"
    program.write_text(f"#!{sys.executable}\n" + CHILD.format(notes=str(notes)))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return notes


def command(world: Path, ablation: str, out: Path, *more: str) -> list[str]:
    return [ablation, "--data", str(world / "data"), "--config", str(world / "tiny.toml"), "--out", str(out), *more]


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def error_of(capsys, argv: list[str]) -> str:
    """The error of a command that fails: the last line, with no traceback."""
    assert ablations.main(argv) == 1
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert not any(line.startswith("error") or "Traceback" in line for line in before)
    return last


# Real runs


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs both commands here, where torch is loaded already."""
    modules = {"training.scienceqa": training.scienceqa, "eval.scienceqa": eval.scienceqa}

    def call(what, run, command, asked):
        module, *argv = command
        assert modules[module].main(argv) == 0, what

    monkeypatch.setattr(ablations, "call", call)


def test_a_smoke_run_of_real_processes(world, tmp_path, capfd, monkeypatch):
    """What the children print goes to their files, and they find their modules."""
    both = ablations.variants
    monkeypatch.setattr(ablations, "variants", lambda *arguments: both(*arguments)[:1])
    out = tmp_path / "out"
    assert ablations.main(command(world, "attention", out, "--smoke")) == 0
    printed = capfd.readouterr()
    assert printed.out == (out / "table.md").read_text()
    assert printed.err == "run 1 of 1: zero-initialised, seed 0\n"
    assert "adapter in" in (out / "zero-initialised-seed0.training.txt").read_text()
    assert "ScienceQA train, held out with seed 0: 8 questions" in (
        (out / "zero-initialised-seed0.scoring.txt").read_text()
    )


def test_zero_and_random_attention(world, tmp_path, capsys, in_this_process):
    """What the table says is what the adapters, logs and scores of two real runs hold."""
    out = tmp_path / "out"
    assert ablations.main(command(world, "attention", out, "--smoke")) == 0
    zero, random = (out / f"{name}-seed0" for name in ("zero-initialised", "randomly-initialised"))
    states = [load_file(folder / "adapter.safetensors") for folder in (zero, random)]
    assert not (states[0]["gate"] == 0).all(), "the gates that start at zero are trained"
    assert (states[1]["gate"] == 1).all(), "those at one stay there"
    about = [read_about(folder / "adapter.safetensors") for folder in (zero, random)]
    assert [one.adapter.gate for one in about] == ["tanh", "identity"]
    assert [one.training["run"]["gate_init"] for one in about] == [0, 1]
    assert [one.training["steps"] for one in about] == [4, 4]
    results = json.loads((out / "results.json").read_text())
    assert (results["smoke"], results["ablation"]) == (True, "attention")
    for row, state in zip(results["variants"], states, strict=True):
        (run,) = row["runs"]
        log = [json.loads(line) for line in (Path(run["folder"]) / "log.jsonl").read_text().splitlines()]
        assert run["train_loss"] == [line["loss"] for line in log if "loss" in line][-1], "the last fifth of four steps"
        assert run["val_loss"] == log[-1]["val_loss"]
        scores = json.loads((Path(run["folder"]) / "scores.json").read_text())
        assert (scores["split"], scores["held_out"], scores["model"]["score"]) == ("train", 8, "likelihood")
        assert (run["accuracy"], run["questions"], scores["total"]) == (scores["avg"], 8, 8)
        assert run["scored"]["adapter_hash"] == scores["adapter_hash"]
        assert run["scored"]["data_hash"] == scores["data_hash"]
        assert run["answers"] == {row["pid"]: row["answer"] for row in scores["predictions"]}
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        gates = 0 if row["name"] == "randomly-initialised" else state["gate"].numel()
        assert run["parameters"] == state["prompt"].numel() + gates
    with Image.open(out / "curves.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    capsys.readouterr()
    assert ablations.main(command(world, "attention", out, "--smoke")) == 0
    assert "run 1 of 2: zero-initialised, seed 0: done" in capsys.readouterr().err, "the settings are known again"


def test_without_held_out_rows_the_validation_split_is_scored(world, tmp_path, in_this_process):
    run_file = tmp_path / "val.toml"
    run_file.write_text((world / "tiny.toml").read_text().replace("held_out = 10", "held_out = 0"))
    arguments = command(world, "overfitting", tmp_path / "out", "--smoke", "--config", str(run_file))
    assert ablations.main(arguments) == 0
    folders = [tmp_path / "out" / f"steps-{steps}-seed0" for steps in (4, 8, 16)]
    assert [read_about(folder / "adapter.safetensors").training["steps"] for folder in folders] == [4, 8, 16]
    for folder in folders:
        scores = json.loads((folder / "scores.json").read_text())
        assert (scores["split"], scores["held_out"], scores["total"]) == ("val", None, 4)
    assert "4 questions of the val split" in (tmp_path / "out" / "table.md").read_text()


def test_the_time_is_read_from_a_real_dry_run(world, capsys):
    arguments = ["--config", str(world / "tiny.toml"), "--data", str(world / "data"), "--dry-run"]
    assert training.scienceqa.main(arguments) == 0
    printed = capsys.readouterr().out
    assert 0 <= ablations.minutes_of(printed) < 1
    text = (
        "steps       1,840 of 24 rows: 4.00 epochs\nmemory      1 GiB\ntime        1.50 s a step, 46 minutes in all\n"
    )
    assert ablations.minutes_of(text) == 46
    with pytest.raises(ValueError, match="a dry run says its steps"):
        ablations.minutes_of("something else")


# What is run


@pytest.mark.parametrize(
    ("ablation", "changes"),
    [
        ("layers", {"layers-1": {"layers": 1}, "layers-2": {"layers": 2}, "layers-3": {"layers": 3}}),
        (
            "attention",
            {
                "zero-initialised": {"gate": "tanh", "gate_init": 0.0, "gate_lr": 0.03},
                "randomly-initialised": {"gate": "identity", "gate_init": 1.0, "gate_lr": 0.0},
            },
        ),
        ("overfitting", {f"epochs-{n}": {"train_rows": 96, "epochs": float(n)} for n in (15, 30, 60)}),
    ],
)
def test_the_runs_of_an_ablation(world, tmp_path, capsys, calls, ablation, changes):
    out = tmp_path / "out"
    assert ablations.main(command(world, ablation, out, "--seeds", "2")) == 0
    made, names = calls[:], [f"{name}-seed{seed}" for seed in (0, 1) for name in changes]
    pairs = [f"{what} {name}" for name in names for what in ("train", "score")]
    assert calls.names() == ["estimate"] * len(changes) + pairs
    base = read_config(world / "tiny.toml", {})
    for name in names:
        variant, _, seed = name.partition("-seed")
        run = read_about(out / name / "adapter.safetensors").training["run"]
        expected = {**vars(base), "scales": [], **changes[variant], "seed": int(seed)}
        assert run == expected
    for call in made[len(changes) + 1 :: 2]:
        assert (option(call, "--split"), option(call, "--held-out"), option(call, "--score")) == (
            *("train", "10"),
            "likelihood",
        )
        assert option(call, "--seed") == Path(option(call, "--adapter")).parent.name[-1], "questions held out by seed"
        assert (option(call, "--llama"), option(call, "--dtype")) == (str(world / "llama"), "float32")
        assert option(call, "--device") in ("cpu", "cuda")
        assert "--limit" not in call
    progress = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    assert progress[0].startswith(f"run 1 of {len(names)}: {next(iter(changes))}, seed 0; about ")
    assert len(progress) == len(names)


def test_the_shipped_run_file_adapts_the_papers_layers():
    config = read_config(ablations.RUN_FILE, {})
    assert (config.vision, config.tune, config.held_out, config.ema) == ("", "prompts", 1200, 0)
    assert [variant.name for variant in ablations.variants("overfitting", config)] == [
        *("epochs-15", "epochs-30", "epochs-60"),
    ]


def test_layers_in_thirds_of_the_base(monkeypatch, world):
    class Base:
        layers = 30

    monkeypatch.setattr("mmadapter.weights.read_config", lambda spec: Base)
    config = read_config(world / "tiny.toml", {})
    assert [variant.changes for variant in ablations.variants("layers", config)] == [
        {"layers": count} for count in (10, 20, 30)
    ]
    assert [variant.paper[:5] for variant in ablations.variants("layers", config)] == ["55.95", "73.36", "83.85"]
    Base.layers = 2
    with pytest.raises(ValueError, match="has 2 layers; to adapt thirds of them takes a base of at least 3"):
        ablations.variants("layers", config)


def test_smoke_is_small_and_estimates_nothing(world, tmp_path, calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["layers", "--data", str(world / "data"), "--config", str(world / "tiny.toml"), "--smoke"]
    assert ablations.main(arguments) == 0
    assert len(calls) == 6
    folder = tmp_path / "runs" / "ablation_layers_smoke" / "layers-2-seed0"
    run = read_about(folder / "adapter.safetensors").training["run"]
    assert {name: run[name] for name in ablations.SMOKE} == ablations.SMOKE


def test_the_estimate(world, tmp_path, capsys, calls):
    """1,200 steps of .10, .20 and .30 s: 2, 4 and 6 minutes, two runs of each."""
    assert ablations.main(command(world, "layers", tmp_path / "out", "--seeds", "2")) == 0
    shown = capsys.readouterr().err.splitlines()
    said = "6 runs of about 2 to 6 minutes, about 24 minutes in all; validation and scoring come on top"
    assert shown[3:5] == [said, "run 1 of 6: layers-1, seed 0; about 24 minutes left"]
    assert shown[-1] == "run 6 of 6: layers-3, seed 1; about 0 minutes left", "the stand-ins are faster than said"
    assert not list((tmp_path / "out").glob("*.estimate.txt"))


def test_a_long_time_is_in_hours():
    assert [ablations.duration(minutes) for minutes in (7.4, 99, 210)] == [
        *("about 7 minutes", "about 99 minutes", "about 3.5 hours"),
    ]


# Going on


def test_what_is_there_is_not_done_again(world, tmp_path, capsys, calls):
    out = tmp_path / "out"
    arguments = command(world, "attention", out, "--seeds", "1")
    assert ablations.main(arguments) == 0
    tables = (out / "table.md").read_text(), (out / "results.json").read_text()
    calls.clear()
    (out / "table.md").unlink()
    assert ablations.main(arguments) == 0
    assert calls.names() == []
    assert ((out / "table.md").read_text(), (out / "results.json").read_text()) == tables

    (out / "zero-initialised-seed0" / "scores.json").unlink()
    assert ablations.main(arguments) == 0
    assert calls.names() == ["estimate", "score zero-initialised-seed0"]

    shutil.rmtree(out / "randomly-initialised-seed0")
    assert ablations.main(command(world, "attention", out, "--seeds", "2")) == 0
    assert calls.names() == [
        *("estimate", "estimate", "train randomly-initialised-seed0", "score randomly-initialised-seed0"),
        *("train zero-initialised-seed1", "score zero-initialised-seed1"),
        *("train randomly-initialised-seed1", "score randomly-initialised-seed1"),
    ]


def test_scores_of_another_adapter_are_made_again(world, tmp_path, calls):
    out = tmp_path / "out"
    arguments = command(world, "attention", out, "--smoke")
    assert ablations.main(arguments) == 0
    calls.clear()
    scores = out / "zero-initialised-seed0" / "scores.json"
    scores.write_text(json.dumps({"avg": 1.0, "total": 40, "model": {"adapter_hash": "of another"}}))
    assert ablations.main(arguments) == 0
    assert calls.names() == ["score zero-initialised-seed0"]
    assert json.loads(scores.read_text())["avg"] == 50


def test_a_run_of_another_ablation_may_be_copied(world, tmp_path, calls):
    """As the help says of 30 layers: here the run file adapts two of three."""
    assert ablations.main(command(world, "layers", tmp_path / "first", "--seeds", "1")) == 0
    calls.clear()
    shutil.copytree(tmp_path / "first" / "layers-2-seed0", tmp_path / "second" / "zero-initialised-seed0")
    assert ablations.main(command(world, "attention", tmp_path / "second", "--seeds", "1")) == 0
    assert calls.names() == [
        "estimate",
        "train randomly-initialised-seed0",
        "score randomly-initialised-seed0",
    ]


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("lr = 0.01", "lr = 0.02", "lr"),
        ("ema = 0.0", "ema = 0.5\nship = 'best'", "ema, ship"),
        ("epochs = 2.0", "epochs = 3.0", "epochs"),
    ],
)
def test_a_run_of_other_settings_is_refused(world, tmp_path, capsys, calls, before, after, named):
    """A table over runs of two run files would compare what is not said."""
    out = tmp_path / "out"
    assert ablations.main(command(world, "attention", out, "--seeds", "1")) == 0
    calls.clear()
    changed = tmp_path / "changed.toml"
    text = (world / "tiny.toml").read_text()
    assert before in text
    changed.write_text(text.replace(before, after))
    error = error_of(capsys, command(world, "attention", out, "--seeds", "1", "--config", str(changed)))
    adapter = out / "zero-initialised-seed0" / "adapter.safetensors"
    assert f"{adapter} was made with another {named}; choose another --out or delete {adapter.parent}" in error
    assert not calls


def test_settings_that_change_nothing_may_differ(world, tmp_path, calls):
    out, other = tmp_path / "out", tmp_path / "other.toml"
    assert ablations.main(command(world, "attention", out, "--smoke")) == 0
    calls.clear()
    other.write_text((world / "tiny.toml").read_text().replace("licence = ", "keep = 3\nlicence = "))
    assert ablations.main(command(world, "attention", out, "--smoke", "--config", str(other))) == 0
    assert not calls


def test_a_run_of_other_data_is_refused(world, tmp_path, capsys, calls):
    out, data = tmp_path / "out", shutil.copytree(world / "data", tmp_path / "data")
    assert ablations.main(command(world, "attention", out, "--smoke")) == 0
    (data / "problems.json").write_text((data / "problems.json").read_text() + "\n")
    error = error_of(capsys, command(world, "attention", out, "--smoke", "--data", str(data)))
    assert "was made with another data; choose another --out" in error


def test_damaged_scores_are_named(world, tmp_path, capsys, calls):
    out = tmp_path / "out"
    assert ablations.main(command(world, "attention", out, "--smoke")) == 0
    scores = out / "zero-initialised-seed0" / "scores.json"
    scores.write_text("{")
    error = error_of(capsys, command(world, "attention", out, "--smoke"))
    assert f"{scores} is not JSON" in error
    assert "delete it to score the run again" in error


# Children


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            {"fail": "training.scienceqa", "after": "INFO: the end"},
            "training of zero-initialised, seed 0 failed: the loss is nan at step 2; see {out}.training.txt",
        ),
        (
            {"fail": "eval.scienceqa"},
            "scoring of zero-initialised, seed 0 failed: the loss is nan at step 2; see {out}.scoring.txt",
        ),
        (
            {"fail": "training.scienceqa", "kill": True},
            "training of zero-initialised, seed 0 failed: it was ended by SIGKILL; see {out}.training.txt",
        ),
    ],
)
def test_a_child_that_fails(world, tmp_path, capsys, child, plan, said):
    (child / "plan").write_text(json.dumps(plan))
    out = tmp_path / "out"
    error = error_of(capsys, command(world, "attention", out, "--smoke"))
    assert error == "error: " + said.format(out=out / "zero-initialised-seed0")
    assert not (out / "table.md").exists()


def test_the_last_error_of_a_child_without_one(tmp_path):
    output = tmp_path / "output"
    output.write_text("Traceback (most recent call last):\n  File\nImportError: no such thing\n\n")
    assert ablations.last_error(output, 1) == "ImportError: no such thing"
    output.write_text("")
    assert ablations.last_error(output, 3) == "exit status 3"
    assert ablations.last_error(output, -15) == "it was ended by SIGTERM"


@pytest.mark.parametrize("module", ["training.scienceqa", "eval.scienceqa"])
@pytest.mark.parametrize("sent", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)])
def test_signals_are_passed_on_once_each(world, tmp_path, capsys, child, module, sent):
    """The child saves at the first and ends at once at the second: a signal too many would lose the step at hand."""
    (child / "plan").write_text(json.dumps({"sleep": module, "signals": len(sent)}))
    ended = threading.Event()

    def send() -> None:
        while not (child / "asleep").exists():
            if ended.wait(0.02):
                return
        for number in sent:
            os.kill(os.getpid(), number)
            ended.wait(0.5)

    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    sender = threading.Thread(target=send)
    sender.start()
    try:
        status = ablations.main(command(world, "attention", tmp_path / "out", "--smoke"))
    finally:
        ended.set()
        sender.join()
    assert status == 128 + sent[0]
    assert json.loads((child / "caught").read_text()) == list(sent)
    assert int((child / "asleep").read_text()) != os.getsid(0), "a terminal's Ctrl-C would reach it twice"
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; the same command goes on from there"
    modules = [line.split('"')[3] for line in (child / "calls").read_text().splitlines()]
    assert modules == ["training.scienceqa", "eval.scienceqa"][: 1 + (module == "eval.scienceqa")], (
        "no other is started"
    )
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_child_that_outlived_its_parent_is_not_given_a_rival(world, tmp_path, capsys, child):
    """Two trainings in one folder would overwrite each other's checkpoints."""
    (child / "plan").write_text(json.dumps({"sleep": "training.scienceqa", "signals": 1}))
    arguments = command(world, "attention", tmp_path / "out", "--smoke")
    program = (
        f"import sys; sys.executable = {sys.executable!r}; from training import ablations; ablations.main({arguments})"
    )
    parent = subprocess.Popen([PYTHON, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(child / "asleep")
    parent.kill()
    parent.wait()
    output = tmp_path / "out" / "zero-initialised-seed0.training.txt"
    assert error_of(capsys, arguments) == (f"error: another process is writing {output}; wait until it ends, or end it")
    assert output.read_text() == "asleep\n", "what it printed stays"
    assert len((child / "calls").read_text().splitlines()) == 1
    os.kill(int((child / "asleep").read_text()), signal.SIGTERM)
    wait_for(child / "caught")
    (child / "plan").write_text(json.dumps({"fail": "training.scienceqa"}))
    for _ in range(100):  # until it has ended
        error = error_of(capsys, arguments)
        if "another process" not in error:
            break
        time.sleep(0.05)
    assert "the loss is nan" in error
    assert "asleep" not in output.read_text(), "an earlier child's output is not this one's"


def wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists() and path.read_text():
            return
        time.sleep(0.02)
    raise TimeoutError(f"{path} did not come")


# Results


def test_the_table_and_the_record(world, tmp_path, capsys, calls):
    """10 rows in batches of 4 are 3 steps an epoch, the last of which the train loss is of; the stand-in's loss of a
    step is its number, its accuracy 50 + 10 a seed, its validation loss 2 (the layers) + a tenth of the seed."""
    out = tmp_path / "out"
    arguments = command(world, "overfitting", out, "--seeds", "3")
    assert ablations.main(arguments) == 0
    half = 4.303 * 10 / math.sqrt(3)
    cells = [
        f"| {2 * 3 * 5 + 2 * 4:,} | {{loss:.3f}} | 2.100 | 60.00 [{60 - half:.2f}, {60 + half:.2f}] | {against} |"
        for against in ("", "+0.00 ± 0.00", "+0.00 ± 0.00")
    ]
    assert capsys.readouterr().out.splitlines() == [
        "| variant | trained parameters | train loss at the end | validation loss | accuracy, 95% interval "
        "| against the first | LLaMA-7B, paper's Table 6 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| epochs-15 {cells[0].format(loss=37)} 82.08 (15 epochs; train loss .022, validation loss .136) |",
        f"| epochs-30 {cells[1].format(loss=74)} 83.85 (30 epochs; .004, .241) |",
        f"| epochs-60 {cells[2].format(loss=149)} 83.94 (60 epochs; .001, .282) |",
        "",
        "llama, without images. Accuracy: percent of 40 questions held out of the train split; 3 seeds (each seed "
        "holds out others), Student's t over them and over their differences. Losses: a target token. Paper: val "
        "split, with images.",
    ]
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == shlex.join(["python", "-m", "training.ablations", *arguments])
    assert results["config"]["batch_size"] == 4
    assert {"git_commit", "versions", "smoke", "ablation"} <= set(results)
    first = results["variants"][0]
    assert (first["changes"], first["accuracy"], first["interval"]) == (
        {"train_rows": 96, "epochs": 15.0},
        *(60, [pytest.approx(60 - half), pytest.approx(60 + half)]),
    )
    assert [run["accuracy"] for run in first["runs"]] == [50, 60, 70]
    assert [run["seed"] for run in first["runs"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("ablation", "names", "points"),
    [
        ("attention", ["zero-initialised", "randomly-initialised"], [[(1, 1), (2, 2), (3, 3), (4, 4)]] * 2),
        (
            "overfitting",
            [f"steps-{steps}, {what}" for steps in (4, 8, 16) for what in ("training", "validation")],
            [None, [(4, 2)], None, [(8, 2)], None, [(16, 2)]],
        ),
    ],
)
def test_the_curves(world, tmp_path, calls, ablation, names, points):
    assert ablations.main(command(world, ablation, tmp_path / "out", "--smoke", "--seeds", "2")) == 0
    drawn = calls.drawn
    assert list(drawn["named"]) == names
    assert drawn["out"] == tmp_path / "out" / "curves.png"
    assert drawn["title"] == f"ScienceQA, llama: {ablation}"
    for curves, expected in zip(drawn["named"].values(), points, strict=True):
        assert len(curves) == 2
        assert expected is None or curves[0] == expected


def test_a_curve_is_of_means_over_equal_parts():
    log = [{"step": 0, "val_loss": 5.0}, *({"step": step, "loss": float(step % 2)} for step in range(1, 461))]
    curve = ablation_results.smoothed(log)
    assert len(curve) == ablation_results.CURVE_POINTS
    assert (curve[0][0], curve[-1][0]) == (9, 460)
    assert curve[0][1] == pytest.approx(5 / 9)
    assert all(0.4 < mean < 0.6 for _, mean in curve)


def test_students_t_is_that_of_its_density():
    """The table of quantiles against the integral of the density: 95% lie within."""
    for degrees, quantile in enumerate(ablation_results.STUDENT_T, 1):
        x = np.linspace(-quantile, quantile, 200_001)
        density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        assert np.trapezoid(density, x) * scale == pytest.approx(0.95, abs=1e-4), degrees


def test_intervals():
    low, high = ablation_results.interval([70.0, 74.0, 72.0], 1200)
    assert ((low + high) / 2, (high - low) / 2) == (pytest.approx(72), pytest.approx(4.303 * 2 / math.sqrt(3)))
    low, high = ablation_results.interval([70.0, 72.0], 1200)
    assert high - low == pytest.approx(2 * 12.706 * 1)  # the mean's deviation is sqrt(2) / sqrt(2)
    low, high = ablation_results.interval([72.0], 1200)
    assert (high - low) / 2 == pytest.approx(1.96 * 100 * math.sqrt(0.72 * 0.28 / 1200), rel=0.05)
    assert (low + high) / 2 == pytest.approx(72, abs=0.2)
    assert ablation_results.interval([72.0], 1200) == (low, high), "the same at each call"
    assert ablation_results.interval([100.0], 8) == (100, 100)


# Misuse


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gates", "--data", "."], "gates"),
        (["layers"], "--data"),
        (["layers", "--data", ".", "--seeds", "0"], "--seeds must be 1 to 20, got 0"),
        (["layers", "--data", ".", "--seeds", "21"], "--seeds must be 1 to 20, got 21"),
    ],
)
def test_misuse_is_one_line_and_exits_with_2(capsys, argv, message):
    with pytest.raises(SystemExit) as exited:
        ablations.main(argv)
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_data_and_run_file_are_looked_for_first(world, tmp_path, capsys, calls):
    out = tmp_path / "out"
    absent = tmp_path / "absent"
    assert f"no folder {absent}" in error_of(capsys, command(world, "layers", out, "--data", str(absent)))
    absent.mkdir()
    assert f"no {absent}/problems.json" in error_of(capsys, command(world, "layers", out, "--data", str(absent)))
    missing = str(absent / "x.toml")
    assert f"no run file {missing}" in error_of(capsys, command(world, "layers", out, "--config", missing))
    assert not out.exists()
    assert not calls


def test_help_opens_with_an_example(capsys):
    with pytest.raises(SystemExit) as exited:
        ablations.main(["--help"])
    assert exited.value.code == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    parser = ablations.build_parser()
    for line in (first, second):
        program, argv = line.split()[:3], line.split()[3:]
        assert program == ["python", "-m", "training.ablations"]
        assert parser.parse_args(argv).config.is_file()
