"""Cross-entropy over a large vocabulary without ever holding all logits.

Shapes: n targets, C width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 128  # targets at a time: 25 MB of float32 logits for a vocabulary of 49,152


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is worked out while its logits are there: n * V numbers never exist at once.

    The output weight is frozen, so only the hidden states get a gradient.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, smoothing: float) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        shape = (min(CHUNK, len(hidden)), weight.shape[0])  # memory that is new for each chunk would cost more than it
        narrow, wide = hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            target, share = targets[part, None], scale[part, None]  # [chunk, 1]
            rounded = torch.mm(hidden[part], weight.T, out=narrow[: len(target)])  # [chunk, V]
            logits = wide[: len(target)].copy_(rounded)
            expected = (1 - smoothing) * logits.gather(1, target)
            if smoothing:
                expected += smoothing * logits.mean(-1, keepdim=True)
            highest = logits.amax(-1, keepdim=True)
            powers = logits.sub_(highest).exp_()
            powers_sum = powers.sum(-1, keepdim=True)
            total += (share * (highest + powers_sum.log() - expected)).sum()
            if gradient is not None:  # softmax - (1 - smoothing) * one_hot - smoothing / V
                slope = powers.mul_(share / powers_sum)
                slope.scatter_add_(1, target, share * (smoothing - 1))
                if smoothing:
                    slope -= share * (smoothing / slope.shape[1])
                gradient[part] = rounded.copy_(slope) @ weight
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.gradient * upstream, None, None, None, None


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T, targets, reduction="none")`, scaled and summed; the weight is frozen.

    Args:
        hidden: [n, C].
        weight: Output projection, [V, C].
        targets: Token ids, [n].
        scale: Factor on each target's loss, [n]; None is 1.
        label_smoothing: Share of the target probability spread over the vocabulary.
    """
    if scale is None:
        scale = torch.ones(len(hidden), device=hidden.device)
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, scale, label_smoothing)
