"""Run files: what a training run is, in one frozen dataclass, read from TOML and overridden by flags."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from mmadapter.config import AdapterConfig, VisionConfig, from_dict
from mmadapter.prompts import template

KINDS = {int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}


@dataclass(frozen=True)
class RunConfig:
    """One training run. The defaults are the settings measured on the default base.

    Attributes:
        llama: Spec of the base model.
        dtype: Of the frozen base; the adapter itself always trains in float32.
        template: Name of the prompt template (mmadapter/prompts.py).
        layers: Adapted layers, L.
        prompt_length: Adaption prompts a layer, K.
        gate: Gate variant: tanh, identity or scalar.
        prompt_std: Standard deviation at the start of the prompts, and of the image token that is added to them.
        vision: Spec of the image encoder; empty for text.
        scales: What is read off the encoder; empty takes its default (see mmadapter.config.VisionConfig).
        image_size: Side of the square image in pixels; 0 takes the encoder's own.
        resize: "squash" or "crop".
        views: Views of each training photo whose features are cached: the photo and views - 1 random crops of it.
        projection_width: Inner width of the MLP from image features to the image token.
        dropout: Dropout inside that MLP.
        feature_dropout: Dropout on the image features.
        init: Adapter to start from, a name or a path; empty starts afresh.
        objective: "likelihood" of the references, or "cider": self-critical training (training/self_critical.py).
        samples: Captions drawn for each image in self-critical training.
        seed: Of everything random.
        batch_size: Rows a step.
        steps: Optimiser steps.
        lr: Peak learning rate of prompts and projection.
        gate_lr: Peak learning rate of the gates.
        weight_decay: Of the projection's matrices; prompts, gates, biases and norms are not decayed.
        beta1, beta2: AdamW's.
        warmup: Steps of linear warm-up before the half-cosine to zero.
        clip: Largest gradient norm; 0 is no clipping.
        label_smoothing: Share of the target probability spread over the vocabulary.
        ema: Decay of the running mean of the weights that is validated and shipped; 0 takes the last weights.
        max_tokens: Longest row in tokens.
        licence: Of the training data; it is written into the adapter file.
        beams: Beams of the adapter's default decoding; 1 is greedy.
        length_penalty: Its length penalty: a beam's log-probability is divided by its length to this power.
        validation_rows: Rows of the validation set that are taken, evenly spread over it.
        eval_every: Steps between validations.
        save_every: Steps between checkpoints.
    """

    llama: str = "smollm2-135m"
    dtype: str = "bfloat16"
    template: str = "plain"
    layers: int = 30
    prompt_length: int = 10
    gate: str = "tanh"
    prompt_std: float = 1.0
    vision: str = ""
    scales: tuple[str, ...] = ()
    image_size: int = 0
    resize: str = "squash"
    views: int = 1
    projection_width: int = 576
    dropout: float = 0.0
    feature_dropout: float = 0.0
    init: str = ""
    objective: str = "likelihood"
    samples: int = 4
    seed: int = 0
    batch_size: int = 48
    steps: int = 900
    lr: float = 3e-3
    gate_lr: float = 9e-3
    weight_decay: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: int = 50
    clip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    max_tokens: int = 512
    licence: str = ""
    beams: int = 1
    length_penalty: float = 1.0
    validation_rows: int = 1000
    eval_every: int = 100
    save_every: int = 50

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_of_kind(value, type(field.default)):
                raise ValueError(f"{field.name} must be {KINDS[type(field.default)]}, got {value!r}")
        for name in (
            "layers",
            "prompt_length",
            "steps",
            "batch_size",
            "views",
            "eval_every",
            "save_every",
            "projection_width",
            "max_tokens",
            "validation_rows",
            "beams",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "feature_dropout", "label_smoothing", "ema", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("seed", "lr", "gate_lr", "weight_decay", "warmup", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.objective not in ("likelihood", "cider"):
            raise ValueError(f"objective must be likelihood or cider, got {self.objective!r}")
        if self.objective == "cider" and self.samples < 2:
            raise ValueError(f"samples must be at least 2, for each is compared with the others, got {self.samples}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        # What these say of their own fields, before anything is loaded or computed.
        AdapterConfig(self.layers, self.prompt_length, self.gate, self.prompt_std)
        VisionConfig(self.vision, self.scales, self.image_size, self.resize)
        template(self.template)


def _is_of_kind(value: object, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind  # a bool is an int to isinstance


def read_config(path: Path, overrides: dict[str, object]) -> RunConfig:
    """The run file at `path` with `overrides` (those that are not None) on top.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not TOML, or a key is unknown, or a value is of the wrong kind or out of range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no run file {path}; the shipped ones are in training/configs")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        from_dict(RunConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return from_dict(RunConfig, values | {key: value for key, value in overrides.items() if value is not None})


def descriptions() -> dict[str, str]:
    """What the docstring of `RunConfig` says of each field, for `--help`."""
    listed = (inspect.getdoc(RunConfig) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): (.+(?:\n {8}.+)*)", listed, re.MULTILINE)
    return {name: " ".join(said.split()) for names, said in entries for name in names.split(", ")}


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of `RunConfig`: --batch-size 16 overrides batch_size of the run file."""
    group = parser.add_argument_group("overrides of the run file")
    said = descriptions()
    for field in dataclasses.fields(RunConfig):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        about = f"{said.get(field.name, '')} (default: {'none' if default in ('', ()) else default})".replace("%", "%%")
        if isinstance(default, tuple):
            group.add_argument(flag, nargs="*", metavar="SCALE", help=about)
        else:
            group.add_argument(flag, type=type(default), metavar=type(default).__name__.upper(), help=about)


def overrides_of(arguments: argparse.Namespace) -> dict[str, object]:
    """The override flags given on the command line."""
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(RunConfig)}
