"""The base model gives the logits of transformers, and the same ones however its tokens are fed to it."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
from weight_files import DIVISORS, SCALING, huggingface_model, random_state, with_changes

from mmadapter import llama as llama_module
from mmadapter.config import TUNES, LlamaConfig
from mmadapter.llama import KVCache, Llama, RMSNorm, attend
from mmadapter.model import AdaptedLlama
from mmadapter.normalise import normalise
from mmadapter.weights import expected_shapes, load_state_dict, open_weights, store

# What is changed in the tiny LLaMA (grouped queries, untied, heads wider than C / H), and transformers' words for it.
CASES = {
    "grouped": ({}, {}),
    "multi-head": ({"kv_heads": 4}, {}),
    "one key head": ({"kv_heads": 1}, {}),
    "tied": ({"tied": True}, {}),
    "head width C / H": ({"head_width": 16}, {}),
    "norm eps": ({"norm_eps": 0.1}, {}),
    "rope theta": ({"rope_theta": 100.0}, {}),
    "llama3 rope": (
        {"rope_divisors": DIVISORS},
        {"rope_type": "llama3", **SCALING, "original_max_position_embeddings": 64},
    ),
    "linear rope": ({"rope_divisors": (4.0,) * 24}, {"rope_type": "linear", "factor": 4.0}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(case: str) -> None:
    changes, rope = CASES[case]
    shape = with_changes(**changes)
    model = Llama.from_state_dict(shape, random_state(shape))
    tokens = tiny.tokens(2, 40, vocab_size=shape.vocab_size)
    theirs = huggingface_model(shape, rope)(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["norm eps", "rope theta", "llama3 rope", "linear rope"])
@torch.no_grad()
def test_what_holds_no_weight_shows_in_the_logits(case: str) -> None:
    """Else the parity above could not tell whether either side heeds the number."""
    plain, changed = with_changes(), with_changes(**CASES[case][0])
    tokens = tiny.tokens(2, 40, vocab_size=plain.vocab_size)
    logits, other = (Llama.from_state_dict(shape, random_state(shape))(tokens) for shape in (plain, changed))
    assert (logits - other).abs().max() > 0.05


@pytest.mark.slow
@torch.no_grad()
def test_the_default_llama_gives_the_logits_of_transformers() -> None:
    from transformers import AutoModelForCausalLM

    path = store.cached_path("smollm2-135m")
    if path is None:
        pytest.skip("the default weights are not in the cache; `python -m mmadapter weights fetch smollm2-135m`")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = tiny.tokens(2, 24, vocab_size=49152)
    expected = theirs(tokens).logits
    del theirs
    weights = open_weights("smollm2-135m")
    model = Llama.from_state_dict(weights.config, load_state_dict(weights, torch.float32))
    # Logits reach 33, where float32 itself is off by some 1e-5 in each: hence a share of the size beside the 1e-4.
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_is_near_float32_and_its_logits_are_float32() -> None:
    model, tokens = tiny.llama(), tiny.tokens(2, 9)
    exact = model(tokens)
    logits = model.to(torch.bfloat16)(tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.05 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("short", [256, 6, 0], ids=["short", "crossing", "long"])
@pytest.mark.parametrize("chunks", [[1] * 12, [12], [3, 1, 6, 2], [11, 1]], ids=str)
@torch.no_grad()
def test_cached_equals_uncached(monkeypatch: pytest.MonkeyPatch, chunks: list[int], short: int) -> None:
    monkeypatch.setattr(llama_module, "SHORT", short)
    model, tokens = tiny.llama(), tiny.tokens(2, 12)
    cache = model.new_cache(2, 15)
    parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("short", [256, 6, 0], ids=["short", "crossing", "long"])
@torch.no_grad()
def test_a_left_padded_batch_equals_its_rows_alone(monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    """A softmax over padding alone gave NaN, and NaN spread to real positions."""
    monkeypatch.setattr(llama_module, "SHORT", short)
    model = tiny.llama()
    rows = [tiny.tokens(1, length, seed=length)[0] for length in (4, 7, 1, 7)]
    alone = [model(torch.cat((row, tiny.tokens(1, 5, seed=9)[0]))[None])[0] for row in rows]  # each [t + 5, V]
    batch, valid = tiny.left_padded(rows, pad_id=5)
    cache = model.new_cache(4, 12)
    prefill = model(batch, cache=cache, valid=valid)  # [4, 7, V]
    torch.testing.assert_close(model(batch, valid=valid), prefill)
    assert prefill.isfinite().all()
    for row, expected, logits in zip(rows, alone, prefill, strict=True):
        torch.testing.assert_close(logits[7 - len(row) :], expected[: len(row)], atol=1e-5, rtol=0)
    steps = []
    for part in tiny.tokens(1, 5, seed=9).expand(4, -1).split([1, 3, 1], dim=1):  # one token, a chunk, one token
        valid = torch.cat((valid, torch.ones(4, part.shape[1], dtype=torch.bool)), 1)
        steps.append(model(part, cache=cache, valid=valid))
    decoded = torch.cat(steps, 1)  # [4, 5, V]
    for row, expected, logits in zip(rows, alone, decoded, strict=True):
        torch.testing.assert_close(logits, expected[len(row) :], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = tiny.llama()
    rows = [tiny.tokens(1, 3)[0], tiny.tokens(1, 8)[0]]
    batch, valid = tiny.left_padded(rows, pad_id=0)
    other, _ = tiny.left_padded(rows, pad_id=17)
    assert torch.equal(model(batch, valid=valid)[valid], model(other, valid=valid)[valid])


@torch.no_grad()
def test_selected_cache_rows_go_on_as_they_were() -> None:
    """A beam search reorders and repeats rows; their caches must then be independent of each other."""
    model = tiny.llama()
    start, order = tiny.tokens(3, 6), [2, 0, 0, 1]
    steps = tiny.tokens(4, 2, seed=8)
    cache = model.new_cache(3, 8)
    model(start, cache=cache)
    cache.select(torch.tensor(order))
    assert (cache.length, cache.capacity, cache.keys.shape[1]) == (6, 8, 4)
    decoded = torch.cat([model(step, cache=cache) for step in steps.split(1, dim=1)], 1)  # [4, 2, V]
    whole = model(torch.cat((start[order], steps), 1))[:, 6:]
    torch.testing.assert_close(decoded, whole, atol=1e-5, rtol=0)


def test_cache_rows_are_selected_while_gradients_are_on() -> None:
    model, tokens = tiny.llama().requires_grad_(), tiny.tokens(2, 4)
    cache = model.new_cache(2, 5)
    model(tokens, cache=cache)
    kept = cache.keys.detach().clone()
    cache.select(torch.tensor([1, 0]))
    assert torch.equal(cache.keys[:, :, :, :4], kept[:, [1, 0], :, :4])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("new", "keys", "mask"), [(5, 5, None), (1, 7, None), (3, 7, "shared"), (3, 7, "of each row")])
def test_both_paths_of_attention_agree(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, new: int, keys: int, mask: str | None
) -> None:
    """Outputs and gradients of the held and the blocked scores, against each other and softmax written out."""
    B, H, G, T, S, D = 2, 4, kv_heads, new, keys, 6
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    scattered = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(5)) < 0.5
    scattered[..., 0] = True  # every query sees something
    allowed = {None: None, "shared": causal[None, None], "of each row": scattered}[mask]
    generator = torch.Generator().manual_seed(4)
    shapes = ((B, H, T, D), (B, G, S, D), (B, G, S, D))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    weights = torch.randn(B, H, T, D, generator=generator)
    found = []
    for short in (256, 0):
        monkeypatch.setattr(llama_module, "SHORT", short)
        out = attend(q, k, v, allowed)
        found.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    wide_k, wide_v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))  # [B, H, S, D]
    scores = torch.einsum("bhtd,bhsd->bhts", q, wide_k) / D**0.5
    out = scores.masked_fill(~(causal if allowed is None else allowed), -torch.inf).softmax(-1) @ wide_v
    found.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_gradients_through_the_model_agree_on_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, grads = tiny.tokens(2, 9), []
    for short in (256, 0):
        monkeypatch.setattr(llama_module, "SHORT", short)
        model = tiny.llama().requires_grad_()
        model(tokens).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in grads[0]:
        assert grads[0][name].abs().max() > 0, name
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_errors_say_what_came() -> None:
    model = tiny.llama()
    cache = KVCache(model.config, 1, 4, torch.float32)
    model(tiny.tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="room for 4 tokens, 3 are in it and 2 more came"):
        model(tiny.tokens(1, 2), cache=cache)
    assert cache.length == 3
    model(tiny.tokens(1, 1), cache=cache)  # what fits still goes in
    with pytest.raises(ValueError, match="checkpointing runs each block twice, which a cache does not stand"):
        model.hidden(tiny.tokens(1, 1), cache=model.new_cache(1, 4), checkpointing=True)
    for wrong in (torch.tensor([1, 2]), torch.empty(2, 0, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"tokens must be \[B, T\].*got shape"):
            model(wrong)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("norm.weight"), "Missing key.*norm.weight"),
        (lambda state: state.update(extra=torch.ones(1)), "Unexpected key.*extra"),
        (lambda state: state.update({"norm.weight": torch.ones(3)}), "size mismatch for norm.weight"),
    ],
)
def test_a_state_dict_must_be_whole(change, reason: str) -> None:
    state = random_state(tiny.config())
    change(state)
    with pytest.raises(RuntimeError, match=reason):
        Llama.from_state_dict(tiny.config(), state)


def test_the_model_holds_the_tensors_it_was_given() -> None:
    """A copy would need twice the memory of a large base."""
    state = random_state(tiny.config())
    model = Llama.from_state_dict(tiny.config(), state)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_leaves_the_base_as_it_is(tied: bool, tune: str) -> None:
    """Its keys stay Meta's, and after a use with prompts its tensors and logits are what they were, bit for bit."""
    shape: LlamaConfig = tiny.config(tied=tied)
    model, adapter, tokens = tiny.llama(shape), tiny.adapter(shape, tune=tune), tiny.tokens(1, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(tokens)
    assert sorted(before) == sorted(expected_shapes(shape))
    adapted = AdaptedLlama(model, adapter)
    adapted(tokens, tokens).backward()
    after = adapted.llama.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(tokens), logits)
    own = [name for name in adapter.state_dict() if not name.startswith("tuning.")]
    assert own == ["prompt", "gate"]


# ---- The norm.


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("gradient", [True, False, None], ids=["trained", "frozen", "inference"])
def test_the_norm_is_its_formula(gradient: bool | None, rows: int) -> None:
    """Few rows without gradients go through another kernel."""
    norm = RMSNorm(8, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(rows, 1, 8, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, rows)[:, None, None]
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    with contextlib.nullcontext() if gradient is not None else torch.inference_mode():
        y = norm(x.requires_grad_(bool(gradient)))
    torch.testing.assert_close(y.double(), expected, atol=2e-6, rtol=0)


def test_the_norms_gradient_is_the_formulas() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).mul_(0.01)
    upstream = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain = x.clone().requires_grad_()
    (plain / (plain.square().mean(-1, keepdim=True) + 1e-5).sqrt()).backward(upstream)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        ours = x.to(dtype).requires_grad_()
        normalise(ours, 1e-5).backward(upstream.to(dtype))
        assert (ours.grad.double() - plain.grad).norm() < tolerance * plain.grad.norm()
