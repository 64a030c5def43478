"""The caption training command: both annotation formats end to end, a real kill, and what it says about bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
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
    start,
    story,
    text_of,
    wait_for,
    write_coco,
    write_karpathy,
    write_world,
)

import mmadapter
from mmadapter.captions import read_captions
from mmadapter.checkpoint import read_about
from mmadapter.config import VisionConfig
from mmadapter.tokenizer import open_tokenizer
from mmadapter.vision import load_encoder
from training.coco_caption import caption_rows, caption_text, main, read_data

DATA = os.environ.get("MMADAPTER_DATA")
WRITERS = {"karpathy": write_karpathy, "coco": write_coco}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with models, `karpathy/`, `coco/` and a run file `tiny.toml` that uses them."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _cache(world, monkeypatch):
    monkeypatch.setenv("MMADAPTER_CACHE", str(world / "cache"))


def command(world: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(world / "tiny.toml"), "--data", str(data), "--out", str(out), *more]


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("kind", WRITERS)
def test_a_run_trains_an_adapter_that_captions(world, tmp_path, capsys, kind):
    """From annotations and pictures to a caption, through the real command."""
    out = tmp_path / "out"
    assert main(command(world, world / kind, out, "--beams", "2")) == 0
    file = out / "adapter.safetensors"
    assert sorted(path.name for path in out.iterdir()) == [
        *("adapter.safetensors", "best.pt", "checkpoint-000003.pt", "gates.png", "log.jsonl", "loss.png")
    ]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "gates.png"))
    assert f"adapter in {file}" in capsys.readouterr().out

    about = read_about(file)
    validations = [line["val_loss"] for line in log_of(out) if "val_loss" in line]
    assert about.task == "caption"
    assert (about.adapter.layers, about.adapter.prompt_length, about.adapter.gate) == (2, 3, "tanh")
    assert about.base == str(world / "llama")
    assert about.generation == {"beams": 2, "length_penalty": 1.0, "max_new_tokens": 30}
    assert about.training["licence"] == RUN["licence"]
    assert about.training["steps"] == 3
    assert about.scores == {"val_loss": round(validations[-1], 4)}

    session = mmadapter.load(llama=str(world / "llama"), adapter=file)
    first, second, *_ = sorted((world / kind).rglob("*.*g"))
    (caption,) = session.caption([first])
    assert isinstance(caption, str)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.equal(session.logits(tokens, first), session.logits(tokens, second)), (
        "the photo must reach the text"
    )


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A run folder of three steps on Karpathy's format."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMADAPTER_CACHE", str(world / "cache"))
        assert main(command(world, world / "karpathy", out)) == 0
    return out


def test_the_log_begins_with_the_resolved_settings_and_the_data(world, trained):
    first = log_of(trained)[0]
    assert first["event"] == "start"
    expected = {**RUN, "llama": str(world / "llama")}
    assert {key: first["config"][key] for key in expected} == expected
    assert first["config"]["beta2"] == 0.95  # a default that the run file leaves alone
    assert first["data"] == ["dataset_tiny.json"]
    assert [len(digest) for digest in first["data_hash"]] == [64]
    assert (first["rows"], first["validation_rows"], first["rows_left_out"]) == (40, 15, 0)
    assert "git_commit" in first


def test_the_shipped_weights_are_the_running_mean_with_the_statistics_of_the_plain_training_photos(world, trained):
    state = load_file(trained / "adapter.safetensors")
    checkpoint = torch.load(trained / "checkpoint-000003.pt", weights_only=True)
    for name, mean in checkpoint["mean"].items():
        assert torch.equal(state[name], mean)
    assert not torch.equal(state["prompt"], checkpoint["adapter"]["prompt"])

    about = read_about(trained / "adapter.safetensors")
    folder = world / "karpathy"
    train, _, _ = read_data(folder, 0)
    paths = [folder / "images" / image.file_name for image in train]
    features = load_encoder(about.vision).features_of(paths).half().float()
    torch.testing.assert_close(state["projection.feature_mean"], features.mean(0), rtol=1e-4, atol=1e-4)


def test_every_part_of_the_adapter_has_moved(world, trained, tmp_path):
    """A part that never trains, such as the projection of an unused image token, does not show in a loss that falls."""
    assert main(command(world, world / "karpathy", tmp_path, "--lr", "1e-30", "--gate-lr", "1e-30")) == 0
    before, after = load_file(tmp_path / "adapter.safetensors"), load_file(trained / "adapter.safetensors")
    unmoved = [name for name in after if torch.allclose(before[name], after[name], rtol=0, atol=1e-5)]
    assert unmoved == ["projection.feature_mean", "projection.feature_std", "projection.feature_whitening"]


def test_prompts_and_image_token_start_at_the_scale_of_the_run_file(world, tmp_path):
    still = ("--lr", "1e-30", "--gate-lr", "1e-30", "--prompt-std", "0.05")
    assert main(command(world, world / "karpathy", tmp_path, *still)) == 0
    state = load_file(tmp_path / "adapter.safetensors")
    assert state["prompt"].std().item() == pytest.approx(0.05, rel=0.2)
    assert state["projection.output_norm.weight"].tolist() == pytest.approx([0.05] * 32)
    assert read_about(tmp_path / "adapter.safetensors").adapter.prompt_std == 0.05


def test_a_finished_run_is_resumed_and_changes_nothing(world, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "again")
    assert main(command(world, world / "karpathy", out)) == 0
    before, after = load_file(trained / "adapter.safetensors"), load_file(out / "adapter.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    events = [(line["event"], line["step"]) for line in log_of(out) if "event" in line]
    assert events == [("start", 0), ("resume", 3)]
    assert story(out) == story(trained)


def test_a_run_killed_with_sigkill_ends_bit_identical_to_one_never_killed(world, tmp_path):
    """The real command in a process of its own, killed while it trains, and the same command again."""
    long = ("--steps", "100", "--save-every", "3", "--eval-every", "40")
    out, said = tmp_path / "killed", tmp_path / "said"
    process = start(["training.coco_caption", *command(world, world / "karpathy", out, *long)], said)
    wait_for(process, lambda: list(out.glob("checkpoint-*.pt")))
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, said.read_text()[-2000:]
    assert not (out / "adapter.safetensors").exists()
    step = max(int(path.stem.partition("-")[2]) for path in out.glob("checkpoint-*.pt"))
    assert 0 < step < 100

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed process had
    try:
        for folder in (out, tmp_path / "whole"):
            assert main(command(world, world / "karpathy", folder, *long)) == 0
    finally:
        torch.set_num_threads(threads)
    assert [line["step"] for line in log_of(out) if line.get("event") == "resume"] == [step]
    resumed, whole = (load_file(folder / "adapter.safetensors") for folder in (out, tmp_path / "whole"))
    assert not different(resumed, whole)
    assert story(out) == story(tmp_path / "whole")
    assert [path.name for path in sorted(out.iterdir())] == [
        path.name for path in sorted((tmp_path / "whole").iterdir())
    ]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_missing_picture_is_named_and_may_be_skipped(world, tmp_path, capsys, monkeypatch):
    data = write_karpathy(tmp_path / "data")
    (data / "images" / "4.png").unlink()
    argv = command(world, data, tmp_path / "out")
    error = error_of(capsys, main, argv)
    assert "error: 5 bad rows: dataset_tiny.json, 4.png, caption 1: picture 4.png is neither in " in error
    assert f"{data} nor in a folder in it" in error
    given = given_to_engine(monkeypatch, main, [*argv, "--skip-bad-rows"])
    assert len(given.train_examples) == 35
    assert not any("4.png" in row.where for row in given.train_examples)


@pytest.mark.parametrize("sentence", [{"raw": " . "}, {"raw": None}, {"tokens": ["a", "dog"]}, "a dog"])
def test_a_caption_that_is_none_is_named_and_may_be_skipped(world, tmp_path, capsys, monkeypatch, sentence):
    """A full stop is all that would be learnt of an empty one."""
    data = write_karpathy(tmp_path / "data")
    content = json.loads((data / "dataset_tiny.json").read_text())
    content["images"][2]["sentences"][3] = sentence
    (data / "dataset_tiny.json").write_text(json.dumps(content))
    argv = command(world, data, tmp_path / "out")
    error = error_of(capsys, main, argv)
    assert "error: 1 bad row: dataset_tiny.json, 2.png, caption 4: the caption is empty or no text; mend" in error
    assert len(given_to_engine(monkeypatch, main, [*argv, "--skip-bad-rows"]).train_examples) == 39


def test_a_caption_of_cocos_that_is_none_is_named_and_may_be_skipped(world, tmp_path, capsys, monkeypatch):
    data = write_coco(tmp_path / "data")
    path = data / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][7]["caption"] = None
    path.write_text(json.dumps(content))
    argv = command(world, data, tmp_path / "out")
    said = "1 bad row: captions_val2017.json, 000000000002.jpg, caption 3: the caption is empty or no text"
    assert said in error_of(capsys, main, argv)
    given = given_to_engine(monkeypatch, main, [*argv, "--skip-bad-rows"])
    assert len([*given.train_examples, *given.validation_examples]) == 59


def test_of_several_split_files_none_is_taken(world, tmp_path, capsys):
    """Karpathy's archive holds those of three data sets."""
    data = write_karpathy(tmp_path / "data")
    (data / "dataset_coco.json").write_text((data / "dataset_tiny.json").read_text())
    error = error_of(capsys, main, command(world, data, tmp_path / "out"))
    assert f"error: {data} has 2 split files (dataset_coco.json, dataset_tiny.json); leave one of them there" in error


