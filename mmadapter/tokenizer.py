"""Text to token ids and back, with the same ids whatever kind of file the vocabulary came from.

A `Tokenizer` is a small front over one of three libraries: `tokenizers` (tokenizer.json, byte-level GGUF vocabularies),
`sentencepiece` (LLaMA 1 and 2) and `tiktoken` (Meta's LLaMA-3 file). The libraries turn text into ids; ids turn into
text here, because every id stands for fixed bytes and a text is those bytes joined. That is what lets a stream of ids
be decoded piece by piece to exactly the text of the whole.

Special tokens ("<|im_end|>") steer a chat model, so text that a user typed must never become one. `encode` reads them
only with `special=True`, meant for a rendered chat template, and `render_chat` guards the messages inside it.
"""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mmadapter import chat_template, vocabulary
from mmadapter.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, sentencepiece_model
from mmadapter.vocabulary import Vocabulary

# Tokens that end a turn or a text in one model or another; those that a vocabulary declares as special stop generation.
END_TOKENS = (
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
)

# A Unicode noncharacter, which text does not hold. `render_chat` sets it into special tokens that stand in a message,
# so that `encode(special=True)` does not find them; encode drops it again.
GUARD = "\ufdd0"


class Tokenizer:
    """Text to ids and back for one vocabulary; safe to use from several threads.

    Attributes:
        vocab_size: Number of token ids; ids run from 0 to vocab_size - 1.
        bos_id: Id of the beginning-of-sequence token, or None.
        eos_id: Id of the end-of-sequence token, or None.
        stop_ids: Ids that end a text or a turn.
        adds_bos: Whether the model expects `bos_id` at the start of a sequence.
        chat_template: The model's Jinja chat template, or None.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: Iterable[int] = (),
        adds_bos: bool,
        chat_template: str | None = None,
    ) -> None:
        """Use `open_tokenizer` or `tokenizer_from_gguf`, which know what to pass.

        Args:
            vocabulary: The vocabulary.
            bos_id: See the class.
            eos_id: See the class.
            stop_ids: Ids that end a text or a turn, beside `eos_id` and the special tokens among `END_TOKENS`.
            adds_bos: See the class; without a `bos_id` it is False.
            chat_template: See the class.

        Raises:
            ValueError: An id is not of the vocabulary.
        """
        special = vocabulary.special
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.stop_ids = frozenset(
            {special[token] for token in END_TOKENS if token in special}
            | {*stop_ids}
            | ({eos_id} if eos_id is not None else set())
        )
        for token_id in self.stop_ids | ({bos_id} if bos_id is not None else set()):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"the model names the token id {token_id}, but its vocabulary has {self.vocab_size}")
        self.adds_bos = adds_bos and bos_id is not None
        self.chat_template = chat_template
        self._vocabulary = vocabulary
        longest_first = sorted(special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._special_starts = tuple({token[:length] for token in special for length in range(1, len(token))})

    def encode(self, text: str, *, bos: bool | None = None, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: Any string; a lone surrogate becomes U+FFFD.
            bos: Whether `bos_id` comes first; None does as the model wants, and with `special` adds none to a text that
                begins with one.
            special: Whether special-token texts such as "<|im_end|>" become their ids. Leave it False for text that a
                user typed.

        Raises:
            ValueError: `bos` is True and the vocabulary has no such token.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not special:
            ids = self._vocabulary.encode_plain(text)
        elif self._vocabulary.encode_special is not None and GUARD not in text:
            ids = self._vocabulary.encode_special(text)
        else:
            ids = self._encode_split(text)
        if bos is None:
            bos = self.adds_bos and not (special and ids[:1] == [self.bos_id])
        if not bos:
            return ids
        if self.bos_id is None:
            raise ValueError("this vocabulary has no beginning-of-sequence token; encode with bos=False")
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: Token ids.
            skip_special: Whether special tokens are left out, else their text stands in the result.

        Raises:
            ValueError: An id is not of this vocabulary.
        """
        data = b"".join(self.token_bytes(token_id, skip_special=skip_special) for token_id in ids)
        if self._vocabulary.strips_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The bytes one id stands for; they may be a part of a character.

        Raises:
            ValueError: The id is not of this vocabulary.
        """
        token_id = operator.index(token_id)  # an element of a tensor, too
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is outside the vocabulary, whose ids run from 0 to {self.vocab_size - 1}"
            )
        return b"" if skip_special and token_id in self._vocabulary.special_ids else self._vocabulary.pieces[token_id]

    def tokens(self) -> list[str]:
        """The string of every id, for a fingerprint of the vocabulary.

        Byte-level vocabularies (tiktoken too) give the byte-level alphabet of GPT-2, SentencePiece ones their pieces,
        so that one model gives one list whatever file it came from.
        """
        return list(self._vocabulary.tokens)

    def render_chat(self, messages: list[dict], *, generation_prompt: bool = True) -> str:
        """The prompt of a conversation by the model's chat template, for `encode(..., special=True)`.

        Special-token texts inside the messages get a `GUARD` and so stay plain text when the prompt is encoded.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            generation_prompt: Whether the prompt ends where the assistant is to answer.

        Raises:
            ValueError: There is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use a base prompt instead of chat messages")
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError('chat messages must be a list of {"role": ..., "content": ...}')
        tokens = self._vocabulary.tokens
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        variables = {name: tokens[token_id] for name, token_id in names.items() if token_id is not None}
        return chat_template.render(
            self.chat_template, self._guard(messages), add_generation_prompt=generation_prompt, **variables
        )

    def _encode_split(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._special_pattern.split(text)):
            if index % 2:
                ids.append(self._vocabulary.special[part])
            elif part := part.replace(GUARD, ""):
                ids += self._vocabulary.encode_plain(part)
        return ids

    def _guard(self, value: object) -> object:
        if isinstance(value, str):
            value = self._special_pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], value)
            # The template may set another string right after this one, which could complete a special token.
            return value + GUARD if value.endswith(self._special_starts) else value
        if isinstance(value, Mapping):
            return {key: self._guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(item) for item in value]
        return value


