"""Adapter files of the three kinds: what is written comes back, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmadapter import checkpoint
from mmadapter.adapter import Adapter
from mmadapter.checkpoint import (
    FILE_NAME,
    AdapterFile,
    Fingerprint,
    find_adapter,
    load_adapter,
    read_about,
    save_adapter,
)
from mmadapter.config import GATES, TUNES, AdapterConfig, VisionConfig
from mmadapter.info import SHAPES, adapter_parameters
from mmadapter.vision import ImageProjection

BASE = tiny.config()
WORDS = [f"word {number}" for number in range(BASE.vocab_size)]
FINGERPRINT = Fingerprint.of(BASE, WORDS)
PROJECTION = [
    f"projection.{name}"
    for name in (
        *("feature_mean", "feature_norm.bias", "feature_norm.weight", "feature_std", "hidden.bias", "hidden.weight"),
        *("output.bias", "output.weight", "output_norm.bias", "output_norm.weight"),
    )
]
TUNING = sorted(
    [f"tuning.{kind}.{name}" for kind in ("scale", "bias") for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")]
    + [f"tuning.norm.{name}" for name in ("attention", "ffn", "final")]
)


def about(adapter: Adapter, **changes: object) -> AdapterFile:
    """Every field set, and to what is not its default."""
    vision = VisionConfig("efficientnet-lite2", ("3/2x2", "final"), 128, "crop")
    facts = AdapterFile(
        adapter=adapter.config,
        task="caption",
        template="plain",
        base="tiny",
        fingerprint=FINGERPRINT,
        vision=vision if adapter.projection is not None else None,
        projection_width=11 if adapter.projection is not None else 0,
        generation={"beams": 3, "stop": ["\n"]},
        training={"data": "flickr8k", "licence": "CC0", "steps": 5},
        scores={"CIDEr": 0.25},
        git_commit="abc",
    )
    return dataclasses.replace(facts, **changes)


def saved(path: Path, *, image: bool = True, tune: str = "prompts", **changes: object) -> Adapter:
    adapter = tiny.adapter(BASE, image=image, tune=tune)
    save_adapter(path, adapter.state_dict(), about(adapter, **changes))
    return adapter


def message(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def load_message(path: Path, kind: type[Exception] = ValueError, **options: object) -> str:
    text = message(lambda: load_adapter(path, BASE, FINGERPRINT, **options), kind)
    assert str(path) in text
    return text


# ---- Our own file.


def test_whitening_is_saved_with_the_projection(tmp_path: Path) -> None:
    adapter = tiny.adapter(BASE, image=False)
    adapter.projection = ImageProjection(tiny.FEATURES, BASE.width, 11, components=3)
    adapter.projection.set_statistics(torch.randn(20, tiny.FEATURES))
    save_adapter(tmp_path / FILE_NAME, adapter.state_dict(), about(adapter))
    loaded, _ = load_adapter(tmp_path, BASE, FINGERPRINT)
    assert loaded.projection.feature_whitening.shape == (tiny.FEATURES, 3)
    features = torch.randn(2, tiny.FEATURES)
    assert torch.equal(loaded.projection(features), adapter.projection(features))


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("gate", GATES)
def test_what_is_saved_comes_back(tmp_path: Path, gate: str, image: bool, tune: str) -> None:
    adapter = tiny.adapter(BASE, gate=gate, image=image, tune=tune)
    path = tmp_path / "new folder" / FILE_NAME
    save_adapter(path, adapter.state_dict(), about(adapter))
    assert os.listdir(path.parent) == [FILE_NAME]
    stored = load_file(path)
    tuning = TUNING if tune == "prompts+bias+scale+norm" else ()
    assert sorted(stored) == ["gate", *(PROJECTION if image else ()), "prompt", *tuning]
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    for name in (path, path.parent):  # a file, or its folder
        loaded, facts = load_adapter(name, BASE, FINGERPRINT)
        assert facts == about(adapter) == read_about(path)
        assert loaded.config == adapter.config
        assert loaded.state_dict().keys() == adapter.state_dict().keys()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in loaded.state_dict().items())
        assert all(torch.equal(tensor, stored[key]) for key, tensor in adapter.state_dict().items())
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    llama, tokens, features = tiny.llama(), tiny.tokens(2, 5), tiny.features(2) if image else None
    logits = [llama(tokens, prompts=each.prompts(llama, features)) for each in (adapter, loaded)]
    assert torch.equal(*logits)


def test_other_number_formats_are_stored_in_float32(tmp_path: Path) -> None:
    adapter = tiny.adapter(BASE).to(torch.bfloat16)
    save_adapter(tmp_path / FILE_NAME, adapter.state_dict(), about(adapter))
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE_NAME).values()} == {torch.float32}
    loaded, _ = load_adapter(tmp_path, BASE, FINGERPRINT)
    assert torch.equal(loaded.prompt, adapter.prompt.float())


def test_the_papers_adapter_has_its_number_of_parameters() -> None:
    """30 layers of 10 prompts of width 4096, and a gate for each of 32 heads (the paper's 1.2M)."""
    config = AdapterConfig(layers=30, prompt_length=10)
    with torch.device("meta"):
        adapter = Adapter(config, SHAPES["llama-7b"])
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 1_229_760
    assert adapter_parameters(config, SHAPES["llama-7b"]) == {"prompts": 1_228_800, "gates": 960}
    assert adapter_parameters(dataclasses.replace(config, gate="scalar"), SHAPES["llama-7b"])["gates"] == 30
    for gate, tune in itertools.product(GATES, TUNES):
        small = tiny.adapter(BASE, gate=gate, tune=tune)
        assert sum(adapter_parameters(small.config, BASE).values()) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_failed_save_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / FILE_NAME
    saved(path)
    before = path.read_bytes()

    def half_written(tensors: dict, file: Path, metadata: dict) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    def not_renamed(source: Path, target: Path) -> None:
        raise OSError("no space left")

    if step == "write":
        monkeypatch.setattr(checkpoint, "save_file", half_written)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", not_renamed)
    for target in (path, tmp_path / "other.safetensors"):
        with pytest.raises(OSError, match="no space left"):
            saved(target, scores={"CIDEr": 1.0})
    assert os.listdir(tmp_path) == [FILE_NAME]
    assert path.read_bytes() == before


def rewrite(path: Path, tensors: Callable[[dict], object] = dict, metadata: Callable[[dict], object] = dict) -> None:
    """Changes the tensors and the metadata of a saved file."""
    state = load_file(path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["mmadapter"])
    tensors(state)
    metadata(facts)
    save_file(state, path, {"mmadapter": json.dumps(facts)})


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_damaged_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / FILE_NAME
    saved(path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "damaged" in load_message(path)


def test_a_file_without_or_with_other_metadata_is_named(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    save_file({"prompt": torch.ones(1)}, path)
    assert "without the metadata of an mmadapter adapter" in load_message(path)
    save_file({"prompt": torch.ones(1)}, path, {"mmadapter": "{broken"})
    assert "damaged or not an adapter file" in load_message(path)


@pytest.mark.parametrize("version", [2, None])
def test_another_format_version_is_refused(tmp_path: Path, version: int | None) -> None:
    path = tmp_path / FILE_NAME
    saved(path)
    rewrite(path, metadata=lambda facts: facts.update(format_version=version))
    assert f"format version {version}, this program reads 1" in load_message(path)


def test_metadata_that_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    saved(path)
    rewrite(path, metadata=lambda facts: facts["adapter"].update(rank=4))
    assert "unknown rank" in load_message(path)


@pytest.mark.parametrize(
    "metadata",
    [
        "[]",
        "3",
        '{"format_version": 1}',
        '{"format_version": 1, "adapter": 3}',
        '{"format_version": 1, "adapter": {"layers": "2"}}',
        '{"format_version": 1, "adapter": {"layers": 2}, "fingerprint": [1]}',
    ],
)
def test_metadata_of_another_form_is_refused(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / FILE_NAME
    adapter = saved(path)
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}, path, {"mmadapter": metadata}
    )
    load_message(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("gate"), "has no tensor gate"),
        (lambda state: state.pop("projection.feature_mean"), "has no tensor projection.feature_mean"),
        (lambda state: state.update(extra=torch.ones(1)), "has a tensor extra that this adapter does not have"),
        (lambda state: state.update(prompt=torch.ones(2, 3, 5)), r"prompt is (2, 3, 5), expected (2, 3, 24)"),
        (lambda state: state.update({"projection.hidden.bias": torch.ones(3)}), "projection.hidden.bias is (3,)"),
        (lambda state: state.pop("tuning.bias.w2"), "has no tensor tuning.bias.w2"),
        (lambda state: state.update({"tuning.scale.output": torch.ones(53)}), "has a tensor tuning.scale.output that"),
        (lambda state: state.update({"tuning.scale.w1": torch.ones(3, 39)}), "w1 is (3, 39), expected (3, 40)"),
    ],
)
def test_a_missing_extra_or_misshapen_tensor_is_named(
    tmp_path: Path, change: Callable[[dict], object], reason: str
) -> None:
    path = tmp_path / FILE_NAME
    saved(path, tune="prompts+bias+scale+norm")
    rewrite(path, tensors=change)
    assert reason in load_message(path)