@pytest.mark.parametrize(("split", "left"), [("train", 35), ("val", 40), ("test", None)])
def test_a_picture_without_captions_is_named_and_may_be_skipped(world, tmp_path, capsys, monkeypatch, split, left):
    """One of the test split is none of the training's business."""
    data = write_karpathy(tmp_path / "data")
    content = json.loads((data / "dataset_tiny.json").read_text())
    image = next(image for image in content["images"] if image["split"] == split)
    image["sentences"] = []
    (data / "dataset_tiny.json").write_text(json.dumps(content))
    argv = command(world, data, tmp_path / "out")
    if left is None:
        assert len(given_to_engine(monkeypatch, main, argv).train_examples) == 40
        return
    said = f"1 bad row: dataset_tiny.json, {image['filename']}: it has no captions"
    assert said in error_of(capsys, main, argv)
    assert len(given_to_engine(monkeypatch, main, [*argv, "--skip-bad-rows"]).train_examples) == left
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"no picture at all", None])
def test_a_corrupt_picture_is_named(world, tmp_path, capsys, monkeypatch, content):
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    data = write_karpathy(tmp_path / "data")
    picture = data / "images" / "4.png"
    picture.write_bytes(content or picture.read_bytes()[:60])
    error = error_of(capsys, main, command(world, data, tmp_path / "out"))
    assert str(picture) in error
    assert not list((tmp_path / "cache").rglob("features-*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no data folder"),
        (lambda folder: folder.write_text("a file"), "no data folder"),
        (lambda folder: folder.mkdir(), "neither a dataset_*.json nor annotations/captions_*.json"),
        (
            lambda folder: (write_karpathy(folder) / "dataset_tiny.json").write_text("{"),
            "dataset_tiny.json is not JSON",
        ),
        (lambda folder: write_karpathy(folder, val=0), "8 training and 0 validation images"),
        (lambda folder: write_karpathy(folder, train=1), "1 training and 3 validation images"),
        (lambda folder: write_coco(folder, 2), "1 training and 1 validation images"),
    ],
)
def test_data_that_cannot_be_trained_on_is_an_error(world, tmp_path, capsys, make, message):
    data = tmp_path / "data"
    make(data)
    error = error_of(capsys, main, command(world, data, tmp_path / "out"))
    assert message in error
    assert str(data) in error
    assert not (tmp_path / "out").exists()


