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

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}


AT_LEAST_ONE = (
    *("layers", "prompt_length", "batch_size", "views", "eval_every", "save_every", "projection_width"),
    *("validation_rows", "beams", "keep", "pool"),
)
BELOW_ONE = ("dropout", "feature_dropout", "label_smoothing", "ema", "beta1", "beta2")
NOT_NEGATIVE = (
    *("seed", "batch_tokens", "steps", "epochs", "lr", "gate_lr", "weight_decay", "warmup", "warmup_epochs", "clip"),
    *("held_out", "whiten", "train_rows"),
)
CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "decay": ("projection", "all"),
    "ship": ("last", "best"),
    "answer_form": ("letter", "text"),
}


@dataclass(frozen=True)
class RunConfig:
    """One training run. The defaults are the settings measured on the default base.

    Attributes:
        llama: Spec of the base model.
        dtype: Of the frozen base; the adapter itself always trains in float32.
        device: "auto" is the GPU of this process where there is one, else the CPU.
        template: Name of the prompt template (mmadapter/prompts.py).
        layers: Adapted layers, L.
        prompt_length: Adaption prompts a layer, K.
        gate: Gate variant: tanh, identity or scalar.
        gate_init: Value of every gate at the start, before phi; at 0 training starts from the base model.
        prompt_std: Standard deviation at the start of the prompts, and of the image token that is added to them.
        tune: "prompts", or "prompts+bias+scale+norm": LLaMA-Adapter V2's tuning as well.
        vision: Spec of the image encoder; empty for text.
        scales: What is read off the encoder; empty takes its default (see mmadapter.config.VisionConfig).
        image_size: Side of the square image in pixels; 0 takes the encoder's own.
        resize: "squash" or "crop".
        views: Views of each training photo whose features are cached: the photo and views - 1 random crops of it.
        whiten: Principal components of the image features that the projection takes, each scaled to unit variance; 0
            takes the features as they are.
        projection_width: Inner width of the MLP from image features to the image token.
        dropout: Dropout inside that MLP.
        feature_dropout: Dropout on the image features.
        seed: Of everything random.
        batch_size: Rows an optimiser step, over all processes.
        batch_tokens: Most tokens, padding included, that one forward pass of a process takes: a step's rows are sorted
            by length and cut into as many passes as that needs, their gradients accumulated; 0 is one pass.
        pool: Steps whose rows are drawn together and sorted by length, for little padding; 1 draws each step at random.
        steps: Optimiser steps; 0 takes `epochs`.
        epochs: Times that each row is seen, where `steps` is 0.
        lr: Peak learning rate of prompts, projection and tuning.
        gate_lr: Peak learning rate of the gates.
        scale_lr: Multiplies both rates by batch_size / 256, as the official code does.
        weight_decay: Of what `decay` names.
        decay: "projection" decays the projection's matrices only; "all" every parameter, as the official code does.
        beta1, beta2: AdamW's.
        warmup: Steps of linear warm-up before the half-cosine to zero; 0 takes `warmup_epochs`.
        warmup_epochs: Epochs of warm-up, where `warmup` is 0.
        clip: Largest gradient norm; 0 is no clipping.
        label_smoothing: Share of the target probability spread over the vocabulary.
        ema: Decay of the running mean of the weights that is validated and shipped; 0 takes the last weights.
        max_tokens: Longest row in tokens.
        checkpointing: Computes each block's activations again in the backward pass instead of keeping them.
        compile: Compiles the blocks with torch.compile.
        shard: Spreads the frozen blocks over the processes (FSDP2), for a base that does not fit one device.
        held_out: Rows kept aside by `seed` for validation, where the data has no validation split of its own.
        train_rows: Training rows that are used, drawn by `seed`; 0 is all of them.
        skip_bad_rows: Goes on without rows that cannot be used, and says how many.
        format: ScienceQA: the data set's prompt format, such as QCM-A or QCM-ALE.
        answer_form: ScienceQA: the answer is learnt as "letter" or as the option's own "text".
        licence: Of the training data; it is written into the adapter file.
        beams: Beams of the adapter's default decoding; 1 is greedy.
        length_penalty: Its length penalty: a beam's log-probability is divided by its length to this power.
        validation_rows: Rows of the validation set that are taken, evenly spread over it.
        eval_every: Steps between validations.
        save_every: Steps between checkpoints.
        keep: Latest checkpoints that are kept; that of the lowest validation loss is kept as well.
        ship: Which weights become the adapter: "last", or "best", those of the lowest validation loss.
    """

    llama: str = "smollm2-135m"
    dtype: str = "bfloat16"
    device: str = "auto"
    template: str = "plain"
    layers: int = 30
    prompt_length: int = 10
    gate: str = "tanh"
    gate_init: float = 0.0
    prompt_std: float = 0.2
    tune: str = "prompts"
    vision: str = ""
    scales: tuple[str, ...] = ()
    image_size: int = 0
    resize: str = "squash"
    views: int = 1
    whiten: int = 0
    projection_width: int = 576
    dropout: float = 0.0
    feature_dropout: float = 0.0
    seed: int = 0
    batch_size: int = 48
    batch_tokens: int = 2048
    pool: int = 16
    steps: int = 0
    epochs: float = 1.0
    lr: float = 3e-3
    gate_lr: float = 3e-2
    scale_lr: bool = False
    weight_decay: float = 0.02
    decay: str = "projection"
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: int = 50
    warmup_epochs: float = 0.0
    clip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    max_tokens: int = 512
    checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    held_out: int = 0
    train_rows: int = 0
    skip_bad_rows: bool = False
    format: str = "QCM-A"
    answer_form: str = "letter"
    licence: str = ""
    beams: int = 1
    length_penalty: float = 1.0
    validation_rows: int = 1000
    eval_every: int = 100
    save_every: int = 50
    keep: int = 1
    ship: str = "last"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_of_kind(value, type(field.default)):
                raise ValueError(f"{field.name} must be {KINDS[type(field.default)]}, got {value!r}")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, one to read and one to learn, got {self.max_tokens}")
        for name in BELOW_ONE:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if not self.steps and not self.epochs:
            raise ValueError("steps and epochs are both 0; set one of them")
        # What these say of their own fields, before anything is loaded or computed.
        AdapterConfig(self.layers, self.prompt_length, self.gate, self.prompt_std, self.tune)
        VisionConfig(self.vision, self.scales, self.image_size, self.resize)
        template(self.template)

    def schedule(self, rows: int) -> tuple[int, int]:
        """Optimiser steps, and those of warm-up, for that many training rows."""
        steps = self.steps or max(1, math.ceil(rows * self.epochs / self.batch_size))
        return steps, self.warmup or round(rows * self.warmup_epochs / self.batch_size)


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
        shown = "none" if default in ("", ()) else str(default).lower() if isinstance(default, bool) else default
        about = f"{said.get(field.name, '')} (default: {shown})".replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=about)
        elif isinstance(default, tuple):
            group.add_argument(flag, nargs="*", metavar="SCALE", help=about)
        else:
            group.add_argument(flag, type=type(default), metavar=type(default).__name__.upper(), help=about)


def overrides_of(arguments: argparse.Namespace) -> dict[str, object]:
    """The override flags given on the command line."""
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(RunConfig)}