def test_a_file_from_before_there_was_tuning_has_none(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    adapter = saved(path)
    rewrite(path, metadata=lambda facts: facts["adapter"].pop("tune"))
    loaded, facts = load_adapter(path, BASE, FINGERPRINT)
    assert facts == about(adapter)
    assert loaded.config.tune == "prompts"
    assert loaded.tuning is None


def test_tensors_and_metadata_must_agree_on_the_tuning(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    saved(path, tune="prompts+bias+scale+norm")
    rewrite(path, metadata=lambda facts: facts["adapter"].update(tune="prompts"))
    assert "has a tensor tuning.bias.w1 that this adapter does not have" in load_message(path)
    saved(path)
    rewrite(path, metadata=lambda facts: facts["adapter"].update(tune="prompts+bias+scale+norm"))
    assert "has no tensor tuning.bias.w1" in load_message(path)
    rewrite(path, metadata=lambda facts: facts["adapter"].update(tune="everything"))
    assert "tune must be one of prompts, prompts+bias+scale+norm, got 'everything'" in load_message(path)


def test_a_text_adapter_with_a_projection_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    saved(path, image=True, vision=None)
    assert "has a tensor projection.feature_mean that this adapter does not have" in load_message(path)


# ---- The base it was trained on.


@pytest.mark.parametrize(
    "other",
    [
        Fingerprint.of(tiny.config(layers=4), WORDS),
        Fingerprint.of(tiny.config(width=30), WORDS),
        Fingerprint.of(tiny.config(heads=6), WORDS),
        Fingerprint.of(tiny.config(kv_heads=4), WORDS),
        Fingerprint.of(tiny.config(vocab_size=54), WORDS),
        Fingerprint.of(BASE, WORDS[::-1]),
        Fingerprint.of(tiny.config(layers=4), None),
    ],
    ids=str,
)
def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path, other: Fingerprint) -> None:
    path = tmp_path / FILE_NAME
    saved(path)
    text = message(lambda: load_adapter(path, BASE, other))
    assert str(FINGERPRINT) in text
    assert str(other) in text
    assert str(FINGERPRINT) != str(other)
    assert "trained on tiny" in text
    assert "--llama tiny" in text


def test_vocabularies_are_compared_where_both_are_known(tmp_path: Path) -> None:
    unknown = Fingerprint.of(BASE, None)
    assert unknown.vocabulary is None
    assert "vocabulary unknown" in str(unknown)
    assert FINGERPRINT.matches(unknown)
    assert unknown.matches(FINGERPRINT)
    assert unknown.matches(unknown)
    assert FINGERPRINT.matches(Fingerprint.of(BASE, list(WORDS)))
    assert not FINGERPRINT.matches(Fingerprint.of(BASE, [*WORDS[:-1], "another word"]))
    path = tmp_path / FILE_NAME
    for written, here in ((FINGERPRINT, unknown), (unknown, FINGERPRINT), (None, FINGERPRINT)):
        saved(path, fingerprint=written)
        load_adapter(path, BASE, here)


def test_a_vocabulary_of_any_strings_has_a_fingerprint() -> None:
    """Tokens are bytes in places: half a character must not end the hash, and order counts."""
    first, second = (Fingerprint.of(BASE, words) for words in (["\ud800", "é"], ["é", "\ud800"]))
    assert first.vocabulary != second.vocabulary


# ---- The official file.


def official(rows: int = 6, gates: tuple[int, ...] = (1, 4, 1, 1), layers: int = 3) -> dict[str, Tensor]:
    """Prompts of all adapted layers in one table, and a gate for every layer of the base."""
    generator = torch.Generator().manual_seed(0)
    file = {"adapter_query.weight": torch.randn(rows, BASE.width, generator=generator)}
    return file | {f"layers.{i}.attention.gate": torch.randn(gates, generator=generator) for i in range(layers)}


@pytest.mark.parametrize("gate", ["tanh", "identity"])
@torch.no_grad()
def test_an_official_file_is_an_adapter_filled_by_hand(tmp_path: Path, gate: str) -> None:
    """The first K rows belong to layer N - L, and gates of layers below it are there but mean nothing."""
    path, file = tmp_path / "adapter.pth", official()
    file["layers.0.attention.gate"][:] = torch.nan
    torch.save(file, path)
    loaded, facts = load_adapter(path, BASE, FINGERPRINT, prompt_length=3, gate=gate)
    assert facts == AdapterFile(AdapterConfig(2, 3, gate), task="instruct")
    by_hand = tiny.adapter(BASE, gate=gate)
    rows = file["adapter_query.weight"]
    for index, layer in enumerate((1, 2)):
        for k in range(3):
            by_hand.prompt[index, k] = rows[3 * index + k]
        for head in range(4):
            by_hand.gate[index, head] = file[f"layers.{layer}.attention.gate"][0, head, 0, 0]
    llama, tokens = tiny.llama(), tiny.tokens(2, 6)
    logits = llama(tokens, prompts=loaded.prompts(llama))
    assert torch.equal(logits, llama(tokens, prompts=by_hand.prompts(llama)))
    assert (logits - llama(tokens)).abs().max() > 0.05


def test_the_first_official_release_had_one_gate_a_layer(tmp_path: Path) -> None:
    path, file = tmp_path / "adapter.pth", official(gates=(1,))
    torch.save(file, path)
    loaded, _ = load_adapter(path, BASE, FINGERPRINT, prompt_length=3, gate="scalar")
    assert torch.equal(loaded.gate[:, 0], torch.cat([file[f"layers.{i}.attention.gate"] for i in (1, 2)]))
    assert "gate is (1,), expected a number for each of 4 heads with --gate tanh" in load_message(path, prompt_length=3)
    torch.save(official(), path)
    assert "gate is (1, 4, 1, 1), expected one number with --gate scalar" in load_message(
        path, prompt_length=3, gate="scalar"
    )


def test_an_official_file_in_half_precision_becomes_float32(tmp_path: Path) -> None:
    path, file = tmp_path / "adapter.pth", official()
    torch.save({name: tensor.half() for name, tensor in file.items()}, path)
    loaded, _ = load_adapter(path, BASE, FINGERPRINT, prompt_length=3)
    assert loaded.prompt.dtype == loaded.gate.dtype == torch.float32
    assert torch.equal(loaded.prompt.flatten(0, 1), file["adapter_query.weight"].half().float())


def without(file: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in file.items() if key != name}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (official(rows=7), "7 prompt rows, which K=3 does not divide; set --prompt-length"),
        (official(rows=12), "adapts 4 layers and has gates for 3; this base has 3 layers"),
        (official(layers=4), "adapts 2 layers and has gates for 4; this base has 3 layers"),
        (without(official(), "layers.2.attention.gate"), "adapts 2 layers and has gates for 2; this base has 3"),
        (without(official(), "adapter_query.weight"), "it has no adapter_query.weight"),
        (official() | {"adapter_query.weight": torch.ones(6, 5)}, "a base of width 5, this one has 24"),
        (official() | {"layers.1.attention.wq.lora": torch.ones(1)}, "layers.1.attention.wq.lora, which is no part"),
        (official(gates=(1, 6, 1, 1)), "gate is (1, 6, 1, 1), expected a number for each of 4 heads with --gate tanh"),
        ([torch.ones(1)], "it has no adapter_query.weight"),
        ({"adapter_query.weight": Path("x")}, "damaged or not a LLaMA-Adapter checkpoint"),  # any object may be code
        (official() | {"adapter_query.weight": 3}, "adapter_query.weight"),
        (official() | {"layers.1.attention.gate": 3}, "layers.1.attention.gate"),
        (official() | {"layers.1.attention.gate": torch.ones(1, 3, 1, 1)}, "layers.1.attention.gate"),
        (official() | {7: torch.ones(1)}, "holds 7, which is no part"),
        (official(rows=0), "0 prompt rows"),
    ],
)
def test_what_is_wrong_with_an_official_file_is_said(tmp_path: Path, file: object, reason: str) -> None:
    path = tmp_path / "adapter.pth"
    torch.save(file, path)
    assert reason in load_message(path, prompt_length=3)


