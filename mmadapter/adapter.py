"""Zero-gated adaption prompts and the image token (LLaMA-Adapter, arXiv 2303.16199, section 3).

For an adapted layer with prompt P_l [K, C], image token I [B, C], rotated query q and gate g:

    P      = P_l + I                                                       (Eq. 10)
    out    = softmax(q k^T / sqrt(D)) v + phi(g) * softmax(q k_p^T / sqrt(D)) v_p,   k_p, v_p = W_k P, W_v P

The second term is `PromptKV.attend`; `Adapter.prompts` makes k_p, v_p and phi(g) once, for as long as adapter and
image stay the same.

Shapes: B batch, T tokens, C width, H query heads, G key/value heads, D head width, N layers, L adapted layers,
K prompt length, F width of the image features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapter.config import AdapterConfig
from mmadapter.llama import Llama
from mmadapter.vision import ImageProjection


@dataclass(frozen=True)
class PromptKV:
    """One layer's adaption prompts as attention sees them. A dimension B may be 1: all rows share it.

    Attributes:
        key: [B, G, K, D].
        value: [B, G, K, D].
        gate: phi(g) times the strength, [B, H].
        mask: True where a row has a prompt, [B, K]; None where all rows have all K.
    """

    key: Tensor
    value: Tensor
    gate: Tensor
    mask: Tensor | None = None

    def attend(self, q: Tensor) -> Tensor:
        """phi(g) * softmax(q k_p^T / sqrt(D)) v_p, a softmax of its own beside the text's (Eq. 7).

        Args:
            q: Rotated queries, [B, H, T, D]. Head h reads key/value head h // (H / G).

        Returns:
            [B, H, T, D].
        """
        B, H, T, D = q.shape
        G = self.key.shape[1]
        grouped = q.reshape(B, G, H // G * T, D)
        scores = grouped @ self.key.transpose(2, 3) * D**-0.5  # [B, G, H/G * T, K]
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask[:, None, None, :], float("-inf"))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out = (weights @ self.value).view(B, H, T, D)
        return self.gate[:, :, None, None] * out

    def select(self, rows: Tensor) -> PromptKV:
        """The rows of index `rows` [B']; what all rows share stays shared."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[rows]

        mask = None if self.mask is None else pick(self.mask)
        return PromptKV(pick(self.key), pick(self.value), pick(self.gate), mask)


Prompts = tuple[PromptKV | None, ...]  # one entry for each of the N layers; None where a layer is not adapted


class Adapter(nn.Module):
    """Everything that is trained: prompts, gates and, for images, the projection to the image token.

    Its parameters are the one list that freezing, counting, the optimiser and saving go by.

    Args:
        config: L, K, gate variant, scale of the prompts at the start.
        width: Model width of the base, C.
        heads: Query heads of the base, H.
        projection: Image features [B, F] -> image token [B, C]; None for a text adapter.
    """

    def __init__(
        self, config: AdapterConfig, *, width: int, heads: int, projection: ImageProjection | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.prompt = nn.Parameter(torch.randn(config.layers, config.prompt_length, width) * config.prompt_std)
        self.gate = nn.Parameter(torch.zeros(config.layers, 1 if config.gate == "scalar" else heads))
        self.projection = projection

    def gate_values(self) -> Tensor:
        """phi(g), [L, H], or [L, 1] for the scalar variant."""
        return self.gate.tanh() if self.config.gate == "tanh" else self.gate

    def prompts(
        self,
        llama: Llama,
        features: Tensor | None = None,
        *,
        has_image: Tensor | None = None,
        strength: float = 1.0,
    ) -> Prompts:
        """Keys, values and gates of every layer, computed once for an adapter and its images.

        W_v is linear, so W_v (P_l + I) = W_v P_l + W_v I: K + B rows instead of K * B. W_k I would add q . W_k I to all
        K scores of a query alike, which no softmax sees, so the keys are W_k P_l whatever the image.

        Args:
            llama: The base whose W_k and W_v are used.
            features: Image features, [B, F]; None for text.
            has_image: False where a row takes no image token, [B]; None: every row of `features` has one.
            strength: Factor on phi(g): 0 is the base model, 1 the adapter as trained.

        Raises:
            ValueError: The base has too few layers, or features were given to a text adapter.
        """
        first = llama.config.layers - self.config.layers
        if first < 0:
            raise ValueError(f"an adapter of {self.config.layers} layers does not fit a base of {llama.config.layers}")
        if features is not None and self.projection is None:
            raise ValueError("this adapter was trained without images; load one that has an image encoder")
        token = None
        if features is not None:
            token = self.projection(features)  # [B, C]
            if has_image is not None:
                token = token * has_image[:, None]
        gates = (self.gate_values() * strength).expand(-1, llama.config.heads)  # [L, H]
        result: list[PromptKV | None] = [None] * first
        for block, prompt, gate in zip(llama.layers[first:], self.prompt, gates, strict=True):
            attention = block.attention
            prompt = prompt.to(llama.dtype)
            key = _split_heads(attention.wk(prompt), attention.kv_heads)[None]  # [1, G, K, D]
            value = _split_heads(attention.wv(prompt), attention.kv_heads)[None]  # [1, G, K, D]
            if token is not None:
                image_value = attention.wv(token.to(llama.dtype))  # [B, G * D]
                value = value + image_value.view(len(token), attention.kv_heads, 1, -1)  # [B, G, K, D]
            result.append(PromptKV(key, value, gate.to(llama.dtype)[None]))
        return tuple(result)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[K, G * D] -> [G, K, D]."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def stack_prompts(rows: Sequence[Prompts | None]) -> Prompts | None:
    """Puts the prompts of single rows into one batch, whatever adapter, image and K each of them has.

    A row whose adapter leaves a layer alone, or that has no adapter (None), gets a gate of zero there.

    Args:
        rows: For each row its prompts with B = 1, or None.

    Returns:
        Prompts of batch size len(rows), or None where no row has any.
    """
    given = [row for row in rows if row is not None]
    if not given:
        return None
    if all(row is rows[0] for row in rows):
        return rows[0]
    return tuple(_stack_layer([None if row is None else row[layer] for row in rows]) for layer in range(len(given[0])))


def _stack_layer(rows: Sequence[PromptKV | None]) -> PromptKV | None:
    given = [row for row in rows if row is not None]
    if not given:
        return None
    longest = max(given, key=lambda row: row.key.shape[2])
    K = longest.key.shape[2]
    keys, values, gates, masks = [], [], [], []
    for row in rows:
        if row is None:  # zero keys and values, all of them visible: finite, and the gate removes them
            keys.append(torch.zeros_like(longest.key[:1]))
            values.append(torch.zeros_like(longest.value[:1]))
            gates.append(torch.zeros_like(longest.gate[:1]))
            masks.append(torch.ones(1, K, dtype=torch.bool, device=longest.key.device))
        else:
            missing = K - row.key.shape[2]
            keys.append(F.pad(row.key, (0, 0, 0, missing)))
            values.append(F.pad(row.value, (0, 0, 0, missing)))
            gates.append(row.gate)
            visible = (
                torch.ones(1, K - missing, dtype=torch.bool, device=row.key.device) if row.mask is None else row.mask
            )
            masks.append(F.pad(visible, (0, missing), value=False))
    mask = torch.cat(masks)
    return PromptKV(torch.cat(keys), torch.cat(values), torch.cat(gates), None if mask.all() else mask)


def select_prompts(prompts: Prompts | None, rows: Tensor) -> Prompts | None:
    """The rows of index `rows` [B'] of a batch's prompts; a row may be taken more than once."""
    if prompts is None:
        return None
    return tuple(None if layer is None else layer.select(rows) for layer in prompts)
