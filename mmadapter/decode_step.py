"""One new token a row on a CPU, in as few kernels as will do: what answers are written with.

A step reads every weight for a few products a row, and beside that what each of hundreds of calls costs by itself is a
fifth of the time of a small base. So here stands the loop over the layers of `Llama.hidden` once more, for T = 1, on a
base that is packed or quantised (`joined`), with what stays the same from token to token made ready before: the norms'
weights, and the prompts as attention takes them. Attention is in float32, for few numbers (`KEYS`) the faster format.
What comes out is what the plain loop gives, up to the order of sums and to where bfloat16 is rounded.

Shapes: as in `llama`, and R rows of prompts: 1 where all rows share them, else B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadapter.llama import UNTUNED, KVCache, LayerTuning, Llama, RMSNorm, rope_frequencies, rope_table, tuned

if TYPE_CHECKING:
    from mmadapter.adapter import PromptKV, Prompts

FEW = 16  # rows up to which the number of kernels counts more than what they compute
NARROW = 1024  # width of a base up to which it does
KEYS = 3 * 2**18  # numbers in the keys of all rows, from which on making float32 of them costs more than it saves


@dataclass(frozen=True)
class HeadPrompts:
    """One layer's adaption prompts, head by head, in float32.

    Attributes:
        key: k_p, [R * H, K, D].
        value: phi(g) v_p, [R * H, K, D].
        bias: 0, or -inf where a row has no prompt, [R * H, 1, K]; None where all rows have all K, as where R = 1.
        image: phi(g) times what each row's image adds to its values, [B, H, D]; None where `value` has it.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None
    image: Tensor | None

    @classmethod
    def of(cls, prompt: PromptKV) -> HeadPrompts:
        """The prompts of `prompt`, laid out anew."""
        R = 1 if len(prompt.key) == len(prompt.gate) == 1 and prompt.mask is None else prompt.batch
        H = prompt.gate.shape[1]

        def by_head(x: Tensor) -> Tensor:
            """[1 or B, G, n, D] -> float32 [at least R, H, n, D]."""
            return x.float().expand(max(R, len(x)), -1, -1, -1).repeat_interleave(H // x.shape[1], dim=1)

        gate = prompt.gate.float()[:, :, None, None]  # [1 or B, H, 1, 1]
        value, image = by_head(prompt.value), None
        if prompt.image is not None and len(prompt.image) <= R:
            value = value + by_head(prompt.image)
        elif prompt.image is not None:
            image = (gate * by_head(prompt.image)).squeeze(2)  # [B, H, D]
        bias = None
        if prompt.mask is not None:
            bias = _bias(prompt.mask[:, None, None]).expand(R, H, 1, -1).flatten(0, 1)
        return cls(by_head(prompt.key).flatten(0, 1), (gate * value).flatten(0, 1), bias, image)

    def add(self, out: Tensor, q: Tensor) -> Tensor:
        """out + phi(g) * softmax(q k_p^T / sqrt(D)) v_p (Eq. 7), both float32 [B, H, D]; q as `attend_one` takes it."""
        B, H, D = q.shape
        if B > 1 and len(self.key) == H:  # R = 1: the rows of a head stand together, and K where a softmax is quick
            weights = _softmax(self.key, q.permute(1, 2, 0), None, dim=1).transpose(1, 2)  # [H, B, K]
            seen = torch.baddbmm(out.transpose(0, 1), weights, self.value).transpose(0, 1)
        else:
            weights = _softmax(q.reshape(B * H, 1, D), self.key.transpose(1, 2), self.bias, dim=2)  # [B * H, 1, K]
            seen = torch.baddbmm(out.view(B * H, 1, D), weights, self.value).view(B, H, D)
        return seen if self.image is None else seen + self.image


def attend_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`llama.attend` for one query a row: the queries of a group are rows of one head, so that no key is repeated.

    Of keys of more than `KEYS` numbers in bfloat16 it is torch's kernel in that format, which rounds the queries, too.

    Args:
        q: Rotated queries divided by sqrt(D), float32 [B, H, D].
        k, v: [B, G, S, D].
        bias: 0, or -inf where a query may not look, float32 [B * G, 1, S]; None: it may look everywhere.

    Returns:
        float32 [B, H, D].
    """
    B, G, S, D = k.shape
    if k.dtype != torch.float32 and k.numel() > KEYS:
        q, bias = q.view(B, G, -1, D).to(k.dtype), None if bias is None else bias.view(B, G, 1, S).to(k.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1).float().reshape(B, -1, D)
    q, k, v = q.reshape(B * G, -1, D), k.float().flatten(0, 1), v.float().flatten(0, 1)
    return torch.bmm(_softmax(q, k.transpose(1, 2), bias, dim=2), v).view(B, -1, D)


def _softmax(a: Tensor, b: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """softmax(a b + bias), [n, rows, D] and [n, D, columns] -> [n, rows, columns]."""
    return torch.softmax(torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b), dim=dim)


def _bias(mask: Tensor) -> Tensor:
    """0 where the mask is True, else -inf, in float32."""
    return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def norm_weight(norm: RMSNorm, difference: Tensor | None) -> Tensor:
    """The weight of an RMS norm as `normalised` takes it: [C] twice, or [B, 1, C] where rows differ."""
    weight = norm.weight if difference is None else norm.weight + difference
    return weight if weight.ndim > 1 and len(weight) > 1 else weight.view(-1).repeat(2)


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm.forward` with a weight of `norm_weight`: [B, 1, C] -> [B, 1, C]."""
    C = x.shape[-1]
    if weight.ndim > 1:
        return F.rms_norm(x, (C,), None, eps) * weight
    if len(x) > FEW:
        return F.rms_norm(x, (C,), weight[:C], eps)
    # The mean of (x, -x) is 0, so its layer norm is (y, -y). On a CPU that is one kernel, the RMS norm eight.
    return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * C,), weight, None, eps)[..., :C]


