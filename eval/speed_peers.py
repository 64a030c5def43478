"""The peers that we are measured against: transformers, peft and llama.cpp, on the very tensors or file that we use.

They are development dependencies, which the product does without, so they are imported by name where a case needs one;
`Absent` says why one cannot take part.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from eval.speed_base import synchronize
from eval.speed_rounds import Timed
from mmadapter.weights.huggingface import stored_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapter.llama import Llama

PACKAGES = {"transformers": "transformers", "peft": "peft", "llama_cpp": "llama-cpp-python", "kernels": "kernels"}


class Absent(Exception):  # noqa: N818 - a peer that is not there is no error
    """Why a peer takes no part in a case."""


def require(name: str) -> ModuleType:
    """Imports a peer.

    Raises:
        Absent: It is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise Absent(f"the package {PACKAGES[name]} is not installed")
    return importlib.import_module(name)


def transformers_model(llama: Llama) -> nn.Module:
    """transformers' own LLaMA over the tensors of ours, which are not copied.

    Raises:
        Absent: transformers is not installed.
    """
    transformers = require("transformers")
    base = llama.config
    config = transformers.LlamaConfig(
        vocab_size=base.vocab_size,
        hidden_size=base.width,
        intermediate_size=base.hidden_width,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.kv_heads,
        head_dim=base.head_width,
        rms_norm_eps=base.norm_eps,
        max_position_embeddings=base.context,
        tie_word_embeddings=base.tied,
        rope_parameters={"rope_theta": base.rope_theta, "rope_type": "default"},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {stored_name(name): tensor for name, tensor in llama.state_dict().items()}
    if base.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    with torch.device(llama.device):
        rotary = type(model.model.rotary_emb)(config)  # its frequencies are in no state dict
    if base.rope_divisors is not None:
        rotary.inv_freq /= torch.tensor(base.rope_divisors, device=llama.device)
    model.model.rotary_emb = rotary
    return model.requires_grad_(False).eval()


def packed_model(gguf: Path) -> nn.Module:
    """transformers' model from the GGUF file itself, with its weights left packed.

    Raises:
        Absent: transformers, or what it computes with packed weights by, is not there.
    """
    transformers = require("transformers")
    require("kernels")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    if not any("gguf" in type(module).__name__.lower() for module in model.modules()):
        raise Absent("transformers unpacks this file's weights, which makes it the contender in float32")
    model.generation_config.eos_token_id = None
    return model.eval()


def peft_model(llama: Llama, layers: int, prompt_length: int) -> nn.Module:
    """peft's AdaptionPrompt on transformers' model over the tensors of ours.

    Raises:
        Absent: peft is not installed, or does not take a base of this shape.
    """
    peft = require("peft")
    config = llama.config
    if config.heads * config.head_width != config.width:
        raise Absent("peft takes bases whose heads have the width C / H only")
    settings = peft.AdaptionPromptConfig(adapter_len=prompt_length, adapter_layers=layers, task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers_model(llama), settings).train()


class _Clock:
    """Notes when the first token and the last are there; transformers asks it after every token whether to stop."""

    def __init__(self, last: int, device: str) -> None:
        self.last, self.device, self.count, self.times = last, device, 0, []

    def __call__(self, tokens: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.count += 1
        if self.count in (1, self.last):
            synchronize(self.device)
            self.times.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


@torch.inference_mode()
def decode_with_transformers(model: nn.Module, tokens: Tensor, new: int) -> tuple[Timed, list[list[int]]]:
    """Greedy decoding by `generate`, timed from the first new token on.

    Args:
        tokens: [B, T].
        new: Tokens a row after the first.

    Returns:
        The time of `new` tokens a row, and all new tokens of each row.
    """
    transformers = require("transformers")
    clock = _Clock(new + 1, str(tokens.device))
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new + 1,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    first, last = clock.times
    return Timed(last - first, new * len(tokens)), found[:, tokens.shape[1] :].tolist()


def llama_cpp_decoder(gguf: Path | None, threads: int, room: int) -> Callable[[Sequence[int], int], Timed]:
    """llama.cpp on the same file: a function of a prompt and a number of tokens that decodes them greedily.

    Args:
        room: Tokens of the longest text.

    Raises:
        Absent: It is not installed, or the base is no GGUF file.
    """
    llama_cpp = require("llama_cpp")
    if gguf is None:
        raise Absent("llama.cpp reads GGUF files only")
    model = llama_cpp.Llama(model_path=str(gguf), n_ctx=room, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(tokens: Sequence[int], new: int) -> Timed:
        pieces = model.generate(list(tokens), temp=0.0, top_k=1, repeat_penalty=1.0)
        next(pieces)
        started = time.perf_counter()
        for _ in range(new):
            next(pieces)
        return Timed(time.perf_counter() - started, new)

    return decode
