"""What stands beside a tokenizer file, and files and metadata that cannot be read."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from vocabularies import SPECIAL, write_byte_level

from mmadapter.tokenizer import open_tokenizer, tokenizer_from_gguf
from mmadapter.vocabulary import from_tiktoken


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """A vocabulary of SmolLM's kind: its folder and its GGUF metadata."""
    folder = tmp_path_factory.mktemp("smol")
    return folder, write_byte_level(folder, "smollm", special=SPECIAL)


def test_files_beside_the_tokenizer(smol, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((smol[0] / "tokenizer.json").read_bytes())
    alone = open_tokenizer(tmp_path)
    ids = {token: token_id for token_id, token in enumerate(alone.tokens())}
    assert (alone.bos_id, alone.eos_id, alone.chat_template) == (None, None, None)
    assert alone.stop_ids == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    # Id 5 is an ordinary token: a config that was copied from another model must not end texts at it.
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|im_start|>"], 5]}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": len(ids)}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": "old"}))
    (tmp_path / "chat_template.jinja").write_text("new")
    full = open_tokenizer(tmp_path)
    assert (full.bos_id, full.eos_id, full.adds_bos) == (ids["<|im_start|>"], ids["<|im_start|>"], True)
    assert full.stop_ids == alone.stop_ids | {ids["<|im_start|>"]}
    assert full.vocab_size == len(ids) + 1
    assert full.encode("a<pad>", bos=False, special=True)[-1] == len(ids)
    assert full.decode(full.encode("a<pad>")) == "a<pad>"
    assert full.chat_template == "new"


def changed(key: str, value: object = None):
    """A change to GGUF metadata: a key set to a value, or taken out."""

    def change(fields: dict) -> dict:
        fields = {name: entry for name, entry in fields.items() if name != f"tokenizer.ggml.{key}"}
        return fields if value is None else fields | {f"tokenizer.ggml.{key}": value}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("model", "bert"), 'must be "gpt2" .* or "llama" .*, got \'bert\''),
        (changed("pre", "klingon"), "'klingon', which is not known; known are .*llama-bpe"),
        (changed("merges"), r"no tokenizer\.ggml\.merges"),
        (changed("tokens"), r"no tokenizer\.ggml\.tokens"),
        (changed("token_type", [1, 1]), r"token_type has 2 entries for \d+ tokens"),
        (changed("merges", ["a nosuchtoken"]), "the merge 'a nosuchtoken' does not make a token"),
        (changed("eos_token_id", 10**6), r"names the token id 1000000, but its vocabulary has \d+"),
    ],
)
def test_errors_in_gguf_metadata(smol, change, message):
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_from_gguf(change(smol[1]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "not a tokenizer that can be read"),
        ("tokenizer.model", b"", "not a tokenizer that can be read"),
        ("tokenizer.model", b"IQ== 0\nnonsense here too\n", "line 2 is not a base64 token"),
        ("tokenizer.model", b"IQ== 0\nIg== 2\n", "must run from 0 without a gap"),
        ("tokenizer.model", b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        ("tokenizer.json", b'{"model": ', "not a tokenizer that can be read"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}', "of type \"BPE\", got 'WordPiece'"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "got the decoder None"),
        ("tokenizer.json", b'{"decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": 3}}', "cannot read"),
    ],
)
def test_errors_in_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_around_files(smol, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer; put the model's tokenizer\.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_bytes((smol[0] / "tokenizer.json").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<far>": 1000000000}')
    with pytest.raises(ValueError, match=r"without a gap, got the ids \[1000000000\]"):
        open_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(ValueError, match="does not have '<nowhere>', which the files beside it name as eos_token"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object, got a list"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        open_tokenizer(tmp_path)


def test_a_vocabulary_that_is_too_large_for_llama3():
    """LLaMA-4 uses the same file format with another split: its ids would be quietly wrong."""
    words = [bytes([byte]) for byte in range(256)] + [b"%06d" % number for number in range(128_000)]
    lines = [base64.b64encode(word) + b" %d" % rank for rank, word in enumerate(words)]
    with pytest.raises(ValueError, match="at most 128000 ranks, this one has 128256"):
        from_tiktoken(b"\n".join(lines))
