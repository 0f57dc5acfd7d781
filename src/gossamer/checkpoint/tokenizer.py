"""Text to token ids and back, over the `tokenizers` library. Knows no model and no file format but tokenizer.json.

Where a folder has no tokenizer.json it is built: from a SentencePiece `tokenizer.model`, read here with the tokens that
other files add to it, or from older vocabulary files, by transformers. No code from the folder is run. Chat templates
run in a process of their own (`chat_template.py`).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import ChatTemplateError, TokenizerError, UnsafeCheckpoint
from . import chat_template as templates
from .atomic import write_file
from .files import has, inside, read_json, read_limited, read_text

MAX_TOKENIZER = 256 << 20
MAX_TEMPLATE = 1 << 20
MAX_PENDING = 16
"""Tokens that a stream holds back for an unfinished character; one takes 4 at most, the rest is not text."""
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
)
"""Special tokens that end an answer, whatever the config calls the end."""
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_DROPPED = {"auto_map", "custom_pipelines", "chat_template", "tokenizer_file", "name_or_path", "processor_class"}


@dataclass(frozen=True)
class SpecialTokens:
    """What tokens mean to the model: role (`bos`, `eos`, `pad`, `unk`) -> text, and every id that ends an answer."""

    roles: Mapping[str, str] = field(default_factory=dict)
    eos_ids: frozenset[int] = frozenset()


class Tokenizer:
    """A model's tokenizer. Raises TokenizerError, ChatTemplateError."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: SpecialTokens,
        *,
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
        model_vocab_size: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._special = backend, special
        self._config = {key: value for key, value in (config or {}).items() if key not in _DROPPED}
        self._limit = model_vocab_size
        self.chat_template = chat_template
        self._special_ids = frozenset(
            number for number, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones counted; a model's embedding may have more rows."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_id(self) -> int | None:
        return self._role_id("bos")

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        return self._special.eos_ids

    @property
    def pad_id(self) -> int | None:
        return self._role_id("pad")

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not text."""
        return self._special_ids

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return str(self._backend.to_str())

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text in the vocabulary, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token(self, token_id: int) -> str | None:
        """The text in the vocabulary of a token, or None; byte-level tokens are in disguise."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model wants around a text, such as a start token."""
        if not isinstance(text, str):
            raise TokenizerError(f"text to encode is a {type(text).__name__}")
        ids: list[int] = _guarded(lambda: self._backend.encode(text, add_special_tokens=special).ids, "cannot encode")
        if self._limit is not None and ids and max(ids) >= self._limit:
            raise TokenizerError(f"token {max(ids)} is beyond the model's vocabulary of {self._limit}")
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of these tokens; ids that no token has are nothing."""
        ids = list(ids)
        wrong = next((i for i in ids if not 0 <= i < 1 << 32), None)
        if wrong is not None:
            raise TokenizerError(f"{wrong} is not a token id")
        text: str = _guarded(lambda: self._backend.decode(ids, skip_special_tokens=skip_special), "cannot decode")
        return text

    def stream(self, skip_special: bool = True) -> TokenStream:
        """A decoder that is fed one token at a time."""
        return TokenStream(self, skip_special)

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of a conversation as the chat template lays it out. Raises ChatTemplateError."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), special=False)

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text; `variables` (`tools`, ...) reach the template. Raises ChatTemplateError."""
        if self.chat_template is None:
            raise ChatTemplateError("this model has no chat template", hint="give it a plain prompt instead")
        known = {f"{role}_token": text for role, text in self._special.roles.items()}
        return templates.render(
            self.chat_template,
            {
                "tools": None,
                "documents": None,
                **known,
                **variables,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            },
        )

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and its companions, as transformers reads them."""
        roles = {f"{role}_token": text for role, text in self._special.roles.items()}
        config = {
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._config,
            **{key: text for key, text in roles.items() if key not in self._config},
        }
        write_file(folder / "tokenizer.json", self._backend.to_str(pretty=True).encode())
        write_file(folder / "tokenizer_config.json", _json(config))
        write_file(folder / "special_tokens_map.json", _json(roles))
        if self.chat_template is not None:
            write_file(folder / "chat_template.jinja", self.chat_template.encode())

    def _role_id(self, role: str) -> int | None:
        text = self._special.roles.get(role)
        return None if text is None else self.token_id(text)


class TokenStream:
    """Decodes token by token: what `push` returns, joined, with `flush` at the end, is the decoded whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._context: list[int] = []  # tokens of the last text given out: a space or a byte may depend on them
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        self._pending.append(token_id)
        text = self._text()
        if text.endswith("\ufffd") and len(self._pending) < MAX_PENDING:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        return self._emit(self._text())

    def _emit(self, text: str) -> str:
        if text:
            self._context, self._pending = self._pending, []
        return text

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip) if ids else ""


