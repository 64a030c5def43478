"""The frozen base in 8 or 4 bits a weight, for inference on a CPU: weights stay packed in memory and are used as they
are, by torch's own kernels.

Decoding one text reads every weight once a token, so fewer bytes are fewer milliseconds. Activations are
bfloat16, the one number format in which these kernels are fast; of keys and values see `decode_step`.

- int8: each output row is w = s * q, with q from -127 to 127.
- int4: each group of 32 inputs of a row is w = s * (q - 8) + z, with q from 0 to 15. The smallest weight of a group has
  q = 0 and the largest q = 15, as llama.cpp makes Q4_1: of a GGUF in that type, the very q are found again.
- In both, norms are bfloat16, and the token embedding and the output projection are int8: where the two are tied, one
  memory serves both, and the GGUF of the default base keeps 8 bits there, too.

What quantises a weight, `row_grid` and `group_grid`, is plain torch. `quantised_llama` builds a `Llama` whose linears
are `QuantisedLinear`, joined where they read the same input; the model file knows nothing of it, and adapters work on
it as on any other base.

Shapes: C width, V vocabulary, I inputs and O outputs of a linear.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapter.decode_step import DecodeStep
from mmadapter.joined import PARTS, JoinedAttention, JoinedFeedForward, whole_of
from mmadapter.llama import Llama
from mmadapter.packed import FrozenLinear
from mmadapter.weights import BaseWeights, load_state_dict

FLOATS = ("float32", "bfloat16")
BITS = {"int8": 8, "int4": 4}
ACTIVATIONS = torch.bfloat16
GROUP = 32  # inputs that share a scale and a zero in int4
OUTPUTS = 16  # the int4 kernel takes multiples of so many outputs
LANES = 16  # inputs that the int8 kernel takes at a time: of another number it reads past a row's end
MANY = 64  # rows from which turning an int8 weight into bfloat16 and multiplying is faster than the int8 kernel


def row_grid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest weight of the form w = s * q, with one s for each row.

    Args:
        weight: [O, I].

    Returns:
        q, int8 [O, I], and s, bfloat16 [O]; q is made for the s that was rounded, so that the rounding costs nothing.
    """
    wide = weight.float()
    scale = (wide.abs().amax(1) / 127).to(ACTIVATIONS)  # [O]
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros
    return (wide / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def group_grid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest weight of the form w = s * (q - 8) + z, with one s and z for each group of 32 inputs of a row.

    Args:
        weight: [O, I], I a multiple of 32.

    Returns:
        q, int32 [O, I], from 0 to 15, and s and z, bfloat16 [I / 32, O, 2].
    """
    groups = weight.float().view(len(weight), -1, GROUP)  # [O, I/32, 32]
    low, high = groups.aminmax(dim=-1, keepdim=True)  # [O, I/32, 1]
    step = (high - low) / 15
    q = ((groups - low) / torch.where(step == 0, torch.ones_like(step), step)).round()
    scales_and_zeros = torch.cat((step, low + 8 * step), dim=-1).to(ACTIVATIONS)  # [O, I/32, 2]
    return q.to(torch.int32).view_as(weight), scales_and_zeros.transpose(0, 1).contiguous()


class QuantisedLinear(FrozenLinear):
    """A linear in 8 or 4 bits a weight.

    Args:
        weight: [O, I].
        bits: 8 or 4.

    Raises:
        ValueError: The int4 kernel does not take this shape.
    """

    why = (
        "a base in int8 or int4 is for inference: its weights are packed and have no gradient; "
        "load it with dtype float32 or bfloat16 to train on it"
    )

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight)
        self.bits = bits
        if bits == 4:
            if self.in_features % GROUP or self.out_features % OUTPUTS:
                raise ValueError(
                    f"int4 takes inputs in multiples of {GROUP} and outputs in multiples of {OUTPUTS}, and a linear of "
                    f"this base, or several joined, has {self.in_features} inputs and {self.out_features} outputs; "
                    "choose dtype int8"
                )
            q, scales = group_grid(weight)
            packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)  # uint8 [O, I/2], in the order the CPU reads best
        else:
            packed, scales = row_grid(weight)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [..., I] -> bfloat16 [..., O].

        Raises:
            ValueError: A gradient is wanted.
        """
        self.refuse_gradient(x)
        rows = x.reshape(-1, self.in_features).contiguous()  # [n, I]
        if self.bits == 4:
            y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)  # [n, O]
        elif len(rows) < MANY and self.in_features % LANES == 0:
            y = torch._weight_int8pack_mm(rows, self.packed, self.scales)
        else:
            y = F.linear(rows, self.packed.to(rows.dtype)) * self.scales  # -127 to 127 are exact in bfloat16
        return y.view(*x.shape[:-1], self.out_features)