@dataclass(frozen=True)
class ReadyLayer:
    """What a layer takes beside the base's linears.

    Attributes:
        attention_norm, ffn_norm: Weights, of `norm_weight`.
        prompt: None where the layer has none.
        tuning: Of the linears.
    """

    attention_norm: Tensor
    ffn_norm: Tensor
    prompt: HeadPrompts | None
    tuning: LayerTuning


class Ready(NamedTuple):
    """What stays the same from token to token: of each layer, and the weight of the final norm (`norm_weight`)."""

    layers: list[ReadyLayer]
    norm: Tensor


class DecodeStep:
    """The layers of a frozen base whose blocks are joined, for one new token a row."""

    def __init__(self, llama: Llama) -> None:
        config = llama.config
        self.config, self.blocks, self.norm = config, llama.layers, llama.norm
        self._frequencies = rope_frequencies(config, llama.device)
        # Bound once: a module's attributes and its call go through Python several times, which shows here.
        self._linears = [
            (attention.wqkv.forward, attention.wo.forward, feed_forward.w13.forward, feed_forward.w2.forward)
            for attention, feed_forward in ((block.attention, block.feed_forward) for block in llama.layers)
        ]
        self._turning = config.heads + config.kv_heads  # heads of what is rotated
        self._scale = torch.ones(self._turning, 1)
        self._scale[: config.heads] = config.head_width**-0.5
        self._plain = self._make_ready(None)

    def widens(self, rows: int) -> bool:
        """Whether for so many rows of this base a cache in float32 is worth its size: nothing is converted then."""
        return rows <= FEW and self.config.width <= NARROW

    def takes(self, tokens: Tensor, cache: KVCache | None) -> bool:
        """Whether new tokens [B, T] are for this step, after those in the cache."""
        return tokens.shape[1] == 1 and cache is not None and cache.length > 0

    def _make_ready(self, prompts: Prompts | None) -> Ready:
        layers = []
        for index, block in enumerate(self.blocks):
            prompt, tuning = (None, UNTUNED) if prompts is None else (prompts.layers[index], prompts.tuning[index])
            norms = (
                norm_weight(block.attention_norm, tuning.attention_norm),
                norm_weight(block.ffn_norm, tuning.ffn_norm),
            )
            layers.append(ReadyLayer(*norms, None if prompt is None else HeadPrompts.of(prompt), tuning))
        return Ready(layers, norm_weight(self.norm, None if prompts is None else prompts.norm))

    def __call__(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache, prompts: Prompts | None
    ) -> Tensor:
        """Embeddings to final hidden states, both [B, 1, C], as the plain loop has them.

        Args:
            x: Embeddings; they are overwritten.
            positions: Of the new tokens, [1] or [B, 1].
            mask: True where a query may look, [B, 1, 1, S]; None: everywhere.
            cache: Earlier tokens. Keys and values of the new ones are stored behind them; its length stays.
            prompts: What an adapter adds; None is the base model.
        """
        known, ready = (None, self._plain) if prompts is None else cache.ready
        if known is not prompts:
            ready = self._make_ready(prompts)
            cache.ready = (prompts, ready)
        B, heads, turning, D = len(x), self.config.heads, self._turning, self.config.head_width
        eps, dtype = self.config.norm_eps, x.dtype
        rope = rope_table(self._frequencies, positions, dtype)
        cos, sin = (part[:, 0] * self._scale for part in rope)  # float32 [1 or B, H + G, D]
        bias = None if mask is None else _bias(mask).repeat_interleave(self.config.kv_heads, dim=0).squeeze(1)
        for linears, layer, cached in zip(self._linears, ready.layers, cache.one_more(), strict=True):
            (wqkv, wo, w13, w2), tuning, (new_key, k, new_value, v) = linears, layer.tuning, cached
            normed = normalised(x, layer.attention_norm, eps)
            joined = tuned(wqkv(normed), tuning.wqkv).view(B, -1, D)  # [B, H + 2 G, D]
            turned = joined[:, :turning]
            turned = torch.addcmul(turned * cos, turned.roll(D // 2, -1), sin)  # float32 [B, H + G, D]
            q = turned[:, :heads]
            new_key.copy_(turned[:, heads:])
            new_value.copy_(joined[:, turning:])
            mixed = attend_one(q, k, v, bias)  # [B, H, D]
            if layer.prompt is not None:
                mixed = layer.prompt.add(mixed, q)
            mixed = mixed.to(dtype).reshape(B, 1, heads * D)
            x.add_(tuned(wo(mixed), tuning.wo))
            normed = normalised(x, layer.ffn_norm, eps)
            gate, up = tuned(w13(normed), tuning.w13).chunk(2, dim=-1)
            x.add_(tuned(w2(F.silu(gate) * up), tuning.w2))
        return normalised(x, ready.norm, eps)
