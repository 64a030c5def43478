"""A tiny training run without files: a random base, rows of numbers, a table of image features."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from mmadapter.adapter import Adapter
from mmadapter.config import AdapterConfig
from mmadapter.data import Example
from mmadapter.model import AdaptedLlama
from mmadapter.vision import ImageProjection
from training.config import RunConfig
from training.engine import Trainer

IMAGES, VIEWS = 6, 3
CALM = {"dropout": 0.0, "feature_dropout": 0.0, "label_smoothing": 0.0}  # nothing random within a step but the views


def config_of(**changes: object) -> RunConfig:
    """A run that uses everything that draws at random or remembers: dropout, views, EMA, momentum; a step has several
    forward passes, and two steps are cut together."""
    settings = {
        "llama": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "layers": 2,
        "prompt_length": 3,
        "projection_width": 8,
        "dropout": 0.3,
        "feature_dropout": 0.3,
        "batch_size": 4,
        "batch_tokens": 24,
        "pool": 2,
        "steps": 9,
        "lr": 1e-2,
        "gate_lr": 3e-2,
        "warmup": 2,
        "label_smoothing": 0.1,
        "ema": 0.9,
        "eval_every": 3,
        "save_every": 2,
    }
    return RunConfig(**{**settings, **changes})


def rows(count: int, seed: int = 0, images: bool = True) -> list[Example]:
    """Rows of three prompt tokens and 2 to 8 more; the answer depends on the image."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        length = int(torch.randint(2, 9, (), generator=generator))
        answer = [10 + index % IMAGES + place for place in range(length)]
        examples.append(Example((1, 2, 3, *answer), 3, index % IMAGES if images else None, f"row {index}"))
    return examples


def model_of(config: RunConfig, images: bool = True, start: int = 0) -> AdaptedLlama:
    """Base and adapter, whose weights before the first step `start` seeds; the gates are not zero."""
    torch.manual_seed(start)
    base = tiny.llama()
    projection = None
    if images:
        rates = {"dropout": config.dropout, "feature_dropout": config.feature_dropout}
        projection = ImageProjection(tiny.FEATURES, base.config.width, config.projection_width, **rates)
    shape = AdapterConfig(config.layers, config.prompt_length, config.gate, config.prompt_std, config.tune)
    adapter = Adapter(shape, base.config, projection=projection)
    torch.nn.init.normal_(adapter.gate, std=0.1)
    return AdaptedLlama(base, adapter)


def table_lookup(index: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Features of pictures [B], of a random view each in training: [B, F]."""
    table = torch.randn(VIEWS, IMAGES, tiny.FEATURES, generator=torch.Generator().manual_seed(5))
    views = 0 if generator is None else torch.randint(VIEWS, index.shape, generator=generator)
    return table[views, index]


def trainer(
    folder: Path,
    *,
    start: int = 0,
    images: bool = True,
    record: dict | None = None,
    train: list[Example] | None = None,
    **changes: object,
) -> Trainer:
    """A run over 40 rows."""
    config = config_of(**changes)
    return Trainer(
        model_of(config, images, start),
        config,
        folder,
        train=rows(40, images=images) if train is None else train,
        validation=rows(5, seed=1, images=images),
        features=table_lookup if images else None,
        record=record,
    )


def all_tensors(run: Trainer) -> dict[str, torch.Tensor]:
    """Everything a run carries from one step to the next."""
    found = {f"adapter.{name}": tensor for name, tensor in run.adapter.state_dict().items()}
    found |= {f"mean.{name}": tensor for name, tensor in run.mean.items()}
    for index, moments in run.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def different(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit for bit."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]
