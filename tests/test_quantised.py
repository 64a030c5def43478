"""The base in int8 and int4: exact against its own numbers in float32, small in memory, and a base like any other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny as small
import tiny_session
import torch
from torch import Tensor, nn
from weight_files import CONFIG, random_state, write_gguf

import mmadapter
from mmadapter import cli, options, quantised
from mmadapter.config import LlamaConfig
from mmadapter.llama import Llama
from mmadapter.model import AdaptedLlama
from mmadapter.quantised import QuantisedLinear, group_grid, packed_bytes, quantised_llama, row_grid
from mmadapter.weights import BaseWeights

NAMES = ("int8", "int4")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def row_values(weight: Tensor) -> Tensor:
    """What int8 makes of a weight, written from the definition, float32 [O, I]."""
    q, scale = row_grid(weight)
    return q.float() * scale.float()[:, None]


def group_values(weight: Tensor) -> Tensor:
    """What int4 makes of a weight, float32 [O, I]."""
    q, grid = group_grid(weight)
    scale, zero = (part.float().T.repeat_interleave(32, dim=1) for part in grid.unbind(-1))  # [O, I]
    return (q - 8) * scale + zero


VALUES = {"int8": row_values, "int4": group_values}


def weights_of(state: dict[str, Tensor], config: LlamaConfig = CONFIG) -> BaseWeights:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return BaseWeights("", Path(), config, shapes, lambda: iter(state.items()), lambda: None)


def as_stored(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The numbers that a quantised model stands for, in float32."""
    kept = {"tok_embeddings.weight": row_values, "output.weight": row_values}
    return {
        key: kept.get(key, VALUES[name])(tensor) if tensor.ndim == 2 else tensor.bfloat16().float()
        for key, tensor in state.items()
    }


def rounded(config: LlamaConfig, state: dict[str, Tensor]) -> Llama:
    """The plain model in bfloat16: what that alone makes of the logits is what a packed model may do, too."""
    return Llama.from_state_dict(config, {key: tensor.bfloat16() for key, tensor in state.items()})


@pytest.mark.parametrize("name", NAMES)
def test_tensors_in_any_order_make_the_same_model(name):
    """Joined linears wait for their parts."""
    state = random_state(CONFIG)
    turned = dict(reversed(state.items()))
    tokens = torch.arange(6)[None]
    with torch.inference_mode():
        expected, found = (quantised_llama(weights_of(s), name)(tokens) for s in (state, turned))
    assert torch.equal(found, expected)
    del turned["layers.0.attention.wk.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the model, such as layers\.0\.attention\.wk\.weight"):
        quantised_llama(weights_of(turned), name)


@pytest.mark.parametrize("values", VALUES.values(), ids=NAMES)
def test_the_grids_are_the_nearest(values):
    weight = noise(48, 96)
    weight[3] = 0  # a row that no scale fits
    weight[4, :32] = 0.25
    off = (values(weight) - weight).abs()
    if values is row_values:
        step = weight.abs().amax(1, keepdim=True) / 127
    else:
        groups = weight.view(48, 3, 32)
        step = ((groups.amax(2) - groups.amin(2)) / 15).repeat_interleave(32, dim=1)
    # Half a step, and what rounding scale and zero to bfloat16, 8 bits, may add.
    assert (off <= 0.5 * step + weight.abs().max() * 2**-8).all()
    assert off.max() > 0.3 * step.max()  # it is rounding at all
    assert (values(weight)[3] == 0).all()
    if values is group_values:
        assert (values(weight)[4, :32] == 0.25).all()  # no step between equal numbers


def test_the_numbers_of_q4_1_are_found_again():
    """llama.cpp's blocks hold scale, minimum and 32 q of 4 bits, in that order; the low halves are the first 16."""
    weight = noise(32, 64, seed=1).numpy()
    blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1).reshape(32, 2, 20)
    packed = blocks[..., 4:]
    stored = np.concatenate((packed & 15, packed >> 4), axis=-1).reshape(32, 64)
    scale, low = torch.from_numpy(blocks[..., :4].copy().view(np.float16).astype(np.float32)).unbind(-1)  # [O, I/32]
    read = gguf.quants.dequantize(blocks.reshape(32, -1), gguf.GGMLQuantizationType.Q4_1)
    q, grid = group_grid(torch.from_numpy(read))
    assert torch.equal(q, torch.from_numpy(stored.astype(np.int32)))
    assert torch.equal(grid[..., 0], scale.T.bfloat16())
    assert torch.equal(grid[..., 1], (low + 8 * scale).T.bfloat16())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(96, 64), (48, 160)])
def test_a_linear_multiplies_by_exactly_its_own_numbers(name, shape):
    """Against one 1 in a row of zeros the sum is a single weight, so nothing but the last rounding may differ."""
    weight = noise(*shape)
    linear, values = QuantisedLinear(weight, quantised.BITS[name]), VALUES[name](weight)
    ones = torch.eye(shape[1], dtype=torch.bfloat16)
    assert shape[1] >= quantised.MANY
    assert torch.equal(linear(ones), values.T.bfloat16())  # many rows at once
    assert torch.equal(torch.cat([linear(row[None]) for row in ones]), values.T.bfloat16())  # one, as in decoding
    assert linear(ones[None, :6]).shape == (1, 6, shape[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 5, quantised.MANY, 130])