def test_a_run_folder_of_other_settings_is_refused(world, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "again")
    error = error_of(capsys, main, command(world, world / "karpathy", out, "--lr", "0.5"))
    assert "was made with another lr; choose another --out" in error


def test_a_run_folder_of_other_data_is_refused(world, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "again")
    assert "was made with other data" in error_of(capsys, main, command(world, world / "coco", out))


# ----------------------------------------------------------------------------------------------------------- the pieces


@pytest.mark.parametrize(
    ("raw", "learnt"),
    [
        ("A dog runs .", "a dog runs."),
        ("A dog runs.", "a dog runs."),
        ("a dog runs", "a dog runs."),
        ("  A  Dog\truns \n", "a dog runs."),
        ("A dog runs . .", "a dog runs."),
        ("A dog runs...", "a dog runs."),
        ("A U.S. flag", "a u.s. flag."),
        ("ÉTÉ", "été."),
    ],
)
def test_a_reference_is_learnt_in_one_spelling(raw, learnt):
    assert caption_text(raw) == learnt


def test_each_reference_is_a_row_with_the_prompt_that_the_session_uses(world, tmp_path, monkeypatch):
    tokenizer = open_tokenizer(world / "llama")
    given = given_to_engine(monkeypatch, main, command(world, world / "karpathy", tmp_path))
    images = read_captions(world / "karpathy" / "dataset_tiny.json", "val")
    captions = [caption for image in images for caption in image.captions]
    assert [text_of(row, tokenizer) for row in given.validation_examples] == [
        ("Generate caption for this image:", f" {caption_text(caption)}") for caption in captions
    ]
    assert given.validation_examples[0].where == "dataset_tiny.json, 8.png, caption 1"


