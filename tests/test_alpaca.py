"""The instruction training command: Alpaca's JSON and its two templates, questions about pictures, bad rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_engine import different
from tiny_training import (
    RUN,
    alpaca_rows,
    error_of,
    given_to_engine,
    log_of,
    text_of,
    write_alpaca,
    write_pictures,
    write_world,
)

import mmadapter
from mmadapter.checkpoint import read_about
from mmadapter.data import IGNORE_INDEX, collate
from mmadapter.rows import held_aside
from mmadapter.tokenizer import open_tokenizer
from training.alpaca import main

DATA = os.environ.get("MMADAPTER_DATA")

# As Stanford Alpaca has them, written out, so that a change of one letter in the library is seen.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"), template="alpaca")
    write_alpaca(folder / "alpaca")
    return folder


@pytest.fixture(autouse=True)
def _cache(world, monkeypatch):
    monkeypatch.setenv("MMADAPTER_CACHE", str(world / "cache"))


@pytest.fixture
def tokenizer(world):
    return open_tokenizer(world / "llama")


def command(world: Path, out: Path, *more: str, data: Path | None = None, see: bool = False) -> list[str]:
    run_file = world / ("tiny.toml" if see else "text.toml")
    data = data or world / "alpaca" / "alpaca_data.json"
    return ["--config", str(run_file), "--data", str(data), "--out", str(out), *more]


def written(folder: Path, rows: list[dict], name: str = "rows.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(rows, indent=1))
    return path


QUESTIONS = [
    {"question": f"What is on picture {number}?", "answer": f"thing_{number}", "image": f"{number % 6}.png"}
    for number in range(12)
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Questions about six pictures, two about each, in a file beside `images/`."""
    folder = tmp_path_factory.mktemp("questions")
    write_pictures(folder / "images", [f"{number}.png" for number in range(6)])
    return written(folder, QUESTIONS)


# ----------------------------------------------------------------------------------------------------------- end to end


def test_a_run_trains_an_adapter_that_follows_instructions(world, tmp_path, capsys):
    """From the official JSON to an answer, through the real command."""
    out = tmp_path / "out"
    assert main(command(world, out)) == 0
    file = out / "adapter.safetensors"
    assert sorted(path.name for path in out.iterdir()) == [
        *("adapter.safetensors", "best.pt", "checkpoint-000003.pt", "gates.png", "log.jsonl", "loss.png")
    ]
    assert f"adapter in {file}" in capsys.readouterr().out
    about = read_about(file)
    assert (about.task, about.template, about.vision, about.projection_width) == ("instruct", "alpaca", None, 0)
    assert about.training["data"] == "alpaca_data"
    assert about.training["licence"] == RUN["licence"]
    assert (about.training["rows"], about.training["validation_rows"], about.training["rows_left_out"]) == (11, 1, 0)
    assert about.scores == {"val_loss": round(log_of(out)[-1]["val_loss"], 4)}

    session = mmadapter.load(llama=str(world / "llama"), adapter=file)
    assert isinstance(session.chat("Say what a dog does.", max_new_tokens=4), str)
    base = mmadapter.load(llama=str(world / "llama"))
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.equal(session.logits(tokens), base.logits(tokens))


def test_a_run_on_questions_about_pictures_trains_an_adapter_that_sees(world, questions, tmp_path):
    """The user's own rows; some have no picture and take no image token."""
    rows = [*QUESTIONS, {"instruction": "Say no.", "output": "No."}, {"question": "Yes?", "answer": "yes", "image": ""}]
    data = written(tmp_path / "data", rows)
    out = tmp_path / "out"
    assert main(command(world, out, "--images", str(questions.parent / "images"), data=data, see=True)) == 0
    about = read_about(out / "adapter.safetensors")
    assert about.task == "answer"
    assert about.vision.encoder.startswith("timm:test_resnet")
    assert about.generation == {"max_new_tokens": 30, "stop": ["\n"]}
    session = mmadapter.load(llama=str(world / "llama"), adapter=out / "adapter.safetensors")
    first, second = (questions.parent / "images" / f"{number}.png" for number in (0, 1))
    assert isinstance(session.answer(first, "What is it?"), str)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.equal(session.logits(tokens, first), session.logits(tokens, second))


# ----------------------------------------------------------------------------------------------------- what is learnt


def test_rows_are_in_the_two_official_templates_and_the_response_alone_is_learnt(
    world, tmp_path, monkeypatch, tokenizer
):
    given = given_to_engine(monkeypatch, main, command(world, tmp_path))
    examples = [*given.train_examples, *given.validation_examples]
    expected = {(WITH_INPUT if row["input"] else WITHOUT_INPUT).format(**row): row["output"] for row in alpaca_rows()}
    assert dict(text_of(example, tokenizer) for example in examples) == expected
    assert len(examples) == 12
    for example in examples:
        labels = collate([example]).labels[0]
        learnt = tokenizer.encode(text_of(example, tokenizer)[1], bos=False)
        assert labels.tolist() == [IGNORE_INDEX] * example.prompt_tokens + [*learnt, tokenizer.eos_id]


