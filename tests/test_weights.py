"""Every format of base weights gives back the same tensors, and says what is wrong with a file that does not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from weight_files import (
    CONFIG,
    DIVISORS,
    SCALING,
    edit_json,
    huggingface_model,
    random_state,
    to_pairs,
    with_changes,
    write_gguf,
    write_huggingface,
    write_meta,
)

from mmadapter.config import LlamaConfig, llama3_rope_divisors
from mmadapter.llama import Llama, rope_frequencies, rope_table, rotate
from mmadapter.weights import expected_shapes, load_state_dict, open_weights, store
from mmadapter.weights.base import halves_from_pairs


def assert_holds(spec: Path, config: LlamaConfig, expected: dict[str, torch.Tensor]) -> None:
    weights = open_weights(str(spec))
    assert weights.config == config
    assert weights.spec == str(spec)
    assert weights.shapes == expected_shapes(config)
    state = load_state_dict(weights, torch.float32)
    assert sorted(state) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.float()), name
    Llama(config).load_state_dict(state, strict=True, assign=True)


def message(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_permuted_rows_turn_halves_as_meta_turns_pairs() -> None:
    """Meta's rotation, as the complex product that its paper describes, of W x against ours of the reordered W x."""
    D, heads, T = CONFIG.head_width, 3, 5
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(heads * D, 8, generator=generator) for _ in range(2)]
    x = torch.randn(T, 8, generator=generator)
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)  # [T, D/2]
    meta, ours = [], []
    rope = rope_table(rope_frequencies(CONFIG, torch.device("cpu")), torch.arange(T), torch.float32)
    for weight in weights:
        pairs = torch.view_as_complex((x @ weight.T).view(T, heads, D // 2, 2))  # [T, heads, D/2]
        turned = torch.view_as_real(pairs * torch.polar(torch.ones(T, 1, D // 2), angles[:, None])).flatten(2)
        meta.append(turned.transpose(0, 1))  # [heads, T, D]
        halves = (x @ halves_from_pairs(weight, D).T).view(1, T, heads, D).transpose(1, 2)
        ours.append(rotate(halves, rope)[0])  # [heads, T, D]
    torch.testing.assert_close(ours[0] @ ours[1].mT, meta[0] @ meta[1].mT)
    unturned = (x @ weights[0].T).view(1, T, heads, D).transpose(1, 2)
    assert not torch.allclose(rotate(unturned, rope)[0] @ ours[1].mT, meta[0] @ meta[1].mT)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("split_vocabulary", [False, True])
def test_meta(tmp_path: Path, shards: int, split_vocabulary: bool) -> None:
    config = with_changes(context=2048)
    write_meta(tmp_path, config, shards, split_vocabulary)
    assert_holds(tmp_path, config, random_state(config))
    assert_holds(tmp_path / "consolidated.00.pth", config, random_state(config))


def test_meta_params(tmp_path: Path) -> None:
    """LLaMA 3.1 scales the frequencies, LLaMA 1 names no key heads, and a head is C / H where nothing else is said."""
    config = with_changes(
        heads=4, kv_heads=4, head_width=16, rope_theta=500000.0, context=131072, norm_eps=1e-5, tied=True
    )
    params = {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 48, "n_kv_heads": None, "head_dim": None}
    write_meta(tmp_path, config, **params)
    read = open_weights(str(tmp_path)).config
    divisors = llama3_rope_divisors(16, 500000.0, 8.0, 1.0, 4.0, 8192)
    assert read == LlamaConfig(**{**vars(config), "rope_divisors": divisors})

    edit_json(tmp_path / "params.json", rope_scaling_factor=32.0)
    assert max(open_weights(str(tmp_path)).config.rope_divisors) == pytest.approx(32.0)
    edit_json(tmp_path / "params.json", vocab_size=50)
    assert "tok_embeddings.weight [48, 64] instead of [50, 64]" in message(lambda: open_weights(str(tmp_path)))


def test_meta_without_a_tokenizer(tmp_path: Path) -> None:
    write_meta(tmp_path / "7B", CONFIG)
    assert open_weights(str(tmp_path / "7B")).tokenizer() is None


def test_meta_errors(tmp_path: Path) -> None:
    folder = write_meta(tmp_path, CONFIG, shards=2)
    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    whole = second.read_bytes()
    second.unlink()
    said = message(lambda: open_weights(str(folder)))
    assert "misshapen" in said
    assert "layers.0.attention.wq.weight [96, 64] instead of [192, 64]" in said

    second.write_bytes(whole[: len(whole) // 2])
    assert f"{second} is truncated" in message(lambda: open_weights(str(folder)))

    part = torch.load(first)
    torch.save({name: tensor for name, tensor in part.items() if name != "norm.weight"}, second)
    assert "norm.weight is in some of the 2 shards only" in message(lambda: open_weights(str(folder)))

    second.unlink()
    torch.save({"model": part}, first)
    assert "no flat mapping" in message(lambda: open_weights(str(folder)))

    torch.save({"norm.weight": contextlib.suppress}, first)
    assert f"{first} is truncated, or no file of tensors" in message(lambda: open_weights(str(folder)))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
def test_huggingface(tmp_path: Path, options: dict, tied: bool) -> None:
    config = with_changes(tied=tied)
    folder = write_huggingface(tmp_path, config, **options)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(options)
    assert_holds(folder, config, random_state(config))
    assert_holds(folder / "config.json", config, random_state(config))


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        (CONFIG, {}),
        (with_changes(tied=True, rope_theta=500.0), {}),
        (with_changes(rope_divisors=(3.0,) * 24), {"rope_type": "linear", "factor": 3.0}),
        (
            with_changes(rope_divisors=DIVISORS),
            {"rope_type": "llama3", "original_max_position_embeddings": 64, **SCALING},
        ),
    ],
    ids=["default", "tied", "linear", "llama3"],
)
def test_logits_are_those_of_transformers(tmp_path: Path, config: LlamaConfig, rope: dict) -> None:
    theirs = huggingface_model(config, rope)
    theirs.save_pretrained(tmp_path)
    weights = open_weights(str(tmp_path))
    assert weights.config == config
    ours = Llama.from_state_dict(weights.config, load_state_dict(weights, torch.float32))
    tokens = torch.randint(config.vocab_size, (2, 90), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_huggingface_config_of_earlier_transformers(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path, CONFIG)
    scaling = {"type": "llama3", "original_max_position_embeddings": 64, **SCALING}
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    assert open_weights(str(folder)).config == with_changes(rope_divisors=DIVISORS)
    edit_json(folder / "config.json", rope_scaling=None, rope_theta=77.0, architectures=["MistralForCausalLM"])
    edit_json(folder / "config.json", sliding_window=256)
    assert open_weights(str(folder)).config == with_changes(rope_theta=77.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported are LlamaForCausalLM"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"hidden_act": "gelu"}, "'gelu'; supported is 'silu'"),
        ({"sliding_window": 128}, "sliding window of 128 tokens, less than its context of 256"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'; supported are default, linear and llama3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"num_hidden_layers": 3}, "missing layers.2.attention.wq.weight"),
        ({"num_hidden_layers": 1}, "unknown model.layers.1."),
        ({"intermediate_size": 192}, "feed_forward.w1.weight [128, 64] instead of [192, 64]"),
        ({"num_attention_heads": 5, "head_dim": None}, "a width of 64 cannot be shared by 5 heads"),
        ({"num_attention_heads": 5}, "2 key/value heads do not divide 5 query heads"),
    ],
)
def test_huggingface_errors(tmp_path: Path, changes: dict, expected: str) -> None:
    folder = write_huggingface(tmp_path, CONFIG)
    edit_json(folder / "config.json", **changes)
    said = message(lambda: open_weights(str(folder)))
    assert expected in said
    assert str(tmp_path) in said


def test_huggingface_files_that_are_not_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_huggingface(tmp_path, CONFIG)
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(24)}, path)
    assert_holds(folder, CONFIG, random_state())  # a buffer that old exporters wrote
    save_file({**state, "lm_head.bias": torch.ones(48)}, path)
    assert "unknown lm_head.bias" in message(lambda: open_weights(str(folder)))
    save_file({**state, "lm_head.weight": torch.ones(48, 64, dtype=torch.int8)}, path)
    assert "lm_head.weight is stored as I8" in message(lambda: open_weights(str(folder)))
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path} is truncated" in message(lambda: open_weights(str(folder)))

    sharded = write_huggingface(tmp_path / "sharded", CONFIG, max_shard_size="60KB")
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in message(lambda: open_weights(str(sharded)), FileNotFoundError)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.bin"  # known by its content, not its name
    expected = write_gguf(path, CONFIG, gguf.GGMLQuantizationType[kind])
    assert_holds(path, CONFIG, expected)
    assert open_weights(str(path)).tokenizer() is None


def test_gguf_k_quants(tmp_path: Path) -> None:
    """The `gguf` package cannot write them, so the blocks are random bytes; the q rows are checked in their order."""
    kind = gguf.GGMLQuantizationType.Q4_K
    config = LlamaConfig(
        vocab_size=8, width=256, layers=1, heads=4, kv_heads=4, head_width=64, hidden_width=256, context=2048
    )
    blocks = np.random.default_rng(0).integers(0, 60, (256, 144), dtype=np.uint8)  # one block of 256 a row
    path = tmp_path / "model.gguf"

    def as_blocks(writer: gguf.GGUFWriter) -> None:
        add = writer.add_tensor

        def replace(name: str, data: np.ndarray, **options: object) -> None:
            add(name, blocks, raw_dtype=kind) if "attn_q" in name or "attn_v" in name else add(name, data, **options)

        writer.add_tensor = replace

    write_gguf(path, config, edit=as_blocks)
    state = load_state_dict(open_weights(str(path)), torch.float32)
    values = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert torch.equal(state["layers.0.attention.wv.weight"], values)
    assert torch.equal(to_pairs("wq.weight", state["layers.0.attention.wq.weight"], 64), values)


def test_gguf_rotary_scaling(tmp_path: Path) -> None:
    config = with_changes(tied=True, rope_divisors=tuple(np.float32(DIVISORS).tolist()), rope_theta=500000.0)
    write_gguf(tmp_path / "llama3.gguf", config)
    assert_holds(tmp_path, config, random_state(config))  # a folder with one GGUF file

    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    write_gguf(tmp_path / "linear.gguf", CONFIG, edit=linear)
    assert open_weights(str(tmp_path / "linear.gguf")).config.rope_divisors == (2.0,) * 24
    assert "2 GGUF files" in message(lambda: open_weights(str(tmp_path)))


def test_gguf_tokenizer_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer gets the metadata as plain Python values."""
    tokens = [f"token {number} é" for number in range(48)]

    def vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([float(-number) for number in range(48)])
        writer.add_token_types([1] * 48)
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(True)

    write_gguf(tmp_path / "model.gguf", CONFIG, edit=vocabulary)
    monkeypatch.setattr("mmadapter.tokenizer.tokenizer_from_gguf", lambda fields: fields)
    fields = open_weights(str(tmp_path)).tokenizer()
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"] == tokens
    assert fields["tokenizer.ggml.scores"] == [float(-number) for number in range(48)]
    assert fields["tokenizer.ggml.token_type"] == [1] * 48
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is True


def test_gguf_errors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def said(kind: str = "F32", config: LlamaConfig = CONFIG, **options: object) -> str:
        write_gguf(path, config, gguf.GGMLQuantizationType[kind], **options)
        found = message(lambda: open_weights(str(path)))
        assert str(path) in found
        return found

    assert "architecture 'qwen2'; supported is 'llama'" in said(architecture="qwen2")
    assert "mixture of 8 experts" in said(edit=lambda writer: writer.add_expert_count(8))
    assert "one part of 3" in said(edit=lambda writer: writer.add_uint16("split.count", 3))
    assert "'yarn'; supported are" in said(edit=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    assert "unknown blk.0.attn_q.bias" in said(
        edit=lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(192, dtype=np.float32))
    )
    for name, value, expected in (
        ("rope.dimension_count", 8, "llama.rope.dimension_count is 8, supported is the head width, 48"),
        ("block_count", 2**32 - 1, "describes 4294967295 layers but holds 21 tensors"),
        ("block_count", 3, "missing layers.2.attention.wq.weight"),
        ("embedding_length", 96, "tok_embeddings.weight [48, 64] instead of [48, 96]"),
    ):
        assert expected in said(
            edit=lambda writer, n=name, v=value: writer.kv_data[0][f"llama.{n}"].__setattr__("value", v)
        )
    assert "no llama.block_count" in said(edit=lambda writer: writer.kv_data[0].pop("llama.block_count"))


def test_a_truncated_gguf_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, edit=lambda writer: writer.add_token_list(["token"] * 48))
    whole = path.read_bytes()
    for length in [4, 7, 20, *range(30, 3000, 97), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        said = message(lambda: open_weights(str(path)))
        assert f"{path} is truncated" in said, length
    path.write_bytes(b"GGUF" + (99).to_bytes(4, "little") + whole[8:])
    assert "GGUF version 99 cannot be read" in message(lambda: open_weights(str(path)))


def test_a_damaged_gguf_never_ends_in_another_error(tmp_path: Path) -> None:
    """Guards against a damaged count that fills the memory, and against messages of two lines from damaged names."""
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, edit=lambda writer: writer.add_token_list(["token"] * 48))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refusals = []
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[generator.integers(4, 2500)] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            open_weights(str(path))
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not any("\n" in refusal for refusal in refusals)


def test_specs_that_name_no_weights(tmp_path: Path) -> None:
    said = message(lambda: open_weights(str(tmp_path / "none")), FileNotFoundError)
    assert "smollm2-135m" in said
    assert "hf:ORG/NAME" in said
    assert "image encoder, not a LLaMA" in message(lambda: open_weights("efficientnet-lite2"))
    assert "it holds nothing" in message(lambda: open_weights(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    said = message(lambda: open_weights(str(tmp_path)))
    assert "*.safetensors" in said
    assert "pytorch_model.bin" in said
    assert "not a GGUF file" in message(lambda: open_weights(str(tmp_path / "pytorch_model.bin")))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "config.json is no JSON file" in message(lambda: open_weights(str(tmp_path)))


def test_loading_casts_and_only_to_floats(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", CONFIG, gguf.GGMLQuantizationType.F16)
    weights = open_weights(str(tmp_path))
    state = load_state_dict(weights, torch.bfloat16)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(tensor.is_contiguous() for tensor in state.values())
    message(lambda: load_state_dict(weights, torch.int8))


@pytest.mark.slow
def test_the_default_llama_speaks() -> None:
    """The real file: names, order of the q and k rows, quantised blocks and tokenizer all have to be right for this."""
    if store.cached_path("smollm2-135m") is None:
        pytest.skip("the default weights are not in the cache; `python -m mmadapter weights fetch smollm2-135m`")
    weights = open_weights("smollm2-135m")
    assert weights.config == LlamaConfig(
        vocab_size=49152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_width=64,
        hidden_width=1536,
        rope_theta=100000.0,
        tied=True,
        context=8192,
    )
    assert sum(math.prod(shape) for shape in weights.shapes.values()) == 134515008
    model = Llama.from_state_dict(weights.config, load_state_dict(weights, torch.float32))
    tokenizer = weights.tokenizer()
    ids = tokenizer.encode("The capital of France is", bos=False)
    with torch.no_grad():
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids) == "The capital of France is Paris"
