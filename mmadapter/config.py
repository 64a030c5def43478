"""The plain numbers that describe a base model, an adapter and an image encoder.

Modules take these numbers; they never read files. Each dataclass checks itself where it is made.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

GATES = ("tanh", "identity", "scalar")
TUNES = ("prompts", "prompts+bias+scale+norm")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA.

    Attributes:
        vocab_size: Rows of the token embedding, V.
        width: Model width, C.
        layers: Transformer blocks, N.
        heads: Query heads, H.
        kv_heads: Key/value heads, G; it divides H.
        head_width: Width of one head, D.
        hidden_width: Inner width of the SwiGLU feed-forward.
        norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_divisors: Divisor of each of the D/2 rotary frequencies (the LLaMA-3 scaling, see
            `llama3_rope_divisors`), or None for plain RoPE.
        tied: Whether the output projection is the token embedding.
        context: Longest sequence the model was trained for, in tokens.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden_width: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    tied: bool = False
    context: int = 2048

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "hidden_width", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key/value heads do not divide {self.heads} query heads")
        if self.head_width % 2:
            raise ValueError(f"rotary embeddings need an even head width, got {self.head_width}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_width // 2:
            raise ValueError(
                f"a head of width {self.head_width} has {self.head_width // 2} rotary frequencies, "
                f"got {len(self.rope_divisors)} divisors"
            )

    @property
    def attention_widths(self) -> tuple[int, int, int]:
        """Outputs of the linears of queries, keys and values."""
        return self.heads * self.head_width, self.kv_heads * self.head_width, self.kv_heads * self.head_width


def llama3_rope_divisors(
    head_width: int, theta: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> tuple[float, ...]:
    """Divisors of the D/2 rotary frequencies under the LLaMA-3.1 context scaling.

    Frequencies whose wavelength is longer than `original_context / low_freq_factor` tokens are divided by `factor`,
    those shorter than `original_context / high_freq_factor` stay, and those between are interpolated (Meta, "The
    Llama 3 Herd of Models", arXiv 2407.21783, and the reference configuration `rope_scaling` of LLaMA 3.1).
    """
    divisors = []
    for pair in range(head_width // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_width)
        smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1.0 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


@dataclass(frozen=True)
class AdapterConfig:
    """The shape of an adapter (LLaMA-Adapter, arXiv 2303.16199, section 3).

    Attributes:
        layers: Adapted layers, L: the topmost ones of the base model.
        prompt_length: Adaption prompts of one layer, K.
        gate: phi of the gate: "tanh" (one number a head, tanh), "identity" (one number a head, as it is) or "scalar"
            (one number a layer, as it is).
        prompt_std: Standard deviation of the prompts at the start.
        tune: What trains: "prompts" (and gates), or "prompts+bias+scale+norm", with the tuning of LLaMA-Adapter V2
            (`tuning`) in every layer of the base, adapted or not.
    """

    layers: int
    prompt_length: int = 10
    gate: str = "tanh"
    prompt_std: float = 1.0
    tune: str = "prompts"

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"an adapter needs at least one adapted layer, got {self.layers}")
        if self.prompt_length < 1:
            raise ValueError(f"prompt_length must be at least 1, got {self.prompt_length}")
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}")
        if self.prompt_std < 0:
            raise ValueError(f"prompt_std must not be negative, got {self.prompt_std}")
        if self.tune not in TUNES:
            raise ValueError(f"tune must be one of {', '.join(TUNES)}, got {self.tune!r}")


@dataclass(frozen=True)
class VisionConfig:
    """Which encoder sees the image, and what is read off it.

    Attributes:
        encoder: Spec of the tower: "efficientnet-lite2", "open_clip:ViT-L-14/openai", "timm:NAME" ...
        scales: What is read off the tower, in order. A scale is the number of a block or stage, counted from 1, or
            "final" (the tower's own last feature), optionally followed by "/RxC": the mean over each cell of an R by C
            grid instead of one global feature. Empty: the tower's default scales.
        image_size: Side in pixels of the square the image becomes; 0 takes the tower's own.
        resize: "squash" (the whole image, stretched to the square) or "crop" (shorter side, then the middle).
    """

    encoder: str
    scales: tuple[str, ...] = ()
    image_size: int = 0
    resize: str = "squash"

    def __post_init__(self) -> None:
        if self.resize not in ("squash", "crop"):
            raise ValueError(f'resize must be "squash" or "crop", got {self.resize!r}')
        if self.image_size < 0:
            raise ValueError(f"image_size must not be negative, got {self.image_size}")


def from_dict(cls: type, values: dict) -> object:
    """Builds the dataclass `cls` from a mapping, lists becoming tuples.

    Raises:
        ValueError: A key is not a field of `cls`, or a field without a default is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; {cls.__name__} has {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
