"""The tokenizer that a GGUF file carries as lists of tokens, merges and scores, rebuilt as a `tokenizers` one.

GGUF names the rule by which text is split before merging (`tokenizer.ggml.pre`) and does not contain it. A rule that is
not known here is an error: another one would give other tokens without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import CorruptCheckpoint, TokenizerError, did_you_mean
from .gguf_header import Metadata
from .sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces, backend_from_pieces
from .tokenizer import SpecialTokens, Tokenizer, end_ids, guarded_backend, with_template

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def _byte_level() -> pre_tokenizers.PreTokenizer:
    """GPT-2's own rule."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    """Each digit by itself, then GPT-2's rule."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _default() -> pre_tokenizers.PreTokenizer:
    """Punctuation and runs of three digits apart, then GPT-2's rule: what llama.cpp calls `default`."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{P}\$\+<=>\^~\|]+"), "isolated"),
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"), "isolated"
            ),
            pre_tokenizers.Split(Regex(r"\p{N}+"), "isolated"),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _default,
    "gpt-2": _byte_level,
    "mpt": _byte_level,
    "olmo": _byte_level,
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "command-r": _digits,
    "llama-bpe": lambda: _pattern(_LLAMA3),
    "llama3": lambda: _pattern(_LLAMA3),
    "llama-v3": lambda: _pattern(_LLAMA3),
    "qwen2": lambda: _pattern(_QWEN2),
    "stablelm2": lambda: _pattern(_QWEN2),
    "dbrx": lambda: _pattern(_LLAMA3),
    "bloom": lambda: _pattern(_BLOOM),
}
"""`tokenizer.ggml.pre` -> how text is split before merging."""
COMPOSED = {"qwen2", "mpt", "olmo"}
"""Names of tokenizers that bring text to Unicode's composed form (NFC) first; mpt and olmo are GPT-NeoX's."""
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3"}
"""Names of tokenizers that take a word of the vocabulary as it is, whatever the merges say."""


def tokenizer_from_gguf(metadata: Metadata, vocab_size: int, path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises TokenizerError, CorruptCheckpoint."""
    tokens = metadata.texts("tokenizer.ggml.tokens")
    kind = metadata.text("tokenizer.ggml.model")
    if not tokens or kind is None:
        raise TokenizerError(f"{path}: has no tokenizer (tokenizer.ggml.model, tokenizer.ggml.tokens)")
    if len(tokens) > vocab_size:
        raise CorruptCheckpoint(f"{path}: {len(tokens)} tokens, but an embedding of {vocab_size} rows")
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
    if kind not in builders:
        raise TokenizerError(f"{path}: tokenizer {kind!r} is not supported", hint="known: " + ", ".join(builders))
    # A token without text can never be met, but its id must stay taken.
    named = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    types = _types(metadata, len(tokens), path)
    backend = builders[kind](metadata, named, types, path)
    roles = _roles(metadata, named)
    pre = metadata.text("tokenizer.ggml.pre")
    add_bos = metadata.flag("tokenizer.ggml.add_bos_token", kind == "llama" or pre in WHOLE_WORDS)
    with_template(backend, roles, bos=add_bos, eos=metadata.flag("tokenizer.ggml.add_eos_token", False))
    ends = [
        roles.get("eos"),
        *(_token(metadata, f"tokenizer.ggml.{name}_token_id", named) for name in ("eot", "eom")),
    ]
    return Tokenizer(
        backend,
        SpecialTokens(roles, end_ids(backend, ends, vocab_size)),
        chat_template=metadata.text("tokenizer.chat_template"),
        config={"add_bos_token": add_bos and "bos" in roles},
        model_vocab_size=vocab_size,
    )


def _byte_level_bpe(metadata: Metadata, tokens: list[str], types: list[int], path: Path) -> tokenizers.Tokenizer:
    pre = metadata.text("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{path}: tokenizer.ggml.pre is {pre!r}, a rule for splitting text that is not known",
            hint=did_you_mean(str(pre), PRE_TOKENIZERS) or "known: " + ", ".join(PRE_TOKENIZERS),
        )
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(f"{path}: two tokens of the vocabulary have the same text")
    merges = [_merge(text, path) for text in metadata.texts("tokenizer.ggml.merges") or []]

    def build() -> tokenizers.Tokenizer:
        vocabulary = {text: number for number, text in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS))
        backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
        backend.decoder = decoders.ByteLevel()
        if pre in COMPOSED:
            backend.normalizer = normalizers.NFC()
        special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
        backend.add_tokens(
            [
                AddedToken(text, normalized=False, special=special[kind])
                for text, kind in zip(tokens, types, strict=True)
                if kind in special
            ]
        )
        return backend

    return guarded_backend(build, str(path))


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[int], path: Path) -> tokenizers.Tokenizer:
    scores = metadata.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CorruptCheckpoint(f"{path}: tokenizer.ggml.scores does not give one number for each token")
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    squeeze = metadata.flag("tokenizer.ggml.remove_extra_whitespaces", False)
    return backend_from_pieces(Pieces(tokens, scores.tolist(), types, space_prefix=prefix, squeeze=squeeze), str(path))


def _types(metadata: Metadata, count: int, path: Path) -> list[int]:
    types = metadata.numbers("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * count
    if len(types) != count or types.dtype.kind not in "iu":
        raise CorruptCheckpoint(f"{path}: tokenizer.ggml.token_type does not give one integer for each token")
    listed: list[int] = types.tolist()
    return listed


def _roles(metadata: Metadata, tokens: list[str]) -> dict[str, str]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {role: _token(metadata, f"tokenizer.ggml.{key}_token_id", tokens) for role, key in keys.items()}
    return {role: text for role, text in found.items() if text is not None}


def _token(metadata: Metadata, key: str, tokens: list[str]) -> str | None:
    number = metadata.integer(key)
    # Converters write -1 (4294967295) for a token that is not there; llama.cpp too passes over such ids.
    return None if number is None or not 0 <= number < len(tokens) else tokens[number]


def _merge(text: str, path: Path) -> tuple[str, str]:
    cut = text.find(" ", 1)  # a token may itself begin with a space
    if cut < 0:
        raise CorruptCheckpoint(f"{path}: tokenizer.ggml.merges has {text!r}, not a pair")
    return text[:cut], text[cut + 1 :]
