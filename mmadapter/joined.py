"""Attention and feed-forward with one linear for all that read the same input: fewer calls for one token's decoding.

What a kernel call costs by itself counts where few rows are computed at once, on a CPU a tenth of a step. The numbers
are those of the plain modules of `llama`, whose place these take where a base is packed for inference (`packed`,
`quantised`); nothing trains on them.

Shapes: as in `llama`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmadapter.config import LlamaConfig
from mmadapter.llama import Affine, Attention, FeedForward, LayerTuning, rotate, tuned

PARTS = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}  # of each joined linear, from its first outputs on


class JoinedAttention(Attention):
    """`Attention` with one linear for queries, keys and values; queries and keys are rotated together.

    Its linears are on the meta device until others are put in their place.
    """

    def __init__(self, config: LlamaConfig) -> None:
        with torch.device("meta"):
            super().__init__(config)
            self.wqkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_width, bias=False)
        del self.wq, self.wk, self.wv

    def wk(self, x: Tensor) -> Tensor:
        """Keys alone, [..., C] -> [..., G * D]."""
        return self.wqkv(x)[..., self.heads * self.head_width : (self.heads + self.kv_heads) * self.head_width]

    def wv(self, x: Tensor) -> Tensor:
        """Values alone, [..., C] -> [..., G * D]."""
        return self.wqkv(x)[..., (self.heads + self.kv_heads) * self.head_width :]

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor], tuning: LayerTuning) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        joined = tuned(self.wqkv(x), _joined(tuning.wq, tuning.wk, tuning.wv)).view(B, T, -1, self.head_width)
        joined = joined.transpose(1, 2)  # [B, H + 2 G, T, D]
        turning = self.heads + self.kv_heads
        q, k = rotate(joined[:, :turning], rope).split((self.heads, self.kv_heads), dim=1)
        return q, k, joined[:, turning:]


class JoinedFeedForward(FeedForward):
    """`FeedForward` with one linear for both its inner halves; on the meta device as `JoinedAttention`."""

    def __init__(self, config: LlamaConfig) -> None:
        with torch.device("meta"):
            super().__init__(config)
            self.w13 = nn.Linear(config.width, 2 * config.hidden_width, bias=False)
        del self.w1, self.w3

    def project(self, x: Tensor, tuning: LayerTuning) -> tuple[Tensor, Tensor]:
        gate, up = tuned(self.w13(x), _joined(tuning.w1, tuning.w3)).chunk(2, dim=-1)
        return gate, up


def _joined(*affines: Affine | None) -> Affine | None:
    """One for the joined outputs; a layer has all of its linears tuned or none."""
    if affines[0] is None:
        return None
    return Affine(*(torch.cat(parts, dim=-1) for parts in zip(*affines, strict=True)))