class QuantisedEmbedding(nn.Module):
    """Rows of an int8 weight, turned into bfloat16 as they are looked up; it shares the linear's memory.

    Args:
        linear: Of 8 bits; its outputs are the vocabulary.
    """

    def __init__(self, linear: QuantisedLinear) -> None:
        super().__init__()
        self.register_buffer("packed", linear.packed)  # [V, C]
        self.register_buffer("scales", linear.scales)  # [V]

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> bfloat16 [B, T, C]."""
        return F.embedding(tokens, self.packed).to(ACTIVATIONS) * self.scales[tokens][..., None]


def quantised_llama(weights: BaseWeights, name: str) -> Llama:
    """A frozen model in int8 or int4; its tensors are read and packed a few at a time.

    Args:
        name: "int8" or "int4".

    Raises:
        ValueError: Another name, no such kernel in this torch on this machine, a shape it does not take, or a tensor is
            missing.
    """
    if name not in BITS:
        raise ValueError(f"weights are quantised to {' or '.join(BITS)}, got {name!r}")
    check_kernel(name)
    with torch.device("meta"):
        model = Llama(weights.config)
    missing = dict.fromkeys(model.state_dict())
    for block in model.layers:
        block.attention, block.feed_forward = JoinedAttention(weights.config), JoinedFeedForward(weights.config)
    waiting: dict[str, Tensor] = {}  # parts of a joined linear until the last of them comes
    for tensor_name, tensor in weights.tensors():
        missing.pop(tensor_name, None)
        path, _, leaf = tensor_name.rpartition(".")
        owner, _, last = path.rpartition(".")
        parent = model.get_submodule(owner)
        whole = whole_of(last)
        if path == "tok_embeddings":
            table = QuantisedLinear(tensor, 8)
            model.tok_embeddings = QuantisedEmbedding(table)
            if weights.config.tied:
                model.output = table
        elif whole is not None:
            waiting[path] = tensor
            parts = [f"{owner}.{part}" for part in PARTS[whole]]
            if all(part in waiting for part in parts):
                setattr(parent, whole, QuantisedLinear(torch.cat([waiting.pop(part) for part in parts]), BITS[name]))
        elif isinstance(getattr(parent, last), nn.Linear):
            setattr(parent, last, QuantisedLinear(tensor, 8 if path == "output" else BITS[name]))
        else:
            setattr(getattr(parent, last), leaf, nn.Parameter(tensor.to(ACTIVATIONS)))
    if missing:
        raise ValueError(f"{weights.path} lacks {len(missing)} tensors of the model, such as {next(iter(missing))}")
    model.requires_grad_(False).eval()
    model.decode_step = DecodeStep(model)
    return model


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a model, each counted once."""
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(model))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield tensor


def check_dtype(name: str, device: str) -> None:
    """Checks, before anything is fetched, that a base can be loaded in a number format and run on a device.

    Raises:
        ValueError: It cannot.
    """
    if name not in (*FLOATS, *BITS):
        raise ValueError(f"dtype must be one of {', '.join((*FLOATS, *BITS))}, got {name!r}")
    if name in BITS:
        if device.partition(":")[0] != "cpu":
            raise ValueError(f"{name} runs on the CPU alone, and device is {device!r}; choose float32 or bfloat16")
        check_kernel(name)


def load_llama(weights: BaseWeights, name: str, device: torch.device) -> Llama:
    """A frozen model in any of the number formats that `check_dtype` lets pass."""
    if name in BITS:
        return quantised_llama(weights, name)
    return Llama.from_state_dict(weights.config, load_state_dict(weights, getattr(torch, name))).to(device)


@functools.cache
def check_kernel(name: str) -> None:
    """Tries the kernel once, on a small weight.

    Raises:
        ValueError: This torch has no such kernel for this machine.
    """
    try:
        QuantisedLinear(torch.ones(OUTPUTS, GROUP), BITS[name])(torch.ones(1, GROUP, dtype=ACTIVATIONS))
    except (AttributeError, RuntimeError) as error:  # NotImplementedError of a missing kernel is a RuntimeError
        raise ValueError(
            f"torch {torch.__version__} has no {name} kernel for this machine "
            f"({str(error).splitlines()[0]:.120}); choose dtype float32 or bfloat16"
        ) from error
