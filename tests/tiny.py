"""Tiny random models. Their sizes differ from each other, so that none can be taken for another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from weight_files import random_state

from mmadapter.adapter import Adapter
from mmadapter.config import AdapterConfig, LlamaConfig
from mmadapter.llama import Llama
from mmadapter.vision import ImageProjection

FEATURES = 7  # F, width of the image features


def config(**changes: object) -> LlamaConfig:
    """Grouped queries (H = 4, G = 2) whose heads of width 10 are not C / H."""
    numbers = {"vocab_size": 53, "width": 24, "layers": 3, "heads": 4, "kv_heads": 2, "head_width": 10}
    return LlamaConfig(**{**numbers, "hidden_width": 40, "context": 128, **changes})


def llama(shape: LlamaConfig | None = None) -> Llama:
    """A frozen model, the same at each call."""
    shape = shape or config()
    return Llama.from_state_dict(shape, random_state(shape))


def adapter(
    base: LlamaConfig,
    *,
    layers: int = 2,
    prompt_length: int = 3,
    gate: str = "tanh",
    image: bool = False,
    tune: str = "prompts",
    seed: int = 1,
) -> Adapter:
    """An adapter all of whose parameters are random; the gates are not zero, for a bug hides at zero."""
    projection = ImageProjection(FEATURES, base.width, 11) if image else None
    made = Adapter(AdapterConfig(layers, prompt_length, gate, tune=tune), base, projection=projection)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.3 * noise if name.startswith("tuning.") else noise)
        if projection is not None:
            projection.set_statistics(3 * torch.randn(20, FEATURES, generator=generator) + 1)
    return made.eval()


def tokens(rows: int, length: int, seed: int = 2, vocab_size: int = 53) -> Tensor:
    """Random token ids, [rows, length]."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def features(rows: int, seed: int = 3) -> Tensor:
    """Random image features, [rows, F]."""
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: Sequence[Tensor], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one batch [B, T], and True where a token is real, [B, T]."""
    longest = max(len(row) for row in rows)
    batch = torch.full((len(rows), longest), pad_id)
    valid = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        batch[index, longest - len(row) :] = row
        valid[index, longest - len(row) :] = True
    return batch, valid
