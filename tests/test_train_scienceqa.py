"""The ScienceQA training command: the official layout, prompt formats, answers as letter or text, images or none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_engine import different
from tiny_training import (
    RUN,
    error_of,
    given_to_engine,
    log_of,
    scienceqa_problem,
    text_of,
    write_scienceqa,
    write_world,
)

import mmadapter
from mmadapter.checkpoint import read_about
from mmadapter.config import VisionConfig
from mmadapter.tokenizer import open_tokenizer
from mmadapter.vision import load_encoder
from training.scienceqa import main

DATA = os.environ.get("MMADAPTER_DATA")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"), template="bare")
    write_scienceqa(folder / "scienceqa")
    return folder


@pytest.fixture(autouse=True)
def _cache(world, monkeypatch):
    monkeypatch.setenv("MMADAPTER_CACHE", str(world / "cache"))


@pytest.fixture
def tokenizer(world):
    return open_tokenizer(world / "llama")


def command(world: Path, out: Path, *more: str, data: Path | None = None, see: bool = True) -> list[str]:
    run_file = world / ("tiny.toml" if see else "text.toml")
    return ["--config", str(run_file), "--data", str(data or world / "scienceqa"), "--out", str(out), *more]


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("see", [True, False])
def test_a_run_trains_an_adapter_that_answers(world, tmp_path, capsys, see):
    """From the official layout to an adapter that says how it is to be asked, through the real command."""
    out = tmp_path / "out"
    flags = ("--answer-form", "letter" if see else "text", "--format", "QCM-A" if see else "QCML-AE")
    assert main(command(world, out, *flags, see=see)) == 0
    file = out / "adapter.safetensors"
    assert f"adapter in {file}" in capsys.readouterr().out
    about = read_about(file)
    assert (about.task, about.template) == ("scienceqa", "bare")
    assert (about.vision is not None) == see
    assert about.generation == {"max_new_tokens": 64 if see else 512, "stop": ["\n"]}  # an explanation is long
    asked = {key: about.training[key] for key in ("format", "answer_form", "score")}
    assert asked == {
        "format": flags[3],
        "answer_form": flags[1],
        "score": "letter" if see else "likelihood",
    }
    assert (about.training["rows"], about.training["validation_rows"]) == (10, 4)
    assert about.training["data"] == "problems, pid_splits"
    assert about.training["licence"] == RUN["licence"]
    assert about.scores == {"val_loss": round(log_of(out)[-1]["val_loss"], 4)}

    session = mmadapter.load(llama=str(world / "llama"), adapter=file)
    tokens = torch.tensor([[1, 2, 3]])
    if see:
        pictures = sorted((world / "scienceqa").rglob("*.png"))
        found = [session.logits(tokens, image) for image in (*pictures[:2], None)]
        assert not any(torch.equal(found[one], found[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    else:
        assert not torch.equal(session.logits(tokens), mmadapter.load(llama=str(world / "llama")).logits(tokens))


# ------------------------------------------------------------------------------------------------- what is learnt


ZERO = "Question: Which is number 0?\nContext: It was painted 0 years ago.\nOptions: (A) a red one (B) a green one\n"
ONE = "Question: Which is number 1?\nContext: N/A\nOptions: (A) a red one (B) a green one (C) a blue one\n"


@pytest.mark.parametrize(
    ("form", "answer_form", "expected"),
    [
        ("QCM-A", "letter", {f"{ZERO}Answer:": "The answer is A.", f"{ONE}Answer:": "The answer is B."}),
        ("QCM-A", "text", {f"{ZERO}Answer:": "a red one", f"{ONE}Answer:": "a green one"}),
        (
            "QCM-ALE",
            "letter",
            {
                f"{ZERO}Answer:": "The answer is A. BECAUSE: Look at it 0 times.",
                f"{ONE}Answer:": "The answer is B. BECAUSE: Colours, part 1. Look at it 1 times.",
            },
        ),
        (
            "QCML-EA",
            "text",
            {
                f"{ZERO}Answer:": "Look at it 0 times. The answer is a red one",
                f"{ONE}Lecture: Colours, part 1.\nAnswer:": "Look at it 1 times. The answer is a green one",
            },
        ),
    ],
)
def test_rows_are_in_the_format_asked_for(world, tmp_path, monkeypatch, tokenizer, form, answer_form, expected):
    argv = command(world, tmp_path, "--format", form, "--answer-form", answer_form, see=False)
    given = given_to_engine(monkeypatch, main, argv)
    found = dict(text_of(example, tokenizer) for example in given.train_examples)
    assert len(found) == 10
    assert {prompt: found[prompt].removeprefix(" ") for prompt in expected} == expected
    assert all(answer.startswith(" ") for answer in found.values()), "the separator of the template is learnt"


def test_splits_are_taken_as_they_are(world, tmp_path, monkeypatch):
    given = given_to_engine(monkeypatch, main, command(world, tmp_path))
    assert [row.where for row in given.train_examples] == [f"problems.json, pid {pid}" for pid in range(100, 110)]
    assert [row.where for row in given.validation_examples] == [f"problems.json, pid {pid}" for pid in range(110, 114)]


def test_half_of_the_training_rows_that_are_held_out_have_images(world, tmp_path, monkeypatch):
    """The val split stays untouched: to choose settings by it would make its score no score."""
    flags = ("--held-out", "4")
    given = given_to_engine(monkeypatch, main, command(world, tmp_path, *flags))
    sides = [{row.where for row in side} for side in (given.train_examples, given.validation_examples)]
    assert [len(side) for side in sides] == [6, 4]
    assert sides[0] | sides[1] == {f"problems.json, pid {pid}" for pid in range(100, 110)}
    assert sum(row.image is not None for row in given.validation_examples) == 2
    again, other = (
        given_to_engine(monkeypatch, main, command(world, tmp_path, *flags, "--seed", str(seed))) for seed in (0, 1)
    )
    assert {row.where for row in again.validation_examples} == sides[1]
    assert {row.where for row in other.validation_examples} != sides[1]


def test_every_question_meets_its_own_picture_and_one_without_takes_no_image_token(
    world, tmp_path, monkeypatch, tokenizer
):
    """An image token of zeros, or of the last picture, for text-only questions is another model than the paper's."""
    given = given_to_engine(monkeypatch, main, command(world, tmp_path))
    encoder = load_encoder(VisionConfig(given.config.vision, (), RUN["image_size"]))
    for split, side in (("train", given.train_examples), ("val", given.validation_examples)):
        for row in side:
            pid = row.where.removeprefix("problems.json, pid ")
            if (int(pid) - 100) % 2:
                assert row.image is None
                continue
            path = world / "scienceqa" / "images" / split / pid / "image.png"
            found = given.features(torch.tensor([row.image]), None)[0]
            torch.testing.assert_close(found, encoder.features_of([path])[0], rtol=2e-3, atol=1e-3)
    torch.nn.init.normal_(given.adapter.gate)
    given.adapter.requires_grad_(False)
    given.model.eval()
    text = [row for row in given.train_examples if row.image is None]
    photo = [row for row in given.train_examples if row.image is not None]
    alone = sum(float(given.loss_of([row], None, smoothing=False)) for row in text)
    together = float(given.loss_of([*text, *photo], None)) - float(given.loss_of(photo, None))
    given.features = None
    assert alone == pytest.approx(float(given.loss_of(text, None)), rel=1e-5)
    assert together == pytest.approx(alone, rel=1e-4)


