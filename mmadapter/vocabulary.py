"""Vocabularies: how a text becomes ids and which bytes each id stands for, for the three kinds that LLaMA models have.

Byte-level byte-pair encoding (the `tokenizers` library), SentencePiece, and Meta's LLaMA-3 file (`tiktoken`). Each
function here reads one kind and returns a `Vocabulary`; which file is of which kind is told apart in `tokenizer.py`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from mmadapter.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, with_control_symbols

# Some vocabularies list their chat markers as ordinary user-defined tokens; by shape they are special all the same.
MARKER = re.compile(r"<[|｜][^<>]*[|｜]>")

# How a text is split before byte-pair encoding: regular expressions, applied one after the other to the parts that the
# ones before have made. From the published tokenizer.json of LLaMA-3, Qwen2 and Mistral Nemo ("tekken"); "default" is
# what llama.cpp does with a vocabulary that names no split.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-3": (_LLAMA3_SPLIT,),
    "qwen2": (_LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "default": (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ),
}

# GGUF names the split (tokenizer.ggml.pre); several names stand for one.
SPLITS = {
    "gpt-2": "gpt-2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "codeshell": "digits",
    "llama-bpe": "llama-3",
    "llama3": "llama-3",
    "llama-v3": "llama-3",
    "falcon3": "llama-3",
    "qwen2": "qwen2",
    "tekken": "tekken",
    "default": "default",
}
# Vocabularies of these splits take a word that is a token as it is, without merging; and their models expect BOS.
WHOLE_WORD_SPLITS = frozenset({"llama-3", "tekken"})

# The special tokens of LLaMA-3, which follow the ranks of its tiktoken file. The names are those of LLaMA 3.1 to 3.3 in
# their Hugging Face and GGUF files, so that all three give one list; the ids are the same in every release.
_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_LLAMA3_SPECIAL, _LLAMA3_RANKS = 256, 128000

# Longer runs of white space overflow the stack of tiktoken's regular expressions. LLaMA-3's own code cuts here as well.
_LONGEST_SPACE = 25000
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{_LONGEST_SPACE},}}")


@dataclass(frozen=True)
class Vocabulary:
    """One vocabulary, as its file describes it.

    Attributes:
        tokens: The string of each id: byte-level strings, or SentencePiece pieces.
        pieces: The bytes that each id stands for.
        special: Ids of the special tokens, by their text.
        encode_plain: Text to ids, with special tokens in it taken as plain text.
        encode_special: Text to ids, with special tokens read; None where the library does not do that.
        strips_space: Whether decoding drops one leading space, which encoding had added.
        bos_id: Id that the file names for the beginning of a sequence, or None.
        eos_id: Id that the file names for the end of a sequence, or None.
        adds_bos: Whether the file says that a sequence begins with `bos_id`.
    """

    tokens: list[str]
    pieces: list[bytes]
    special: dict[str, int]
    encode_plain: Callable[[str], list[int]]
    encode_special: Callable[[str], list[int]] | None = None
    strips_space: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = False
    special_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_ids", frozenset(self.special.values()))


def byte_level(tokens: list[str], types: list[int], merges: Sequence[str], split: str) -> Vocabulary:
    """Byte-level byte-pair encoding from its parts, as a GGUF file holds them.

    Args:
        tokens: Strings of the byte-level alphabet; special and user-defined tokens as they read.
        types: Kind of each token.
        merges: "left right", the most frequent first.
        split: A value of `SPLITS`.

    Raises:
        ValueError: A merge is not of two tokens, or their union is no token.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    ids = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in ids or pair[1] not in ids or pair[0] + pair[1] not in ids:
            raise ValueError(f"the merge {' '.join(pair)!r} does not make a token of two tokens of the vocabulary")
    special = {tokens[token_id]: token_id for token_id, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)}
    user_defined = {tokens[token_id]: token_id for token_id, kind in enumerate(types) if kind == USER_DEFINED}
    model = BPE(ids, pairs, ignore_merges=split in WHOLE_WORD_SPLITS)

    def build(plain: bool) -> Tokenizer:
        library = Tokenizer(model)
        library.pre_tokenizer = _pre_tokenizer(split)
        library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        library.add_tokens([AddedToken(token, special=False, normalized=False) for token in user_defined])
        library.encode_special_tokens = plain
        return library

    as_it_reads = special | user_defined
    return Vocabulary(
        tokens=tokens,
        pieces=[token.encode() if token in as_it_reads else _byte_level_bytes(token) for token in tokens],
        special=special,
        encode_plain=_encoder(build(plain=True)),
        encode_special=_encoder(build(plain=False)),
    )


