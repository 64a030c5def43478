"""What a base and an adapter weigh; the base is worked out from its shapes, without loading it."""

from __future__ import annotations

import math
from pathlib import Path

from mmadapter.checkpoint import FILE_NAME, Fingerprint, find_adapter, load_adapter
from mmadapter.config import AdapterConfig, LlamaConfig
from mmadapter.decode_step import NARROW
from mmadapter.tuning import linear_widths
from mmadapter.weights import expected_shapes, read_config

# Shapes of the papers' bases, for planning before anything is there (LLaMA: arXiv 2302.13971, Table 2).
SHAPES = {
    "llama-7b": LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, 1e-6),
    "llama-13b": LlamaConfig(32000, 5120, 40, 40, 40, 128, 13824, 1e-6),
    "llama-33b": LlamaConfig(32000, 6656, 60, 52, 52, 128, 17920, 1e-6),
    "llama-65b": LlamaConfig(32000, 8192, 80, 64, 64, 128, 22016, 1e-6),
}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 2, "int4": 2}  # of a number; of a packed base, what is not packed
PACKED_BYTES = {"int8": 1.0, "int4": 0.625}  # of a weight of a block with its share of scales (`quantised`)


def base_parameters(config: LlamaConfig) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def adapter_parameters(adapter: AdapterConfig, base: LlamaConfig) -> dict[str, int]:
    """Trained numbers of prompts, K * L * C, of gates, L * H (L for the scalar variant), and of the tuning if any."""
    gates = adapter.layers * (1 if adapter.gate == "scalar" else base.heads)
    parts = {"prompts": adapter.layers * adapter.prompt_length * base.width, "gates": gates}
    if adapter.tune != "prompts":
        block = 2 * sum(linear_widths(base).values()) + 2 * base.width  # scales and biases, norms
        parts["tuning"] = base.layers * block + base.width
    return parts


def weight_bytes(config: LlamaConfig, dtype: str) -> float:
    """The base's weights; of a packed one embedding and output projection have a byte each."""
    if dtype not in PACKED_BYTES:
        return base_parameters(config) * BYTES[dtype]
    outside = config.vocab_size * config.width * (1 if config.tied else 2)
    return outside + (base_parameters(config) - outside) * PACKED_BYTES[dtype]


def cache_bytes(config: LlamaConfig, tokens: int, dtype: str) -> int:
    """Keys and values of `tokens` tokens."""
    return 2 * config.layers * config.kv_heads * config.head_width * tokens * BYTES[dtype]


def activation_bytes(config: LlamaConfig, adapter: AdapterConfig, tokens: int, dtype: str) -> int:
    """Estimate of what the backward pass keeps: per adapted layer and token the inputs of each operation (about 10 of
    width C, 4 of the feed-forward's), and logits and their gradient in float32, a target for every token. Tuning adapts
    every layer, and keeps each linear's output too."""
    layers, per_layer = adapter.layers, 10 * config.width + 4 * config.hidden_width
    if adapter.tune != "prompts":
        layers, per_layer = config.layers, per_layer + sum(linear_widths(config).values())
    return layers * tokens * per_layer * BYTES[dtype] + 2 * tokens * config.vocab_size * 4


def describe(
    llama: str,
    adapter: str | None = None,
    *,
    dtype: str = "bfloat16",
    layers: int | None = None,
    prompt_length: int = 10,
    gate: str = "tanh",
    batch_tokens: int = 2048,
) -> str:
    """The text of `python -m mmadapter info`.

    Args:
        llama: A name in `SHAPES`, or the spec of a base.
        adapter: Name, folder or file of an adapter; None describes one as it would be.
        dtype: "float32", "bfloat16", "int8" or "int4", of the base in memory.
        layers: Adapted layers of an adapter as it would be, L; None is all but two of the base.
        prompt_length: K of such an adapter, or of an official `.pth`.
        gate: Gate variant of such an adapter, or of an official `.pth`.
        batch_tokens: Tokens of a training batch.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: The base or the adapter cannot be read, or they do not fit.
    """
    config = SHAPES.get(llama) or read_config(llama)
    lines = [
        f"base          {llama}",
        f"  layers N    {config.layers}",
        f"  width C     {config.width}, feed-forward {config.hidden_width}",
        f"  heads H     {config.heads} of width {config.head_width}, {config.kv_heads} key/value heads",
        f"  vocabulary  {config.vocab_size:,}{', tied to the output' if config.tied else ''}",
        f"  context     {config.context:,} tokens",
        f"  parameters  {base_parameters(config):,}",
        "",
    ]
    if adapter is not None:
        loaded, about = load_adapter(
            adapter, config, Fingerprint.of(config, None), prompt_length=prompt_length, gate=gate
        )
        shape = about.adapter
        parts = adapter_parameters(shape, config)
        if loaded.projection is not None:
            parts["image projection"] = sum(parameter.numel() for parameter in loaded.projection.parameters())
        lines.append(f"adapter       {adapter}, {_disk_bytes(find_adapter(adapter)) / 1e6:.1f} MB on disk")
        if about.vision is not None:
            scales = ", ".join(about.vision.scales) or "its own"
            lines.append(f"  image       {about.vision.encoder}, scales {scales}")
    else:
        shape = AdapterConfig(max(1, config.layers - 2) if layers is None else layers, prompt_length, gate)
        if shape.layers > config.layers:
            raise ValueError(f"{llama} has {config.layers} layers, so {shape.layers} cannot be adapted; set --layers")
        parts = adapter_parameters(shape, config)
        lines.append(f"adapter       as it would be, {sum(parts.values()) * 4 / 1e6:.1f} MB on disk")
    trained = sum(parts.values())
    tuning = f", tuned bias, scale and norm of {config.layers}" if shape.tune != "prompts" else ""
    lines += [f"  adapted L   {shape.layers} layers, K = {shape.prompt_length} prompts, gate {shape.gate}{tuning}"]
    lines += [f"  {name:<17} {count:>12,}" for name, count in parts.items()]
    lines += [f"  {'trained':<17} {trained:>12,}  ({trained / base_parameters(config):.3%} of the base)"]
    weights = weight_bytes(config, dtype)
    training = weights + trained * 16 + activation_bytes(config, shape, batch_tokens, dtype)
    inference = weights + cache_bytes(config, 2048, "float32" if config.width <= NARROW else dtype)
    lines += [
        "",
        f"memory, {dtype} (estimates)",
        f"  inference   {_gigabytes(inference)} with 2,048 cached tokens of one text",
    ]
    if dtype not in PACKED_BYTES:  # a packed base cannot be trained on
        lines.append(
            f"  training    {_gigabytes(training)} with {batch_tokens:,} tokens a batch: base, activations, AdamW"
        )
    return "\n".join(lines)


def _disk_bytes(path: Path) -> int:
    """Size of an adapter file, or of the one in a folder of ours or of peft, where a training run may have more."""
    files = [path] if path.is_file() else [*path.glob(FILE_NAME), *path.glob("adapter_model.*")][:1]
    return sum(file.stat().st_size for file in files)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
