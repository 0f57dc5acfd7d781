"""Grammars on the way from text to a mask over the vocabulary, with llguidance. Knows no request and no model.

A grammar may be anything that a client sends. What it costs is limited three times: by its length (`params`), by the
library's own limits, which every step has too, and, as some compile for hours nonetheless, by a trial in a process of
its own (`_grammar_trial.py` is the other side).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.tokenizer import Tokenizer
from ..errors import EngineError, GossamerError
from .params import Grammar

MAX_COMPILED = 32
"""Compiled grammars that an engine keeps, the last used; each holds up to 40 MB, most less than one."""
LIMITS = {"max_lexer_states": 20_000, "verbose_errors": False}
"""What differs from the library's defaults: states take 1 to 2 kB each; long errors would tell what was generated."""
TRIAL_SECONDS = 15.0
"""Until a trial is given up. It has far less of the processor, but a busy machine may start it late."""
ANYTHING = {"type": "object"}
JSON = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}", "json_allow_general_unicode_escapes": True}
"""What a schema may override in `x-guidance`. White space without a bound would let a small model go on for ever."""
_MEANINGFUL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)

_Library: TypeAlias = Any
_T = TypeVar("_T")


class Grammars:
    """Compiles grammars for one engine, and keeps those that were used last. One thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        """The model's; rows of its embedding that no token has are never allowed."""
        self.num_tokens = tokenizer.vocab_size
        self.eos_ids = frozenset(i for i in tokenizer.eos_ids if i < vocab_size)
        self._compiled: OrderedDict[Grammar, _Library] = OrderedDict()

    def __len__(self) -> int:
        return len(self._compiled)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of an answer. Raises EngineError for a grammar that is bad or costs too much.

        A new grammar takes 0.1 s, at worst some seconds; `check` does most of that in advance, in any thread.
        """
        return Matcher(self, grammar, self.start(grammar))

    def forget(self, grammar: Grammar) -> None:
        """Compile it anew when it is next asked for."""
        self._compiled.pop(grammar, None)

    def start(self, grammar: Grammar) -> _Library:
        """The library's matcher at the start. Raises EngineError."""
        if grammar not in self._compiled:
            check(grammar)
            self._compiled[grammar] = self._compile(grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].deep_copy()

    def _compile(self, grammar: Grammar) -> _Library:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**LIMITS)
        made = _attempt(
            lambda: LLMatcher(self._tokens, _source(grammar), log_level=0, limits=limits), _failure(grammar)
        )
        first = made.deep_copy()
        first.compute_bitmask()  # a grammar that no text fits shows only here
        if first.is_error():
            raise _refused(grammar, first.get_error())
        return made

    @functools.cached_property
    def _tokens(self) -> _Library:
        """The vocabulary as the library wants it; a fifth of a second for 50,000 tokens."""
        from llguidance import LLTokenizer, TokenizerWrapper

        if not self.eos_ids:
            raise EngineError("no grammar without an end token, and this tokenizer has none")
        size, ends = max(self.vocab_size, self.num_tokens), sorted(self.eos_ids)
        with contextlib.suppress(ValueError):  # a decoder that it does not know
            return LLTokenizer(self._tokenizer.to_json(), n_vocab=size, eos_token=ends)
        wrapper = TokenizerWrapper(_Plain(self._tokenizer))
        return _attempt(lambda: LLTokenizer(wrapper, eos_token=ends), "no grammar works with this tokenizer")