def tokenizer_from_folder(folder: Path, hf_config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises TokenizerError, UnsafeCheckpoint, CorruptCheckpoint."""
    config = _optional_json(folder, "tokenizer_config.json")
    if config.get("auto_map") and not any(has(folder, name) for name in ("tokenizer.json", "tokenizer.model")):
        raise UnsafeCheckpoint(f"{folder}: its tokenizer is Python code (auto_map), which is never run")
    older = _optional_json(folder, "special_tokens_map.json")
    backend = _backend(folder, config, older)
    roles = _roles(folder, config, older, hf_config, backend)
    generation = _optional_json(folder, "generation_config.json")
    ends = [roles.get("eos"), *_ids(generation.get("eos_token_id")), *_ids(hf_config.get("eos_token_id"))]
    rows = hf_config.get("vocab_size")
    vocab_size = rows if isinstance(rows, int) else None
    if has(folder, "tokenizer.model") and not has(folder, "tokenizer.json"):
        backend = _with_bos(backend, config, roles)  # tokenizer.json says it itself, whatever the flags
    return Tokenizer(
        backend,
        SpecialTokens(roles, end_ids(backend, ends, vocab_size)),
        chat_template=_chat_template(folder, config),
        config=_portable(config, has(folder, "tokenizer.json")),
        model_vocab_size=vocab_size,
    )


def end_ids(
    backend: tokenizers.Tokenizer, ends: Iterable[str | int | None], vocab_size: int | None = None
) -> frozenset[int]:
    """Ids of these tokens (by text or id) and of every special token that ends a turn, as far as the model has them.

    An id from `vocab_size` on is one that the model cannot give and whose logit does not exist.
    """
    special = {token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    ids = {backend.token_to_id(end) if isinstance(end, str) else end for end in ends}
    ids |= {special.get(name) for name in END_OF_TURN}
    return frozenset(
        number for number in ids if number is not None and (vocab_size is None or 0 <= number < vocab_size)
    )


def with_template(
    backend: tokenizers.Tokenizer, roles: Mapping[str, str], *, bos: bool, eos: bool
) -> tokenizers.Tokenizer:
    """Make `encode` put the start token before a text and the end token after it, or neither. Raises TokenizerError."""
    before = [roles["bos"]] if bos and "bos" in roles else []
    after = [roles["eos"]] if eos and "eos" in roles else []
    if before or after:
        _guarded(
            lambda: setattr(backend, "post_processor", _around(backend, before, after)),
            f"cannot put {before} before a text and {after} after it",
        )
    return backend


def _around(
    backend: tokenizers.Tokenizer, before: list[str], after: list[str]
) -> tokenizers.processors.TemplateProcessing:
    """What puts these tokens around a text."""

    def part(name: str, kind: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": kind}}
        first, last = ([{"SpecialToken": {"id": token, "type_id": kind}} for token in side] for side in (before, after))
        return [*first, text, *last]

    # The constructor's grammar gives `$` and `:` in a token a meaning, and other ids than the tokens' own texts would
    # mislead readers of tokenizer.json (llama.cpp's converter). The form that tokenizer.json has knows no grammar.
    template = tokenizers.processors.TemplateProcessing()
    special = {t: {"id": t, "ids": [backend.token_to_id(t)], "tokens": [t]} for t in {*before, *after}}
    said = {"single": part("A", 0), "pair": part("A", 0) + part("B", 1), "special_tokens": special}
    template.__setstate__(json.dumps({"type": "TemplateProcessing", **said}).encode())
    return template


def guarded_backend(build: Callable[[], tokenizers.Tokenizer], where: str) -> tokenizers.Tokenizer:
    """A tokenizer from data that may be damaged. Raises TokenizerError."""
    backend: tokenizers.Tokenizer = _guarded(build, f"{where}: not a tokenizer")
    return backend


def _backend(folder: Path, config: Mapping[str, Any], older: Mapping[str, Any]) -> tokenizers.Tokenizer:
    if has(folder, "tokenizer.json"):
        path = inside(folder, "tokenizer.json")
        text = read_text(path, MAX_TOKENIZER)
        return guarded_backend(lambda: tokenizers.Tokenizer.from_str(text), str(path))
    if has(folder, "tokenizer.model"):
        from .sentencepiece import MAX_MODEL, backend_from_model

        path = inside(folder, "tokenizer.model")
        backend = backend_from_model(read_limited(path, MAX_MODEL), path, prefix_once=config.get("legacy") is False)
        return _with_added_tokens(backend, folder, config, older)
    if has(folder, "vocab.json"):
        return _converted(folder)
    raise TokenizerError(
        f"{folder}: no tokenizer", hint="expected tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
    )


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """Older vocabulary files, by way of transformers."""
    from transformers import AutoTokenizer

    for name in ("vocab.json", "merges.txt"):
        if has(folder, name):
            read_limited(inside(folder, name), MAX_TOKENIZER)
    load = functools.partial(AutoTokenizer.from_pretrained, folder, trust_remote_code=False, local_files_only=True)
    converted = _guarded(load, f"{folder}: transformers cannot load the tokenizer")
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TokenizerError(f"{folder}: a tokenizer that has no tokenizer.json form")
    return backend


def _with_added_tokens(
    backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any], older: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """The tokens that were added to a SentencePiece model after it was made: its file does not have them."""
    added = sorted(_added_tokens(folder, config, older).items())
    _guarded(lambda: backend.add_tokens([_added(row) for _, row in added]), f"{folder}: cannot add tokens")
    for number, row in added:
        found = backend.token_to_id(row["content"])
        if found != number:
            raise TokenizerError(
                f"{folder}: the added token {row['content'][:80]!r} has id {number}, but its place is {found}",
                hint="ids of added tokens go on from the last one of tokenizer.model, without a gap",
            )
    return backend


def _added_tokens(folder: Path, config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Id -> what is said of that token; tokenizer_config.json says more than added_tokens.json, and wins."""
    named = _special_texts(config) | _special_texts(older)
    added: dict[int, dict[str, Any]] = {}
    for text, number in _optional_json(folder, "added_tokens.json").items():
        if not _ids([number]):
            raise TokenizerError(f"{folder}/added_tokens.json: {text[:80]!r} has id {str(number)[:80]!r}")
        added[number] = {"content": text, "special": text in named}
    decoder = config.get("added_tokens_decoder") or {}
    where = f"{folder}/tokenizer_config.json: added_tokens_decoder"
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{where} is a {type(decoder).__name__}, not an object")
    for key, row in decoder.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise TokenizerError(f"{where}: {key[:80]!r} is not a token id")
        if not (isinstance(row, dict) and isinstance(row.get("content"), str)):
            raise TokenizerError(f"{where}: {key} is {str(row)[:80]!r}, not a token")
        added[int(key)] = {**row, "special": row.get("special") is True or row["content"] in named}
    return added


def _added(row: Mapping[str, Any]) -> tokenizers.AddedToken:
    # A normalized token would be met only at the start of a text: there alone the normalizer puts its mark of a space.
    flags = {name: row.get(name) is True for name in ("special", "lstrip", "rstrip", "single_word")}
    return tokenizers.AddedToken(row["content"], normalized=False, **flags)


def _special_texts(config: Mapping[str, Any]) -> set[str]:
    """The tokens that a config calls special, by role or in a list."""
    lists = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    rows = itertools.chain((config.get(f"{role}_token") for role in ROLES), *(x for x in lists if isinstance(x, list)))
    return {text for text in map(_content, rows) if isinstance(text, str)}


def _roles(
    folder: Path,
    config: Mapping[str, Any],
    older: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    backend: tokenizers.Tokenizer,
) -> dict[str, str]:
    """Role -> token, from the tokenizer's config, the older map, or the ids in config.json."""
    roles: dict[str, str] = {}
    for role in ROLES:
        said = config.get(f"{role}_token", older.get(f"{role}_token"))
        if said is None and not config:
            ids = _ids(hf_config.get(f"{role}_token_id"))
            said = backend.id_to_token(ids[0]) if ids else None
        text = _content(said)
        if text is None:
            continue
        if not isinstance(text, str):
            raise TokenizerError(f"{folder}: {role}_token is {str(said)[:80]!r}, not a token")
        if backend.token_to_id(text) is not None:
            roles[role] = text
    return roles


def _with_bos(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], roles: Mapping[str, str]
) -> tokenizers.Tokenizer:
    return with_template(
        backend, roles, bos=bool(config.get("add_bos_token", True)), eos=bool(config.get("add_eos_token", False))
    )


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if has(folder, "chat_template.jinja"):
        return read_text(inside(folder, "chat_template.jinja"), MAX_TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [(row.get("name"), row.get("template")) for row in template if isinstance(row, dict)]
        template = dict(row for row in named if all(isinstance(part, str) for part in row)).get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{folder}: chat_template is a {type(template).__name__}, not text")
    return template


def _portable(config: Mapping[str, Any], has_json: bool) -> dict[str, Any]:
    """The tokenizer's config for a folder that has tokenizer.json and no code."""
    if config.get("auto_map") or not has_json:
        return {key: value for key, value in config.items() if key != "tokenizer_class"}
    return dict(config)


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(inside(folder, name)) if has(folder, name) else {}


def _content(said: Any) -> Any:
    """The text of a token, which configs give plainly or with its flags."""
    return said.get("content") if isinstance(said, dict) else said


def _ids(value: Any) -> Sequence[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 32]


def _guarded(action: Callable[[], Any], what: str) -> Any:
    try:
        return action()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in the Rust library is no Exception
        raise TokenizerError(f"{what}: {str(error)[:300]}") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
