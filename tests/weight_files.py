"""A tiny random LLaMA and its files in each format, written from the formats' definitions or by their own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from mmadapter.config import LlamaConfig, llama3_rope_divisors
from mmadapter.weights import expected_shapes

if TYPE_CHECKING:
    import transformers

# The head width is not C / H and the query heads share key heads, so that no two sizes can be taken for each other.
CONFIG = LlamaConfig(
    vocab_size=48, width=64, layers=2, heads=4, kv_heads=2, head_width=48, hidden_width=128, norm_eps=1e-6, context=256
)
SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DIVISORS = llama3_rope_divisors(48, 10000.0, **SCALING, original_context=64)


def with_changes(**changes: object) -> LlamaConfig:
    return LlamaConfig(**{**vars(CONFIG), **changes})


def random_state(config: LlamaConfig = CONFIG) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}


def to_pairs(name: str, weight: torch.Tensor, head_width: int) -> torch.Tensor:
    """Meta's order of the rows, row by row from the definition: pair j of a head is its rows j and j + D/2."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    rows = []
    for head in range(len(weight) // head_width):
        for pair in range(head_width // 2):
            first = head * head_width + pair
            rows += [weight[first], weight[first + head_width // 2]]
    return torch.stack(rows)


def write_meta(
    folder: Path, config: LlamaConfig, shards: int = 1, split_vocabulary: bool = False, **params: object
) -> Path:
    """Writes Meta's layout, with the rotary buffer that LLaMA 1 came with."""
    folder.mkdir(exist_ok=True)
    params = {
        "dim": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "head_dim": config.head_width,
        "multiple_of": 32,
        "norm_eps": config.norm_eps,
        "vocab_size": -1,
        **params,
    }
    (folder / "params.json").write_text(json.dumps(params))
    dimension = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0) | dict.fromkeys(("wo", "w2"), 1)
    dimension["tok_embeddings"] = 0 if split_vocabulary else 1
    parts = [{"rope.freqs": torch.ones(config.head_width // 2)} for _ in range(shards)]
    for name, tensor in random_state(config).items():
        tensor = to_pairs(name, tensor, config.head_width)
        split = dimension.get(name.split(".")[-2])
        pieces = [tensor] * shards if split is None else tensor.chunk(shards, split)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    for number, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    return folder


HUGGINGFACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "layers": "model.layers",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def huggingface_model(config: LlamaConfig, rope: dict | None = None) -> transformers.LlamaForCausalLM:
    """transformers' own model with our random weights."""
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.hidden_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.context,
            tie_word_embeddings=config.tied,
            rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default", **(rope or {})},
        )
    )
    state = {}
    for name, tensor in random_state(config).items():
        for ours, theirs in HUGGINGFACE_NAMES.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        state["model.norm.weight" if name == "norm.weight" else name] = tensor
    if config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def write_huggingface(folder: Path, config: LlamaConfig, **options: object) -> Path:
    huggingface_model(config).save_pretrained(folder, **options)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "layers": "blk",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
}


def write_gguf(
    path: Path,
    config: LlamaConfig,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str = "llama",
) -> dict[str, torch.Tensor]:
    """Writes the file and returns what its tensors stand for, in canonical names and order."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    edit(writer)
    if config.rope_divisors:
        writer.add_tensor("rope_freqs.weight", np.array(config.rope_divisors, dtype=np.float32))
    meant = {}
    for name, tensor in random_state(config).items():
        stored = "output_norm.weight" if name == "norm.weight" else name
        for ours, theirs in GGUF_NAMES.items():
            stored = stored.replace(f"{ours}.", f"{theirs}.")
        if tensor.ndim == 1:
            writer.add_tensor(stored, tensor.numpy())
            meant[name] = tensor
            continue
        data = gguf.quants.quantize(to_pairs(name, tensor, config.head_width).numpy(), kind)
        writer.add_tensor(stored, data, raw_dtype=kind)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
