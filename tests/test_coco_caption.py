"""The caption training command: both annotation formats end to end, a real kill, and what it says about bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import RUN, encoder_spec, write_coco, write_karpathy, write_llama, write_run_file

import mmadapter
from mmadapter.captions import read_captions
from mmadapter.checkpoint import read_about
from mmadapter.config import VisionConfig
from mmadapter.tokenizer import open_tokenizer
from mmadapter.vision import load_encoder
from training import coco_caption
from training.cider import words
from training.coco_caption import caption_examples, caption_text, feature_source, main, picture_paths, read_data
from training.engine import Trainer

ROOT = Path(__file__).resolve().parents[1]
DATA = os.environ.get("MMADAPTER_DATA")
WRITERS = {"karpathy": write_karpathy, "coco": write_coco}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with `llama/`, an encoder, `karpathy/`, `coco/` and a run file `tiny.toml` that uses them."""
    folder = tmp_path_factory.mktemp("world")
    write_llama(folder / "llama")
    for name, write in WRITERS.items():
        write(folder / name)
    write_run_file(folder / "tiny.toml", llama=str(folder / "llama"), vision=encoder_spec(folder))
    return folder


@pytest.fixture(autouse=True)
def _cache(world, monkeypatch):
    monkeypatch.setenv("MMADAPTER_CACHE", str(world / "cache"))


def command(world: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(world / "tiny.toml"), "--data", str(data), "--out", str(out), *more]


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def error_of(capsys, argv: list[str]) -> str:
    """The error of a command that fails: one line, the last, with no traceback."""
    assert main(argv) == 1
    shown = capsys.readouterr().err.replace("\r", "\n")
    *before, last = [line for line in shown.splitlines() if line.strip()]
    assert last.startswith("error: ")
    assert not any("error" in line or "Traceback" in line for line in before)
    return last


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("kind", WRITERS)
def test_a_run_trains_an_adapter_that_captions(world, tmp_path, capsys, kind):
    """From annotations and pictures to a caption, through the real command."""
    out = tmp_path / "out"
    assert main(command(world, world / kind, out, "--beams", "2")) == 0
    file = out / "adapter.safetensors"
    assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "checkpoint.pt", "log.jsonl"]
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
    assert first["data"] == "dataset_tiny.json"
    assert len(first["data_hash"]) == 64
    assert "git_commit" in first


def test_the_shipped_weights_are_the_running_mean_with_the_statistics_of_the_plain_training_photos(world, trained):
    state = load_file(trained / "adapter.safetensors")
    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    for name, mean in checkpoint["mean"].items():
        assert torch.equal(state[name], mean)
    assert not torch.equal(state["prompt"], checkpoint["adapter"]["prompt"])

    about = read_about(trained / "adapter.safetensors")
    folder = world / "karpathy"
    train, _, _ = read_data(folder, 0)
    features = load_encoder(about.vision).features_of(picture_paths(folder, train)).half().float()
    torch.testing.assert_close(state["projection.feature_mean"], features.mean(0), rtol=1e-4, atol=1e-4)


def test_every_part_of_the_adapter_has_moved(world, trained, tmp_path):
    """A part that never trains, such as the projection of an unused image token, does not show in a loss that falls."""
    assert main(command(world, world / "karpathy", tmp_path, "--lr", "1e-30", "--gate-lr", "1e-30")) == 0
    before, after = load_file(tmp_path / "adapter.safetensors"), load_file(trained / "adapter.safetensors")
    unmoved = [name for name in after if torch.allclose(before[name], after[name], rtol=0, atol=1e-5)]
    assert unmoved == ["projection.feature_mean", "projection.feature_std"]


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
    assert [line["step"] for line in log_of(out) if line.get("event") == "start"] == [0, 3]


