"""The step that writes one token a row gives what the plain loop over the layers gives."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from mmadapter import decode_step
from mmadapter.adapter import Prompts, select_prompts, stack_prompts
from mmadapter.beam import beam_search
from mmadapter.choices import log_likelihoods
from mmadapter.continuous import RunningBatch
from mmadapter.decode_step import HeadPrompts, attend_one
from mmadapter.generate import generate
from mmadapter.llama import Llama, attend
from mmadapter.packed import can_pack, pack
from mmadapter.sampling import Sampling, longer
from mmadapter.tokenizer import Tokenizer
from mmadapter.vocabulary import Vocabulary

ROWS, READ, WRITTEN = 3, 5, 4
TUNED = "prompts+bias+scale+norm"
KINDS = ("none", "text", "images", "one image", "tuned", "mixed")
SHAPES = {"grouped": tiny.config(), "multi-head": tiny.config(kv_heads=4), "tied": tiny.config(tied=True)}

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")


def packed_llama(shape: object = None, dtype: torch.dtype = torch.float32) -> Llama:
    llama = tiny.llama(shape).to(dtype)
    assert pack(llama)
    return llama


def prompts_of(llama: Llama, kind: str, rows: int = ROWS) -> Prompts | None:
    """None, one for all rows, an image for each row, one for all, a tuned one, or rows of several adapters and none."""
    if kind == "none":
        return None
    reads = tiny.adapter(llama.config, prompt_length=4, gate="scalar", seed=5).prompts(llama)
    if kind == "text":
        return reads
    sees = tiny.adapter(llama.config, image=True, tune=TUNED if kind in ("tuned", "mixed") else "prompts")
    prompts = sees.prompts(llama, tiny.features(1 if kind == "one image" else rows), strength=0.8)
    if kind == "mixed":
        each = [select_prompts(prompts, torch.tensor([0])), None, reads]
        return stack_prompts((each * rows)[:rows])
    return prompts


def written(llama: Llama, kind: str, rows: int = ROWS, padded: bool = False) -> Tensor:
    """Logits of several tokens written one by one after a prompt, [rows, WRITTEN, V]; one row changes its place."""
    with torch.inference_mode():
        prompts, tokens = prompts_of(llama, kind, rows), tiny.tokens(rows, READ + WRITTEN)
        valid = None
        if padded:
            valid = torch.ones(rows, READ, dtype=torch.bool)
            valid[0, :2] = valid[-1, :1] = False
        cache = llama.new_cache(rows, READ + WRITTEN)
        llama(tokens[:, :READ], prompts=prompts, cache=cache, valid=valid)
        found = []
        for place in range(READ, READ + WRITTEN):
            if place == READ + 2:
                order = torch.arange(rows).roll(1)
                cache.select(order)
                prompts, tokens = select_prompts(prompts, order), tokens[order]
                valid = None if valid is None else valid[order]
            valid = longer(valid)
            found.append(llama(tokens[:, place : place + 1], prompts=prompts, cache=cache, valid=valid))
        assert cache.length == READ + WRITTEN
        return torch.cat(found, dim=1)


TOKENIZER = Tokenizer(
    Vocabulary([f"<{index}>" for index in range(53)], [b"%d " % index for index in range(53)], {}, lambda text: []),
    bos_id=None,
    eos_id=None,
    stop_ids=frozenset(),
    adds_bos=False,
)


def tokens_of_one(llama: Llama, row: list[int], prompts: Prompts | None) -> str:
    """What a row gives alone, its tokens as numbers."""
    return generate(llama, TOKENIZER, [row], Sampling(max_new_tokens=6), prompts)[0].text


def plainly_written(llama: Llama, *arguments: object, **options: object) -> Tensor:
    """As `written`, by the plain loop and a cache in the model's own number format."""
    step, llama.decode_step = llama.decode_step, None
    try:
        return written(llama, *arguments, **options)
    finally:
        llama.decode_step = step


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_step_gives_the_logits_of_the_plain_loop(shape: object, kind: str, padded: bool) -> None:
    llama = packed_llama(shape)
    torch.testing.assert_close(written(llama, kind, padded=padded), plainly_written(llama, kind, padded=padded))


