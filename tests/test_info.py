"""Sizes against the models themselves and against published ones."""

from __future__ import annotations

import re
import shutil

import pytest
import tiny_session
import torch

from mmadapter import info
from mmadapter.config import TUNES, AdapterConfig, LlamaConfig
from mmadapter.info import SHAPES, activation_bytes, adapter_parameters, base_parameters, cache_bytes, describe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_session.Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


def number(text: str, name: str) -> int:
    """The number on the line that begins with `name`."""
    found = re.search(rf"^ *{re.escape(name)} +([\d,]+)", text, re.MULTILINE)
    assert found, f"no line {name!r} in:\n{text}"
    return int(found[1].replace(",", ""))


# Parameters of the released checkpoints.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-33b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
    ],
)
def test_the_papers_bases_have_their_size(name, parameters, monkeypatch):
    monkeypatch.setattr(info, "read_config", None)  # nothing is opened
    assert base_parameters(SHAPES[name]) == parameters
    assert number(describe(name), "parameters") == parameters


def test_the_papers_adapter_has_its_size():
    """1.2M parameters: K = 10, L = 30 of 32, 32 heads."""
    text = describe("llama-7b", layers=30)
    assert number(text, "prompts") == 1_228_800
    assert number(text, "gates") == 960
    assert number(text, "trained") == 1_229_760
    assert describe("llama-7b") == text  # L = 30 and K = 10 unless they are given
    assert number(describe("llama-7b", layers=10, prompt_length=5), "trained") == 10 * 5 * 4096 + 10 * 32
    assert number(describe("llama-7b", gate="scalar"), "gates") == 30


def test_a_base_has_the_size_of_the_model_itself(tiny):
    llama = tiny.load().llama
    text = describe(str(tiny.llama))
    assert number(text, "parameters") == sum(parameter.numel() for parameter in llama.parameters())
    cache = llama.new_cache(1, 77)
    assert cache_bytes(llama.config, 77, "float32") == cache.keys.nbytes + cache.values.nbytes
    assert cache_bytes(llama.config, 77, "bfloat16") == cache_bytes(llama.config, 77, "float32") // 2
    assert adapter_parameters(AdapterConfig(2, 3), llama.config) == {"prompts": 2 * 3 * 32, "gates": 2 * 4}


@pytest.mark.parametrize("name", ["sees", "reads", "tuned"])
def test_an_adapter_has_the_size_of_its_trained_parameters(tiny, tmp_path, name):
    adapter = getattr(tiny, name)
    text = describe(str(tiny.llama), str(adapter))
    trained = list(tiny.load(adapter).adapter_module.parameters())
    assert number(text, "trained") == sum(parameter.numel() for parameter in trained)
    assert ("image projection" in text) == ("timm:test_resnet" in text) == (name != "reads")
    assert ("tuned bias, scale and norm of 3" in text) == (" tuning " in text) == (name == "tuned")
    file = adapter / "adapter.safetensors"
    assert f"adapter       {adapter}, {file.stat().st_size / 1e6:.1f} MB on disk" in text
    assert describe(str(tiny.llama), str(file)).splitlines()[9:] == text.splitlines()[9:]
    shutil.copytree(adapter, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(bytes(10**6))  # what a training run leaves beside it is not it
    described = describe(str(tiny.llama), str(tmp_path / "run"))
    assert described.replace(str(tmp_path / "run"), str(adapter)) == text


def test_tuning_needs_memory_in_every_layer():
    """A scale and a bias for each output of seven linears, and two norms; the final norm once."""
    base = LlamaConfig(100, width=10, layers=5, heads=3, kv_heads=1, head_width=4, hidden_width=7)
    prompts, tuned = (AdapterConfig(2, 3, tune=tune) for tune in TUNES)
    assert adapter_parameters(tuned, base)["tuning"] == 5 * (2 * (12 + 4 + 4 + 10 + 7 + 10 + 7) + 2 * 10) + 10
    assert "tuning" not in adapter_parameters(prompts, base)
    logits = 2 * 60 * 100 * 4
    assert activation_bytes(base, prompts, 60, "float32") == 2 * 60 * (100 + 28) * 4 + logits
    assert activation_bytes(base, tuned, 60, "float32") == 5 * 60 * (100 + 28 + 54) * 4 + logits


def test_an_official_checkpoint_is_described_too(tiny, tmp_path):
    state = {"adapter_query.weight": torch.randn(2 * 5, 32)}
    state |= {f"layers.{layer}.attention.gate": torch.randn(1, 4, 1, 1) for layer in range(3)}
    torch.save(state, tmp_path / "official.pth")
    text = describe(str(tiny.llama), str(tmp_path / "official.pth"), prompt_length=5, gate="identity")
    assert "adapted L   2 layers, K = 5 prompts, gate identity" in text
    assert number(text, "trained") == 2 * 5 * 32 + 2 * 4


def test_what_does_not_fit_is_refused(tiny):
    with pytest.raises(ValueError, match=r"was trained on tiny .* this base has 32 layers, width 4096"):
        describe("llama-7b", str(tiny.sees))
    with pytest.raises(ValueError, match="llama-7b has 32 layers, so 33 cannot be adapted; set --layers"):
        describe("llama-7b", layers=33)
    with pytest.raises(ValueError, match="prompt_length must be at least 1, got 0"):
        describe("llama-7b", prompt_length=0)
    with pytest.raises(FileNotFoundError, match="no LLaMA named 'llama-9b'"):
        describe("llama-9b")


def memory(line: str, **options: object) -> float:
    text = describe("llama-7b", **options)
    amount, unit = re.search(rf"^  {line} +([\d.]+) (GB|MB)", text, re.MULTILINE).groups()
    return float(amount) * (1e9 if unit == "GB" else 1e6)


def test_memory_grows_with_what_takes_it():
    # 13.5 GB of weights and 1.07 GB of keys and values: 2 * 32 layers * 4096 * 2048 tokens * 2 bytes.
    assert memory("inference") == pytest.approx(14.55e9, abs=0.06e9)
    assert memory("inference", dtype="float32") == pytest.approx(2 * 14.55e9, abs=0.06e9)
    assert memory("training") > memory("inference")
    assert memory("training", batch_tokens=4096) > memory("training")
    assert memory("training", layers=10) < memory("training")
    assert "memory, float32 (estimates)" in describe("llama-7b", dtype="float32")


def test_a_packed_base_takes_less_and_is_not_trained_on():
    """Linears of the blocks take 1 or 0.625 bytes a weight, LLaMA-7B's 2 x 131M of vocabulary a byte."""
    blocks, outside = 6_738_415_616 - 262_144_000, 262_144_000
    for dtype, share in (("int8", 1.0), ("int4", 0.625)):
        expected = outside + share * blocks + 2 * 32 * 32 * 128 * 2048 * 2
        assert memory("inference", dtype=dtype) == pytest.approx(expected, abs=0.06e9)
        assert "training" not in describe("llama-7b", dtype=dtype)
