"""A tokenizer as the metadata of a GGUF file: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

What is written must give the same tokens when it is read, which `check` tries on texts of many kinds.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Tokenizer
from ..checkpoint.gguf_header import Metadata
from ..checkpoint.gguf_tokenizer import COMPOSED, PRE_TOKENIZERS, WHOLE_WORDS, tokenizer_from_gguf
from ..checkpoint.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from ..errors import ExportError, GossamerError

CARRIED = "gossamer convert carries the tokenizer over as it is, in a folder that transformers loads"
PROBES = (
    "Hello, world!",
    "  two spaces, a\ttab\nand\n\nlines\r\n",
    "1 22 333 4444 1,234.56 2026-11-29",
    "I'm you'll THEY'RE don't",
    "Ærøskøbing naïve Привет 你好 こんにちは مرحبا 🙂🙃",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }",
    "\u00a0\u2003\u200b",
    "",
    " ",
)


def tokenizer_metadata(tokenizer: Tokenizer, hf_config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """`tokenizer.*` keys and their values. Raises ExportError for a tokenizer that GGUF has no words for."""
    data = json.loads(tokenizer.to_json())
    model = data["model"]
    if model["type"] != "BPE":
        raise ExportError(f"gguf: a tokenizer of type {model['type']} is not written, BPE is", hint=CARRIED)
    byte_level = "ByteLevel" in json.dumps([data["pre_tokenizer"], data["decoder"]])
    tokens = _tokens(data, vocab_size)
    types = _types(data, tokens, byte_level, vocab_size)
    texts = [tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2" if byte_level else "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        **_ids(tokenizer, hf_config, model),
        **_around(tokenizer),
    }
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if byte_level:
        values |= {"tokenizer.ggml.pre": _pre(data), **({"tokenizer.ggml.merges": merges} if merges else {})}
    else:
        values |= {"tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": _scores(model, texts)}
        prefixed = _prefix(data["normalizer"]) or _prefix(data["pre_tokenizer"])
        values["tokenizer.ggml.add_space_prefix"] = bool(prefixed)
    if tokenizer.chat_template is not None:
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return values


def check(tokenizer: Tokenizer, metadata: Metadata, vocab_size: int, path: Path) -> None:
    """Raises ExportError unless the written tokenizer splits every probe as ours does."""
    try:
        written = tokenizer_from_gguf(metadata, vocab_size, path)
    except GossamerError as error:
        raise ExportError(f"gguf: the tokenizer cannot be read back: {error.message}", hint=CARRIED) from error
    special = [tokenizer.token(i) or "" for i in sorted(tokenizer.special_ids)]
    for probe in (*PROBES, "".join(special[:8]), *(f"a {text} b" for text in special[:8])):
        ours, theirs = tokenizer.encode(probe), written.encode(probe)
        if ours != theirs:
            raise ExportError(
                f"gguf: {probe!r} is {ours[:12]} to our tokenizer and {theirs[:12]} to the one that GGUF can describe",
                hint=CARRIED,
            )
    if written.chat_template != tokenizer.chat_template:
        raise ExportError(
            f"gguf: the chat template {reprlib.repr(tokenizer.chat_template)} is read back as "
            f"{reprlib.repr(written.chat_template)}",
            hint=CARRIED,
        )


def _tokens(data: Mapping[str, Any], vocab_size: int) -> dict[int, str]:
    tokens = {number: text for text, number in data["model"]["vocab"].items()}
    tokens |= {added["id"]: added["content"] for added in data["added_tokens"]}
    last = max(tokens, default=-1)
    if last >= vocab_size:
        raise ExportError(
            f"gguf: the tokenizer has token {last} ({tokens[last][:40]!r}), and the model only the tokens below "
            f"{vocab_size}",
            hint=f"take it out of the tokenizer; or {CARRIED}",
        )
    return tokens


def _types(data: Mapping[str, Any], tokens: Mapping[int, str], byte_level: bool, vocab_size: int) -> list[int]:
    types = [NORMAL if i in tokens else UNUSED for i in range(vocab_size)]
    if not byte_level:
        for number, text in tokens.items():
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                types[number] = BYTE
    for added in data["added_tokens"]:
        unknown = not byte_level and added["content"] == data["model"].get("unk_token")
        types[added["id"]] = UNKNOWN if unknown else CONTROL if added["special"] else USER_DEFINED
    return types


def _ids(tokenizer: Tokenizer, hf_config: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, int]:
    """Which tokens begin and end a text, as far as they are known."""
    said = hf_config.get("eos_token_id")
    ends = said if isinstance(said, list) else [said]
    eos = next((i for i in ends if i in tokenizer.eos_ids), next(iter(sorted(tokenizer.eos_ids)), None))
    unknown = model.get("unk_token")
    found = {
        "bos": tokenizer.bos_id,
        "eos": eos,
        "padding": tokenizer.pad_id,
        "unknown": None if unknown is None else tokenizer.token_id(unknown),
    }
    return {f"tokenizer.ggml.{role}_token_id": number for role, number in found.items() if number is not None}


def _around(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether a start token goes before a text and an end token after it."""
    with_special, bare = tokenizer.encode("a"), tokenizer.encode("a", special=False)
    first = 1 if with_special[:1] == [tokenizer.bos_id] and bare[:1] != [tokenizer.bos_id] else 0
    after = with_special[first + len(bare) :]
    if with_special[first:] != bare + after or not set(after) <= tokenizer.eos_ids or len(after) > 1:
        raise ExportError(
            f"gguf: the tokenizer makes {bare} of 'a', and {with_special} with what it puts around a text: "
            "GGUF can say one start token and one end token",
            hint=CARRIED,
        )
    return {"tokenizer.ggml.add_bos_token": bool(first), "tokenizer.ggml.add_eos_token": bool(after)}