@pytest.mark.parametrize("max_tokens", [2, 12, 60])
def test_a_row_that_is_too_long_keeps_something_to_learn(world, tmp_path, monkeypatch, tokenizer, max_tokens):
    """Cut on the right, a long prompt leaves no response at all: its loss is 0 / 0."""
    given = given_to_engine(monkeypatch, main, command(world, tmp_path, "--max-tokens", str(max_tokens)))
    outputs = [row["output"] for row in alpaca_rows()]
    for example in given.train_examples:
        assert len(example.tokens) == max_tokens
        answer = example.tokens[example.prompt_tokens :]
        if max_tokens == 60:
            assert text_of(example, tokenizer)[1] in outputs, "what fits is learnt whole"
            assert text_of(example, tokenizer)[0].endswith("\n\n### Response:")
        else:
            assert any(output.startswith(tokenizer.decode(answer).rstrip("�")) for output in outputs)
            assert example.prompt_tokens == 0
    loss = given.loss_of(given.train_examples[:4], None)
    assert loss.isfinite()
    assert loss > 0


def test_the_settings_of_the_official_code_reach_the_optimizer(world, tmp_path, monkeypatch):
    flags = ("--lr", "9e-3", "--gate-lr", "9e-3", "--scale-lr", "--decay", "all", "--weight-decay", "0.02")
    given = given_to_engine(monkeypatch, main, command(world, tmp_path, *flags, "--batch-size", "64"))
    (group,) = given.optimizer.param_groups
    assert (group["peak"], group["weight_decay"], group["betas"]) == (2.25e-3, 0.02, (0.9, 0.95))
    plain = given_to_engine(monkeypatch, main, command(world, tmp_path))
    assert {group["weight_decay"] for group in plain.optimizer.param_groups} == {0.0}


def test_some_rows_are_kept_aside_by_the_seed(world, tmp_path, monkeypatch):
    def kept(*flags: str) -> list[str]:
        given = given_to_engine(monkeypatch, main, command(world, tmp_path, *flags))
        validation = [row.where for row in given.validation_examples]
        train = [row.where for row in given.train_examples]
        assert len({*train, *validation}) == len(train) + len(validation) == 12
        return validation

    assert len(kept()) == 1
    four = kept("--held-out", "4")
    assert len(four) == 4
    assert kept("--held-out", "4") == four
    assert kept("--held-out", "4", "--seed", "1") != four
    assert all(where.split("alpaca_data.json, row ")[1] for where in four)


def test_questions_about_one_picture_stay_on_one_side(world, questions, tmp_path, monkeypatch):
    """Else the model is validated on pictures it has learnt by heart."""
    given = given_to_engine(monkeypatch, main, command(world, tmp_path, "--held-out", "3", data=questions, see=True))
    sides = [{row.image for row in side} for side in (given.train_examples, given.validation_examples)]
    assert sides[0].isdisjoint(sides[1])
    assert (len(given.train_examples), len(given.validation_examples)) == (8, 4)


def test_every_row_meets_its_own_picture(world, questions, tmp_path, monkeypatch, tokenizer):
    given = given_to_engine(monkeypatch, main, command(world, tmp_path, "--held-out", "3", data=questions, see=True))
    encoder = mmadapter.vision.load_encoder(mmadapter.config.VisionConfig(given.config.vision, (), RUN["image_size"]))
    features = encoder.features_of([questions.parent / "images" / f"{number}.png" for number in range(6)])
    for row in [*given.train_examples, *given.validation_examples]:
        prompt, answer = text_of(row, tokenizer)
        number = int(answer.removeprefix("thing "))
        assert f"What is on picture {number}?" in prompt
        found = given.features(torch.tensor([row.image]), None)[0]
        torch.testing.assert_close(found, features[number % 6], rtol=2e-3, atol=1e-3)


def test_only_rows_of_the_training_split_are_taken(world, tmp_path, monkeypatch):
    rows = [{**row, "split": "test" if number < 4 else "train"} for number, row in enumerate(alpaca_rows())]
    data = written(tmp_path / "data", rows)
    given = given_to_engine(monkeypatch, main, command(world, tmp_path, data=data))
    assert len(given.train_examples) + len(given.validation_examples) == 8


def test_one_row_in_twenty_is_kept_aside_and_never_more_than_500():
    from mmadapter.rows import Row

    for count, expected in ((3, 1), (100, 5), (20_000, 500)):
        train, validation = held_aside([Row("", "x", None, str(index)) for index in range(count)], 0, 0)
        assert (len(train), len(validation)) == (count - expected, expected)


# ------------------------------------------------------------------------------------------------------------- bad rows


BAD = [*alpaca_rows(8), {"instruction": "Say nothing.", "input": "", "output": "  "}, {"output": "no instruction"}]


