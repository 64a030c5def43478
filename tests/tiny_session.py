"""A tiny random LLaMA in a folder, with a byte-level tokenizer, a tiny image encoder and adapters for them, all made
offline, so that `mmadapter.load` and the command line run as they do on real weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mmadapter
from mmadapter import checkpoint
from mmadapter.adapter import Adapter
from mmadapter.checkpoint import AdapterFile, Fingerprint, save_adapter
from mmadapter.config import AdapterConfig, LlamaConfig, VisionConfig
from mmadapter.session import Session
from mmadapter.tokenizer import open_tokenizer
from mmadapter.vision import ImageProjection, load_encoder
from mmadapter.weights import expected_shapes

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Merged into longer tokens, so that the fixed prompts are not one token a byte.
TRAINING_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "### Instruction: ### Input: ### Response: Generate caption for this image: Options: (A) (B) assistant user",
    "a red dog runs on the grass and a man stops, END",
)
ENCODER_SIZE = 32


@dataclass(frozen=True)
class Tiny:
    """Where the pieces of the tiny model lie.

    Attributes:
        llama: Folder of the base, with a tokenizer that has a chat template.
        plain: The same base, its tokenizer without a chat template.
        bare: The same base without a tokenizer.
        sees: Adapter folder of task "caption", template "plain".
        reads: Adapter folder of task "instruct", template "alpaca", without images.
        tuned: As `sees`, with tuned biases, scales and norms.
        pictures: Folder of 5 small pictures, 0.png to 4.png.
    """

    llama: Path
    plain: Path
    bare: Path
    sees: Path
    reads: Path
    tuned: Path
    pictures: Path

    def picture(self, number: int) -> Path:
        return self.pictures / f"{number}.png"

    def load(self, adapter: Path | None = None, **options: object) -> Session:
        return mmadapter.load(llama=str(self.llama), adapter=adapter, **options)


def build(folder: Path) -> Tiny:
    """Writes the whole tiny model under `folder`."""
    tiny = Tiny(*(folder / name for name in ("llama", "plain", "bare", "sees", "reads", "tuned", "pictures")))
    write_tokenizer(tiny.llama, CHATML)
    write_tokenizer(tiny.plain, None)
    tokenizer = open_tokenizer(tiny.llama)
    config = llama_config(tokenizer.vocab_size)
    for place in (tiny.llama, tiny.plain, tiny.bare):
        write_llama(place, config)
    encoder = VisionConfig(f"timm:test_resnet@{write_encoder(folder)}", ("2", "final"), ENCODER_SIZE, "squash")
    fingerprint = Fingerprint.of(config, tokenizer.tokens())
    write_adapter(tiny.sees, config, fingerprint, "caption", "plain", encoder)
    write_adapter(tiny.reads, config, fingerprint, "instruct", "alpaca", None)
    write_adapter(tiny.tuned, config, fingerprint, "caption", "plain", encoder, tune="prompts+bias+scale+norm")
    tiny.pictures.mkdir()
    for number in range(5):
        picture(number).save(tiny.picture(number))
    return tiny


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture of random blocks; another number is another picture."""
    blocks = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def llama_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size, width=32, layers=3, heads=4, kv_heads=2, head_width=8, hidden_width=48, norm_eps=1e-6, context=400
    )


def random_state(config: LlamaConfig, seed: int = 0, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Random weights; those of the norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        noise = scale * torch.randn(shape, generator=generator)
        state[name] = 1 + noise if len(shape) == 1 else noise
    return state


def write_tokenizer(folder: Path, chat_template: str | None) -> None:
    """A byte-level BPE with a few merges: any text can be written, and most characters past ASCII take two tokens."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    library.train_from_iterator(TRAINING_TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_llama(folder: Path, config: LlamaConfig) -> None:
    """The base in the layout of Hugging Face, whose rotary embeddings turn halves, as `mmadapter.llama` does."""
    from safetensors.torch import save_file

    names = {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
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
    state = {}
    for name, tensor in random_state(config).items():
        part, layer = name.removesuffix(".weight"), ""
        if part.startswith("layers."):
            _, number, part = part.split(".", 2)
            layer = f"model.layers.{number}."
        state[f"{layer}{'model.norm' if part == 'norm' else names[part]}.weight"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden_width,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
    }
    (folder / "config.json").write_text(json.dumps(settings))


def write_encoder(folder: Path) -> Path:
    """Random weights of timm's smallest ResNet; the running statistics of its norms are random, too."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    state = timm.create_model("test_resnet").state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    file = folder / "test_resnet.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


def write_adapter(
    folder: Path,
    llama: LlamaConfig,
    fingerprint: Fingerprint,
    task: str,
    template: str,
    vision: VisionConfig | None,
    tune: str = "prompts",
    **about: object,
) -> None:
    """An adapter of random prompts, random gates that are not zero, a random tuning if any, and where it sees a random
    projection."""
    torch.manual_seed(len(task))
    projection = None
    if vision is not None:
        encoder = load_encoder(vision)
        projection = ImageProjection(sum(encoder.widths), llama.width, 24)
        projection.set_statistics(encoder.features_of([picture(number) for number in range(100, 108)]))
        vision = encoder.config
    config = AdapterConfig(layers=2, prompt_length=3, tune=tune)
    adapter = Adapter(config, llama, projection=projection)
    torch.nn.init.normal_(adapter.gate)
    if adapter.tuning is not None:
        with torch.no_grad():
            for parameter in adapter.tuning.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    save_adapter(
        folder / checkpoint.FILE_NAME,
        adapter.state_dict(),
        AdapterFile(
            adapter=config,
            task=task,
            template=template,
            base="tiny",
            fingerprint=fingerprint,
            vision=vision,
            projection_width=0 if projection is None else 24,
            **about,
        ),
    )
