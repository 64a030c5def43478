"""A tiny world to train in: a LLaMA with its tokenizer, an image encoder, the three data sets in their official layouts
and run files; and what the tests of training ask of a finished or failed run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_session

from mmadapter.data import Example
from mmadapter.tokenizer import Tokenizer, open_tokenizer
from training.engine import Trainer

ROOT = Path(__file__).resolve().parents[1]
RUN = {
    "device": "cpu",
    "dtype": "float32",
    "layers": 2,
    "prompt_length": 3,
    "image_size": 32,
    "views": 2,
    "whiten": 6,
    "projection_width": 8,
    "dropout": 0.2,
    "feature_dropout": 0.2,
    "batch_size": 4,
    "steps": 3,
    "lr": 1e-2,
    "gate_lr": 3e-2,
    "warmup": 1,
    "ema": 0.9,
    "eval_every": 2,
    "save_every": 1,
    "licence": "drawn by a test",
}
SUBJECTS = ("a dog", "two cats", "a man in a red hat", "three children")
ACTIONS = ("runs on the grass", "sits by the water", "jumps over a bench", "plays with a ball")


def write_llama(folder: Path) -> Path:
    """A random LLaMA with a byte-level tokenizer, in the Hugging Face layout."""
    tiny_session.write_tokenizer(folder, None)
    tiny_session.write_llama(folder, tiny_session.llama_config(open_tokenizer(folder).vocab_size))
    return folder


def encoder_spec(folder: Path) -> str:
    """Random weights of a small convolutional network in `folder`, and the spec that names them."""
    return f"timm:test_resnet@{tiny_session.write_encoder(folder)}"


def write_pictures(folder: Path, names: Sequence[str]) -> None:
    """Pictures that differ in content and shape."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        tiny_session.picture(number, 40, 25 + 5 * (number % 4)).save(folder / name)


def captions(count: int) -> list[list[str]]:
    """Five captions for each of `count` pictures, in people's spelling: capitals, loose blanks, some full stops."""
    rng = random.Random(0)
    said = [f"{subject} {action}".capitalize() for subject in SUBJECTS for action in ACTIONS]
    return [[rng.choice(said) + rng.choice(("", ".", " .", " ")) for _ in range(5)] for _ in range(count)]


def write_karpathy(folder: Path, train: int = 8, val: int = 3) -> Path:
    """`dataset_tiny.json` beside `images/`, with one picture of the test split, which nothing may read."""
    splits = ["train"] * (train - 1) + ["restval"] + ["val"] * val
    names = [f"{index}.png" for index in range(len(splits))]
    write_pictures(folder / "images", names)
    images = [
        {"imgid": index, "filename": name, "split": split, "sentences": [{"raw": text} for text in texts]}
        for index, (name, split, texts) in enumerate(zip(names, splits, captions(len(names)), strict=True))
    ]
    images.append({"imgid": 99, "filename": "absent.png", "split": "test", "sentences": [{"raw": "a test"}]})
    (folder / "dataset_tiny.json").write_text(json.dumps({"dataset": "tiny", "images": images}))
    return folder


def write_coco(folder: Path, count: int = 12) -> Path:
    """`annotations/captions_val2017.json` beside `val2017/`."""
    names = [f"{index:012}.jpg" for index in range(1, count + 1)]
    write_pictures(folder / "val2017", names)
    annotations = [
        {"id": 10 * index + number, "image_id": index, "caption": text}
        for index, texts in enumerate(captions(count), 1)
        for number, text in enumerate(texts)
    ]
    images = [{"id": index, "file_name": name} for index, name in enumerate(names, 1)]
    (folder / "annotations").mkdir()
    (folder / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations})
    )
    return folder


def alpaca_rows(count: int = 12) -> list[dict[str, str]]:
    """Rows of Alpaca's official JSON; every other one has an input."""
    return [
        {
            "instruction": f"Say what {subject} does.",
            "input": "" if number % 2 else f"It is {number} o'clock.",
            "output": f"{subject.capitalize()} {ACTIONS[number % len(ACTIONS)]}.",
        }
        for number, subject in enumerate(SUBJECTS[number % len(SUBJECTS)] for number in range(count))
    ]