def test_without_an_encoder_no_picture_is_looked_for(world, tmp_path, monkeypatch):
    data = shutil.copytree(world / "scienceqa", tmp_path / "data", ignore=shutil.ignore_patterns("images"))
    given = given_to_engine(monkeypatch, main, command(world, tmp_path / "out", data=data, see=False))
    assert {row.image for row in [*given.train_examples, *given.validation_examples]} == {None}
    assert given.features is None


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def data(world, tmp_path) -> Path:
    """A copy of the data to be damaged."""
    return shutil.copytree(world / "scienceqa", tmp_path / "data")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:60])])
def test_a_picture_that_cannot_be_read_is_named_once_and_may_be_skipped(
    world, data, tmp_path, capsys, monkeypatch, damage
):
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    damage(picture := data / "images" / "train" / "104" / "image.png")
    argv = command(world, tmp_path / "out", data=data)
    error = error_of(capsys, main, argv)
    assert error.startswith("error: 1 bad row: problems.json, pid 104: ")
    assert str(picture) in error
    assert not list((tmp_path / "cache").rglob("features-*"))
    given = given_to_engine(monkeypatch, main, [*argv, "--skip-bad-rows"])
    assert "left out 1 bad row: problems.json, pid 104: " in capsys.readouterr().err
    assert len(given.train_examples) == 9
    assert given.record["rows_left_out"] == 1


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in scienceqa_problem(3, "train").items() if key != name}


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (without("question"), "problems.json, pid 103: it has no question"),
        (without("choices"), "problems.json, pid 103: choices must be a list of 2 to 26 texts, got None"),
        (without("answer"), "problems.json, pid 103: answer must be an index from 0 to 2, got None"),
        ({**scienceqa_problem(3, "train"), "answer": 3}, "answer must be an index from 0 to 2, got 3"),
    ],
)
def test_an_incomplete_question_is_named_by_its_pid_and_may_be_skipped(
    world, data, tmp_path, capsys, monkeypatch, problem, message
):
    problems = json.loads((data / "problems.json").read_text())
    (data / "problems.json").write_text(json.dumps({**problems, "103": problem}))
    argv = command(world, tmp_path / "out", data=data)
    error = error_of(capsys, main, argv)
    assert error.startswith("error: 1 bad row: ")
    assert message in error
    assert not (tmp_path / "out").exists()
    given = given_to_engine(monkeypatch, main, [*argv, "--skip-bad-rows"])
    assert message in capsys.readouterr().err
    assert len(given.train_examples) == 9
    assert given.record["rows_left_out"] == 1