class StreamDecoder:
    """Text of ids that come one by one, never a part of a character.

    The pieces and the final `flush` joined are `tokenizer.decode` of all ids. Each call costs the same, however long
    the text has become.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = tokenizer._vocabulary.strips_space

    def push(self, token_id: int) -> str:
        """The text that this id completes, possibly empty.

        Raises:
            ValueError: The id is not of this vocabulary.
        """
        data = self._tokenizer.token_bytes(token_id)
        if self._strips_space and data:
            self._strips_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left of a character that no id completed: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder, or of a file.

    A folder's tokenizer.json goes before its tokenizer.model (SentencePiece, or the tiktoken file of LLaMA-3: told
    apart by content). These files beside it are used: tokenizer_config.json, special_tokens_map.json,
    added_tokens.json, generation_config.json, config.json and chat_template.jinja.

    Raises:
        FileNotFoundError: There is no such path, or the folder has no tokenizer.
        ValueError: A file cannot be read as what it should be.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a tokenizer.json, a tokenizer.model or their folder")
    if path.is_dir():
        found = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{path} has no tokenizer; put the model's tokenizer.json or tokenizer.model into it"
            )
        path = found

    settings: dict = {}
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        settings |= {key: value for key, value in _read_json(path.parent / name).items() if value is not None}
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    named = {role: _content(settings[role]) for role in roles if role in settings}
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            raise ValueError(f"{path} is a GGUF file; pass its metadata to tokenizer_from_gguf")
    data = path.read_bytes()
    try:
        if data.lstrip()[:1] == b"{":
            known = vocabulary.from_tokenizer_json(data.decode("utf-8"), {*named.values()})
        elif re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
            known = vocabulary.from_tiktoken(data)
        else:
            known = vocabulary.from_sentencepiece(data)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a tokenizer that can be read (tokenizer.json, SentencePiece, or base64 lines of LLaMA-3): "
            f"{_one_line(error)}"
        ) from error
    added = {int(token_id): _content(token) for token_id, token in settings.get("added_tokens_decoder", {}).items()}
    added |= {token_id: token for token, token_id in _read_json(path.parent / "added_tokens.json").items()}
    known = vocabulary.with_added_tokens(known, added)

    ids = {token: token_id for token_id, token in enumerate(known.tokens)}
    for role in ("bos_token", "eos_token"):
        if role in named and named[role] not in ids:
            raise ValueError(f"{path} does not have {named[role]!r}, which the files beside it name as {role}")
    declared = settings.get("eos_token_id", [])
    declared = declared if isinstance(declared, list) else [declared]
    # A config that was never filled in names ids of some other vocabulary: ordinary words must not end a text.
    stops = [token_id for token_id in declared if token_id in known.special_ids]
    eos_id = ids.get(named.get("eos_token"), known.eos_id)
    if eos_id is None and stops:
        eos_id = stops[0]
    bos_id = ids.get(named.get("bos_token"), known.bos_id)
    if bos_id is None and settings.get("bos_token_id") in known.special_ids:
        bos_id = settings["bos_token_id"]
    return Tokenizer(
        known,
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=stops,
        adds_bos=bool(settings.get("add_bos_token", known.adds_bos)),
        chat_template=_chat_template(path.parent, settings.get("chat_template")),
    )


def tokenizer_from_gguf(fields: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that a GGUF file describes in its metadata.

    Args:
        fields: Metadata as plain Python values, by key (`tokenizer.ggml.model`, `tokenizer.ggml.tokens` ...).

    Raises:
        ValueError: A field is missing or contradicts another, or the kind of vocabulary is not known.
    """
    prefix = "tokenizer.ggml."
    field = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    model, pre = field.get("model"), field.get("pre", "default")
    if model not in ("gpt2", "llama"):
        raise ValueError(f'{prefix}model must be "gpt2" (byte-level BPE) or "llama" (SentencePiece), got {model!r}')
    if model == "gpt2" and pre not in vocabulary.SPLITS:
        raise ValueError(
            f"{prefix}pre is {pre!r}, which is not known; known are {', '.join(sorted(vocabulary.SPLITS))}"
        )
    for name in ("tokens", "token_type", "merges" if model == "gpt2" else "scores"):
        if not field.get(name):
            raise ValueError(f"the metadata has no {prefix}{name}, which a {model!r} vocabulary needs")
    tokens, types = list(field["tokens"]), list(field["token_type"])
    for name in ("token_type", "scores"):
        if name in field and len(field[name]) != len(tokens):
            raise ValueError(f"{prefix}{name} has {len(field[name])} entries for {len(tokens)} tokens")
    ids = {name: field.get(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    for token_id, kind in enumerate(types):
        if kind == USER_DEFINED and (vocabulary.MARKER.fullmatch(tokens[token_id]) or token_id in ids.values()):
            types[token_id] = CONTROL
    if model == "gpt2":
        known = vocabulary.byte_level(tokens, types, field["merges"], vocabulary.SPLITS[pre])
        adds_bos = vocabulary.SPLITS[pre] in vocabulary.WHOLE_WORD_SPLITS
    else:
        if UNKNOWN not in types:  # SentencePiece wants one
            types[field.get("unknown_token_id", 0)] = UNKNOWN
        prefix_space = bool(field.get("add_space_prefix", True))
        model_file = sentencepiece_model(tokens, field["scores"], types, add_dummy_prefix=prefix_space)
        known = vocabulary.from_sentencepiece(model_file)
        adds_bos = True
    return Tokenizer(
        known,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        stop_ids=[ids[name] for name in ("eot", "eom") if ids[name] is not None],
        adds_bos=bool(field.get("add_bos_token", adds_bos)),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _chat_template(folder: Path, setting: object) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(setting, list):  # several templates by name
        setting = {entry["name"]: entry["template"] for entry in setting}.get("default")
    return setting


def _content(token: object) -> str:
    """The text of a token, which files give as a string or as a mapping with flags."""
    return token["content"] if isinstance(token, Mapping) else str(token)


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(value).__name__}")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
