"""What a base and an adapter weigh, worked out from their shapes without loading them."""

from __future__ import annotations

import argparse
import math

from mmadapter.checkpoint import FILE_NAME, find_adapter, read_about
from mmadapter.config import AdapterConfig, LlamaConfig
from mmadapter.weights import open_weights
from mmadapter.weights.base import expected_shapes

# Shapes of the papers' bases, for planning before anything is there (LLaMA: arXiv 2302.13971, Table 2).
SHAPES = {
    "llama-7b": LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, 1e-6),
    "llama-13b": LlamaConfig(32000, 5120, 40, 40, 40, 128, 13824, 1e-6),
    "llama-33b": LlamaConfig(32000, 6656, 60, 52, 52, 128, 17920, 1e-6),
    "llama-65b": LlamaConfig(32000, 8192, 80, 64, 64, 128, 22016, 1e-6),
}
BYTES = {"float32": 4, "bfloat16": 2}


def base_parameters(config: LlamaConfig) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def adapter_parameters(adapter: AdapterConfig, base: LlamaConfig) -> dict[str, int]:
    """Trained numbers of prompts and gates: K * L * C and L * H (L for the scalar variant)."""
    gates = adapter.layers * (1 if adapter.gate == "scalar" else base.heads)
    return {"prompts": adapter.layers * adapter.prompt_length * base.width, "gates": gates}


def cache_bytes(config: LlamaConfig, tokens: int, dtype: str) -> int:
    """Keys and values of `tokens` tokens."""
    return 2 * config.layers * config.kv_heads * config.head_width * tokens * BYTES[dtype]


def activation_bytes(config: LlamaConfig, layers: int, tokens: int, dtype: str) -> int:
    """Estimate of what the backward pass keeps: per adapted layer and token the inputs of each operation (about 10 of
    width C, 4 of the feed-forward's), and logits and their gradient in float32, a target for every token."""
    per_layer = 10 * config.width + 4 * config.hidden_width
    return layers * tokens * per_layer * BYTES[dtype] + 2 * tokens * config.vocab_size * 4


def describe(arguments: argparse.Namespace) -> str:
    """The text of `python -m mmadapter info`.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: The base or the adapter cannot be read.
    """
    config = SHAPES.get(arguments.llama) or open_weights(arguments.llama).config
    dtype = "float32" if arguments.dtype == "float32" else "bfloat16"
    lines = [
        f"base          {arguments.llama}",
        f"  layers N    {config.layers}",
        f"  width C     {config.width}, feed-forward {config.hidden_width}",
        f"  heads H     {config.heads} of width {config.head_width}, {config.kv_heads} key/value heads",
        f"  vocabulary  {config.vocab_size}{', tied to the output' if config.tied else ''}",
        f"  context     {config.context} tokens",
        f"  parameters  {base_parameters(config):,}",
    ]
    parts: dict[str, int] = {}
    if arguments.adapter is not None and arguments.adapter != "none":
        path = find_adapter(arguments.adapter)
        path = path / FILE_NAME if path.is_dir() else path
        about = read_about(path)
        adapter = about.adapter
        parts = adapter_parameters(adapter, config)
        if about.vision is not None:
            parts["image projection"] = _stored_projection(path)
        lines += ["", f"adapter       {arguments.adapter}, {path.stat().st_size / 1e6:.1f} MB on disk"]
    else:
        layers = arguments.layers or max(1, config.layers - 2)
        adapter = AdapterConfig(layers, arguments.prompt_length, arguments.gate)
        parts = adapter_parameters(adapter, config)
        lines += ["", f"adapter       as it would be, {sum(parts.values()) * 4 / 1e6:.1f} MB on disk"]
    trained = sum(parts.values())
    lines += [f"  adapted L   {adapter.layers} layers, K = {adapter.prompt_length} prompts, gate {adapter.gate}"]
    lines += [f"  {name:<17} {count:>12,}" for name, count in parts.items()]
    lines += [f"  {'trained':<17} {trained:>12,}  ({trained / base_parameters(config):.3%} of the base)"]
    weights = base_parameters(config) * BYTES[dtype]
    tokens = arguments.batch_tokens
    training = weights + trained * 16 + activation_bytes(config, adapter.layers, tokens, dtype)
    lines += [
        "",
        f"memory, {dtype} (estimates)",
        f"  inference   {_gigabytes(weights + cache_bytes(config, 2048, dtype))} with 2,048 cached tokens",
        f"  training    {_gigabytes(training)} with {tokens:,} tokens a batch: base, activations, adapter with AdamW",
    ]
    return "\n".join(lines)


def _stored_projection(path) -> int:
    """Trained numbers of the image projection in an adapter file, from its header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith("projection.")]  # noqa: SIM118 - not a mapping
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
    statistics = ("projection.feature_mean", "projection.feature_std")
    return sum(size for name, size in sizes.items() if name not in statistics)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
