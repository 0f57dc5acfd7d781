"""What a generation request may ask for, with the bounds of every field. Knows no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import EngineError, UnknownName

MAX_TOKENS = 1 << 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256


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