def test_self_critical_training_goes_on_from_an_adapter(world, trained, tmp_path):
    argv = ("--objective", "cider", "--init", str(trained / "adapter.safetensors"), "--samples", "3", "--steps", "2")
    assert main(command(world, world / "karpathy", tmp_path, *argv)) == 0
    line = next(line for line in log_of(tmp_path) if "loss" in line)
    assert line["reward"] >= 0
    start, end = load_file(trained / "adapter.safetensors"), load_file(tmp_path / "adapter.safetensors")
    assert not torch.equal(start["prompt"], end["prompt"])
    assert torch.equal(start["projection.feature_mean"], end["projection.feature_mean"])
    # It starts where the other ended: its first validation is the other's last.
    validations = [line["val_loss"] for line in log_of(tmp_path) if "val_loss" in line]
    assert validations[0] == pytest.approx([line["val_loss"] for line in log_of(trained) if "val_loss" in line][-1])


def test_a_run_killed_with_sigkill_ends_bit_identical_to_one_never_killed(world, tmp_path):
    """The real command in a process of its own, killed while it trains, and the same command again."""
    long = ("--steps", "300", "--save-every", "3", "--eval-every", "90")
    out = tmp_path / "killed"
    said = tmp_path / "said"
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "training.coco_caption", *command(world, world / "karpathy", out, *long)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=file,
        )
        while not (out / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, said.read_text()[-2000:]
    assert not (out / "adapter.safetensors").exists()
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 300

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed process had
    try:
        assert main(command(world, world / "karpathy", out, *long)) == 0
        assert main(command(world, world / "karpathy", tmp_path / "whole", *long)) == 0
    finally:
        torch.set_num_threads(threads)
    assert [line["step"] for line in log_of(out) if line.get("event") == "start"] == [0, step]
    resumed, whole = (load_file(folder / "adapter.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not list(out.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_missing_picture_is_named(world, tmp_path, capsys):
    data = write_karpathy(tmp_path / "data")
    (data / "images" / "4.png").unlink()
    error = error_of(capsys, command(world, data, tmp_path / "out"))
    assert f"picture 4.png is neither in {data} nor in a folder in it" in error


@pytest.mark.parametrize("content", [b"no picture at all", None])
def test_a_corrupt_picture_is_named(world, tmp_path, capsys, monkeypatch, content):
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    data = write_karpathy(tmp_path / "data")
    picture = data / "images" / "4.png"
    picture.write_bytes(content or picture.read_bytes()[:60])
    error = error_of(capsys, command(world, data, tmp_path / "out"))
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
    error = error_of(capsys, command(world, data, tmp_path / "out"))
    assert message in error
    assert str(data) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--llama", "absent"], "no LLaMA named 'absent'"),
        (["--vision", "timm:test_resnet@absent.pt"], "absent.pt not found"),
        (["--vision", "imaginary"], "unknown image encoder 'imaginary'"),
        (["--scales", "9"], "got scale '9'"),
        (["--init", "absent"], "no adapter 'absent'"),
        (["--layers", "4"], "layers is 4, but"),
        (["--gate", "sigmoid"], "gate must be one of"),
        (["--template", "absent"], "no prompt template 'absent'"),
        (["--lr", "-1"], "lr must not be negative"),
        (["--objective", "cider", "--samples", "1"], "samples must be at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_feature_is_computed(
    world, tmp_path, capsys, monkeypatch, flags, message
):
    """The features of a large data set take hours; a slip in the run file must not cost them."""
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    error = error_of(capsys, command(world, world / "karpathy", tmp_path / "out", *flags))
    assert message in error
    assert not list(tmp_path.rglob("features-*"))
    assert not (tmp_path / "out").exists()


def test_a_run_folder_of_other_settings_is_refused(world, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "again")
    error = error_of(capsys, command(world, world / "karpathy", out, "--lr", "0.5"))
    assert "was made with another lr; choose another --out" in error


def test_a_run_folder_of_other_data_is_refused(world, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "again")
    assert "was made with other data" in error_of(capsys, command(world, world / "coco", out))


def test_a_run_that_breaks_says_at_which_step(world, tmp_path, capsys, monkeypatch):
    likelihood = Trainer._likelihood

    def breaks(self, *arguments):
        loss, figures = likelihood(self, *arguments)
        return (loss * math.nan if self.step == 2 else loss), figures

    monkeypatch.setattr(Trainer, "_likelihood", breaks)
    error = error_of(capsys, command(world, world / "karpathy", tmp_path))
    assert f"the loss is nan at step 2; the last good checkpoint is in {tmp_path}" in error
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_missing_run_file_is_named(world, tmp_path, capsys):
    argv = ["--config", str(tmp_path / "absent.toml"), "--data", str(world / "karpathy")]
    assert f"no run file {tmp_path / 'absent.toml'}" in error_of(capsys, argv)


def test_misuse_is_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exited:
        main([])
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "--config" in error
    assert error.count("\n") == 1


def test_help_opens_with_an_example_whose_run_file_is_there(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    heading, example, *_ = capsys.readouterr().out.splitlines()
    parts = example.split()
    assert heading == "Example:"
    assert parts[:3] == ["python", "-m", "training.coco_caption"]
    assert (ROOT / parts[parts.index("--config") + 1]).is_file()


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


def test_each_reference_is_a_row_with_the_prompt_that_the_session_uses(world):
    tokenizer = open_tokenizer(world / "llama")
    images = read_captions(world / "karpathy" / "dataset_tiny.json", "val")
    rows = caption_examples(images, tokenizer, "plain", first_image=8)
    assert [row.image for row in rows] == [index for index in (8, 9, 10) for _ in range(5)]
    for row, raw in zip(rows, [text for image in images for text in image.captions], strict=True):
        prompt, answer = row.tokens[: row.prompt_tokens], row.tokens[row.prompt_tokens :]
        assert tokenizer.decode(prompt) == "Generate caption for this image:"
        assert answer[-1] == tokenizer.eos_id
        assert tokenizer.decode(answer[:-1]) == f" {caption_text(raw)}"


def test_rows_are_no_longer_than_asked_for(world):
    """The setting has to reach the rows: max_tokens of a run file was read and not used."""
    tokenizer = open_tokenizer(world / "llama")
    images = read_captions(world / "karpathy" / "dataset_tiny.json", "val")
    assert max(len(row.tokens) for row in caption_examples(images, tokenizer, "plain")) > 12
    assert max(len(row.tokens) for row in caption_examples(images, tokenizer, "plain", max_tokens=12)) == 12


@pytest.fixture
def trainer_of(world, tmp_path, monkeypatch):
    """What the command would train: the arguments that the engine gets."""

    class Stop(BaseException):
        pass

    def given(*flags: str, kind: str = "karpathy") -> dict:
        taken = {}

        def trainer(model, config, folder, **rest) -> None:
            taken.update(rest, model=model, config=config)
            raise Stop

        monkeypatch.setattr(coco_caption, "Trainer", trainer)
        with pytest.raises(Stop):
            main(command(world, world / kind, tmp_path, *flags))
        return taken

    return given


def test_the_longest_row_is_that_of_the_run_file(trainer_of):
    assert max(len(row.tokens) for row in trainer_of("--max-tokens", "11")["train"]) == 11


def test_every_row_meets_its_own_picture(world, trainer_of):
    """Validation rows come behind the training rows in one table; one picture off, and the loss only falls slower."""
    given = trainer_of()
    train, validation, _ = read_data(world / "karpathy", 0)
    encoder = load_encoder(VisionConfig(given["config"].vision, (), 32))
    tokenizer = open_tokenizer(world / "llama")
    for part, images in (("train", train), ("validation", validation)):
        features = encoder.features_of(picture_paths(world / "karpathy", images)).half().float()
        expected = [(image, row) for image, row in zip(images, features, strict=True) for _ in image.captions]
        assert len(given[part]) == len(expected)
        for row, (image, feature) in zip(given[part], expected, strict=True):
            torch.testing.assert_close(
                given["features"](torch.tensor([row.image]), None)[0], feature, rtol=2e-3, atol=1e-3
            )
            text = tokenizer.decode(row.tokens[row.prompt_tokens : -1])
            assert text.strip() in [caption_text(caption) for caption in image.captions]


def test_a_start_from_an_adapter_keeps_the_statistics_it_was_trained_with(trained, trainer_of):
    """Other data have other means; the projection was trained on features standardised by the first."""
    before = load_file(trained / "adapter.safetensors")["projection.feature_mean"]
    fresh = trainer_of(kind="coco")["model"].adapter.projection.feature_mean
    resumed = trainer_of("--init", str(trained / "adapter.safetensors"), kind="coco")["model"].adapter.projection
    assert not torch.allclose(before, fresh, rtol=1e-2)
    assert torch.equal(resumed.feature_mean, before)


def test_the_reward_of_an_image_is_by_its_own_references(world, trainer_of):
    given = trainer_of("--objective", "cider")
    assert [row.image for row in given["train"]] == list(range(8)), "one row an image"
    train, _, _ = read_data(world / "karpathy", 0)
    reward = given["objective"].reward
    for row in given["train"]:
        own = caption_text(train[row.image].captions[0])
        assert reward.references[row.image] == [words(caption_text(caption)) for caption in train[row.image].captions]
        assert reward.score(row.image, own) > 0


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


def test_of_cocos_files_the_training_set_is_taken(tmp_path):
    folder = write_coco(tmp_path / "data")
    source = folder / "annotations" / "captions_val2017.json"
    shutil.copy(source, folder / "annotations" / "captions_train2017.json")
    assert read_data(folder, 0)[2].name == "captions_train2017.json"


def test_pictures_are_found_beside_the_annotations_and_one_folder_down(tmp_path, world):
    images = read_captions(world / "karpathy" / "dataset_tiny.json", "val")
    for place in ("", "images", "photos"):
        folder = tmp_path / f"data-{place}"
        (folder / place).mkdir(parents=True)
        for image in images:
            (folder / place / image.file_name).touch()
        assert picture_paths(folder, images) == [folder / place / image.file_name for image in images]


def test_training_sees_random_views_and_validation_the_photo_itself():
    views, images = 3, 4
    table = torch.arange(views * images, dtype=torch.float16).view(views, images, 1)
    lookup = feature_source(table)
    rows = torch.tensor([2, 0, 3, 3])
    assert lookup(rows, None).flatten().tolist() == [2, 0, 3, 3]
    drawn = [lookup(rows, torch.Generator().manual_seed(seed)).flatten() for seed in range(200)]
    for column, row in enumerate(rows.tolist()):
        assert {int(draw[column]) for draw in drawn} == {view * images + row for view in range(views)}
    assert any(draw[2] != draw[3] for draw in drawn), "two captions of one photo may get different views of it"
    assert torch.equal(drawn[5], lookup(rows, torch.Generator().manual_seed(5)).flatten())
    assert drawn[0].dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_flickr8k_is_read_whole():
    folder = Path(DATA) / "flickr8k"
    train, validation, _ = read_data(folder, 0)
    assert (len(train), len(validation)) == (6000, 1000)
    assert {len(image.captions) for image in train + validation} == {5}
    paths = picture_paths(folder, train + validation)
    assert len(set(paths)) == 7000
    assert all(path.parent.name == "images" for path in paths)


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="MMADAPTER_DATA names no data folder")
def test_the_coco_sample_is_read_and_a_few_of_its_photos_are_trained_on(world, tmp_path):
    source = Path(DATA) / "coco"
    train, validation, _ = read_data(source, 0)
    assert (len(train), len(validation)) == (268, 29)
    assert all(path.parent.name == "val2017" for path in picture_paths(source, train + validation))

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