def test_a_pid_without_a_question_is_a_bad_row(world, data, tmp_path, capsys, monkeypatch):
    splits = json.loads((data / "pid_splits.json").read_text())
    splits["val"].append("999")
    (data / "pid_splits.json").write_text(json.dumps(splits))
    argv = command(world, tmp_path / "out", data=data)
    said = "1 bad row: problems.json, pid 999: it is in pid_splits.json, split val, and not here"
    assert said in error_of(capsys, main, argv)
    assert len(given_to_engine(monkeypatch, main, [*argv, "--skip-bad-rows"]).train_examples) == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no folder"),
        (lambda folder: (folder / "problems.json").unlink(), "no "),
        (lambda folder: (folder / "problems.json").write_text("{"), "problems.json is not JSON"),
        (lambda folder: (folder / "pid_splits.json").write_text('{"train": ["100"]}'), "has no split 'val'"),
    ],
)
def test_data_that_cannot_be_trained_on_is_an_error(world, data, tmp_path, capsys, make, message):
    make(data)
    error = error_of(capsys, main, command(world, tmp_path / "out", data=data))
    assert message in error
    assert str(data) in error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_a_few_steps_on_the_real_scienceqa(world, tmp_path, monkeypatch, tokenizer):
    """Six training questions with an image, six without, four of the val split, in the files of the data set."""
    source = Path(DATA) / "scienceqa"
    problems = json.loads((source / "problems.json").read_text(encoding="utf-8"))
    splits = json.loads((source / "pid_splits.json").read_text(encoding="utf-8"))
    seen = [[pid for pid in splits["train"] if bool(problems[pid]["image"]) == has][:6] for has in (True, False)]
    chosen = {"train": seen[0] + seen[1], "val": splits["val"][:4], "test": splits["test"]}
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "images").symlink_to(source / "images")
    (folder / "problems.json").symlink_to(source / "problems.json")
    (folder / "pid_splits.json").write_text(json.dumps(chosen))
    argv = command(world, tmp_path / "out", "--format", "QCM-AE", "--max-tokens", "300", data=folder)
    given = given_to_engine(monkeypatch, main, argv)
    assert sum(row.image is not None for row in given.train_examples) == 6
    answers = [text_of(row, tokenizer)[1] for row in given.train_examples if len(row.tokens) < 300]
    assert answers
    assert all(answer.startswith(" The answer is ") for answer in answers)
    assert main(argv) == 0
    about = read_about(tmp_path / "out" / "adapter.safetensors")
    assert (about.training["rows"], about.training["validation_rows"]) == (12, 4)
    state = load_file(tmp_path / "out" / "adapter.safetensors")
    assert "gate" in different(state, given.adapter.state_dict())
