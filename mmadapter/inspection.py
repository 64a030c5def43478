"""What an adapter did to one answer: its gates, the prompts' share of attention, the scales behind the image token.

Shapes: S tokens of prompt and answer, A steps that wrote the answer, C width, H query heads, G key/value heads,
D head width, N layers, L adapted layers, M scales, F width of the image features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmadapter.adapter import PromptKV
from mmadapter.llama import KVCache, attend
from mmadapter.session import Session
from mmadapter.vision import ImageProjection

ROUNDING = 1e-5  # of the image token's norm: a smaller change of it comes from float32, not from a scale


@dataclass(frozen=True)
class Inside:
    """One answer looked at from inside, in plain numbers.

    Attributes:
        gates: phi(g) times the strength of each adapted layer and head, [L, H].
        first_layer: The lowest adapted layer, N - L, counted from 0.
        prompt_share: How much of what attention adds in each layer comes from the adaption prompts, 0 to 1, [N].
        scale_share: How much the image token leans on each scale of the encoder. The shares sum to 1; all are 0 where
            no scale changes the token, and without an image there are none.
        strength: The factor on the gates.
    """

    gates: list[list[float]]
    first_layer: int
    prompt_share: list[float]
    scale_share: dict[str, float]
    strength: float = 1.0


@torch.inference_mode()
def look_inside(
    session: Session,
    prompt: Sequence[int],
    answer: Sequence[int],
    features: Tensor | None = None,
    strength: float = 1.0,
) -> Inside:
    """Passes once over a prompt and its answer, with the adapter in use, and measures what the adapter did.

    Nothing on the model changes meanwhile, so other threads may use it. The tuning of LLaMA-Adapter V2 is in the pass;
    the prompts' share says nothing of what it does itself.

    Args:
        session: Its adapter is looked at.
        prompt: Tokens that the model was given, one at least.
        answer: Tokens that it wrote; none where it stopped at once.
        features: Image features (`Session.features`), [1, F]; None for text.
        strength: Factor on the gates that the answer was written with (`Session.strength`).

    Raises:
        ValueError: No adapter is in use, the prompt is empty, the tokens are more than the model's context, the
            features are not of one image, or the adapter does not see.
    """
    adapter, llama = session.adapter_module, session.llama
    if adapter is None:
        raise ValueError("the base model alone has no gates and no prompts to look at; choose an adapter")
    tokens = [*prompt, *answer]
    if not prompt:
        raise ValueError("expected the tokens of the prompt, got none")
    if len(tokens) > llama.config.context:
        raise ValueError(f"prompt and answer have {len(tokens)} tokens, the model's context is {llama.config.context}")
    if features is not None and (features.ndim != 2 or len(features) != 1):
        raise ValueError(f"expected the features of one image, [1, F], got {list(features.shape)}")

    prompts = adapter.prompts(llama, features, strength=strength)
    # The step that reads the last token of the prompt writes the first one of the answer, and so on up to its end.
    first_step = len(prompt) - 1
    watched = [None if layer is None else _Watched(layer, first_step) for layer in prompts.layers]
    cache = llama.new_cache(1, len(tokens))
    row = torch.tensor([tokens], device=llama.device)  # [1, S]
    llama.hidden(row, prompts=dataclasses.replace(prompts, layers=tuple(watched)), cache=cache)

    gates = (adapter.gate_values() * strength).expand(-1, llama.config.heads)  # [L, H]
    shares = [0.0 if layer is None else _prompt_share(layer, cache, index) for index, layer in enumerate(watched)]
    scales = {}
    if features is not None:
        encoder = session.encoder
        shares_of_scales = _scale_share(adapter.projection, features, encoder.widths)
        scales = dict(zip(encoder.config.scales, shares_of_scales, strict=True))
    return Inside(gates.tolist(), len(watched) - len(gates), shares, scales, strength)


class _Watched:
    """Stands in for a layer's `PromptKV` and keeps what passes through it from one position on.

    Attributes:
        queries: Rotated queries, [1, H, A, D].
        added: What the prompts add, gated, [1, H, A, D].
    """

    def __init__(self, prompt: PromptKV, first: int) -> None:
        self.prompt, self.first = prompt, first
        self.queries: Tensor | None = None
        self.added: Tensor | None = None

    def add(self, out: Tensor, q: Tensor) -> Tensor:
        """As `PromptKV.add`: twice [1, H, S, D] -> [1, H, S, D]."""
        added = self.prompt.add(torch.zeros_like(out), q)
        self.queries, self.added = q[:, :, self.first :], added[:, :, self.first :]
        return out + added


def _prompt_share(layer: _Watched, cache: KVCache, index: int) -> float:
    """Mean over the steps of |prompts' part| / (|text's part| + |prompts' part|).

    The two parts are summed before W_o (Eq. 8), so there their norms, over all heads, can be compared. The text's part
    is computed once more from the cached keys and values: taking the prompts' from the sum would leave, in bfloat16,
    little but rounding where one part is small.
    """
    A = layer.queries.shape[2]
    S = cache.length
    visible = torch.ones(A, S, dtype=torch.bool, device=cache.keys.device).tril(S - A)[None, None]  # [1, 1, A, S]
    keys, values = (whole[index, :, :, :S].to(layer.queries.dtype) for whole in (cache.keys, cache.values))
    text = attend(layer.queries, keys, values, visible)  # [1, H, A, D]
    of_text, of_prompts = (part.float().norm(dim=(1, 3)) for part in (text, layer.added))  # [1, A]
    # Both are 0 only where every value vector is.
    smallest = torch.finfo(torch.float32).tiny
    return float((of_prompts / (of_text + of_prompts).clamp_min(smallest)).mean())


def _scale_share(projection: ImageProjection, features: Tensor, widths: Sequence[int]) -> list[float]:
    """By how much the image token changes when one scale at a time shows the mean of the training set; shares of 1.

    Leaving one out measures what only this scale tells. At the mean the standardised features are 0.

    Args:
        features: [1, F].
        widths: Features of each scale; they sum to F.
    """
    starts = [sum(widths[:scale]) for scale in range(len(widths))]
    rows = features.repeat(len(widths) + 1, 1)  # [M + 1, F], the last as it is
    for row, start, width in zip(rows[:-1], starts, widths, strict=True):
        row[start : start + width] = projection.feature_mean[start : start + width]
    tokens = projection(rows)  # [M + 1, C]
    change = (tokens[:-1] - tokens[-1]).norm(dim=1)  # [M]
    change[change < ROUNDING * tokens[-1].norm()] = 0
    total = float(change.sum())
    return [value / total if total else 0.0 for value in change.tolist()]