def _pre(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before merging."""
    wanted, whole_words = _comparable(data["pre_tokenizer"]), data["model"].get("ignore_merges", False)
    normalizer = None if data["normalizer"] is None else data["normalizer"]["type"]
    for name, build in PRE_TOKENIZERS.items():
        around = (normalizer, whole_words) == ("NFC" if name in COMPOSED else None, name in WHOLE_WORDS)
        if around and _comparable(_state(build())) == wanted:
            return name
    raise ExportError(
        f"gguf: llama.cpp has no name for how this tokenizer splits text: {json.dumps(data['pre_tokenizer'])[:200]}",
        hint=CARRIED,
    )


def _state(pre_tokenizer: Any) -> Any:
    return json.loads(pre_tokenizer.__getstate__())


def _comparable(value: Any) -> Any:
    """A pre-tokenizer's description without what changes no split: single sequences, offsets, an inverted nothing."""
    if isinstance(value, dict):
        if value.get("type") == "Sequence" and len(value["pretokenizers"]) == 1:
            return _comparable(value["pretokenizers"][0])
        return {key: _comparable(v) for key, v in value.items() if key != "trim_offsets"}
    return [_comparable(v) for v in value] if isinstance(value, list) else value


def _prefix(part: Any) -> Any:
    """The steps of a normalizer or pre-tokenizer that put a space before a text."""
    if not isinstance(part, dict):
        return None
    steps = part.get("normalizers") or part.get("pretokenizers") or [part]
    return [s for s in steps if s["type"] == "Prepend" or (s["type"] == "Metaspace" and s["prepend_scheme"] != "never")]


def _scores(model: Mapping[str, Any], texts: list[str]) -> list[float]:
    """Scores that make SentencePiece merge in the order of the merges: minus the rank of each token's first merge."""
    ranks: dict[str, int] = {}
    for pair in model["merges"]:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, len(ranks))
    return [float(-ranks[text]) if text in ranks else float(-len(ranks) - 1) for text in texts]
