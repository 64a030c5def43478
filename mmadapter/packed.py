"""The linears of a base in float32 or bfloat16 in the order that the CPU's kernels read best (oneDNN), for inference.

torch hands a linear's rows to oneDNN as they are, which then puts them in its own order at every call. Where few tokens
are computed at once, as in decoding, that is a good part of the time; here it is done once, and linears that read the
same input become one (`joined`). The results are those of `nn.Linear`, but for the order of sums in float32. Adapters
work on a packed base as on any other.

Shapes: I inputs and O outputs of a linear.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from mmadapter.decode_step import DecodeStep
from mmadapter.joined import PARTS, JoinedAttention, JoinedFeedForward
from mmadapter.llama import Llama


class FrozenLinear(nn.Module):
    """A linear without bias whose weight is in the order of a kernel: it computes, and has no gradient.

    Attributes:
        why: What is said where someone wants to train on it.
    """

    why: str

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> Tensor:
        """There is none to read: what asks for it wants to train.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self.why)

    def refuse_gradient(self, x: Tensor) -> None:
        """Raises ValueError where a gradient of an input is wanted."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(self.why)


class PackedLinear(FrozenLinear):
    """A linear for oneDNN.

    Args:
        weight: float32 or bfloat16 [O, I], on the CPU.
    """

    why = "the base is packed for inference and has no gradient; load it with mmadapter.load to train on it"

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O].

        Raises:
            ValueError: A gradient is wanted.
        """
        self.refuse_gradient(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")


def pack(llama: Llama) -> bool:
    """Packs a model where it stands, half a block at a time; False where this machine has no such kernels for it.

    One that is packed or quantised already stays as it is. So does the embedding; if it is the output projection, too,
    that gets a packed copy.
    """
    if llama.device.type != "cpu" or not can_pack(llama.dtype):
        return False
    for block in llama.layers:
        if isinstance(block.attention, JoinedAttention):  # quantised, or packed before
            return True
        block.attention = _packed(block.attention, JoinedAttention(llama.config))
        block.feed_forward = _packed(block.feed_forward, JoinedFeedForward(llama.config))
    llama.output = PackedLinear(llama.output_weight)
    llama.decode_step = DecodeStep(llama)
    return True


def _packed(plain: nn.Module, joined: nn.Module) -> nn.Module:
    """The joined module with the plain one's weights."""
    for name, _ in list(joined.named_children()):
        parts = [getattr(plain, part).weight for part in PARTS.get(name, (name,))]
        setattr(joined, name, PackedLinear(torch.cat(parts)))
    return joined.eval()


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Tries the kernels once, on a small weight."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        PackedLinear(torch.ones(16, 16, dtype=dtype))(torch.ones(1, 16, dtype=dtype))
    except (AttributeError, RuntimeError):  # of another build, or for another number format
        return False
    return True
