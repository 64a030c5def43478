"""The tuning of LLaMA-Adapter V2: nothing at the start and at strength 0, everything it says in between, row by row.

Its logits and gradients are compared with the equations in test_adapter.py, decoding in test_generate.py, files in
test_checkpoint.py, switching in test_session.py.
"""

from __future__ import annotations

import pytest
import tiny
import torch

from mmadapter import llama as llama_module
from mmadapter.adapter import Adapter, Prompts, select_prompts, stack_prompts
from mmadapter.config import AdapterConfig, LlamaConfig
from mmadapter.info import adapter_parameters
from mmadapter.llama import UNTUNED, Llama
from mmadapter.model import AdaptedLlama

TUNE = "prompts+bias+scale+norm"
DTYPES = [torch.float32, torch.bfloat16]
DEFAULT_BASE = LlamaConfig(49152, 576, 30, 9, 3, 64, 1536, tied=True)  # the shape of SmolLM2-135M


def fresh(base: LlamaConfig, *, image: bool = False) -> Adapter:
    """As a training run starts."""
    projection = tiny.adapter(base, image=True).projection if image else None
    return Adapter(AdapterConfig(2, 3, tune=TUNE), base, projection=projection)


def test_the_default_base_gets_few_parameters() -> None:
    config = AdapterConfig(28, 10, tune=TUNE)
    adapter = Adapter(config, DEFAULT_BASE)
    count = sum(parameter.numel() for parameter in adapter.tuning.parameters())
    assert count == adapter_parameters(config, DEFAULT_BASE)["tuning"] == 346_176
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 346_176 + 161_280 + 252


# ---- Nothing at the start.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_new_adapter_changes_no_bit_and_all_but_its_prompts_have_a_gradient(image: bool, dtype: torch.dtype) -> None:
    llama, tokens = tiny.llama().to(dtype), tiny.tokens(3, 6)
    adapter, features = fresh(llama.config, image=image), tiny.features(3) if image else None
    logits = llama(tokens, prompts=adapter.prompts(llama, features))
    assert torch.equal(logits, llama(tokens))
    logits.square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert bool(parameter.grad.any()) == (name == "gate" or name.startswith("tuning.")), name


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_strength_zero_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    llama, tokens = tiny.llama().to(dtype), tiny.tokens(3, 6)
    adapter = tiny.adapter(llama.config, tune=TUNE, image=True)
    none = adapter.prompts(llama, tiny.features(3), strength=0.0)
    assert torch.equal(llama(tokens, prompts=none), llama(tokens))
    assert (llama(tokens, prompts=adapter.prompts(llama, tiny.features(3))) - llama(tokens)).abs().max() > 0.1


@torch.no_grad()
def test_strength_scales_the_difference_of_every_tensor() -> None:
    llama, tokens = tiny.llama(), tiny.tokens(2, 6)
    adapter = tiny.adapter(llama.config, tune=TUNE, gate="identity")
    by_hand = tiny.adapter(llama.config, tune=TUNE, gate="identity")
    by_hand.gate *= 0.7
    for name, parameter in by_hand.tuning.named_parameters():
        start = 1.0 if name.startswith("scale.") else 0.0
        parameter.copy_(start + 0.7 * (parameter - start))
    logits = llama(tokens, prompts=adapter.prompts(llama, strength=0.7))
    torch.testing.assert_close(logits, llama(tokens, prompts=by_hand.prompts(llama)), atol=1e-5, rtol=0)


def test_without_tuning_the_plain_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over every linear's output that changes nothing would make every adapter slower."""
    llama, tokens = tiny.llama(), tiny.tokens(2, 6)
    calls, addcmul = [], torch.addcmul
    monkeypatch.setattr(llama_module.torch, "addcmul", lambda *args: calls.append(1) or addcmul(*args))
    turned = 3 * 2  # queries and keys of each layer, by the rotary angles
    for tune, expected in (("prompts", turned), (TUNE, turned + 3 * 7 + 2 * 2)):  # linears, W_k P, W_v P of two layers
        prompts = tiny.adapter(llama.config, tune=tune).prompts(llama)
        calls.clear()
        llama(tokens, prompts=tiny.adapter(llama.config, tune=tune).prompts(llama))
        assert len(calls) == expected
        assert (prompts.tuning == (UNTUNED,) * 3) == (prompts.norm is None) == (tune == "prompts")


# ---- Everything trains.


