"""What every format of base weights is turned into, and the check that nothing is missing, extra or misshapen.

C model width, V vocabulary, H query heads, G key/value heads, D head width.

The tensors carry Meta's names. Rotary embeddings turn halves of a head (feature j with feature j + D/2), as in the
Hugging Face checkpoints; Meta's checkpoints and GGUF turn neighbours (2j with 2j + 1), so their rows of W_q and W_k
are put into the other order when they are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmadapter.config import LlamaConfig

if TYPE_CHECKING:
    from mmadapter.tokenizer import Tokenizer

NAMES_IN_A_MESSAGE = 4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
WHOLE_NUMBERS = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "hidden_width", "context")
# Buffers of rotary frequencies that some exporters write beside the weights. The configuration says the same.
ROTARY_BUFFER = re.compile(r"(rope\.freqs|.*rotary_emb\.inv_freq)")


@dataclass(frozen=True)
class BaseWeights:
    """Weights of a base model, not yet in memory.

    Attributes:
        spec: The name as the user gave it.
        path: File or folder that is read.
        config: Shape of the model.
        shapes: Shape of each tensor, by canonical name, read without loading the tensors.
        tensors: Gives the tensors one at a time as (canonical name, tensor), in float32 or in the stored
            floating-point type.
        tokenizer: Opens the tokenizer, or gives None where the weights come without one.
    """

    spec: str
    path: Path
    config: LlamaConfig
    shapes: dict[str, tuple[int, ...]]
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    tokenizer: Callable[[], Tokenizer | None]


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a model of this configuration has, by canonical name."""
    C, V = config.width, config.vocab_size
    queries = config.heads * config.head_width  # H*D
    keys = config.kv_heads * config.head_width  # G*D
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (V, C)}
    for layer in range(config.layers):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (queries, C),
            f"layers.{layer}.attention.wk.weight": (keys, C),
            f"layers.{layer}.attention.wv.weight": (keys, C),
            f"layers.{layer}.attention.wo.weight": (C, queries),
            f"layers.{layer}.feed_forward.w1.weight": (config.hidden_width, C),
            f"layers.{layer}.feed_forward.w2.weight": (C, config.hidden_width),
            f"layers.{layer}.feed_forward.w3.weight": (config.hidden_width, C),
            f"layers.{layer}.attention_norm.weight": (C,),
            f"layers.{layer}.ffn_norm.weight": (C,),
        }
    shapes["norm.weight"] = (C,)
    if not config.tied:
        shapes["output.weight"] = (V, C)
    return shapes


def check_shapes(
    path: Path, config: LlamaConfig, shapes: dict[str, tuple[int, ...]], stored_names: dict[str, str] | None = None
) -> None:
    """Checks that the tensors of a file are exactly those that its configuration demands.

    Args:
        path: File or folder, for the message.
        config: What the file says about itself.
        shapes: What it holds, by canonical name. Rotary buffers must be left out.
        stored_names: The name in the file of each canonical name, where it differs.

    Raises:
        ValueError: A tensor is missing, is not known, or has another shape.
    """
    stored_names = stored_names or {}
    # A damaged number of layers may be in the billions; their names would fill the memory.
    if config.layers > len(shapes):
        raise ValueError(f"{path} describes {config.layers} layers but holds {len(shapes)} tensors")
    expected = expected_shapes(config)
    problems = []
    if missing := [name for name in expected if name not in shapes]:
        problems.append(f"missing {_listed(missing)}")
    if extra := [stored_names.get(name, name) for name in shapes if name not in expected]:
        problems.append(f"unknown {_listed(extra)}")
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if misshapen:
        problems.append(f"misshapen {_listed(misshapen)}")
    if problems:
        raise ValueError(
            f"{path} does not hold the LLaMA that it describes: {'; '.join(problems)}. "
            "The download may be incomplete, or it is another kind of model"
        )


def _listed(names: list[str]) -> str:
    # A damaged name may hold a line break.
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:NAMES_IN_A_MESSAGE])
    more = len(names) - NAMES_IN_A_MESSAGE
    return f"{shown} and {more} more" if more > 0 else shown


def halves_from_pairs(weight: torch.Tensor, head_width: int) -> torch.Tensor:
    """Reorders the rows of W_q or W_k from neighbouring rotary pairs to rotary halves.

    Within each head, row 2j becomes row j and row 2j + 1 becomes row j + D/2.

    Args:
        weight: Rows of all heads, [heads*D, C].
        head_width: D.

    Returns:
        The same rows in the other order, [heads*D, C].
    """
    rows, width = weight.shape
    pairs = weight.reshape(rows // head_width, head_width // 2, 2, width)  # [heads, D/2, 2, C]
    return pairs.transpose(1, 2).reshape(rows, width)  # [heads*D, C]


def is_rotated(name: str) -> bool:
    """Whether the canonical tensor `name` is multiplied into queries or keys, which are rotated."""
    return name.endswith((".attention.wq.weight", ".attention.wk.weight"))


def without_rotary_buffers(names: Iterable[str]) -> list[str]:
    """The names that are weights, in their order."""
    return [name for name in names if not ROTARY_BUFFER.fullmatch(name)]


def read_json(path: Path) -> dict:
    """Reads a configuration file.

    Raises:
        ValueError: It is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object, but a {type(values).__name__}")
    return values


def required(values: dict, key: str, path: Path) -> Any:
    """The value of `key` in a configuration file.

    Raises:
        ValueError: It is not there.
    """
    if values.get(key) is None:
        raise ValueError(f"{path} has no {key!r}, which a LLaMA needs")
    return values[key]


def head_width_of(path: Path, width: int, heads: int) -> int:
    """The head width D of a model that does not give it: C / H.

    Raises:
        ValueError: The heads do not divide the width.
    """
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{path}: a width of {width!r} cannot be shared by {heads!r} heads")
    return width // heads


def make_config(path: Path, **fields: Any) -> LlamaConfig:
    """Builds a `LlamaConfig` from what a file says.

    Raises:
        ValueError: The numbers describe no LLaMA; the message names the file.
    """
    for name in WHOLE_NUMBERS:
        if not isinstance(fields[name], int):
            raise ValueError(f"{path}: {name} must be a whole number, got {fields[name]!r}")
    try:
        return LlamaConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def folder_tokenizer(*folders: Path) -> Tokenizer | None:
    """Opens the tokenizer of the first folder that has one."""
    from mmadapter.tokenizer import open_tokenizer

    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return open_tokenizer(folder)
    return None