@pytest.mark.parametrize("kept", [0, 300, -30])
def test_a_damaged_official_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "adapter.pth"
    torch.save(official(), path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "is damaged or not a LLaMA-Adapter checkpoint" in load_message(path, prompt_length=3)


def test_a_prompt_length_below_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.pth"
    torch.save(official(), path)
    for wrong in (0, -3):
        assert "prompt_length" in message(
            lambda wrong=wrong: load_adapter(path, BASE, FINGERPRINT, prompt_length=wrong)
        )


# ---- peft folders (their logits are compared with peft's in test_adapter.py).


def write_peft(folder: Path, binary: bool = False, **settings: object) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in (1, 2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.adaption_"
        state[f"{prefix}prompt"] = torch.randn(1, 3, BASE.width, generator=generator)
        state[f"{prefix}gate"] = torch.randn(1, generator=generator)
    folder.mkdir(exist_ok=True)
    text = json.dumps({"peft_type": "ADAPTION_PROMPT", "adapter_layers": 2, "adapter_len": 3, **settings})
    (folder / "adapter_config.json").write_text(text)
    if binary:
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
    return state


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_a_peft_folder_is_read(tmp_path: Path, binary: bool) -> None:
    state = write_peft(tmp_path, binary)
    loaded, facts = load_adapter(tmp_path, BASE, FINGERPRINT, prompt_length=99, gate="tanh")  # the folder says both
    assert facts == AdapterFile(AdapterConfig(2, 3, "scalar"), task="instruct")
    for index, layer in enumerate((1, 2)):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.adaption_"
        assert torch.equal(loaded.prompt[index], state[f"{prefix}prompt"][0])
        assert torch.equal(loaded.gate[index], state[f"{prefix}gate"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "LORA"}, "peft adapter of type LORA, expected ADAPTION_PROMPT"),
        ({"adapter_layers": 1}, "adapts layers [1, 2]; on this base they would be [2]"),
        ({"adapter_len": 4}, "prompt is (2, 3, 24), expected (2, 4, 24)"),
    ],
)
def test_a_peft_folder_of_another_kind_or_shape_is_refused(tmp_path: Path, settings: dict, reason: str) -> None:
    write_peft(tmp_path, **settings)
    assert reason in load_message(tmp_path)


