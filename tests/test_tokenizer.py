"""Token ids against `transformers`, `sentencepiece` and `tiktoken` for every kind of file, and text back from ids.

Small vocabularies are trained here on random strings; each is written as every kind of file that can hold it.
"""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from pathlib import Path

import pytest
from vocabularies import (
    LLAMA3_SPLIT,
    SPECIAL,
    byte_alphabet,
    texts,
    write_byte_level,
    write_llama3,
    write_sentencepiece,
)

from mmadapter.tokenizer import StreamDecoder, Tokenizer, open_tokenizer, tokenizer_from_gguf


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """A vocabulary of SmolLM's kind: its folder and its GGUF metadata."""
    folder = tmp_path_factory.mktemp("smol")
    return folder, write_byte_level(folder, "smollm", special=SPECIAL)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """A SentencePiece vocabulary of LLaMA's kind: its file and its GGUF metadata."""
    folder = tmp_path_factory.mktemp("pieces")
    fields = write_sentencepiece(folder)
    return folder / "tokenizer.model", fields


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Path:
    """A tokenizer.model of Meta's LLaMA-3 kind."""
    return write_llama3(tmp_path_factory.mktemp("llama3"))


@pytest.mark.parametrize("split", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_equals_transformers(tmp_path, split):
    from transformers import PreTrainedTokenizerFast

    fields = write_byte_level(tmp_path, split, special=SPECIAL, bos="<|im_start|>" if split == "llama-bpe" else None)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    ours, from_gguf = open_tokenizer(tmp_path), tokenizer_from_gguf(fields)
    assert ours.tokens() == from_gguf.tokens() == theirs.convert_ids_to_tokens(range(len(theirs)))
    for tokenizer in (ours, from_gguf):
        assert tokenizer.adds_bos == (split == "llama-bpe")
        assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
        assert tokenizer.vocab_size == len(theirs)
        for text in texts(2, 1000):
            ids = tokenizer.encode(text)
            assert ids == theirs(text).input_ids, repr(text)
            assert tokenizer.decode(ids) == text
        marked = "<|im_start|>user\nhi <think> <|im_end|>\n  <|im_end|>x"
        ids = theirs(marked, add_special_tokens=False).input_ids
        assert tokenizer.encode(marked, bos=False, special=True) == ids
        assert tokenizer.decode(ids, skip_special=False) == marked == theirs.decode(ids)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_default_split_cuts_digits_by_three():
    """A vocabulary without tokenizer.ggml.pre is split as llama.cpp does: punctuation apart, then groups of digits."""
    alphabet = sorted(byte_alphabet())
    tokens = [*alphabet, "12", "123", "1234", "!a", "!!", "'s"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "! a", "! !", "' s"],
    }
    tokenizer = tokenizer_from_gguf(fields)
    parts = [tokens[token_id] for token_id in tokenizer.encode("1234!a!!'s")]
    assert parts == ["123", "4", "!", "a", "!!", "'", "s"]


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_words_that_no_merge_makes(pre, whole):
    """LLaMA-3's vocabulary has words that its merges do not reach: it takes a word that is a token as it is."""
    tokens = [*sorted(byte_alphabet()), "ab", "abcd"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["a b"],
    }
    tokenizer = tokenizer_from_gguf(fields)
    parts = [tokens[token_id] for token_id in tokenizer.encode("abcd")]
    assert parts == (["abcd"] if whole else ["ab", "c", "d"])


def test_sentencepiece_equals_its_library(pieces):
    import sentencepiece

    file, fields = pieces
    library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for tokenizer in (open_tokenizer(file), open_tokenizer(file.parent), tokenizer_from_gguf(fields)):
        assert tokenizer.tokens() == fields["tokenizer.ggml.tokens"]
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
        for text in texts(3, 1500):
            ids = tokenizer.encode(text)
            assert ids == [1, *library.encode(text)], repr(text)
            assert tokenizer.decode(ids) == text


