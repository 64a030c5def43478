"""Small vocabularies, trained on random strings and written as every kind of file that can hold them."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def random_text(rng: random.Random) -> str:
    """One varied string: code, accents, emoji, several scripts, digits, runs of white space."""
    kinds = [
        lambda: chr(rng.randrange(32, 127)),
        lambda: chr(rng.randrange(0xA1, 0x250)),
        lambda: rng.choice([" ", "  ", "\t", "\n", "\r\n", " " * rng.randrange(3, 20), "\n\n\n"]),
        lambda: chr(rng.randrange(0x4E00, 0x9FFF)) * rng.randrange(1, 3),
        lambda: chr(rng.randrange(0x621, 0x64B)),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 9))),
        lambda: rng.choice(["def f(x):\n    return x", "e\u0301", "½", "Ⅷ", "'s", "'LL", "don't", "</div>", "x += 1;"]),
        lambda: rng.choice(["👨‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇫🇷", "\u200d", "\ufeff", "\x00", "\x7f"]),
        lambda: rng.choice([" the", " quick", " brown", " fox", "s", " jumps", " over", " lazy dog"]),
    ]
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 25)))


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["", " ", "a", " a", "  lead and trail  ", "\n", *(random_text(rng) for _ in range(count))]


def write_byte_level(folder: Path, split: str, *, special: list[str], bos: str | None = None) -> dict[str, object]:
    """Trains a byte-level BPE, saves it as a Hugging Face folder and returns the same one as GGUF metadata."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Library

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pattern = {"llama-bpe": LLAMA3_SPLIT, "qwen2": LLAMA3_SPLIT.replace("{1,3}", "")}.get(split)
    library = Library(models.BPE(ignore_merges=split == "llama-bpe"))
    if pattern:
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])
    else:
        library.pre_tokenizer = (
            gpt2 if split == "gpt-2" else pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
        )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts(1, 300), trainer)
    library.add_special_tokens(special)
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if bos:
        library.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, library.token_to_id(bos))]
        )
    library.enable_truncation(8)  # as a training run may leave it in the file
    library.enable_padding(length=8, pad_id=library.token_to_id(special[0]), pad_token=special[0])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    config = {
        "bos_token": bos or SPECIAL[1],
        "eos_token": {"__type": "AddedToken", "content": special[-1], "special": True},
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = library.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 4 if token == "<think>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": ids[config["bos_token"]],
        "tokenizer.ggml.eos_token_id": ids[special[-1]],
        "tokenizer.chat_template": CHATML,
    }


def write_sentencepiece(folder: Path) -> dict[str, object]:
    """Trains a SentencePiece BPE of LLaMA's kind as tokenizer.model and returns the same one as GGUF metadata."""
    import sentencepiece

    sentences = [line for text in texts(1, 400) for line in text.replace("\x00", "").splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        user_defined_symbols=["<|im_end|>", "<think>"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = [model.id_to_piece(token_id) for token_id in range(model.get_piece_size())]
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|im_end|>": 4, "<think>": 4}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [model.get_score(token_id) for token_id in range(len(tokens))],
        "tokenizer.ggml.token_type": [
            6 if model.is_byte(token_id) else kinds.get(token, 1) for token_id, token in enumerate(tokens)
        ],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_llama3(folder: Path) -> Path:
    """Trains a tokenizer.model in the format of Meta's LLaMA-3 and returns its path."""
    fields = write_byte_level(folder / "bpe", "llama-bpe", special=["<|begin_of_text|>"], bos="<|begin_of_text|>")
    characters = byte_alphabet()
    words = [token for token in fields["tokenizer.ggml.tokens"] if token not in ("<|begin_of_text|>", "<think>")]
    lines = [base64.b64encode(bytes(characters[c] for c in word)) + b" %d" % rank for rank, word in enumerate(words)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "tokenizer.model"


def byte_alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
