"""The requests of a simulation: drawn as `gossamer bench serve` draws them, or read from a file.

A prompt is made of numbers that no other request has, behind those of the prefix that it shares. Knows no engine.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import UsageError
from ..measure.load.plan import LoadPlan, draw_lengths, moments

MOST_TOKENS = 1 << 20
"""Of one prompt, and of one answer."""
LINE = '{"arrival": 0.5, "input_tokens": 200, "output_tokens": 64, "prefix": 3, "prefix_tokens": 120}'


@dataclass(frozen=True)
class Request:
    """One request of a trace. Raises UsageError for lengths that none has."""

    arrival: float | None
    """Seconds since the first; None: when a client is free."""
    input_tokens: int
    """Of the whole prompt."""
    output_tokens: int
    prefix: int = 0
    """Which of the shared beginnings it has."""
    prefix_tokens: int = 0
    """Tokens of that beginning, a part of the prompt."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("input_tokens", 1, MOST_TOKENS),
            ("output_tokens", 1, MOST_TOKENS),
            ("prefix", 0, MOST_TOKENS),
            ("prefix_tokens", 0, self.input_tokens),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UsageError(f"{name} is {value!r}, must be an integer from {least} to {most}")
        if self.arrival is not None and (type(self.arrival) not in (int, float) or not 0 <= self.arrival < math.inf):
            raise UsageError(f"arrival is {self.arrival!r}, must be seconds, 0 or more")

    def prompt(self, number: int) -> list[int]:
        """Token ids, of which only those of the prefix are any other request's; `number`: its place in the trace."""
        shared = -1 - (self.prefix << 32)
        own = number << 32
        return [
            *range(shared, shared - self.prefix_tokens, -1),
            *range(own, own + self.input_tokens - self.prefix_tokens),
        ]


def draw(plan: LoadPlan, prefixes: int = 1) -> list[Request]:
    """What `gossamer bench serve` asks by this plan; the shared prefix is one of so many, all as likely."""
    if prefixes < 1:
        raise UsageError(f"{prefixes} prefixes: there is one at least")
    lengths = draw_lengths(plan)
    arrivals: list[float | None] = [None] * plan.requests
    if plan.rate is not None:
        arrivals = [*moments(plan.rate, plan.requests, plan.seed)]
    dice = random.Random(f"{plan.seed} prefixes")
    return [
        Request(arrival, plan.shared_prefix + tokens, output, dice.randrange(prefixes), plan.shared_prefix)
        for arrival, (tokens, output) in zip(arrivals, lengths, strict=True)
    ]


def read_trace(path: Path) -> list[Request]:
    """The requests of a .jsonl file, by arrival. Raises UsageError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    found = [_parse(line, f"{path}:{i + 1}") for i, line in enumerate(lines) if line.strip()]
    if not found:
        raise UsageError(f"{path} has no request", hint=f"a line for each: {LINE}")
    return sorted(found, key=lambda request: request.arrival or 0.0)


def _parse(line: str, where: str) -> Request:
    known = [f.name for f in fields(Request)]
    try:
        entry = json.loads(line)
        unknown = next((name for name in entry if name not in known), None)
        if unknown is not None:
            raise UsageError(f"{where} has {unknown!r}, which no request has", hint=f"such as {LINE}")
        request = Request(**entry)
    except UsageError as error:
        raise UsageError(
            f"{where}: {error.message}" if where not in error.message else error.message, hint=error.hint
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{where} is no request", hint=f"such as {LINE}") from error
    if request.arrival is None:
        raise UsageError(f"{where} has no arrival", hint=f"such as {LINE}")
    return request
