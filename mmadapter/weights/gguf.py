"""Base weights from a GGUF file of architecture `llama`, as llama.cpp writes them.

The header is read here: it holds a hundred thousand short strings (vocabulary and merges), for which a general reader
takes seconds. What the blocks of a quantised tensor mean comes from the `gguf` package. Format: the document `gguf.md`
of the ggml project.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmadapter.config import LlamaConfig
from mmadapter.weights.base import BaseWeights, check_shapes, halves_from_pairs, head_width_of, is_rotated, make_config

if TYPE_CHECKING:
    from mmadapter.tokenizer import Tokenizer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ROPE_FREQUENCIES = "rope_freqs.weight"
NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
BLOCK_NAMES = {
    "attn_q.weight": "attention.wq.weight",
    "attn_k.weight": "attention.wk.weight",
    "attn_v.weight": "attention.wv.weight",
    "attn_output.weight": "attention.wo.weight",
    "ffn_gate.weight": "feed_forward.w1.weight",
    "ffn_down.weight": "feed_forward.w2.weight",
    "ffn_up.weight": "feed_forward.w3.weight",
    "attn_norm.weight": "attention_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        shape: Rows first, as in torch (the file has them the other way round).
        kind: Number of its ggml type.
        offset: Of its first byte, from the start of the data.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that is open for reading.

    Attributes:
        path: The file.
        fields: Its metadata: numbers, strings, booleans, and lists of them.
        stored: Its tensors, by their name in the file.
        data: All bytes from the start of the tensor data, not read before they are used.
    """

    path: Path
    fields: dict[str, object]
    stored: dict[str, StoredTensor]
    data: np.ndarray

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor: float16 as it is, every other type as float32.

        Raises:
            ValueError: Its type cannot be read.
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        entry = self.stored[name]
        start = entry.offset
        raw = self.data[start : start + self.size_in_bytes(name)]
        kind = GGMLQuantizationType(entry.kind)
        # A copy: the file is mapped read-only, and it may be closed or replaced later.
        if kind == GGMLQuantizationType.F32:
            values = raw.view("<f4").astype(np.float32)
        elif kind == GGMLQuantizationType.F16:
            values = raw.view("<f2").astype(np.float16)
        else:
            try:
                values = dequantize(raw.reshape(quant_shape_to_byte_shape(entry.shape, kind)), kind)
            except NotImplementedError as error:
                raise ValueError(f"{self.path}: {name} is stored as {kind.name}, which cannot be read") from error
        return torch.from_numpy(values).reshape(entry.shape)

    def size_in_bytes(self, name: str) -> int:
        """Bytes of a tensor in the file.

        Raises:
            ValueError: Its type is not known, or its rows are no whole number of blocks.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        entry = self.stored[name]
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(entry.kind)]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.path}: {name} has the unknown tensor type {entry.kind}") from error
        if entry.shape[-1] % block:
            raise ValueError(f"{self.path}: {name} has rows of {entry.shape[-1]}, which blocks of {block} do not fill")
        return math.prod(entry.shape) // block * block_bytes


def open_gguf(spec: str, path: Path) -> BaseWeights:
    """Describes the base weights in a GGUF file.

    Raises:
        ValueError: It is no whole GGUF file, its architecture is not `llama`, or its tensors are not those of the
            model that its metadata describes.
    """
    file = read_gguf(path)
    config = _config(file)
    canonical = {name: _canonical(name) for name in file.stored if name != ROPE_FREQUENCIES}
    shapes = {canonical[name]: file.stored[name].shape for name in canonical}
    check_shapes(path, config, shapes, {new: old for old, new in canonical.items()})

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for stored, name in canonical.items():
            tensor = file.tensor(stored)
            yield name, halves_from_pairs(tensor, config.head_width) if is_rotated(name) else tensor

    def tokenizer() -> Tokenizer | None:
        from mmadapter.tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(file.fields) if "tokenizer.ggml.tokens" in file.fields else None

    return BaseWeights(spec=spec, path=path, config=config, shapes=shapes, tensors=tensors, tokenizer=tokenizer)


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file and checks that all its tensors are there.

    Raises:
        ValueError: It is no GGUF file, of a version that cannot be read, or truncated.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        fields, stored, start = _read_header(buffer)
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or damaged: its header cannot be read. Fetch it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found = GgufFile(path, fields, stored, np.frombuffer(buffer, dtype=np.uint8)[start:])
    for name, entry in stored.items():
        end = entry.offset + found.size_in_bytes(name)
        if end > len(found.data):
            raise ValueError(
                f"{path} is truncated: {name} ends at byte {start + end}, the file at {len(buffer)}. Fetch it again"
            )
    return found


def _read_header(buffer: mmap.mmap) -> tuple[dict[str, object], dict[str, StoredTensor], int]:
    """Metadata, tensors, and where the data starts. A header that ends too early raises `struct.error`."""
    (version,) = struct.unpack_from("<I", buffer, len(MAGIC))
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} cannot be read; versions {VERSIONS[0]} and {VERSIONS[1]} can")
    header = _Cursor(buffer, len(MAGIC) + 4)
    tensor_count, field_count = header.numbers("Q", 2)
    fields = {}
    for _ in range(field_count):
        name = header.string()
        fields[name] = header.value(*header.numbers("I"))
    stored = {}
    for _ in range(tensor_count):
        name = header.string()
        sizes = header.numbers("Q", *header.numbers("I"))
        (kind,), (offset,) = header.numbers("I"), header.numbers("Q")
        stored[name] = StoredTensor(tuple(reversed(sizes)), kind, offset)
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment must be a positive number, got {alignment!r}")
    return fields, stored, -(-header.position // alignment) * alignment


class _Cursor:
    """Reads one value after another."""

    def __init__(self, buffer: mmap.mmap, position: int) -> None:
        self.buffer = buffer
        self.position = position
        self.length = struct.Struct("<Q")

    def numbers(self, code: str, count: int = 1) -> tuple:
        form = struct.Struct(f"<{count}{code}")
        values = form.unpack_from(self.buffer, self.position)
        self.position += form.size
        return values

    def string(self) -> str:
        (length,) = self.length.unpack_from(self.buffer, self.position)
        start = self.position + self.length.size
        self.position = start + length
        if self.position > len(self.buffer):
            raise struct.error("the file ends inside a string")
        return self.buffer[start : self.position].decode("utf-8")

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.numbers(SCALARS[kind])[0]
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        if kind in SCALARS:
            return list(self.numbers(SCALARS[kind], count))
        return [self.value(kind) for _ in range(count)]


def _canonical(stored: str) -> str:
    """Our name of a tensor; a name that is not known stays, and the check of names will name it."""
    if stored in NAMES:
        return NAMES[stored]
    block, _, rest = stored.removeprefix("blk.").partition(".")
    if stored.startswith("blk.") and rest in BLOCK_NAMES:
        return f"layers.{block}.{BLOCK_NAMES[rest]}"
    return stored


def _config(file: GgufFile) -> LlamaConfig:
    fields, path = file.fields, file.path
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path} holds the architecture {architecture!r}; supported is 'llama'")
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one part of {fields['split.count']}; merge them with `llama-gguf-split --merge`")
    if fields.get("llama.expert_count", 0):
        raise ValueError(f"{path} is a mixture of {fields['llama.expert_count']} experts, which is not supported")
    if "token_embd.weight" not in file.stored:
        raise ValueError(f"{path} has no token_embd.weight, the token embedding: it holds no whole model")

    def field(name: str, default: float | None = None) -> Any:
        value = fields.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"{path} has no llama.{name} in its metadata")
        if not isinstance(value, int | float):
            # Some models give one number for each layer.
            raise ValueError(f"{path}: llama.{name} must be one number, got {value!r}")
        return value

    heads, width = field("attention.head_count"), field("embedding_length")
    head_width = fields.get("llama.attention.key_length") or head_width_of(path, width, heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if field(name, head_width) != head_width:
            raise ValueError(f"{path}: llama.{name} is {field(name)}, supported is the head width, {head_width}")
    return make_config(
        path,
        vocab_size=file.stored["token_embd.weight"].shape[0],
        width=width,
        layers=field("block_count"),
        heads=heads,
        kv_heads=field("attention.head_count_kv", heads),
        head_width=head_width,
        hidden_width=field("feed_forward_length"),
        norm_eps=_decimal(field("attention.layer_norm_rms_epsilon")),
        rope_theta=_decimal(field("rope.freq_base", 10000.0)),
        rope_divisors=_rope_divisors(file, head_width),
        tied="output.weight" not in file.stored,
        context=field("context_length", 2048),
    )


def _decimal(value: float) -> float:
    """The decimal number that was rounded to a stored float32: 9.99999975e-06 is meant as 1e-05."""
    return float(f"{value:.7g}")


def _rope_divisors(file: GgufFile, head_width: int) -> tuple[float, ...] | None:
    scaling = file.fields.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{file.path} scales its rotary frequencies by {scaling!r}; supported are 'none' and 'linear'")
    # Older files name no type and give the factor of a linear scaling alone.
    factor = file.fields.get("llama.rope.scale_linear", 1.0)
    if scaling == "linear":
        factor = file.fields.get("llama.rope.scaling.factor", factor)
    if ROPE_FREQUENCIES in file.stored:
        return tuple(factor * divisor for divisor in file.tensor(ROPE_FREQUENCIES).float().tolist())
    return None if factor == 1.0 else (factor,) * (head_width // 2)
