"""Zero-gated adaption prompts and the image token (LLaMA-Adapter, arXiv 2303.16199, section 3).

For an adapted layer with prompt P_l [K, C], image token I [B, C], rotated query q and gate g:

    P      = P_l + I                                                       (Eq. 10)
    out    = softmax(q k^T / sqrt(D)) v + phi(g) * softmax(q k_p^T / sqrt(D)) v_p,   k_p, v_p = W_k P, W_v P

The second term is `PromptKV.add`'s (and, a token at a time, `decode_step`'s); `Adapter.prompts` makes k_p, v_p and
phi(g) once, for as long as adapter and image stay the same. An adapter may also tune the base's linears and norms
(`tuning`).

Shapes: B batch, T tokens, C width, H query heads, G key/value heads, D head width, N layers, L adapted layers,
K prompt length, F width of the image features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapter.config import AdapterConfig, LlamaConfig
from mmadapter.llama import UNTUNED, LayerTuning, Llama
from mmadapter.tuning import Tuning, select_tuning, stack_tuning
from mmadapter.vision import ImageProjection


@dataclass(frozen=True)
class PromptKV:
    """One layer's adaption prompts as attention sees them. A dimension B may be 1: all rows share it; those of keys and
    values are the same.

    An image adds the same W_v I to each of the K values, and weights of a softmax sum to 1, so it adds W_v I to their
    mean, too. Kept by itself it leaves keys and values that a whole batch of images shares.

    Attributes:
        key: [B, G, K, D].
        value: [B, G, K, D].
        gate: phi(g) times the strength, [B, H].
        mask: True where a row has a prompt, [B, K]; None where all rows have all K.
        image: What each row's image adds to its values, [B, G, 1, D]; None for text.
    """

    key: Tensor
    value: Tensor
    gate: Tensor
    mask: Tensor | None = None
    image: Tensor | None = None

    @property
    def batch(self) -> int:
        """How many rows these are for; 1 fits any number."""
        return max(len(tensor) for tensor in (self.key, self.gate, self.image) if tensor is not None)

    @property
    def values(self) -> Tensor:
        """The values with what the images add, [B, G, K, D]."""
        return self.value if self.image is None else self.value + self.image

    def add(self, out: Tensor, q: Tensor) -> Tensor:
        """out + phi(g) * softmax(q k_p^T / sqrt(D)) v_p, a softmax of its own beside the text's (Eq. 7).

        Args:
            out: What attention over the text gave, [B, H, T, D].
            q: Rotated queries, [B, H, T, D]. Head h reads key/value head h // (H / G).

        Returns:
            [B, H, T, D].
        """
        B, H, T, D = q.shape
        G = self.key.shape[1]
        gate = self.gate[:, :, None, None]  # [1 or B, H, 1, 1]
        if T > 1:
            return out + self._attend_many(q, gate)
        # One kernel in place of several, as `llama.attend` does; rows that share the prompts are one's.
        q = q.reshape(B, G, H // G, D)
        if len(self.key) == 1 and self.mask is None:
            rows = q.transpose(0, 1).reshape(1, G, -1, D)  # [1, G, B * H/G, D]
            seen = F.scaled_dot_product_attention(rows, self.key, self.value).view(G, B, H // G, D).transpose(0, 1)
        else:
            mask = None if self.mask is None else self.mask[:, None, None, :]
            shape = (B, *self.key.shape[1:])
            seen = F.scaled_dot_product_attention(q, self.key.expand(shape), self.value.expand(shape), attn_mask=mask)
        if self.image is not None:
            seen = seen + self.image
        return torch.addcmul(out, seen.reshape(B, H, 1, D), gate)

    def _attend_many(self, q: Tensor, gate: Tensor) -> Tensor:
        """The gated softmax for several queries a row, [B, H, T, D] -> [B, H, T, D]."""
        B, H, T, D = q.shape
        G = self.key.shape[1]
        scores = q.reshape(B, G, H // G * T, D) @ (self.key * D**-0.5).transpose(2, 3)  # [B, G, H/G * T, K]
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask[:, None, None, :], float("-inf"))
        weights = gate * F.softmax(scores, dim=-1).view(B, H, T, -1)  # narrower than the values
        return (weights.view(B, G, H // G * T, -1) @ self.values).view(B, H, T, D)

    def select(self, rows: Tensor) -> PromptKV:
        """The rows of index `rows` [B']; what all rows share stays shared."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or len(tensor) == 1 else tensor[rows]

        return PromptKV(*(pick(tensor) for tensor in (self.key, self.value, self.gate, self.mask, self.image)))


@dataclass(frozen=True)
class Prompts:
    """What an adapter adds to a batch, ready for the model.

    Attributes:
        layers: The adaption prompts of each of the N layers; None where a layer has none.
        tuning: Of each of the N layers; `UNTUNED` where no row has any.
        norm: Difference to the weight of the final norm, [1 or B, 1, C]; None where no row has any.
    """

    layers: tuple[PromptKV | None, ...]
    tuning: tuple[LayerTuning, ...]
    norm: Tensor | None = None

    @property
    def batch(self) -> int:
        """How many rows these are for; 1 fits any number."""
        batches = [layer.batch for layer in self.layers if layer is not None]
        return max([*batches, 1 if self.norm is None else len(self.norm)])  # the norm stands for all of the tuning


class Adapter(nn.Module):
    """Everything that is trained: prompts, gates, perhaps the tuning, and for images the projection to the image token.

    Its parameters are the one list that freezing, counting, the optimiser and saving go by.

    Args:
        config: L, K, gate variant, scale of the prompts at the start, what is tuned.
        base: Shape of the base.
        projection: Image features [B, F] -> image token [B, C]; None for a text adapter.

    Raises:
        ValueError: The base has fewer layers than the adapter.
    """

    def __init__(self, config: AdapterConfig, base: LlamaConfig, *, projection: ImageProjection | None = None) -> None:
        super().__init__()
        if config.layers > base.layers:
            raise ValueError(f"an adapter of {config.layers} layers does not fit a base of {base.layers}")
        self.config, self.base = config, base
        self.prompt = nn.Parameter(torch.randn(config.layers, config.prompt_length, base.width) * config.prompt_std)
        self.gate = nn.Parameter(torch.zeros(config.layers, 1 if config.gate == "scalar" else base.heads))
        self.tuning = Tuning(base) if config.tune == "prompts+bias+scale+norm" else None
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
        """Keys, values and gates of every layer, and its tuning, computed once for an adapter and its images.

        Args:
            llama: The base whose W_k and W_v are used.
            features: Image features, [B, F]; None for text.
            has_image: False where a row takes no image token, [B]; None: every row of `features` has one.
            strength: Factor on phi(g) and on what the tuning changes: 0 is the base model, 1 the adapter as trained.

        Raises:
            ValueError: The base is not the adapter's, or features were given to a text adapter.
        """
        N = self.base.layers
        if llama.config.layers != N:
            raise ValueError(f"an adapter for a base of {N} layers does not fit one of {llama.config.layers}")
        if features is not None and self.projection is None:
            raise ValueError("this adapter was trained without images; load one that has an image encoder")
        token = None
        if features is not None:
            token = self.projection(features)  # [B, C]
            if has_image is not None:
                token = token * has_image[:, None]
            token = token.to(llama.dtype)
        tuning, norm = ((UNTUNED,) * N, None) if self.tuning is None else self.tuning(llama.dtype, strength)
        gates = (self.gate_values() * strength).expand(-1, llama.config.heads).to(llama.dtype)  # [L, H]
        first = N - self.config.layers
        layers: list[PromptKV | None] = [None] * first
        for block, prompt, gate, tuned_by in zip(
            llama.layers[first:], self.prompt.to(llama.dtype), gates, tuning[first:], strict=True
        ):
            key, value, image = block.prompt_keys_values(prompt, token, tuned_by)
            layers.append(PromptKV(key, value, gate[None], image=image))
        return Prompts(tuple(layers), tuning, norm)

    forward = prompts  # what wraps a module, such as DistributedDataParallel, sees calls of `forward` alone


def stack_prompts(rows: Sequence[Prompts | None]) -> Prompts | None:
    """Puts the prompts of single rows into one batch, whatever adapter, image and K each of them has.

    A row whose adapter leaves a layer alone, or that has no adapter (None), gets a gate of zero there, and one whose
    adapter tunes nothing a tuning that changes nothing.

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
    layers = range(len(given[0].layers))
    prompts = tuple(_stack_layer([None if row is None else row.layers[layer] for row in rows]) for layer in layers)
    tuning = tuple(stack_tuning([UNTUNED if row is None else row.tuning[layer] for row in rows]) for layer in layers)
    norms = [None if row is None else row.norm for row in rows]
    some = next((norm for norm in norms if norm is not None), None)
    if some is None:
        return Prompts(prompts, tuning)
    return Prompts(prompts, tuning, torch.cat([torch.zeros_like(some) if norm is None else norm for norm in norms]))


def _stack_layer(rows: Sequence[PromptKV | None]) -> PromptKV | None:
    given = [row for row in rows if row is not None]
    if not given:
        return None
    longest = max(given, key=lambda row: row.key.shape[2])
    K = longest.key.shape[2]
    none = torch.zeros_like(longest.key[:1, :, :1])  # of a row without an image
    keys, values, gates, masks, images = [], [], [], [], []
    for row in rows:
        if row is None:  # zero keys and values, all of them visible: finite, and the gate removes them
            keys.append(torch.zeros_like(longest.key[:1]))
            values.append(torch.zeros_like(longest.value[:1]))
            gates.append(torch.zeros_like(longest.gate[:1]))
            masks.append(torch.ones(1, K, dtype=torch.bool, device=longest.key.device))
            images.append(none)
        else:
            missing = K - row.key.shape[2]
            keys.append(F.pad(row.key, (0, 0, 0, missing)))
            values.append(F.pad(row.value, (0, 0, 0, missing)))
            gates.append(row.gate)
            images.append(none if row.image is None else row.image)
            visible = (
                torch.ones(1, K - missing, dtype=torch.bool, device=row.key.device) if row.mask is None else row.mask
            )
            masks.append(F.pad(visible, (0, missing), value=False))
    mask = torch.cat(masks)
    image = None if all(row is None or row.image is None for row in rows) else torch.cat(images)
    return PromptKV(torch.cat(keys), torch.cat(values), torch.cat(gates), None if mask.all() else mask, image)


def select_prompts(prompts: Prompts | None, rows: Tensor) -> Prompts | None:
    """The rows of index `rows` [B'] of a batch's prompts; a row may be taken more than once."""
    if prompts is None:
        return None
    if prompts.batch == 1:  # all rows share them
        return prompts
    layers = tuple(None if layer is None else layer.select(rows) for layer in prompts.layers)
    norm = prompts.norm
    if norm is None or len(norm) == 1:
        return Prompts(layers, prompts.tuning, norm)
    return Prompts(layers, tuple(select_tuning(layer, rows) for layer in prompts.tuning), norm[rows])
