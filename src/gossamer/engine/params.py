"""What a generation request may ask for, with the bounds of every field. Knows no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import EngineError, UnknownName

MAX_TOKENS = 1 << 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_GRAMMAR = 1 << 20
"""Characters of a JSON schema, a regular expression or all choices together."""
MAX_TOKEN = (1 << 31) - 1

GrammarKind: TypeAlias = Literal["json", "json_schema", "regex", "choice"]


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like. Raises EngineError for one that is no such thing; `structured` compiles it."""

    kind: GrammarKind
    """`json`: any JSON object; `json_schema`, `regex`: what `source` says; `choice`: one of its JSON list of texts."""
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json", "json_schema", "regex", "choice"):
            raise UnknownName("kind of grammar", str(self.kind), ("json", "json_schema", "regex", "choice"))
        if not isinstance(self.source, str) or len(self.source) > MAX_GRAMMAR:
            raise EngineError(f"the {self.kind} is no text of up to {MAX_GRAMMAR:,} characters")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises EngineError, naming the field and its bounds."""

    max_tokens: int = 256
    """Most tokens to generate; fewer if the model's context ends before."""
    temperature: float = 0.0
    """0 takes the likeliest token, 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach this sum (Holtzman et al., arXiv 1904.09751); 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest (Nguyen et al., arXiv 2407.01082)."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch; None takes a fresh one."""
    stop: tuple[str, ...] = ()
    """Texts at which generation ends; they are not part of the output."""
    ignore_eos: bool = False
    """Go on after an end token."""
    min_tokens: int = 0
    """No end token and no stop text before so many tokens."""
    n: int = 1
    """Completions of one prompt; each has a seed of its own, made from `seed`."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was generated."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a generated token for each time that it was."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer (Keskar et al., 1909.05858)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token id and what is added to its logit; may be given as a mapping."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end generation, besides the model's own."""
    logprobs: int | None = None
    """Tell the log-probability of each token and so many of the likeliest, in the model's own distribution."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    grammar: Grammar | None = None
    """What the answer must look like."""
    skip_special: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, 0, 1 << 24)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, (1 << 63) - 1)
        if not isinstance(self.ignore_eos, bool):
            raise EngineError(f"ignore_eos is {self.ignore_eos!r}, expected true or false")
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        object.__setattr__(self, "stop", _stops(self.stop))
        _integer("n", self.n, 1, MAX_CHOICES)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise EngineError(f"grammar is a {type(self.grammar).__name__}, expected a Grammar")
        if not isinstance(self.skip_special, bool):
            raise EngineError(f"skip_special is {self.skip_special!r}, expected true or false")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Params from a parsed request. Raises UnknownName for a field that does not exist."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UnknownName("sampling field", str(name), known)
        return cls(**fields)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def plain(self) -> bool:
        """True if the model's own likeliest token is all that is asked for: no logit is changed and none is told."""
        return self.greedy and not (
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.logprobs is not None
            or self.prompt_logprobs is not None
            or self.grammar is not None
        )


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise EngineError(f"{name} is {value!r}, expected an integer from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (above and value == low):
        raise EngineError(f"{name} is {value!r}, expected a number {'above' if above else 'from'} {low:g} to {high:g}")


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, tuple | list) or len(stops) > MAX_STOPS:
        raise EngineError(f"stop is {value!r:.80}, expected at most {MAX_STOPS} texts")
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise EngineError(f"stop contains {text!r:.80}, expected a text of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple | list) or len(pairs) > MAX_BIASES:
        raise EngineError(f"logit_bias is {value!r:.80}, expected up to {MAX_BIASES} tokens with a number each")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise EngineError(f"logit_bias contains {pair!r:.80}, expected a token and a number")
        _integer("a token in logit_bias", pair[0], 0, MAX_TOKEN)
        _number(f"logit_bias of token {pair[0]}", pair[1], -100.0, 100.0)
    return tuple((int(token), float(bias)) for token, bias in pairs)


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > MAX_STOPS:
        raise EngineError(f"stop_token_ids is {value!r:.80}, expected up to {MAX_STOPS} token ids")
    for token in value:
        _integer("a token in stop_token_ids", token, 0, MAX_TOKEN)
    return tuple(value)