@pytest.mark.parametrize("rows", [1, decode_step.FEW, decode_step.FEW + 3])
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_and_many(kind: str, rows: int) -> None:
    llama = packed_llama()
    torch.testing.assert_close(written(llama, kind, rows), plainly_written(llama, kind, rows))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_one_query(kv_heads: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, from keys of bfloat16, and of many such keys by torch's kernel."""
    B, H, S, D = 5, 4, 7, 6
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(B, heads, n, D, generator=generator) for heads, n in ((H, 1), (kv_heads, S), (kv_heads, S)))
    mask = torch.rand(B, 1, 1, S, generator=generator) < 0.5
    mask[..., 0] = True
    mask = mask if masked else None
    k, v = k.bfloat16(), v.bfloat16()
    expected = attend(q, k.float(), v.float(), mask).squeeze(2)
    bias = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    bias = None if mask is None else bias.repeat_interleave(kv_heads, dim=0).squeeze(1)
    scaled = q.squeeze(2) * D**-0.5
    torch.testing.assert_close(attend_one(scaled, k.float(), v.float(), bias), expected)
    torch.testing.assert_close(attend_one(scaled, k, v, bias), expected)
    monkeypatch.setattr(decode_step, "KEYS", k.numel() - 1)
    torch.testing.assert_close(attend_one(scaled, k.float(), v.float(), bias), expected)
    rounded = attend_one(scaled, k, v, bias)
    assert not torch.equal(rounded, expected)  # by the kernel, in bfloat16
    torch.testing.assert_close(rounded, expected, atol=2e-2, rtol=0)
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize("rows", [ROWS, decode_step.FEW + 1], ids=["few", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_is_no_farther_from_the_truth_than_the_plain_loop(kind: str, rows: int) -> None:
    llama = packed_llama(dtype=torch.bfloat16)
    wide = tiny.llama().to(torch.bfloat16).float()  # the very weights, computed with in float32
    truth = written(wide, kind, rows)
    by_step, by_loop = ((way(llama, kind, rows) - truth).norm() for way in (written, plainly_written))
    assert 0 < by_step <= 1.2 * by_loop < 0.1 * truth.norm()


def test_a_packed_base_writes_by_the_step_and_reads_by_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(decode_step.DecodeStep, "__call__", lambda *arguments: steps.append(1) or arguments[1])
    written(packed_llama(), "images")
    assert len(steps) == WRITTEN


def test_few_rows_of_a_narrow_base_have_their_keys_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    few = decode_step.FEW
    llama = packed_llama(dtype=torch.bfloat16)
    assert llama.new_cache(few, 2).keys.dtype == torch.float32
    assert llama.new_cache(few + 1, 2).keys.dtype == torch.bfloat16
    assert llama.new_cache(1, 2, most=few + 1).keys.dtype == torch.bfloat16
    assert tiny.llama().to(torch.bfloat16).new_cache(1, 2).keys.dtype == torch.bfloat16
    monkeypatch.setattr(decode_step, "NARROW", llama.config.width - 1)
    assert llama.new_cache(1, 2).keys.dtype == torch.bfloat16


def test_prompts_are_laid_out_once_for_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out = []
    of = HeadPrompts.of
    monkeypatch.setattr(HeadPrompts, "of", lambda prompt: laid_out.append(prompt) or of(prompt))
    llama = packed_llama()
    with torch.inference_mode():
        prompts, cache = prompts_of(llama, "images"), llama.new_cache(ROWS, 9)
        adapted, base = [layer for layer in prompts.layers if layer is not None], llama.new_cache(ROWS, 9)
        for token in tiny.tokens(ROWS, 9).split(1, dim=1):
            llama(token, prompts=prompts, cache=cache)
            llama(token, cache=base)  # another text, between two steps of this one
    assert [id(prompt) for prompt in laid_out] == [id(layer) for layer in adapted]


TEXTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]


@pytest.mark.parametrize("kind", KINDS)
def test_beams_and_likelihoods_are_those_of_a_plain_base(kind: str) -> None:
    """Beams come from one row each, change places, and leave; endings of two tokens are read by one step."""
    found = []
    for llama in (tiny.llama(), packed_llama()):
        with torch.inference_mode():
            prompts = prompts_of(llama, kind, len(TEXTS))
        beams = beam_search(llama, TEXTS, Sampling(max_new_tokens=7, beams=3), frozenset({1, 2, 13}), prompts)
        scores = log_likelihoods(llama, TEXTS, [[[5, 6], [7], [8, 9]]] * len(TEXTS), prompts)
        found.append((beams, torch.cat([score.total for score in scores])))
    assert found[1][0] == found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_join_and_leave_while_the_cache_changes_its_format(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(decode_step, "FEW", 2)
    llama = packed_llama(dtype=dtype)
    with torch.inference_mode():
        prompts = prompts_of(llama, "images", len(TEXTS))
        own = [select_prompts(prompts, torch.tensor([row])) for row in range(len(TEXTS))]
    expected = [tokens_of_one(llama, row, mine) for row, mine in zip(TEXTS, own, strict=True)]
    batch, formats, texts = RunningBatch(llama, TOKENIZER), set(), {}
    numbers = []
    for row, mine in zip(TEXTS, own, strict=True):
        numbers.append(batch.add(row, Sampling(max_new_tokens=6), mine))
        for step in batch.step():
            texts[step.row] = texts.get(step.row, "") + step.text
        formats.add(batch._cache.keys.dtype)
    while len(batch):
        for step in batch.step():
            texts[step.row] = texts.get(step.row, "") + step.text
        formats |= {batch._cache.keys.dtype} if len(batch) else set()
    assert [texts[number] for number in numbers] == expected
    assert formats == {torch.float32, dtype}
