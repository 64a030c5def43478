"""A tiny world to train in: a LLaMA with its tokenizer, an image encoder, pictures with captions, and a run file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import tiny_session

from mmadapter.tokenizer import open_tokenizer

RUN = {
    "dtype": "float32",
    "layers": 2,
    "prompt_length": 3,
    "image_size": 32,
    "views": 2,
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


def write_run_file(path: Path, **changes: object) -> Path:
    """The settings of `RUN`, with changes, as TOML."""
    values = {**RUN, **changes}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path