def write_alpaca(folder: Path, count: int = 12) -> Path:
    """`alpaca_data.json`, indented as the official file is."""
    folder.mkdir(parents=True)
    (folder / "alpaca_data.json").write_text(json.dumps(alpaca_rows(count), indent=4))
    return folder / "alpaca_data.json"


def scienceqa_problem(number: int, split: str) -> dict[str, object]:
    """One entry of `problems.json`: even ones have an image, every third a hint, every fourth no lecture."""
    return {
        "question": f"Which is number {number}?",
        "choices": [f"a {colour} one" for colour in ("red", "green", "blue")[: 2 + number % 2]],
        "answer": number % 2,
        "hint": f"It was painted {number} years ago." if number % 3 == 0 else "",
        "image": "image.png" if number % 2 == 0 else None,
        "task": "closed choice",
        "grade": f"grade{1 + number % 12}",
        "subject": ("natural science", "social science", "language science")[number % 3],
        "lecture": f"Colours, part {number}." if number % 4 else "",
        "solution": f"Look at it {number} times.",
        "split": split,
    }


def write_scienceqa(folder: Path, train: int = 10, val: int = 4) -> Path:
    """`problems.json`, `pid_splits.json` and `images/SPLIT/PID/image.png`; pictures of the test split, which nothing
    may read, are not there."""
    problems, splits = {}, {"train": [], "val": [], "test": []}
    for number, split in enumerate(["train"] * train + ["val"] * val + ["test"] * 2):
        pid = str(100 + number)
        splits[split].append(pid)
        problems[pid] = scienceqa_problem(number, split)
        if problems[pid]["image"] and split != "test":
            picture = folder / "images" / split / pid / "image.png"
            picture.parent.mkdir(parents=True)
            tiny_session.picture(number, 40, 25 + number).save(picture)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


def write_world(folder: Path, **changes: object) -> Path:
    """`llama/`, an encoder, and run files that use them: `tiny.toml`, and `text.toml` without images."""
    llama = str(write_llama(folder / "llama"))
    write_run_file(folder / "tiny.toml", **{"llama": llama, "vision": encoder_spec(folder), **changes})
    write_run_file(folder / "text.toml", **{"llama": llama, **changes})
    return folder


def write_run_file(path: Path, **changes: object) -> Path:
    """The settings of `RUN`, with changes, as TOML."""
    values = {**RUN, **changes}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


def log_of(out: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def story(out: Path) -> list[dict]:
    """A run's log without times and without the lines that say where it was resumed: the same for every run of the same
    settings, however often it was killed."""
    timed = ("time", "tokens_per_s")
    lines = [line for line in log_of(out) if line.get("event") != "resume"]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def error_of(capsys, main: Callable[[list[str]], int], argv: list[str]) -> str:
    """The error of a command that fails: one line, the last, with no traceback."""
    assert main(argv) == 1
    shown = capsys.readouterr().err.replace("\r", "\n")
    *before, last = [line for line in shown.splitlines() if line.strip()]
    assert last.startswith("error: ")
    assert not any("error" in line or "Traceback" in line for line in before)
    return last


def start(argv: Sequence[str], said: Path) -> subprocess.Popen:
    """A command in a process of its own, on one thread, with what it says in the file `said`."""
    with said.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *argv],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=said.parent,
            stdout=file,
            stderr=file,
        )


def wait_for(process: subprocess.Popen, there: Callable[[], object], seconds: float = 240.0) -> None:
    """Returns as soon as `there()` is true, or the process has ended."""
    end = time.monotonic() + seconds
    while not there() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


class _Stop(BaseException):
    """Ends a command where it would begin to train."""


def given_to_engine(monkeypatch, main: Callable[[list[str]], int], argv: list[str]) -> Trainer:
    """The trainer that a command would start, with its rows, features and weights as they are before the first step."""
    taken = []

    def train(trainer: Trainer) -> None:
        taken.append(trainer)
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", train)
        with pytest.raises(_Stop):
            main(argv)
    return taken[0]


def text_of(example: Example, tokenizer: Tokenizer) -> tuple[str, str]:
    """What a row shows and what it has the model learn, the end of sequence apart, which it must end with."""
    prompt, answer = example.tokens[: example.prompt_tokens], example.tokens[example.prompt_tokens :]
    assert answer[-1] == tokenizer.eos_id
    return tokenizer.decode(prompt), tokenizer.decode(answer[:-1])