def test_every_parameter_moves_and_the_loss_falls() -> None:
    """From the start of a run: after the first step the gates have moved, and the prompts follow."""
    llama, tokens, features = tiny.llama(), tiny.tokens(2, 6), tiny.features(2)
    torch.manual_seed(0)
    model = AdaptedLlama(llama, fresh(llama.config, image=True))
    before = {name: parameter.clone() for name, parameter in model.adapter.named_parameters()}
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(tokens, tokens, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    moved = {name for name, parameter in model.adapter.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == before.keys()
    for name, parameter in model.adapter.tuning.named_parameters():
        rows = parameter.grad if parameter.ndim == 2 else parameter.grad[None]
        assert rows.any(1).all(), name  # in every layer


# ---- Rows that differ.


def mixed_rows(llama: Llama) -> list[Prompts | None]:
    """Untuned, none, two images on one tuned adapter, one of them at another strength, it without an image, and
    another tuned adapter."""
    shape, images = llama.config, tiny.features(2)
    seeing = tiny.adapter(shape, image=True, tune=TUNE)
    other = tiny.adapter(shape, layers=3, prompt_length=5, gate="identity", tune=TUNE, seed=4)
    untuned = tiny.adapter(shape, layers=1, prompt_length=1, gate="scalar", seed=5)
    return [
        untuned.prompts(llama),
        seeing.prompts(llama, images[:1]),
        None,
        seeing.prompts(llama, images[1:], strength=0.6),
        other.prompts(llama),
        seeing.prompts(llama),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_mixed_left_padded_cached_batch_equals_its_rows_alone(dtype: torch.dtype) -> None:
    llama = tiny.llama().to(dtype)
    rows = mixed_rows(llama)
    texts = [tiny.tokens(1, length, seed=length)[0] for length in (3, 1, 8, 5, 8, 2)]
    ends = tiny.tokens(1, 3, seed=9)[0]
    batch, valid = tiny.left_padded(texts)
    cache, prompts = llama.new_cache(6, 11), stack_prompts(rows)
    steps = [llama(batch, prompts=prompts, cache=cache, valid=valid)]
    for token in ends:
        valid = torch.cat((valid, torch.ones(6, 1, dtype=torch.bool)), 1)
        steps.append(llama(token.expand(6, 1), prompts=prompts, cache=cache, valid=valid))
    logits = torch.cat(steps, 1)  # [6, 11, V]
    near = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0}
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        whole = torch.cat((text, ends))[None]
        alone = llama(whole, prompts=row)[0]
        torch.testing.assert_close(logits[index, 8 - len(text) :], alone, **near)
        assert row is None or (alone - llama(whole)[0]).abs().max() > 0.2  # each row's adapter shows


@torch.no_grad()
def test_rows_are_taken_repeated_and_stacked_again() -> None:
    llama, tokens = tiny.llama(), tiny.tokens(6, 7)
    stacked = stack_prompts(mixed_rows(llama))
    alone = llama(tokens, prompts=stacked)
    order = torch.tensor([5, 1, 1, 2, 0])
    picked = select_prompts(stacked, order)
    torch.testing.assert_close(llama(tokens[order], prompts=picked), alone[order], atol=1e-5, rtol=0)
    again = stack_prompts([select_prompts(stacked, torch.tensor([row])) for row in (0, 3, 4)])
    torch.testing.assert_close(llama(tokens[[0, 3, 4]], prompts=again), alone[[0, 3, 4]], atol=1e-5, rtol=0)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows() -> None:
    """A row without tuning must not train that of another."""
    llama, tokens = tiny.llama(), tiny.tokens(3, 6)
    gradients = []
    for batched in (True, False):
        tuned = tiny.adapter(llama.config, tune=TUNE)
        rows = [tuned.prompts(llama), None, tiny.adapter(llama.config, seed=4).prompts(llama)]
        if batched:
            llama(tokens, prompts=stack_prompts(rows)).square().mean((1, 2)).sum().backward()
        else:
            llama(tokens[:1], prompts=rows[0]).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in tuned.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_what_all_rows_share_stays_shared() -> None:
    """Copied for each beam of each row, the tuning would be read from memory at every token."""
    llama = tiny.llama()
    prompts = tiny.adapter(llama.config, tune=TUNE, image=True).prompts(llama, tiny.features(2))
    picked = select_prompts(prompts, torch.tensor([1, 1, 0]))
    assert len(picked.layers[1].image) == 3
    assert len(picked.layers[1].key) == len(picked.layers[1].value) == 1
    assert picked.tuning is prompts.tuning
    assert picked.norm is prompts.norm
    untuned = tiny.adapter(llama.config).prompts(llama)
    stacked = stack_prompts([untuned, None])
    assert stacked.tuning == (UNTUNED,) * 3
    assert stacked.norm is None


# ---- One tensor at a time: each does what its name says, in its own layer.


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["wq", "wk", "wv", "wo", "w1", "w2", "w3"])
@torch.no_grad()
def test_a_scale_is_that_of_the_rows_of_its_weight(name: str, layer: int) -> None:
    """The base with the rows of one W scaled, against the base with one tuned scale."""
    llama, other, tokens = tiny.llama(), tiny.llama(), tiny.tokens(2, 6)
    adapter = fresh(llama.config)
    adapter.tuning.scale[name][layer] += torch.randn(adapter.tuning.scale[name].shape[1])
    part = "attention" if name in ("wq", "wk", "wv", "wo") else "feed_forward"
    weight = getattr(getattr(other.layers[layer], part), name).weight
    weight.copy_(weight * adapter.tuning.scale[name][layer][:, None])
    expected = other(tokens)
    torch.testing.assert_close(llama(tokens, prompts=adapter.prompts(llama)), expected, atol=1e-4, rtol=1e-5)
    assert (expected - llama(tokens)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["attention", "ffn", "final"])
@torch.no_grad()
def test_a_norm_is_that_of_the_base_with_another_weight(name: str) -> None:
    llama, other, tokens = tiny.llama(), tiny.llama(), tiny.tokens(2, 6)
    adapter = fresh(llama.config)
    difference = adapter.tuning.norm[name]
    difference.copy_(torch.randn(difference.shape))
    norms = [other.norm] if name == "final" else [getattr(block, f"{name}_norm") for block in other.layers]
    for norm, change in zip(norms, difference.view(len(norms), -1), strict=True):
        norm.weight += change
    expected = other(tokens)
    assert torch.equal(llama(tokens, prompts=adapter.prompts(llama)), expected)
    assert (expected - llama(tokens)).abs().max() > 0.01