def from_tokenizer_json(text: str, named: Set[str] = frozenset()) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    Args:
        text: Content of the file.
        named: Tokens that the files beside it name as special.

    Raises:
        ValueError: The text is no such file, or its kind of vocabulary is not known.
    """
    from tokenizers import Tokenizer

    spec = json.loads(text)
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "vocab" not in model:
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(f'expected a tokenizer.json whose model is of type "BPE", got {kind!r}')
    decoder = spec.get("decoder") or {}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if "type" in step}
    if "ByteLevel" in steps:
        to_bytes = _byte_level_bytes
    elif "Metaspace" in steps or "ByteFallback" in steps:
        to_bytes = _piece_bytes
    else:
        raise ValueError(
            f"expected a byte-level or SentencePiece-like tokenizer.json, got the decoder {', '.join(steps) or None}"
        )
    strips = steps.get("Strip", {}).get("start", 0) > 0 or (
        "Metaspace" in steps and steps["Metaspace"].get("prepend_scheme", "always") != "never"
    )

    try:
        library = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizers cannot read it: {' '.join(str(error).split())}") from error
    library.no_truncation()  # limits that were saved from a training run
    library.no_padding()
    ids = library.get_vocab(with_added_tokens=True)
    library.add_special_tokens(sorted(named & ids.keys()))
    added = library.get_added_tokens_decoder()
    for token in added.values():
        token.special = token.special or token.content in named or bool(MARKER.fullmatch(token.content))

    # A second front over the same model: whether special tokens are read is a switch of the whole library object, and
    # other threads may be encoding.
    plain = Tokenizer(library.model)
    plain.normalizer = library.normalizer
    plain.pre_tokenizer = library.pre_tokenizer
    plain.add_special_tokens([token for token in added.values() if token.special])
    plain.add_tokens([token for token in added.values() if not token.special])
    plain.encode_special_tokens = True

    tokens = [""] * (max(ids.values()) + 1)
    pieces = [b""] * len(tokens)
    for token, token_id in ids.items():
        tokens[token_id] = token
        pieces[token_id] = token.encode() if token_id in added else to_bytes(token)
    special = {token.content: token_id for token_id, token in added.items() if token.special}
    whole, alone = library.encode("a").ids, library.encode("a", add_special_tokens=False).ids
    adds_bos = whole[1 : 1 + len(alone)] == alone and len(whole) > len(alone) and whole[0] in special.values()
    return Vocabulary(
        tokens=tokens,
        pieces=pieces,
        special=special,
        encode_plain=_encoder(plain),
        encode_special=_encoder(library),
        strips_space=strips,
        bos_id=whole[0] if adds_bos else None,
        adds_bos=adds_bos,
    )


def from_sentencepiece(model: bytes) -> Vocabulary:
    """The vocabulary of a SentencePiece model file.

    Raises:
        ValueError: The bytes are no SentencePiece model.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(f"sentencepiece cannot read it: {' '.join(str(error).split())}") from error
    tokens = [processor.id_to_piece(token_id) for token_id in range(processor.get_piece_size())]
    markers = {token_id for token_id, token in enumerate(tokens) if MARKER.fullmatch(token)}
    if not all(processor.is_control(token_id) for token_id in markers):
        # SentencePiece reads user-defined symbols from any text, and control symbols from none.
        processor.LoadFromSerializedProto(with_control_symbols(model, markers))
    special = {
        token: token_id
        for token_id, token in enumerate(tokens)
        if processor.is_control(token_id) or processor.is_unknown(token_id)
    }
    return Vocabulary(
        tokens=tokens,
        pieces=[
            _piece_bytes(token) if processor.is_byte(token_id) else token.replace("▁", " ").encode()
            for token_id, token in enumerate(tokens)
        ],
        special=special,
        encode_plain=processor.encode,
        strips_space=processor.encode("a", out_type=str)[0].startswith("▁"),
        bos_id=processor.bos_id() if processor.bos_id() >= 0 else None,
        eos_id=processor.eos_id() if processor.eos_id() >= 0 else None,
        adds_bos=processor.bos_id() >= 0,
    )


