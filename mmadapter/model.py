"""A frozen LLaMA and a trainable adapter, with the loss that trains it.

Shapes: B batch, T tokens, C width, V vocabulary, F width of the image features.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmadapter.adapter import Adapter
from mmadapter.data import IGNORE_INDEX
from mmadapter.llama import Llama
from mmadapter.loss import cross_entropy_sum


class AdaptedLlama(nn.Module):
    """Base and adapter side by side: the base is frozen, every parameter of the adapter trains."""

    def __init__(self, llama: Llama, adapter: Adapter) -> None:
        super().__init__()
        self.llama = llama.requires_grad_(False)
        self.adapter = adapter

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        has_image: Tensor | None = None,
        label_smoothing: float = 0.0,
        checkpointing: bool = False,
    ) -> Tensor:
        """Cross-entropy summed over the labelled positions; divide by `target_count(labels)` for the mean.

        Logits are computed only where there is a label. Without tuning, layers below the first adapted one take no part
        in the backward pass: nothing under them trains.

        Args:
            tokens: [B, T], padded on the right.
            labels: [B, T], the token itself where it is to be predicted, IGNORE_INDEX elsewhere.
            features: Image features, [B, F].
            has_image: False where a row has no image, [B].
            checkpointing: Trades time for memory; see `Llama.hidden`.

        Raises:
            ValueError: A row has no target.
        """
        targets = labels[:, 1:]  # position t predicts token t + 1
        wanted = targets != IGNORE_INDEX  # [B, T - 1]
        empty = (~wanted.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"nothing to predict in row {empty[0]} of the batch: all its labels are {IGNORE_INDEX}")
        prompts = self.adapter(self.llama, features, has_image=has_image)
        hidden = self.llama.hidden(tokens[:, :-1], prompts=prompts, checkpointing=checkpointing)  # [B, T - 1, C]
        return cross_entropy_sum(
            hidden[wanted], self.llama.output_weight, targets[wanted], label_smoothing=label_smoothing
        )


def target_count(labels: Tensor) -> int:
    """Labelled positions of a batch, as `AdaptedLlama.forward` sums over them."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
