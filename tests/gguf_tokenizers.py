"""Tokenizers that split text as those of each family do, with a tiny vocabulary."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tiny_llama import make_tokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def split_by(tokenizer: Any, *, normalizer: Any = None, ignore_merges: bool = False) -> Tokenizer:
    """The tiny tokenizer with another rule for splitting text."""
    made = make_tokenizer(300)
    data = json.loads(made.to_str())
    data["pre_tokenizer"] = json.loads(tokenizer.__getstate__())
    data["normalizer"] = None if normalizer is None else json.loads(normalizer.__getstate__())
    data["model"]["ignore_merges"] = ignore_merges
    return Tokenizer.from_str(json.dumps(data))


def split(pattern: str) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), last])


def gemma_tokenizer() -> Tokenizer:
    """As Gemma's: spaces become their own sign, what is not in the vocabulary becomes bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    texts = [
        *special,
        *(f"<0x{i:02X}>" for i in range(256)),
        *"\u2581helo12",
        "he",
        "ll",
        "hell",
        "hello",
        "\u2581hello",
    ]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello")]
    vocabulary = {text: number for number, text in enumerate(texts)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(special)
    return made


TOKENIZERS = {
    "mpt": lambda: split_by(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC()),
    "bloom": lambda: split_by(split(BLOOM)),
    "dbrx": lambda: split_by(split(CL100K)),
    "llama-bpe": lambda: split_by(split(CL100K), ignore_merges=True),
    "qwen2": lambda: split_by(split(CL100K.replace("{1,3}", "")), normalizer=normalizers.NFC()),
}
"""Name in a GGUF file -> the tokenizer of GPT-NeoX, BLOOM, Phi-4, LLaMA 3 and Qwen, with a tiny vocabulary."""
