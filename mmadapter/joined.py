"""Attention and feed-forward with one linear for all that read the same input: fewer calls for one token's decoding.

What a kernel call costs by itself counts where few rows are computed at once, on a CPU a tenth of a step. The numbers
are those of `llama.Attention` and `llama.FeedForward`, whose place these take where a base is packed for inference
(`packed`, `quantised`); nothing trains on them.

Shapes: as in `llama`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from mmadapter.config import LlamaConfig
from mmadapter.llama import KVCache, LayerTuning, attend_both, rotate, tuned

if TYPE_CHECKING:
    from mmadapter.adapter import PromptKV

PARTS = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}  # of each joined linear, from its first outputs on


def whole_of(part: str) -> str | None:
    """The joined linear that one of the plain modules is part of."""
    return next((whole for whole, parts in PARTS.items() if part in parts), None)


class JoinedAttention(nn.Module):
    """`Attention` with one linear for queries, keys and values; queries and keys are rotated together.

    Its linears are on the meta device until others are put in their place.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.widths = config.attention_widths
        self.wqkv = nn.Linear(config.width, sum(self.widths), bias=False, device="meta")
        self.wo = nn.Linear(config.heads * config.head_width, config.width, bias=False, device="meta")

    def forward(
        self,
        x: Tensor,
        layer: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        prompt: PromptKV | None,
        tuning: LayerTuning,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]; the arguments are those of `Attention.forward`."""
        B, T, _ = x.shape
        joined = tuned(self.wqkv(x), tuning.wqkv).view(B, T, -1, self.head_width)
        joined = joined.transpose(1, 2)  # [B, H + 2 G, T, D]
        turning = self.heads + self.kv_heads
        q, k = rotate(joined[:, :turning], rope).split((self.heads, self.kv_heads), dim=1)
        mixed = attend_both(q, k, joined[:, turning:], layer, mask, cache, prompt)
        return tuned(self.wo(mixed), tuning.wo)

    def key_of(self, x: Tensor) -> Tensor:
        """W_k x, [..., C] -> [..., G * D]."""
        return self._parts(x)[1]

    def value_of(self, x: Tensor) -> Tensor:
        """W_v x, [..., C] -> [..., G * D]."""
        return self._parts(x)[2]

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.wqkv(x).split(self.widths, dim=-1)


class JoinedFeedForward(nn.Module):
    """`FeedForward` with one linear for both its inner halves; on the meta device as `JoinedAttention`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.width, 2 * config.hidden_width, bias=False, device="meta")
        self.w2 = nn.Linear(config.hidden_width, config.width, bias=False, device="meta")

    def forward(self, x: Tensor, tuning: LayerTuning) -> Tensor:
        gate, up = tuned(self.w13(x), tuning.w13).chunk(2, dim=-1)
        return tuned(self.w2(F.silu(gate) * up), tuning.w2)  # [B, T, C]