def test_rows_are_no_longer_than_asked_for(world, tmp_path, monkeypatch):
    """The setting has to reach the rows: max_tokens of a run file was read and not used."""
    argv = command(world, world / "karpathy", tmp_path)
    lengths = [
        max(len(row.tokens) for row in given_to_engine(monkeypatch, main, [*argv, *flags]).train_examples)
        for flags in ((), ("--max-tokens", "11"))
    ]
    assert lengths[0] > lengths[1] == 11


def test_every_row_meets_its_own_picture(world, tmp_path, monkeypatch):
    """Validation rows come behind the training rows in one table; one picture off, and the loss only falls slower."""
    given = given_to_engine(monkeypatch, main, command(world, world / "karpathy", tmp_path))
    train, validation, _ = read_data(world / "karpathy", 0)
    encoder = load_encoder(VisionConfig(given.config.vision, (), 32))
    tokenizer = open_tokenizer(world / "llama")
    for rows, images in ((given.train_examples, train), (given.validation_examples, validation)):
        paths = [world / "karpathy" / "images" / image.file_name for image in images]
        features = encoder.features_of(paths).half().float()
        expected = [(image, row) for image, row in zip(images, features, strict=True) for _ in image.captions]
        assert len(rows) == len(expected)
        for row, (image, feature) in zip(rows, expected, strict=True):
            found = given.features(torch.tensor([row.image]), None)[0]
            torch.testing.assert_close(found, feature, rtol=2e-3, atol=1e-3)
            assert text_of(row, tokenizer)[1].strip() in [caption_text(caption) for caption in image.captions]


def test_karpathys_splits_are_taken_as_they_are(world):
    train, validation, path = read_data(world / "karpathy", 0)
    assert [image.split for image in train] == ["train"] * 7 + ["restval"]
    assert [image.split for image in validation] == ["val"] * 3
    assert path.name == "dataset_tiny.json"


