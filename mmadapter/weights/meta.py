"""Base weights from a folder in Meta's layout: `params.json` and `consolidated.NN.pth`, one file a model-parallel rank.

LLaMA 1 and 2 split the token embedding over its width, LLaMA 3 over the vocabulary; the shapes tell which.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmadapter.config import LlamaConfig, llama3_rope_divisors
from mmadapter.weights.base import (
    BaseWeights,
    check_shapes,
    folder_tokenizer,
    halves_from_pairs,
    head_width_of,
    is_rotated,
    make_config,
    read_json,
    required,
    without_rotary_buffers,
)

if TYPE_CHECKING:
    from mmadapter.tokenizer import Tokenizer

SHARDS = "consolidated.*.pth"
SPLIT_ROWS = (".wq.weight", ".wk.weight", ".wv.weight", ".w1.weight", ".w3.weight", "output.weight")
SPLIT_COLUMNS = (".wo.weight", ".w2.weight")
# The scaling of LLaMA 3.1 (arXiv 2407.21783). `params.json` says only whether it is used, and LLaMA 3.2, which has
# another factor, says no more; its two text models are known by (width, layers).
ROPE_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}
LLAMA_3_2_FACTOR = 32.0
LLAMA_3_2 = ((2048, 16), (3072, 28))


def open_meta(spec: str, folder: Path) -> BaseWeights:
    """Describes the base weights in a folder of Meta's layout.

    Raises:
        ValueError: A file is damaged, or the tensors are not those of the model that `params.json` describes.
    """
    shards = [_open_shard(path) for path in sorted(folder.glob(SHARDS))]
    names = without_rotary_buffers(shards[0])
    for number, shard in enumerate(shards):
        if different := sorted(set(names) ^ set(without_rotary_buffers(shard))):
            raise ValueError(f"{folder}: {different[0]} is in some of the {len(shards)} shards only, not in {number}")
    params = read_json(folder / "params.json")
    width = required(params, "dim", folder / "params.json")
    splits = {name: _split_dimension(name, shards[0][name].shape, width) for name in names}
    shapes = {name: _merged_shape(folder, name, shards, splits[name]) for name in names}
    config = _config(folder, params, shapes)
    check_shapes(folder, config, shapes)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            tensor = _merge([shard[name] for shard in shards], splits[name])
            yield name, halves_from_pairs(tensor, config.head_width) if is_rotated(name) else tensor

    def tokenizer() -> Tokenizer | None:
        # LLaMA 1 and 2 came as one tokenizer beside a folder for each size.
        return folder_tokenizer(folder, folder.resolve().parent)

    return BaseWeights(spec=spec, path=folder, config=config, shapes=shapes, tensors=tensors, tokenizer=tokenizer)


def _open_shard(path: Path) -> dict[str, torch.Tensor]:
    """Maps one file into memory: its tensors are read when they are used."""
    try:
        # Files written before torch 1.6 are no zip archives and cannot be mapped.
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is truncated, or no file of tensors; fetch it again") from error
    if not isinstance(shard, dict) or not shard or not all(isinstance(value, torch.Tensor) for value in shard.values()):
        raise ValueError(f"{path} is no flat mapping from names to tensors, as Meta's checkpoints are")
    return shard


def _split_dimension(name: str, shape: torch.Size, width: int) -> int | None:
    """The dimension over which the ranks share a tensor, None where each holds all of it."""
    if name == "tok_embeddings.weight":
        return 0 if shape[-1] == width else 1
    if name.endswith(SPLIT_ROWS):
        return 0
    return 1 if name.endswith(SPLIT_COLUMNS) else None


def _merge(parts: list[torch.Tensor], dimension: int | None) -> torch.Tensor:
    return parts[0] if dimension is None or len(parts) == 1 else torch.cat(parts, dimension)


def _merged_shape(
    folder: Path, name: str, shards: list[dict[str, torch.Tensor]], dimension: int | None
) -> tuple[int, ...]:
    # On the meta device the tensors are joined in name only.
    parts = [torch.empty(shard[name].shape, device="meta") for shard in shards]
    try:
        return tuple(_merge(parts, dimension).shape)
    except (RuntimeError, IndexError) as error:
        found = ", ".join(str(list(part.shape)) for part in parts)
        raise ValueError(f"{folder}: the shards' parts of {name} do not fit together: {found}") from error


def _config(folder: Path, params: dict, shapes: dict[str, tuple[int, ...]]) -> LlamaConfig:
    path = folder / "params.json"
    width, heads = required(params, "dim", path), required(params, "n_heads", path)
    head_width = params.get("head_dim") or head_width_of(path, width, heads)
    theta = float(params.get("rope_theta") or 10000.0)
    layers = required(params, "n_layers", path)
    # The width of the feed-forward follows from `multiple_of` and `ffn_dim_multiplier` by a rounding rule; the tensor
    # says the same. Where one of the two tensors is missing, the check of names will say so.
    gate = shapes.get("layers.0.feed_forward.w1.weight", (1,))
    embedding = shapes.get("tok_embeddings.weight", (1,))
    vocab_size = params.get("vocab_size") or -1
    return make_config(
        path,
        # LLaMA 1 and 2 leave the vocabulary to the tokenizer and write -1.
        vocab_size=vocab_size if vocab_size > 0 else embedding[0],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=params.get("n_kv_heads") or heads,
        head_width=head_width,
        hidden_width=gate[0],
        norm_eps=float(params.get("norm_eps") or 1e-5),
        rope_theta=theta,
        rope_divisors=_rope_divisors(params, head_width, theta),
        tied="output.weight" not in shapes,
        context=params.get("max_seq_len") or _context(params, theta),
    )


def _rope_divisors(params: dict, head_width: int, theta: float) -> tuple[float, ...] | None:
    if not params.get("use_scaled_rope"):
        return None
    scaling = dict(ROPE_SCALING)
    if (params["dim"], params["n_layers"]) in LLAMA_3_2:
        scaling["factor"] = LLAMA_3_2_FACTOR
    if params.get("rope_scaling_factor"):
        scaling["factor"] = float(params["rope_scaling_factor"])
    if params.get("rope_high_freq_factor"):
        scaling["high_freq_factor"] = float(params["rope_high_freq_factor"])
    return llama3_rope_divisors(head_width, theta, **scaling)


def _context(params: dict, theta: float) -> int:
    """Length of the training sequences, which `params.json` does not give, by what tells the releases apart."""
    if params.get("use_scaled_rope"):
        return 131072  # LLaMA 3.1 and later
    if theta == 1e6:
        return 16384  # Code Llama
    if theta > 10000.0:
        return 8192  # LLaMA 3
    return 4096 if params.get("norm_eps") == 1e-5 else 2048  # LLaMA 2, LLaMA 1