def test_bad_rows_are_named_by_file_and_line_before_anything_is_loaded(world, tmp_path, capsys):
    data = written(tmp_path / "data", BAD)
    error = error_of(capsys, main, command(world, tmp_path / "out", "--llama", "absent", data=data))
    assert f"2 bad rows: {data}, row 9 (line 42): output is empty; {data}, row 10 (line 47): has neither" in error
    assert error.endswith("mend them, or go on without them with --skip-bad-rows")
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_without_bad_rows_where_it_is_asked_to(world, tmp_path, capsys):
    data = written(tmp_path / "data", BAD)
    assert main(command(world, tmp_path / "out", "--skip-bad-rows", data=data)) == 0
    assert f"left out 2 bad rows: {data}, row 9 (line 42): output is empty" in capsys.readouterr().err
    training = read_about(tmp_path / "out" / "adapter.safetensors").training
    assert (training["rows"] + training["validation_rows"], training["rows_left_out"]) == (8, 2)


def test_a_bad_row_is_told_from_the_one_at_its_place_in_a_file_of_the_same_name(world, tmp_path, capsys, monkeypatch):
    """Two people's rows.json: a good row must not be left out in place of the other's bad one."""
    paths = [written(tmp_path / "one", BAD[::-1]), written(tmp_path / "two", alpaca_rows(8))]
    argv = command(world, tmp_path / "out", str(paths[1]), "--skip-bad-rows", data=paths[0])
    argv = ["--data", *map(str, paths), *(part for part in argv if part not in ("--data", *map(str, paths)))]
    given = given_to_engine(monkeypatch, main, argv)
    assert len(given.train_examples) + len(given.validation_examples) == 16
    assert f"left out 2 bad rows: {paths[0]}, row 1 " in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"no picture at all", None])
def test_a_picture_that_cannot_be_read_makes_its_rows_bad(world, questions, tmp_path, capsys, monkeypatch, content):
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    write_pictures(tmp_path / "images", [f"{number}.png" for number in range(6)])
    picture = tmp_path / "images" / "4.png"
    picture.write_bytes(content or picture.read_bytes()[:60])
    data = written(tmp_path, QUESTIONS)
    argv = command(world, tmp_path / "out", data=data, see=True)
    error = error_of(capsys, main, argv)
    assert "2 bad rows: " in error
    assert all(f"{data}, row {number} (line " in error for number in (5, 11))
    assert str(picture) in error
    assert not list((tmp_path / "cache").rglob("features-*"))
    assert main([*argv, "--skip-bad-rows"]) == 0
    assert read_about(tmp_path / "out" / "adapter.safetensors").training["rows_left_out"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (QUESTIONS[:1] + alpaca_rows(6), "an image encoder takes two or more pictures to train on, got"),
        (alpaca_rows(6), "got 0; give more, or leave the encoder out: --vision ''"),
        (QUESTIONS[:1] + QUESTIONS[6:7], "there are 0 rows to train on and 2 to validate on"),
    ],
)
def test_too_few_rows_or_pictures_are_an_error_before_any_feature_is_computed(
    world, questions, tmp_path, capsys, monkeypatch, rows, message
):
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    data = written(tmp_path / "data", rows)
    images = ("--images", str(questions.parent / "images"))
    assert message in error_of(capsys, main, command(world, tmp_path / "out", *images, data=data, see=True))
    assert not list(tmp_path.rglob("features-*"))
    assert not (tmp_path / "out").exists()


def test_a_run_folder_of_other_rows_is_refused(world, tmp_path, capsys):
    rows = alpaca_rows(8)
    data = written(tmp_path / "data", rows)
    assert main(command(world, tmp_path / "out", data=data)) == 0
    rows[3]["output"] = "Something else."
    written(tmp_path / "data", rows)
    error = error_of(capsys, main, command(world, tmp_path / "out", data=data))
    assert "checkpoint-000003.pt was made with other data; choose another --out" in error


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_a_few_steps_on_the_real_alpaca(world, tmp_path, capsys, monkeypatch, tokenizer):
    """Rows 1440 to 1480 of the third of Alpaca that is there; one of them has an empty output."""
    rows = json.loads((Path(DATA) / "alpaca" / "alpaca_17k.json").read_text(encoding="utf-8"))[1440:1480]
    data = written(tmp_path, rows, "alpaca_17k.json")
    argv = command(world, tmp_path / "out", "--max-tokens", "200", data=data)
    assert "1 bad row: " in (error := error_of(capsys, main, argv))
    assert "alpaca_17k.json, row 22 (line 107): output is empty" in error
    given = given_to_engine(monkeypatch, main, [*argv, "--skip-bad-rows"])
    shown = dict(text_of(example, tokenizer) for example in given.train_examples if len(example.tokens) < 200)
    outputs = {row["output"].strip() for row in rows}
    assert shown
    assert set(shown.values()) <= outputs
    assert main([*argv, "--skip-bad-rows"]) == 0
    about = read_about(tmp_path / "out" / "adapter.safetensors")
    assert about.training["rows"] + about.training["validation_rows"] == 39
    assert different(load_file(tmp_path / "out" / "adapter.safetensors"), given.adapter.state_dict())