class Matcher:
    """How far an answer has come in its grammar. Raises EngineError when that becomes too costly to follow."""

    def __init__(self, grammars: Grammars, grammar: Grammar, state: _Library, tokens: Sequence[int] = ()) -> None:
        self._grammars, self._grammar, self._state = grammars, grammar, state
        self._tokens = list(tokens)
        self._ended = False

    def copy(self) -> Matcher:
        """Another one in the same state, for a look ahead; takes microseconds."""
        twin = Matcher(self._grammars, self._grammar, self._state.deep_copy(), self._tokens)
        twin._ended = self._ended
        return twin

    @property
    def finished(self) -> bool:
        """True if something was written and nothing but an end token may come next."""
        return self._ended or bool(self._state.is_stopped())

    def mask(self, logits: Tensor) -> None:
        """Set those of logits float32 [vocab_size] to -inf, in place, whose token may not come next."""
        if logits.dtype != torch.float32 or logits.shape != (self._grammars.vocab_size,):
            raise EngineError(
                f"logits are {logits.dtype} {list(logits.shape)}, expected float32 [{self._grammars.vocab_size}]"
            )
        bits = np.frombuffer(self._try(lambda state: state.compute_bitmask()), np.uint8)
        # Bits past the last token are missing in some cases, and then 0: not allowed.
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(np.bool_)
        np.copyto(logits.numpy(), -np.inf, where=~allowed)

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may follow one another; none is looked at past an end token. Changes nothing."""
        end = next((at for at, token in enumerate(tokens) if token in self._grammars.eos_ids), len(tokens))
        if self.finished:
            return int(end == 0 < len(tokens))
        size = min(self._grammars.vocab_size, self._grammars.num_tokens)
        known = next((at for at, token in enumerate(tokens[: end + 1]) if not 0 <= token < size), end + 1)
        asked = list(tokens[:known])
        return int(self._try(lambda state: state.validate_tokens(asked))) if asked else 0

    def accept(self, token: int) -> None:
        """Go on past a token. Raises EngineError, and stays where it is, if the token is not allowed."""
        if self.allowed([token]) == 0:
            self._try(lambda state: state.compute_bitmask())  # a lexer at its limit lets nothing pass: this tells
            if self.allowed([token]) == 0:
                raise EngineError(f"token {token} does not fit the {self._grammar.kind}")
        if token in self._grammars.eos_ids:
            self._ended = True
        else:
            self._try(lambda state: state.consume_token(token))
            self._tokens.append(token)

    def _try(self, action: Callable[[_Library], _T]) -> _T:
        """The result of an action on the state.

        All matchers of a grammar share its lexer, whose states are limited, so one may fail for what others met: a
        second attempt starts from a lexer that has only met this answer.
        """
        result = action(self._state)
        if self._state.is_error():
            self._grammars.forget(self._grammar)
            self._state = self._grammars.start(self._grammar)
            self._state.consume_tokens(self._tokens)
            result = action(self._state)
            if self._state.is_error():
                self._grammars.forget(self._grammar)
                raise EngineError(
                    f"the {self._grammar.kind} is too complex to follow: {_first_line(self._state.get_error())}"
                )
        return result


def check(grammar: Grammar) -> None:
    """Raise EngineError for a grammar that is bad, or costs too much to compile. Any thread may call it."""
    _source(grammar)
    if grammar.kind in ("json", "choice"):  # these cost what they are long
        return
    error = _trial(grammar)
    if error is not None:
        raise _refused(grammar, error)


@functools.lru_cache(maxsize=64)
def _trial(grammar: Grammar) -> str | None:
    """What is wrong with a grammar. Raises EngineError if the trial itself did not come about."""
    request = json.dumps({"grammar": _source(grammar), "limits": LIMITS}).encode()
    script = Path(__file__).with_name("_grammar_trial.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(script)], input=request, capture_output=True, timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"the {grammar.kind} was not compiled within {TRIAL_SECONDS:g} s") from None
    except OSError as error:
        raise EngineError(f"the process that compiles a {grammar.kind} does not start: {error}") from error
    if done.returncode < 0:
        return "it takes too much time or memory"
    if done.returncode > 0:
        raise EngineError(f"the process that compiles a {grammar.kind} failed: {_last_line(done.stderr)}")
    return json.loads(done.stdout)["error"] or None


def _source(grammar: Grammar) -> str:
    """The grammar in the library's language. Raises EngineError."""
    from llguidance import LLMatcher

    if grammar.kind in ("json", "json_schema"):
        schema = ANYTHING if grammar.kind == "json" else _parsed(grammar, dict)
        text = json.dumps(schema)
        return str(_attempt(lambda: LLMatcher.grammar_from_json_schema(text, defaults=JSON), _failure(grammar)))
    pattern = grammar.source if grammar.kind == "regex" else _alternatives(grammar)
    # The library puts slashes around it and escapes those inside, even if they are escaped.
    pattern = _ESCAPED.sub(lambda found: "/" if found[1] == "/" else found[0], pattern)
    return str(_attempt(lambda: LLMatcher.grammar_from_regex(pattern), _failure(grammar)))


def _alternatives(grammar: Grammar) -> str:
    """A regular expression for one of the texts in a JSON list."""
    choices = _parsed(grammar, list)
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise EngineError("choice needs a JSON list of texts, at least one")
    return "|".join(_MEANINGFUL.sub(r"\\\g<0>", choice) for choice in dict.fromkeys(choices))


def _parsed(grammar: Grammar, kind: type[_T]) -> _T:
    try:
        value = json.loads(grammar.source)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"the {grammar.kind} is no JSON: {str(error)[:300] or 'nested too deeply'}") from error
    if not isinstance(value, kind):
        raise EngineError(f"the {grammar.kind} is no JSON {'object' if kind is dict else 'list'}")
    return value


class _Plain:
    """A tokenizer without bytes, such as one over characters: a token is the text that it adds to another one's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.eos_ids)
        self.eos_token_id, self.bos_token_id = min(tokenizer.eos_ids), tokenizer.bos_id
        first = next((i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids), 0)
        before = len(tokenizer.decode([first]))
        texts = (tokenizer.decode([first, i])[before:] for i in range(tokenizer.vocab_size))
        self.tokens = [text.encode("utf-8", "replace") for text in texts]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)


def _attempt(action: Callable[[], _T], what: str) -> _T:
    try:
        return action()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, GossamerError):
        raise
    except BaseException as error:  # a panic in the Rust library is no Exception
        raise EngineError(f"{what}: {_first_line(str(error))}") from error


def _failure(grammar: Grammar) -> str:
    return f"the {grammar.kind} cannot be compiled"


def _refused(grammar: Grammar, error: str) -> EngineError:
    return EngineError(f"{_failure(grammar)}: {_first_line(error)}")


def _first_line(error: str) -> str:
    # An invalid regex is quoted first, and the reason comes in a line of its own.
    if error.startswith("NoExtension"):
        return "no text fits it"
    reason = re.search(r"^error: (.*)", error, re.MULTILINE)
    return (reason[1] if reason else error.strip().partition("\n")[0])[:300]


def _last_line(error: bytes) -> str:
    return error.decode(errors="replace").strip().rpartition("\n")[2][:300]