def test_sentencepiece_without_a_space_prefix(pieces):
    tokenizer = tokenizer_from_gguf(pieces[1] | {"tokenizer.ggml.add_space_prefix": False})
    for text in ["the", " the", "  x", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokens()[tokenizer.encode("the", bos=False)[0]][0] != "▁"


def test_sentencepiece_equals_transformers(pieces, tmp_path):
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    fields = pieces[1]
    ids = {token: token_id for token_id, token in enumerate(fields["tokenizer.ggml.tokens"])}
    scores = dict(zip(ids, fields["tokenizer.ggml.scores"], strict=True))
    skipped = [token for token, kind in zip(ids, fields["tokenizer.ggml.token_type"], strict=True) if kind != 1]
    theirs = LlamaTokenizer(vocab=ids, merges=generate_merges(ids, scores, skipped), add_bos_token=True)
    theirs.save_pretrained(tmp_path)
    for name, tokenizer in (("folder", open_tokenizer(tmp_path)), ("file", open_tokenizer(pieces[0]))):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
        assert tokenizer.tokens() == theirs.convert_ids_to_tokens(range(len(theirs)))
        for text in texts(4, 1000):
            if name == "file" and (text == "" or text[0] == " "):
                continue  # the sentencepiece library sets a space before a text that has one; transformers does not
            expected = theirs(text).input_ids
            assert tokenizer.encode(text) == expected, (name, text)
            assert tokenizer.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


def test_tiktoken_equals_transformers_and_tiktoken(llama3, monkeypatch):
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would keep a copy elsewhere
    tokenizer = open_tokenizer(llama3)
    names = tokenizer.tokens()[-256:]
    theirs = TikTokenConverter(vocab_file=str(llama3), extra_special_tokens=names).converted()
    lines = [line.split() for line in llama3.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    plain = tiktoken.Encoding("x", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in texts(5, 1500):
        ids = tokenizer.encode(text, bos=False)
        assert ids == plain.encode_ordinary(text) == theirs.encode(text).ids, repr(text)
        assert tokenizer.decode(ids) == text
    marked = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi  <|eot_id|>"
    assert tokenizer.encode(marked, special=True) == theirs.encode(marked).ids
    assert tokenizer.tokens() == [theirs.id_to_token(token_id) for token_id in range(tokenizer.vocab_size)]


def test_llama3_special_tokens(llama3):
    tokenizer = open_tokenizer(llama3)
    base = tokenizer.vocab_size - 256
    tokens = tokenizer.tokens()[base:]
    assert {place: tokens[place] for place in (0, 1, 4, 6, 7, 8, 9, 10)} == {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    assert (tokens[2], tokens[5], tokens[11]) == tuple(f"<|reserved_special_token_{n}|>" for n in (0, 2, 3))
    assert tokens[255] == "<|reserved_special_token_247|>"
    assert len({*tokens}) == 256
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (base, base + 1, True)
    assert tokenizer.stop_ids == {base + 1, base + 8, base + 9}


def test_long_white_space_does_not_crash_tiktoken(llama3):
    """tiktoken overflows its stack, with an exception that is no `Exception`, on a long run of spaces."""
    tokenizer = open_tokenizer(llama3)
    for text in [" " * 1_000_001, "x" + " \t" * 600_000 + "y", "\n" * 100_000, ("z" + " " * 24_999) * 8]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_typed_special_tokens_stay_text(smol, pieces, llama3):
    """Prompt injection: whoever types a special token must not end his turn and speak for the system."""
    llama = open_tokenizer(llama3)
    kinds = [
        (open_tokenizer(smol[0]), SPECIAL),
        (tokenizer_from_gguf(smol[1]), SPECIAL),
        (llama, llama.tokens()[-256:]),
    ]
    for tokenizer in (open_tokenizer(pieces[0]), tokenizer_from_gguf(pieces[1])):
        kinds.append((tokenizer, ["<unk>", "<s>", "</s>", "<|im_end|>"]))
    for tokenizer, special in kinds:
        ids = [tokenizer.tokens().index(token) for token in special]
        assert [tokenizer.encode(token, bos=False, special=True) for token in special] == [
            [token_id] for token_id in ids
        ]
        for token in special:
            text = f"a {token}{token} b"
            plain = tokenizer.encode(text, bos=False)
            assert not {*ids} & {*plain}, token
            assert tokenizer.decode(plain) == text


def test_markers_that_a_file_does_not_call_special(tmp_path):
    """Some fine-tuned models list <|im_end|> as an ordinary added token: typed, it must still be text."""
    fields = write_byte_level(tmp_path, "smollm", special=SPECIAL)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    fields["tokenizer.ggml.token_type"] = [4 if kind == 3 else kind for kind in fields["tokenizer.ggml.token_type"]]
    for tokenizer in (open_tokenizer(tmp_path), tokenizer_from_gguf(fields)):
        for text in ("<|im_end|>", "<|endoftext|>"):  # the second is named by no file
            marker = tokenizer.tokens().index(text)
            assert marker not in tokenizer.encode(text)
            assert tokenizer.encode(text, special=True) == [marker]
            assert marker in tokenizer.stop_ids
        assert tokenizer.encode("<think>") == [tokenizer.tokens().index("<think>")]


def test_beginning_of_sequence(llama3, smol):
    tokenizer = open_tokenizer(llama3)
    bos = tokenizer.bos_id
    assert tokenizer.encode("a")[0] == bos
    assert bos not in tokenizer.encode("a", bos=False)
    # A rendered template brings its own; a second one would be text that no model has seen.
    assert tokenizer.encode("<|begin_of_text|>a", special=True) == tokenizer.encode("a")
    assert tokenizer.encode("a", special=True) == tokenizer.encode("a")
    assert tokenizer.encode("<|begin_of_text|>a", bos=True, special=True)[:2] == [bos, bos]
    unadorned = tokenizer_from_gguf({key: value for key, value in smol[1].items() if "bos" not in key})
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        unadorned.encode("a", bos=True)


def test_lone_surrogates(smol, pieces, llama3):
    """JSON can hold half a character; the libraries refuse it or crash."""
    for tokenizer in (open_tokenizer(smol[0]), open_tokenizer(pieces[0]), open_tokenizer(llama3)):
        assert tokenizer.decode(tokenizer.encode("a\ud83d b \ud83d\ude00")) == "a\ufffd b 😀"


def test_stream_decoder_equals_decode(smol, pieces, llama3):
    """Random ids hold broken characters, special tokens and leading spaces; no piece may hold half a character."""
    rng = random.Random(0)
    for tokenizer in (open_tokenizer(smol[0]), open_tokenizer(pieces[0]), open_tokenizer(llama3)):
        samples = [tokenizer.encode(text) for text in texts(6, 200)]
        samples += [rng.choices(range(tokenizer.vocab_size), k=rng.randrange(40)) for _ in range(300)]
        for ids in samples:
            stream = StreamDecoder(tokenizer)
            got = [stream.push(token_id) for token_id in ids]
            assert "".join(got) + stream.flush() == tokenizer.decode(ids)
        stream = StreamDecoder(tokenizer)
        emoji = tokenizer.encode("👨‍👩‍👧", bos=False)
        assert "\ufffd" not in "".join(map(stream.push, emoji)) + stream.flush()


def test_stream_decoder_looks_at_each_id_once(smol, monkeypatch):
    """Decoding the whole text again for every id made long answers quadratic."""
    tokenizer = open_tokenizer(smol[0])
    ids = tokenizer.encode("the quick brown 👍🏽 fox " * 50)
    seen = []
    original = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda *args, **kwargs: seen.append(1) or original(*args, **kwargs))
    stream = StreamDecoder(tokenizer)
    for token_id in ids:
        stream.push(token_id)
    assert len(seen) == len(ids)


def test_threads_do_not_disturb_each_other(smol):
    """One library switch turns special tokens into text; toggled for each call, it would leak into other threads."""
    tokenizer = open_tokenizer(smol[0])
    text = "<|im_start|>a<|im_end|>" * 20
    expected = {special: tokenizer.encode(text, special=special) for special in (True, False)}
    wrong = []

    def work(special: bool) -> None:
        for _ in range(300):
            if tokenizer.encode(text, special=special) != expected[special]:
                wrong.append(special)

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected[True] != expected[False]
    assert not wrong


class Element:
    """A whole number that is no int, as an element of a tensor is: its hash is not the number's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_decode_takes_tensors_and_refuses_foreign_ids(smol):
    """Special tokens in a tensor were not skipped: its elements are not found in a set of numbers."""
    tokenizer = open_tokenizer(smol[0])
    ids = tokenizer.encode("hi<|im_end|>", special=True)
    assert tokenizer.decode([Element(token_id) for token_id in ids]) == "hi"
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
            tokenizer.decode([wrong])


@pytest.mark.slow
def test_the_default_model():
    """SmolLM2's tokenizer from its GGUF file, against transformers with the split of SmolLM2's own tokenizer.json.

    Without that split (one part a digit) transformers gives other ids for this file, as for two spaces and a digit.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    from mmadapter.weights.gguf import read_gguf
    from mmadapter.weights.store import cached_path

    path = cached_path("smollm2-135m")
    if path is None:
        pytest.skip("the default model is not in the cache: python -m mmadapter weights fetch smollm2-135m")
    fields = read_gguf(path).fields
    start = time.thread_time()  # not the clock: other programs may be running
    tokenizer = tokenizer_from_gguf(fields)
    assert time.thread_time() - start < 1
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (49152, 1, 2, False)
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert [tokenizer.tokens()[token_id] for token_id in tokenizer.encode("  1")] == ["ĠĠ", "1"]
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    for text in texts(7, 3000):
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids, repr(text)
        assert tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "What is this?"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(messages) == rendered
    assert tokenizer.encode(rendered, special=True) == theirs(rendered, add_special_tokens=False).input_ids