def test_a_linear_equals_float32(name, rows):
    weight, x = noise(96, 64), noise(rows, 64, seed=1).bfloat16()
    expected = x.float() @ VALUES[name](weight).T
    y = QuantisedLinear(weight, quantised.BITS[name])(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-6, atol=2**-6)  # bfloat16 holds 8 bits
    # Columns of x and rows of a batch that do not lie side by side in memory.
    apart = noise(64, rows, seed=1).bfloat16().T
    linear = QuantisedLinear(weight, quantised.BITS[name])
    assert torch.equal(linear(apart), linear(apart.contiguous()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_equals_a_plain_one_of_its_own_numbers(name, tied):
    """Embedding, every linear of every block and the output projection, tied or not; whole text and cached."""
    config = dataclasses.replace(CONFIG, tied=tied)
    state = random_state(config)
    state = {key: 1 + tensor if tensor.ndim == 1 else tensor for key, tensor in state.items()}
    model = quantised_llama(weights_of(state, config), name)
    assert model.dtype == torch.bfloat16
    tokens = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    plain = Llama.from_state_dict(config, as_stored(state, name))(tokens)
    allowed = 1.5 * (rounded(config, as_stored(state, name))(tokens) - plain).norm()
    logits = model(tokens)
    assert logits.dtype == torch.float32
    assert (logits - plain).norm() < allowed

    cache = model.new_cache(2, 40)
    parts = [model(part, cache=cache) for part in tokens.split((33, 1, 1, 5), dim=1)]
    assert (torch.cat(parts, dim=1) - plain).norm() < allowed


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_packed(tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    state = random_state(config)
    tables = 48 * (64 + 2) * (1 if tied else 2)  # int8, and a scale of 2 bytes a row; one memory for both where tied
    norms = 2 * (4 * 64 + 64)
    sizes = [(t.shape[0], t.numel()) for key, t in state.items() if t.ndim == 2 and key.startswith("layers")]
    expected = {
        "int8": sum(count + 2 * rows for rows, count in sizes),
        "int4": sum(count // 2 + count // 32 * 4 for _, count in sizes),
    }
    for name in NAMES:
        model = quantised_llama(weights_of(state, config), name)
        assert packed_bytes(model) == expected[name] + tables + norms
        floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        assert max(tensor.numel() for tensor in floats) <= 192 * 128 // 32 * 2  # no whole weight beside the packed one
        assert not [module for module in model.modules() if type(module) in (nn.Linear, nn.Embedding)]
    assert packed_bytes(rounded(config, state)) == 2 * sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("tune", ["prompts", "prompts+bias+scale+norm"])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_tuning_act_on_the_packed_base(name, tune):
    state = random_state()
    packed = quantised_llama(weights_of(state), name)
    plain = Llama.from_state_dict(CONFIG, as_stored(state, name))
    adapter = small.adapter(CONFIG, image=True, tune=tune)
    tokens, features = small.tokens(2, 9, vocab_size=48), small.features(2)
    with torch.no_grad():
        expected, logits, close = (
            model(tokens, prompts=adapter.prompts(model, features))
            for model in (plain, packed, rounded(CONFIG, as_stored(state, name)))
        )
        assert (logits - expected).norm() < 1.5 * (close - expected).norm()
        assert (packed(tokens) - expected).norm() > 4 * (close - expected).norm()
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


def test_training_on_a_packed_base_is_refused():
    model = quantised_llama(weights_of(random_state()), "int4")
    assert not list(filter(lambda parameter: parameter.requires_grad, model.parameters()))
    with pytest.raises(ValueError, match=r"is for inference.*load it with dtype float32 or bfloat16"):
        model.output_weight  # noqa: B018 - what the loss multiplies by
    adapter = small.adapter(CONFIG)
    with pytest.raises(ValueError, match="is for inference"):
        AdaptedLlama(model, adapter)(small.tokens(1, 5, vocab_size=48), torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize("inputs", [16, 20, 24, 40, 50])
@pytest.mark.parametrize("rows", [1, 4, 70])
def test_int8_takes_any_number_of_inputs(inputs, rows):
    """Of a number that is no multiple of 16 the kernel reads what lies behind a row, or ends the process."""
    generator = torch.Generator().manual_seed(inputs)
    weight, x = (torch.randn(n, inputs, generator=generator) for n in (9, rows))
    found = QuantisedLinear(weight, 8)(x.bfloat16())
    torch.testing.assert_close(found.float(), x.bfloat16().float() @ row_values(weight).T, atol=0.1, rtol=0.02)


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"multiples of 32 .*48 inputs and 16 outputs; choose dtype int8"):
        QuantisedLinear(torch.ones(16, 48), 4)
    with pytest.raises(ValueError, match=r"multiples of 16, .*32 inputs and 24 outputs"):
        QuantisedLinear(torch.ones(24, 32), 4)
    with pytest.raises(ValueError, match="quantised to int8 or int4, got 'int2'"):
        quantised_llama(weights_of({}), "int2")
    state = random_state()
    del state["layers.1.attention.wo.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the model, such as layers.1.attention.wo.weight"):
        quantised_llama(weights_of(state), "int8")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, int4, got 'half'"):
        mmadapter.load("nowhere", dtype="half")
    with pytest.raises(ValueError, match="int4 runs on the CPU alone, and device is 'cuda:1'; choose float32"):
        mmadapter.load("nowhere", dtype="int4", device="cuda:1")

    def missing(*_: object) -> Tensor:
        raise NotImplementedError("no such operator on this CPU\nmore")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    quantised.check_kernel.cache_clear()
    with pytest.raises(ValueError, match=r"has no int8 kernel .* \(no such operator on this CPU\); choose"):
        mmadapter.load("nowhere", dtype="int8")
    quantised.check_kernel("int4")
    monkeypatch.delattr(torch, "_weight_int4pack_mm_for_cpu")
    quantised.check_kernel.cache_clear()
    with pytest.raises(ValueError, match=r"has no int4 kernel .*_weight_int4pack_mm_for_cpu"):
        mmadapter.load("nowhere", dtype="int4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model with a feed-forward as wide as the int4 kernel asks for."""
    plain = tiny_session.llama_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_session, "llama_config", lambda size: dataclasses.replace(plain(size), hidden_width=64))
        return tiny_session.build(tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize("name", NAMES)
def test_adapters_switch_and_the_base_stays(tiny, name):
    session, tokens, picture = tiny.load(dtype=name), torch.arange(12)[None], tiny.picture(0)
    base = session.logits(tokens)
    state = {key: tensor.clone() for key, tensor in session.llama.state_dict().items()}
    seen = []
    for adapter, image in ((tiny.sees, picture), (tiny.reads, None), (tiny.tuned, picture), (tiny.sees, picture)):
        session.adapter(adapter)
        seen.append(session.logits(tokens, image))
        assert not torch.equal(seen[-1], base)
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[2])
    session.adapter(None)
    assert torch.equal(session.logits(tokens), base)
    assert all(torch.equal(state[key], tensor) for key, tensor in session.llama.state_dict().items())
    assert session.with_adapter(tiny.reads).llama is session.llama
    # An adapter fits whatever number format it was trained on: its file knows the shape alone.
    assert session.fingerprint == tiny.load().fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_captions_answers_and_beams(tiny, name):
    session = tiny.load(tiny.sees, dtype=name)
    pictures = [tiny.picture(0), tiny.picture(1)]
    together = session.caption(pictures, max_new_tokens=6)
    assert together == [session.caption([picture], max_new_tokens=6)[0] for picture in pictures]
    assert len(session.caption(pictures, max_new_tokens=6, beams=3)) == 2
    choice = session.answer(pictures[0], "what is it?", ["a dog", "a man"])
    assert sum(choice.probabilities) == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line(tiny, name, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    words = ["caption", str(tiny.picture(0)), "--llama", str(tiny.llama), "--adapter", str(tiny.sees)]
    assert cli.main([*words, "--dtype", name, "--out", str(out), "--max-new-tokens", "5"]) == 0
    caption = json.loads(out.read_text())["caption"]
    assert caption == tiny.load(tiny.sees, dtype=name).caption([tiny.picture(0)], max_new_tokens=5)[0]
    assert cli.main([*words, "--dtype", name, "--device", "cuda"]) == 1
    assert f"error: {name} runs on the CPU alone" in capsys.readouterr().err


def test_names_of_dtypes():
    assert options.resolve_dtype("int8", "cpu") is torch.int8
    assert str(options.resolve_dtype("int4", "cpu")) == "torch.int4"
    with pytest.raises(ValueError, match="unknown dtype 'int2'; choose auto, float32, bfloat16, int8 or int4"):
        options.resolve_dtype("int2", "cpu")
    parser = options.Parser(prog="x")
    options.add_model_options(parser)
    for given, name in (("fp32", "float32"), ("bf16", "bfloat16"), ("int8", "int8"), ("int4", "int4")):
        assert parser.parse_args(["--dtype", given]).dtype == name


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_loads_packed(tmp_path, name):
    """From the file to logits; Q4_1 holds 4 bits already, so that int4 loses nothing but the scales' last bits."""
    path = tmp_path / "model.gguf"
    meant = write_gguf(path, CONFIG, gguf.GGMLQuantizationType.Q4_1)
    plain, tokens = Llama.from_state_dict(CONFIG, meant), small.tokens(1, 30, vocab_size=48)
    expected = plain(tokens)
    logits = mmadapter.load(str(path), dtype=name).logits(tokens)
    assert (logits - expected).norm() < 3 * (rounded(CONFIG, meant)(tokens) - expected).norm()