def from_tiktoken(data: bytes) -> Vocabulary:
    """The vocabulary of Meta's LLaMA-3 file: base64 token and rank a line, special tokens after the last rank.

    Raises:
        ValueError: A line is not of that form, or the ranks are not those of a LLaMA-3 vocabulary.
    """
    import tiktoken

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a base64 token and its rank: {line[:60]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("the ranks must run from 0 without a gap and hold the 256 single bytes")
    if len(ranks) > _LLAMA3_RANKS:
        raise ValueError(f"a LLaMA-3 vocabulary has at most {_LLAMA3_RANKS} ranks, this one has {len(ranks)}")
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(_LLAMA3_SPECIAL))
    names = [_LLAMA3_NAMED[place] if place in _LLAMA3_NAMED else next(reserved) for place in range(_LLAMA3_SPECIAL)]
    special = {name: len(ranks) + place for place, name in enumerate(names)}
    encoding = tiktoken.Encoding("llama-3", pat_str=_LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)

    def encode(text: str) -> list[int]:
        cuts = [0]
        for run in _LONG_SPACE.finditer(text):
            cuts += range(run.start() + _LONGEST_SPACE, run.end() + 1, _LONGEST_SPACE)
        parts = (text[start:end] for start, end in itertools.pairwise([*cuts, len(text)]))
        return [token_id for part in parts for token_id in encoding.encode_ordinary(part)]

    characters = {byte: character for character, byte in _byte_alphabet().items()}
    pieces = sorted(ranks, key=ranks.__getitem__)
    return Vocabulary(
        tokens=["".join(characters[byte] for byte in piece) for piece in pieces] + names,
        pieces=pieces + [name.encode() for name in names],
        special=special,
        encode_plain=encode,
        bos_id=special["<|begin_of_text|>"],
        eos_id=special["<|end_of_text|>"],
        adds_bos=True,
    )


def with_added_tokens(known: Vocabulary, added: Mapping[int, str]) -> Vocabulary:
    """The vocabulary with special tokens after its last, as the files beside a tokenizer file list them.

    Args:
        known: The vocabulary of the file.
        added: Text of tokens by id; those that the vocabulary has already are left as they are.

    Raises:
        ValueError: The new ids leave a gap.
    """
    size = len(known.tokens)
    new = {token_id: added[token_id] for token_id in sorted(added) if token_id >= size}
    if [*new] != [*range(size, size + len(new))]:
        raise ValueError(f"added tokens must follow the {size} of the vocabulary without a gap, got the ids {[*new]}")
    if not new:
        return known
    return dataclasses.replace(
        known,
        tokens=[*known.tokens, *new.values()],
        pieces=[*known.pieces, *(token.encode() for token in new.values())],
        special=known.special | {token: token_id for token_id, token in new.items()},
        encode_special=None,
    )


def _pre_tokenizer(split: str) -> object:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    # Not patterns, but what the tokenizer.json of GPT-2 and SmolLM have: the library's regular expressions know fewer
    # of Unicode's newest digits than its `Digits`.
    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "gpt-2":
        return gpt2
    if split == "digits":
        return Sequence([Digits(individual_digits=True), gpt2])
    parts = [Split(Regex(pattern), "isolated") for pattern in _PATTERNS[split]]
    return Sequence([*parts, ByteLevel(add_prefix_space=False, use_regex=False)])


def _encoder(library: object) -> Callable[[str], list[int]]:
    return lambda text: library.encode(text, add_special_tokens=False).ids


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character of GPT-2's alphabet: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(256)} - {*printable})
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level_bytes(token: str) -> bytes:
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # not of the alphabet: the token stands for itself
        return token.encode()


def _piece_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
