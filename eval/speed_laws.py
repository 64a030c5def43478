"""What arithmetic and memory say that things cost, and how well measured costs keep to it.

Shapes: T tokens of a row, P numbers of the blocks' matrices, V vocabulary, C width, N layers, L adapted layers, K
prompt length, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmadapter.config import LlamaConfig
from mmadapter.tuning import linear_widths


def block_numbers(config: LlamaConfig) -> int:
    """Numbers of the matrices of one block."""
    inner = config.heads * config.head_width
    attention = 2 * config.width * inner + 2 * config.width * config.kv_heads * config.head_width
    return attention + 3 * config.width * config.hidden_width


def forward_flops(config: LlamaConfig, length: int, rows: int = 1) -> float:
    """Floating-point operations of the blocks over rows of T tokens: 2 N P T, and causal attention 2 N H D T^2."""
    attention = 2 * config.layers * config.heads * config.head_width * length**2
    return rows * (2.0 * config.layers * block_numbers(config) * length + attention)


def training_flops(config: LlamaConfig, length: int, rows: int, layers: int, prompt_length: int) -> float:
    """Operations of a training step with every position a target.

    Nothing of the base is trained, so the backward pass through a matrix costs what the forward pass does, and it goes
    through the L adapted layers only. The prompts add 4 L H D K a token forward, and twice as much backward; logits
    cost 2 V C a token each way.
    """
    forward = forward_flops(config, length, rows)
    attention = rows * 2.0 * config.layers * config.heads * config.head_width * length**2
    backward = (forward + attention) * layers / config.layers  # attention has two operands, both of which need theirs
    prompts = 12.0 * layers * config.heads * config.head_width * prompt_length * length * rows
    logits = 4.0 * config.vocab_size * config.width * length * rows
    return forward + backward + prompts + logits


def cache_bytes(config: LlamaConfig, tokens: float, item: int) -> float:
    """Keys and values of so many tokens, in numbers of `item` bytes."""
    return 2.0 * config.layers * config.kv_heads * config.head_width * tokens * item


def decoding_bytes(config: LlamaConfig, weight_bytes: float, start: int, new: int, rows: int, item: int) -> float:
    """Bytes that decoding `new` tokens a row reads: all weights each step, and the keys and values so far."""
    seen = new * start + new * (new + 1) / 2
    return new * weight_bytes + rows * cache_bytes(config, seen, item)


def kept_bytes(config: LlamaConfig, layers: int, tokens: int, item: int) -> float:
    """What the backward pass keeps of the adapted layers: each operation's input, about 10 of width C a token and 4 of
    the feed-forward's."""
    return float(layers * tokens * (10 * config.width + 4 * config.hidden_width) * item)


def passing_bytes(config: LlamaConfig, tokens: int, item: int) -> float:
    """The outputs of one block's matrices, which a forward pass without gradients holds one block at a time."""
    return float(sum(linear_widths(config).values()) * tokens * item)


@dataclass(frozen=True)
class Fit:
    """measured = offset + scale * law, by least squares.

    Attributes:
        r2: Share of the variance that the law explains; 1 where nothing varies and nothing is left over.
        worst: The largest distance between a measured value and the line, as a share of the largest measured value.
    """

    offset: float
    scale: float
    r2: float
    worst: float

    def at(self, law: float) -> float:
        return self.offset + self.scale * law


def fit(law: Sequence[float], measured: Sequence[float]) -> Fit:
    """Fits the line through measured values over what the law says of each.

    Raises:
        ValueError: There are fewer than two different values of the law.
    """
    if len(law) != len(measured) or len(set(law)) < 2:
        raise ValueError(f"a line needs two different points at least, got {len(set(law))}")
    mean_law, mean = sum(law) / len(law), sum(measured) / len(measured)
    variance = sum((x - mean_law) ** 2 for x in law)
    scale = sum((x - mean_law) * (y - mean) for x, y in zip(law, measured, strict=True)) / variance
    offset = mean - scale * mean_law
    left = [y - offset - scale * x for x, y in zip(law, measured, strict=True)]
    total = sum((y - mean) ** 2 for y in measured)
    unexplained = sum(rest**2 for rest in left)
    r2 = 1 - unexplained / total if total else 1.0
    largest = max(abs(y) for y in measured)
    return Fit(offset, scale, r2, max(abs(rest) for rest in left) / largest if largest else 0.0)