def test_of_cocos_images_a_tenth_is_held_out_by_seed(tmp_path):
    folder = write_coco(tmp_path / "data", 40)
    split = [read_data(folder, seed) for seed in (0, 0, 1)]
    names = [[[image.file_name for image in part] for part in (train, held)] for train, held, _ in split]
    assert [len(part) for part in names[0]] == [36, 4]
    assert len({*names[0][0], *names[0][1]}) == 40
    assert names[0] == names[1]
    assert set(names[0][1]) != set(names[2][1])


@pytest.mark.parametrize(("held_out", "images"), [(1, 1), (5, 1), (6, 2), (100, 20)])
def test_as_many_captions_of_coco_are_held_out_as_the_run_file_asks_for(tmp_path, held_out, images):
    """The setting was read and not used."""
    train, validation, _ = read_data(write_coco(tmp_path / "data", 40), 0, held_out)
    assert (len(train), len(validation)) == (40 - images, images)


def test_of_cocos_files_the_training_set_is_taken(tmp_path):
    folder = write_coco(tmp_path / "data")
    source = folder / "annotations" / "captions_val2017.json"
    shutil.copy(source, folder / "annotations" / "captions_train2017.json")
    assert read_data(folder, 0)[2].name == "captions_train2017.json"


@pytest.mark.parametrize("place", ["", "images", "photos"])
def test_pictures_are_found_beside_the_annotations_and_one_folder_down(tmp_path, world, place):
    images = read_captions(world / "karpathy" / "dataset_tiny.json", "val")
    (tmp_path / place).mkdir(exist_ok=True)
    for image in images:
        (tmp_path / place / image.file_name).touch()
    rows, bad = caption_rows(tmp_path, images, "plain", "file.json")
    assert [row.image for row in rows] == [tmp_path / place / image.file_name for image in images for _ in range(5)]
    assert bad == []


def test_pictures_of_karpathys_coco_file_are_found_below_its_filepath(tmp_path, world):
    """His file for COCO names train2014 and val2014 beside each file name."""
    images = read_captions(world / "karpathy" / "dataset_tiny.json", "val")[:1]
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / images[0].file_name).touch()
    named = [dataclasses.replace(images[0], file_name=f"val2014/{images[0].file_name}")]
    rows, bad = caption_rows(tmp_path, named, "plain", "file.json")
    assert {row.image for row in rows} == {tmp_path / "val2014" / images[0].file_name}
    assert bad == []


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_flickr8k_is_read_whole():
    folder = Path(DATA) / "flickr8k"
    train, validation, _ = read_data(folder, 0)
    assert (len(train), len(validation)) == (6000, 1000)
    assert {len(image.captions) for image in train + validation} == {5}
    rows, bad = caption_rows(folder, train + validation, "plain", "dataset_flickr8k.json")
    assert (len(rows), len({row.image for row in rows}), bad) == (35_000, 7000, [])
    assert {row.image.parent.name for row in rows} == {"images"}


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_the_coco_sample_is_read_and_a_few_of_its_photos_are_trained_on(world, tmp_path):
    source = Path(DATA) / "coco"
    train, validation, _ = read_data(source, 0)
    assert (len(train), len(validation)) == (268, 29)
    rows, bad = caption_rows(source, train + validation, "plain", "captions_sample.json")
    assert {row.image.parent.name for row in rows} == {"val2017"}
    assert bad == []

    content = json.loads((source / "annotations" / "captions_sample.json").read_text())
    images = content["images"][:12]
    chosen = {image["id"] for image in images}
    folder = tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").symlink_to(source / "val2017")
    annotations = [row for row in content["annotations"] if row["image_id"] in chosen]
    (folder / "annotations" / "captions_sample.json").write_text(
        json.dumps({**content, "images": images, "annotations": annotations})
    )
    assert main(command(world, folder, tmp_path / "out")) == 0
    assert read_about(tmp_path / "out" / "adapter.safetensors").training["rows"] == 55  # 11 photos of five captions