def test_a_peft_folder_without_weights_or_with_others_is_refused(tmp_path: Path) -> None:
    state = write_peft(tmp_path)
    save_file(state | {"lora_A": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert "holds lora_A, which is no part of a peft AdaptionPrompt adapter" in load_message(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in load_message(tmp_path, FileNotFoundError)
    (tmp_path / "adapter_config.json").write_text("{broken")
    assert "is not JSON" in load_message(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("kept", [0, 100, -10])
def test_damaged_peft_weights_are_named(tmp_path: Path, name: str, kept: int) -> None:
    write_peft(tmp_path, binary=name.endswith("bin"))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:kept])
    assert "damaged" in load_message(tmp_path)


@pytest.mark.parametrize("settings", [{"adapter_len": None}, {"adapter_layers": "two"}, {"adapter_layers": 0}])
def test_a_peft_configuration_without_its_numbers_is_named(tmp_path: Path, settings: dict) -> None:
    write_peft(tmp_path, **settings)
    load_message(tmp_path)


def test_a_peft_folder_that_holds_something_else_is_named(tmp_path: Path) -> None:
    write_peft(tmp_path, binary=True)
    torch.save([torch.ones(1)], tmp_path / "adapter_model.bin")
    load_message(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    load_message(tmp_path)


# ---- All kinds.


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["own", "official", "official, old pickle", "peft", "peft bin"])
def test_a_file_of_changed_bytes_loads_or_is_refused(tmp_path: Path, kind: str) -> None:
    """torch raises whatever its reader stumbles over, such as KeyError, and pages of advice."""
    path = target = tmp_path / ("adapter.pth" if kind.startswith("official") else FILE_NAME)
    if kind == "own":
        saved(path)
    elif kind.startswith("official"):
        torch.save(official(), path, _use_new_zipfile_serialization=kind == "official")
    else:
        target = tmp_path / "peft"
        write_peft(target, binary=kind == "peft bin")
        path = target / ("adapter_model.bin" if kind == "peft bin" else "adapter_model.safetensors")
    whole, draw = path.read_bytes(), random.Random(0)
    refusals = []
    for _ in range(200):
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            changed[draw.randrange(min(len(whole), 900))] = draw.randrange(256)  # where names and shapes are
        path.write_bytes(changed)
        try:
            load_adapter(target, BASE, FINGERPRINT, prompt_length=3)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert not [text for text in refusals if "\n" in text]


# ---- Names.


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The shipped adapters and the cached ones, in a place of their own; the working directory holds nothing."""
    shipped, cache = tmp_path / "assets" / "adapters", tmp_path / "cache"
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    monkeypatch.setenv("MMADAPTER_CACHE", str(cache))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return shipped, cache / "adapters"


def test_a_name_is_shipped_then_cached_then_a_path(folders: tuple[Path, Path]) -> None:
    shipped, cached = folders
    saved(cached / "caption" / FILE_NAME)
    assert find_adapter("caption") == cached / "caption"
    saved(shipped / "caption" / FILE_NAME)
    assert find_adapter("caption") == shipped / "caption"
    assert load_adapter("caption", BASE, FINGERPRINT)[1].task == "caption"
    saved(Path("caption") / FILE_NAME)
    assert find_adapter("caption") == shipped / "caption"
    assert find_adapter("./caption") == Path("caption")
    saved(Path("mine") / FILE_NAME)
    assert find_adapter("mine") == Path("mine")
    assert find_adapter(shipped / "caption") == shipped / "caption"


def test_an_unknown_name_lists_the_names_there_are(folders: tuple[Path, Path]) -> None:
    shipped, cached = folders
    text = message(lambda: find_adapter("captoin"), FileNotFoundError)
    assert text == "no adapter 'captoin': neither a path nor one of none"
    saved(shipped / "caption" / FILE_NAME)
    saved(cached / "scienceqa" / FILE_NAME)
    text = message(lambda: load_adapter("captoin", BASE, FINGERPRINT), FileNotFoundError)
    assert text == "no adapter 'captoin': neither a path nor one of caption, scienceqa"


def test_a_folder_without_an_adapter_says_what_was_looked_for(tmp_path: Path) -> None:
    text = load_message(tmp_path, FileNotFoundError)
    assert "no adapter.safetensors and no peft adapter_config.json" in text


def test_the_names_of_this_version_are_in_the_repository() -> None:
    assert Path(__file__).resolve().parents[1] / "assets" / "adapters" == checkpoint.SHIPPED
