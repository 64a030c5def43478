"""A packed base gives what the plain one gives, and says so where it is asked to train."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from mmadapter import packed as packed_module
from mmadapter.adapter import select_prompts
from mmadapter.llama import Llama
from mmadapter.model import AdaptedLlama
from mmadapter.packed import PackedLinear, can_pack, pack

SHAPES = {"tied": tiny.config(tied=True), "untied": tiny.config()}
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_packed_linear_is_the_linear(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    plain = nn.Linear(48, 32, bias=False)
    nn.init.normal_(plain.weight, generator=generator)
    plain.to(dtype)
    x = torch.randn(2, rows, 48, generator=generator).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(plain.weight)(x), plain(x))


@pytest.mark.parametrize("tune", ["prompts", "prompts+bias+scale+norm"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_a_packed_model_gives_the_same_logits(shape: object, tune: str) -> None:
    llama, tokens = tiny.llama(shape), tiny.tokens(2, 6)
    adapter = tiny.adapter(shape, image=True, tune=tune)
    prompts = adapter.prompts(llama, tiny.features(2))
    expected, base = llama(tokens, prompts=prompts), llama(tokens)
    assert pack(llama)
    assert not any(isinstance(module, nn.Linear) for module in llama.modules())
    torch.testing.assert_close(llama(tokens), base)
    torch.testing.assert_close(llama(tokens, prompts=adapter.prompts(llama, tiny.features(2))), expected)


@pytest.mark.parametrize("tune", ["prompts", "prompts+bias+scale+norm"])
@torch.inference_mode()
def test_a_packed_model_decodes_as_the_plain_one(tune: str) -> None:
    """A token at a time, with images: keys and values in the cache, and one of two rows taken twice on the way."""
    llama, tokens = tiny.llama(), tiny.tokens(2, 6)
    other = Llama.from_state_dict(llama.config, llama.state_dict())
    adapter = tiny.adapter(llama.config, image=True, tune=tune)
    assert pack(other)
    found = []
    for model in (llama, other):
        prompts, cache = adapter.prompts(model, tiny.features(2)), model.new_cache(2, 6)
        steps = [model(token, prompts=prompts, cache=cache) for token in tokens[:, :4].split(1, dim=1)]
        rows = torch.tensor([1, 1])
        cache.select(rows)
        prompts = select_prompts(prompts, rows)
        steps += [model(token, prompts=prompts, cache=cache) for token in tokens[rows, 4:].split(1, dim=1)]
        found.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(found[1], found[0])


def test_packing_twice_is_packing_once() -> None:
    llama = tiny.llama()
    assert pack(llama)
    attention = llama.layers[0].attention
    assert pack(llama)
    assert llama.layers[0].attention is attention


def test_a_packed_model_shares_what_is_no_linear_and_leaves_the_other_alone() -> None:
    llama = tiny.llama()
    other = Llama.from_state_dict(llama.config, llama.state_dict())
    assert pack(other)
    assert other.tok_embeddings.weight.data_ptr() == llama.tok_embeddings.weight.data_ptr()
    assert isinstance(llama.layers[0].attention.wq, nn.Linear)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_training_on_it_is_an_error_that_says_what_to_do(shape: object) -> None:
    llama = tiny.llama(shape)
    pack(llama)
    model = AdaptedLlama(llama, tiny.adapter(llama.config))
    with pytest.raises(ValueError, match=r"packed for inference and has no gradient; load it with mmadapter\.load"):
        model(tiny.tokens(2, 5), tiny.tokens(2, 5))


def test_what_cannot_be_packed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "can_pack", lambda dtype: False)
    llama = tiny.llama()
    assert not pack(llama)
    assert isinstance(llama.layers[0].attention.wq, nn.Linear)
    assert not pack(tiny.llama().to(torch.float64))


def test_the_command_line_packs() -> None:
    import argparse

    import mmadapter
    from mmadapter.options import load_session

    loaded = []
    plain = argparse.Namespace(
        **{"llama": "x", "adapter": "none", "vision": None, "device": "cpu", "dtype": "float32"},
        **{"prompt_length": 10, "gate": "tanh"},
    )

    def load(**options: object) -> argparse.Namespace:
        loaded.append(argparse.Namespace(llama=tiny.llama()))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmadapter, "load", load)
        assert load_session(plain) is loaded[0]
    assert isinstance(loaded[0].llama.layers[0].feed_forward.w13, PackedLinear)
