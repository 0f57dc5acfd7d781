"""SentencePiece vocabularies as `tokenizers`: from a `tokenizer.model` file, or from the lists a GGUF file carries.

Two algorithms: BPE, whose merges are recovered from the scores, and unigram. Knows no model; needs no protobuf, for
of a `tokenizer.model` (a protobuf message) only a handful of fields matter.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import TokenizerError
from .tokenizer import guarded_backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_MODEL = 32 << 20
"""Bytes of a tokenizer.model; those of the largest vocabularies, of 256,000 tokens, have 4 to 5 million."""
MAX_PIECES = 1 << 20
MAX_WORK = 1 << 27
"""Characters to look at for the merges of a BPE vocabulary, the square of each token's length: some seconds. At
256,000 tokens, more than any vocabulary has, it allows a mean length of 22, and single tokens of thousands."""
MAX_MERGES = 1 << 21
"""LLaMA's 32,000 tokens have 61,000 merges."""
MAX_UNIGRAM = 1 << 22
"""Bytes of text in a unigram vocabulary, each of which takes the tokenizer's search tree some 300 bytes of memory."""
_SPACE = "\u2581"
_NEVER_MERGED = frozenset({BYTE, CONTROL, UNKNOWN})


@dataclass(frozen=True)
class Pieces:
    """A vocabulary: text, score and type of each token, by id."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unigram: bool = False
    space_prefix: bool = True
    """A text starts as if a space stood before it, and so does the text after each token that was added."""
    prefix_once: bool = False
    """Only a text as a whole does (transformers' `legacy: false`); a space that it starts with is that space."""
    squeeze: bool = False
    """Several spaces count as one."""
    charsmap: bytes = b""
    """SentencePiece's own table of Unicode normalization."""


def backend_from_pieces(pieces: Pieces, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of this vocabulary. Raises TokenizerError."""
    _check_size(pieces, where)
    if len(set(pieces.texts)) != len(pieces.texts):
        raise TokenizerError(f"{where}: two tokens of the vocabulary have the same text")
    return guarded_backend(lambda: _build(pieces), where)


def backend_from_model(data: bytes, path: Path, *, prefix_once: bool = False) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.model file; `prefix_once` is not said there. Raises TokenizerError."""
    try:
        pieces = _parse(data)
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(
            f"{path}: not a SentencePiece model: {error}", hint="a folder with tokenizer.json needs no tokenizer.model"
        ) from error
    return backend_from_pieces(replace(pieces, prefix_once=prefix_once), str(path))


def merges(texts: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE makes, in its order: by falling score of the result. Raises ValueError."""
    ids = {text: number for number, text in enumerate(texts) if types[number] not in _NEVER_MERGED}
    found: list[tuple[float, str, str]] = []
    for text, number in ids.items():
        rank = -scores[number]
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                found.append((rank, texts[left], texts[right]))  # the vocabulary's own strings, not copies of parts
        if len(found) > MAX_MERGES:
            raise ValueError(f"more than {MAX_MERGES} merges in a vocabulary of {len(texts)} tokens")
    found.sort(key=lambda merge: (merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in found]


def _check_size(pieces: Pieces, where: str) -> None:
    """Refuse a vocabulary that would take hours or all memory."""
    excess = None
    if len(pieces.texts) > MAX_PIECES:
        excess = f"{len(pieces.texts)} tokens, more than {MAX_PIECES}"
    elif pieces.unigram:
        size = sum(len(text.encode()) for text in pieces.texts)
        if size > MAX_UNIGRAM:
            excess = f"{size} bytes of text in a unigram vocabulary, more than {MAX_UNIGRAM}"
    else:
        lengths = [len(t) for t, kind in zip(pieces.texts, pieces.types, strict=True) if kind not in _NEVER_MERGED]
        work = sum(length * length for length in lengths)
        if work > MAX_WORK:
            excess = f"tokens of up to {max(lengths)} characters, whose squares add up to {work}, more than {MAX_WORK}"
    if excess:
        raise TokenizerError(f"{where}: {excess}", hint="no real vocabulary is so large: fetch or convert it again")


def _build(pieces: Pieces) -> tokenizers.Tokenizer:
    unknown = next((i for i, kind in enumerate(pieces.types) if kind == UNKNOWN), None)
    has_bytes = BYTE in pieces.types
    model: models.Model
    if pieces.unigram:
        vocabulary = [(text, float(score)) for text, score in zip(pieces.texts, pieces.scores, strict=True)]
        model = models.Unigram(vocabulary, unk_id=unknown, byte_fallback=has_bytes)
    else:
        model = models.BPE(
            {text: i for i, text in enumerate(pieces.texts)},
            merges(pieces.texts, pieces.scores, pieces.types),
            unk_token=None if unknown is None else pieces.texts[unknown],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = _normalizer(pieces)
    if pieces.space_prefix and pieces.prefix_once:  # a normalizer cannot tell where in the text it is
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            *([decoders.ByteFallback()] if has_bytes else []),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if pieces.space_prefix else []),
        ]
    )
    special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=special[kind])
            for text, kind in zip(pieces.texts, pieces.types, strict=True)
            if kind in special and text
        ]
    )
    return backend


def _normalizer(pieces: Pieces) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if pieces.space_prefix and not pieces.prefix_once:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _parse(data: bytes) -> Pieces:
    # ModelProto: 1 pieces (1 text, 2 score, 3 type); 2 trainer (3 algorithm);
    # 3 normalizer (2 table, 3 prefix, 4 squeeze)
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    algorithm, normalizer = 1, dict[int, int | bytes]()
    for number, value in _fields(data):
        if number not in {1, 2, 3}:
            continue
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is not a message")
        message = {key: part for key, part in _fields(value) if key <= 4}
        if number == 1:
            if len(texts) == MAX_PIECES:
                raise ValueError(f"more than {MAX_PIECES} pieces")
            texts.append(_bytes(message.get(1, b"")).decode("utf-8"))
            scores.append(struct.unpack("<f", _bytes(message.get(2, bytes(4))))[0])
            types.append(_number(message.get(3, NORMAL)))
        elif number == 2:
            algorithm = _number(message.get(3, 1))
        else:
            normalizer = message
    if not texts:
        raise ValueError("no vocabulary")
    if algorithm not in {1, 2}:
        raise ValueError(f"algorithm {algorithm} is neither unigram (1) nor BPE (2)")
    return Pieces(
        texts,
        scores,
        types,
        unigram=algorithm == 1,
        space_prefix=bool(_number(normalizer.get(3, 1))),
        squeeze=bool(_number(normalizer.get(4, 1))),
        charsmap=_bytes(normalizer.get(2, b"")),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of a protobuf message: an integer, or bytes (4, 8, or as many as are announced)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in {1, 5}:
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if size > len(data) - position:
            raise ValueError(f"{size} bytes announced at byte {position} of {len(data)}")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number without end at byte {position}")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value
