"""The tuning of LLaMA-Adapter V2 (arXiv 2304.15010, section 4.1): scales and biases of the linears, and the norms.

A frozen linear W of a block becomes s * (W x + b), with s from 1 and b from 0, and the weight w of an RMSNorm w + d,
with d from 0: at the start nothing changes. All N blocks are tuned, with prompts or without, and the final norm. The
output projection is not: its outputs are the logits of the vocabulary, and two numbers for every token would learn how
often it occurs in the training data.

Shapes: B batch, C width, H query heads, G key/value heads, D head width, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmadapter.config import LlamaConfig
from mmadapter.joined import PARTS
from mmadapter.llama import UNTUNED, Affine, LayerTuning

SIDE_BY_SIDE = PARTS | {"wo": ("wo",), "w2": ("w2",)}  # the linears of each affine of a LayerTuning


def linear_widths(base: LlamaConfig) -> dict[str, int]:
    """Outputs of each linear of a block."""
    attention = dict(zip(("wq", "wk", "wv"), base.attention_widths, strict=True)) | {"wo": base.width}
    return attention | {"w1": base.hidden_width, "w2": base.width, "w3": base.hidden_width}


class Tuning(nn.Module):
    """What trains: for each linear of a block `scale.NAME` and `bias.NAME`, [N, out], and of each norm the difference
    to its frozen weight: `norm.attention` and `norm.ffn`, [N, C], and `norm.final`, [C].

    Args:
        base: Shape of the base.
    """

    def __init__(self, base: LlamaConfig) -> None:
        super().__init__()
        N, C, widths = base.layers, base.width, linear_widths(base)
        self.scale = nn.ParameterDict({name: nn.Parameter(torch.ones(N, out)) for name, out in widths.items()})
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.zeros(N, out)) for name, out in widths.items()})
        norms = {"attention": (N, C), "ffn": (N, C), "final": (C,)}
        self.norm = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in norms.items()})

    def forward(self, dtype: torch.dtype, strength: float = 1.0) -> tuple[tuple[LayerTuning, ...], Tensor]:
        """The tuning of each layer and the difference of the final norm [1, 1, C], as the model takes them.

        Args:
            dtype: Of the model.
            strength: How much of the tuning: 0 is the base model, 1 the tuning as trained.
        """
        fields: dict[str, Sequence[Affine | Tensor]] = {}  # of LayerTuning, a value for each layer
        for name, parts in SIDE_BY_SIDE.items():
            scale = 1 + strength * (torch.cat([self.scale[part] for part in parts], dim=-1) - 1)  # [N, out]
            shift = scale * (strength * torch.cat([self.bias[part] for part in parts], dim=-1))
            fields[name] = [
                Affine(*pair) for pair in zip(_by_layer(scale, dtype), _by_layer(shift, dtype), strict=True)
            ]
        for name in ("attention", "ffn"):
            fields[f"{name}_norm"] = _by_layer(strength * self.norm[name], dtype)
        layers = tuple(
            LayerTuning(**dict(zip(fields, parts, strict=True))) for parts in zip(*fields.values(), strict=True)
        )
        return layers, (strength * self.norm["final"]).to(dtype)[None, None]


def _by_layer(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """[N, out] -> N times [1, 1, out]."""
    return x.to(dtype)[:, None, None].unbind()


def stack_tuning(rows: Sequence[LayerTuning]) -> LayerTuning:
    """One layer's tuning of single rows as one batch; a row without tuning gets s = 1, b = 0, d = 0."""
    given = next((row for row in rows if row is not UNTUNED), None)
    if given is None:
        return UNTUNED
    none = LayerTuning(
        *(
            Affine(torch.ones_like(part.scale), torch.zeros_like(part.shift))
            if isinstance(part, Affine)
            else torch.zeros_like(part)
            for part in given
        )
    )
    return _each_tensor(lambda *tensors: torch.cat(tensors), [none if row is UNTUNED else row for row in rows])


def select_tuning(tuning: LayerTuning, rows: Tensor) -> LayerTuning:
    """The rows of index `rows` [B'] of one layer's tuning."""
    return _each_tensor(lambda tensor: tensor[rows], [tuning])


def _each_tensor(function: Callable[..., Tensor], rows: Sequence[LayerTuning]) -> LayerTuning:
    """`function` of the tensors that stand at the same place of all `rows`, for each place."""
    return LayerTuning(
        *(
            Affine(*(function(*tensors) for tensors in zip(*parts, strict=True)))
            if isinstance(parts[0], Affine)
            else function(*parts)
            for parts in zip(*rows, strict=True)
        )
    )
