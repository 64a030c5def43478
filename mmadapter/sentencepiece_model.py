"""SentencePiece model files: made from their parts, and changed, as protocol-buffer messages.

On the wire a field is its number and kind, then a variable-length integer (kind 0), 8 bytes (1), a length and as many
bytes (2), or 4 bytes (5). These lines spare the package `protobuf`, of which the message classes inside `sentencepiece`
accept only the newest release.

Source: `sentencepiece_model.proto` of google/sentencepiece, for the field numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

# Kinds of piece; a GGUF file numbers its tokens alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def sentencepiece_model(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, add_dummy_prefix: bool
) -> bytes:
    """A SentencePiece model file (byte-pair encoding, no normalisation) from its parts, as a GGUF file holds them.

    Args:
        tokens: Pieces, "▁" for a space.
        scores: Score of each piece; the higher, the earlier it is merged.
        types: Kind of each piece.
        add_dummy_prefix: Whether a text is encoded with a space before it.
    """
    pieces = b"".join(_wire_bytes(1, _sentencepiece_entry(*entry)) for entry in zip(tokens, scores, types, strict=True))
    unknown = tokens[list(types).index(UNKNOWN)]
    trainer = _wire_int(3, 2) + _wire_int(35, int(BYTE in types)) + _wire_bytes(45, unknown.encode())
    normalizer = _wire_bytes(1, b"identity") + _wire_int(3, int(add_dummy_prefix)) + _wire_int(4, 0) + _wire_int(5, 1)
    return pieces + _wire_bytes(2, trainer) + _wire_bytes(3, normalizer)


def _sentencepiece_entry(token: str, score: float, kind: int) -> bytes:
    return _wire_bytes(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _wire_int(3, kind)


def with_control_symbols(model: bytes, ids: set[int]) -> bytes:
    """The same SentencePiece model with the pieces of these ids made control symbols."""
    result, token_id = [], 0
    for number, value, raw in _wire_fields(model):
        if number == 1:
            if token_id in ids:
                kept = b"".join(part for inner, _, part in _wire_fields(value) if inner != 3)
                raw = _wire_bytes(1, kept + _wire_int(3, CONTROL))
            token_id += 1
        result.append(raw)
    return b"".join(result)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _wire_int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _wire_bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _wire_fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Number, value (without its length) and whole bytes of each field of a well-formed message."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at

    at = 0
    while at < len(message):
        key, start = varint(at)
        kind = key & 7
        if kind == 0:
            end = varint(start)[1]
        elif kind == 2:
            length, start = varint(start)
            end = start + length
        else:
            end = start + {1: 8, 5: 4}[kind]
        yield key >> 3, message[start:end], message[at:end]
        at = end
