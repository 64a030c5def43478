"""Adapter files: our own safetensors with metadata, the official `.pth`, and Hugging Face peft folders.

Our file holds the trainable tensors and the feature statistics in float32 under the names of `Adapter.state_dict`, and
one metadata entry `mmadapter`, JSON, whose keys are those of `AdapterFile`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmadapter.adapter import Adapter
from mmadapter.config import AdapterConfig, LlamaConfig, VisionConfig, from_dict
from mmadapter.record import replacing
from mmadapter.vision import ImageProjection
from mmadapter.weights.store import cache_folder

FORMAT_VERSION = 1
FILE_NAME = "adapter.safetensors"
SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "adapters"


@dataclass(frozen=True)
class Fingerprint:
    """What a base model must share with the one an adapter was trained on.

    Attributes:
        vocabulary: Hash of the token strings in order; None where there is no tokenizer, and then not compared.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    vocab_size: int
    vocabulary: str | None = None

    @classmethod
    def of(cls, config: LlamaConfig, tokens: Sequence[str] | None) -> Fingerprint:
        digest = None
        if tokens is not None:
            digest = hashlib.sha256("\n".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return cls(config.layers, config.width, config.heads, config.kv_heads, config.vocab_size, digest)

    def matches(self, other: Fingerprint) -> bool:
        known = self.vocabulary is not None and other.vocabulary is not None
        vocabulary = self.vocabulary if known else None
        return dataclasses.replace(self, vocabulary=vocabulary) == dataclasses.replace(
            other, vocabulary=other.vocabulary if known else None
        )

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, width {self.width}, {self.heads} heads, {self.kv_heads} key/value heads, "
            f"{self.vocab_size} tokens, vocabulary {self.vocabulary or 'unknown'}"
        )


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file says beside its tensors.

    Attributes:
        adapter: L, K, gate variant.
        task: "caption", "instruct" ...
        template: Name of the prompt template it was trained with.
        base: Spec of the base it was trained on; empty where the file does not say (official, peft).
        fingerprint: Of that base; None where the file does not say.
        vision: Image encoder, scales and preprocessing; None for a text adapter.
        projection_width: Inner width of the image projection; 0 without one.
        generation: Default decoding settings of the task (fields of `sampling.Sampling`).
        training: Data, its licence, rows, steps and settings.
        scores: Of the weights in the file.
        git_commit: Of the code that trained it.
    """

    adapter: AdapterConfig
    task: str = ""
    template: str = "alpaca"
    base: str = ""
    fingerprint: Fingerprint | None = None
    vision: VisionConfig | None = None
    projection_width: int = 0
    generation: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    git_commit: str = ""


def save_adapter(path: Path, state: dict[str, Tensor], about: AdapterFile) -> None:
    """Writes one adapter file, all of it or nothing."""
    metadata = {"format_version": FORMAT_VERSION, **dataclasses.asdict(about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"mmadapter": json.dumps(metadata)})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


def find_adapter(name: str | os.PathLike) -> Path:
    """The file or folder of an adapter: a plain name is looked for in the repository's assets, then in the cache.

    What is neither there, or is a path, is taken as it is: `./caption` is a folder of the working directory.

    Raises:
        FileNotFoundError: There is none; the message lists the names there are.
    """
    folders = [SHIPPED, cache_folder() / "adapters"]
    if isinstance(name, str) and os.path.basename(name) == name:
        for folder in folders:
            if (folder / name).exists():
                return folder / name
    if Path(name).exists():
        return Path(name)
    known = sorted({entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()})
    raise FileNotFoundError(f"no adapter {str(name)!r}: neither a path nor one of {', '.join(known) or 'none'}")


def load_adapter(
    name: str | os.PathLike,
    base: LlamaConfig,
    fingerprint: Fingerprint,
    *,
    prompt_length: int = 10,
    gate: str = "tanh",
) -> tuple[Adapter, AdapterFile]:
    """Reads an adapter of any of the three kinds, for the base it is to work on.

    Args:
        name: Name, folder or file; see `find_adapter`.
        base: Shape of the base model.
        fingerprint: Of the base model.
        prompt_length: K of an official `.pth`, which does not name it.
        gate: Gate variant of an official `.pth`, which does not name it.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It is damaged, of a newer format, or was made for another base; the message shows both.
    """
    path = find_adapter(name)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return _load_peft(path, base)
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise FileNotFoundError(f"{path} holds no adapter: no {FILE_NAME} and no peft adapter_config.json in it")
        path = path / FILE_NAME
    if path.suffix == ".safetensors":
        return _load_own(path, base, fingerprint)
    return _load_official(path, base, prompt_length, gate)


def read_about(path: Path) -> AdapterFile:
    """The metadata of an adapter file of our own kind, without its tensors.

    Raises:
        ValueError: The file is damaged, or not of this kind or version.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("mmadapter", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not an adapter file: {error}") from error
    if metadata is None:
        raise ValueError(f"{path} is a safetensors file without the metadata of an mmadapter adapter")
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is damaged: its metadata is {type(metadata).__name__}, expected an object")
    version = metadata.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of format version {version}, this program reads {FORMAT_VERSION}; update it")
    try:
        for key, cls in (("adapter", AdapterConfig), ("fingerprint", Fingerprint), ("vision", VisionConfig)):
            if metadata.get(key) is not None:
                metadata[key] = from_dict(cls, metadata[key])
        return from_dict(AdapterFile, metadata)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its metadata cannot be read: {error}") from error


def _load_own(path: Path, base: LlamaConfig, fingerprint: Fingerprint) -> tuple[Adapter, AdapterFile]:
    about = read_about(path)
    if about.fingerprint is not None and not about.fingerprint.matches(fingerprint):
        raise ValueError(
            f"adapter {path} was trained on {about.base} ({about.fingerprint}); this base has {fingerprint}; "
            f"load it with --llama {about.base}"
        )
    state = load_file(path)
    projection = None
    if about.vision is not None:
        feature_width = len(state["projection.feature_mean"]) if "projection.feature_mean" in state else 1
        components = state["projection.feature_whitening"].shape[-1] if "projection.feature_whitening" in state else 0
        projection = ImageProjection(feature_width, base.width, about.projection_width, components=components)
    return _filled(path, Adapter(about.adapter, base, projection=projection), state), about


def _load_official(path: Path, base: LlamaConfig, prompt_length: int, gate: str) -> tuple[Adapter, AdapterFile]:
    """LLaMA-Adapter's own checkpoint: `adapter_query.weight` [K * L, C] and a raw gate for each of the N layers."""
    if prompt_length < 1:
        raise ValueError(f"prompt_length must be at least 1, got {prompt_length}")
    file = _read_tensors(path, "a LLaMA-Adapter checkpoint")
    if not isinstance(file, dict) or "adapter_query.weight" not in file:
        raise ValueError(f"{path} is no LLaMA-Adapter checkpoint: it has no adapter_query.weight")
    query = file.pop("adapter_query.weight")  # [K * L, C]
    if not isinstance(query, Tensor) or query.ndim == 0:
        raise ValueError(f"{path}: adapter_query.weight is no matrix")
    if query.ndim != 2 or query.shape[1] != base.width:
        raise ValueError(f"{path} was trained on a base of width {query.shape[-1]}, this one has {base.width}")
    if query.shape[0] == 0 or query.shape[0] % prompt_length:
        raise ValueError(
            f"{path} has {query.shape[0]} prompt rows, which K={prompt_length} does not divide; set --prompt-length"
        )
    layers = query.shape[0] // prompt_length
    gates = {}
    for key, value in file.items():
        match = re.fullmatch(r"layers\.(\d+)\.attention\.gate", str(key))
        if not match:
            raise ValueError(f"{path} holds {key}, which is no part of a LLaMA-Adapter checkpoint of prompts and gates")
        gates[int(match[1])] = value
    first = base.layers - layers
    missing = [layer for layer in range(max(first, 0), base.layers) if layer not in gates]
    if first < 0 or missing or max(gates) >= base.layers:
        raise ValueError(
            f"{path} adapts {layers} layers and has gates for {len(gates)}; this base has {base.layers} layers"
        )
    for layer in range(first, base.layers):
        value = gates[layer]
        if not isinstance(value, Tensor) or value.numel() != (1 if gate == "scalar" else base.heads):
            size = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            wanted = "one number" if gate == "scalar" else f"a number for each of {base.heads} heads"
            raise ValueError(f"{path}: layers.{layer}.attention.gate is {size}, expected {wanted} with --gate {gate}")
    state = {
        "prompt": query.view(layers, prompt_length, base.width),
        "gate": torch.stack([gates[layer].flatten() for layer in range(first, base.layers)]),  # [L, H]
    }
    config = AdapterConfig(layers=layers, prompt_length=prompt_length, gate=gate)
    return _filled(path, Adapter(config, base), state), AdapterFile(config, "instruct")


def _read_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a pickle of nothing but tensors.

    Raises:
        ValueError: It is neither; torch's own message fills a page.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or not {kind}: {reason}") from error


def _load_peft(folder: Path, base: LlamaConfig) -> tuple[Adapter, AdapterFile]:
    """A Hugging Face peft AdaptionPrompt folder: one scalar gate a layer, used as it is."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'adapter_config.json'} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / 'adapter_config.json'} is no JSON object")
    if settings.get("peft_type") != "ADAPTION_PROMPT":
        raise ValueError(f"{folder} is a peft adapter of type {settings.get('peft_type')}, expected ADAPTION_PROMPT")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        weights = folder / "adapter_model.bin"
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has neither adapter_model.safetensors nor adapter_model.bin")
    file = _read_tensors(weights, "the weights of a peft adapter")
    for key in ("adapter_layers", "adapter_len"):
        if not isinstance(settings.get(key), int) or settings[key] < 1:
            raise ValueError(
                f"{folder / 'adapter_config.json'}: {key} must be a number from 1, got {settings.get(key)!r}"
            )
    if not isinstance(file, dict) or not all(isinstance(tensor, Tensor) for tensor in file.values()):
        raise ValueError(f"{weights} is damaged: it holds something other than named tensors")
    config = AdapterConfig(settings["adapter_layers"], settings["adapter_len"], "scalar")
    prompts, gates = {}, {}
    for key, tensor in file.items():
        match = re.search(r"layers\.(\d+)\.self_attn\.adaption_(prompt|gate)$", key)
        if not match:
            raise ValueError(f"{folder} holds {key}, which is no part of a peft AdaptionPrompt adapter")
        (prompts if match[2] == "prompt" else gates)[int(match[1])] = tensor
    wanted = list(range(base.layers - config.layers, base.layers))
    if sorted(prompts) != wanted or sorted(gates) != wanted:
        raise ValueError(f"{folder} adapts layers {sorted(prompts)}; on this base they would be {wanted}")
    state = {
        "prompt": torch.cat([prompts[layer] for layer in wanted]),  # [L, K, C] from L times [1, K, C]
        "gate": torch.stack([gates[layer].flatten() for layer in wanted]),  # [L, 1]
    }
    return _filled(folder, Adapter(config, base), state), AdapterFile(config, "instruct")


def _filled(path: Path, adapter: Adapter, state: dict[str, Tensor]) -> Adapter:
    """`adapter` with the tensors of `state`, all of them and nothing else."""
    expected = adapter.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"{path} has no tensor {name}")
        if name not in expected:
            raise ValueError(f"{path} has a tensor {name} that this adapter does not have")
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)} for this base"
            )
    adapter.load_state_dict(state)
    return adapter.requires_grad_(False).eval()
