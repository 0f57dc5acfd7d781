"""How a load is laid out: the numbers that a user chooses and every record repeats. Knows no server.

Bad numbers are refused when a plan is made, before any work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ...errors import UnknownName, UsageError

Endpoint: TypeAlias = Literal["chat", "completions"]

LIMITS = ("ttft", "tpot", "e2e")
"""Latencies that a goodput may bound."""


@dataclass(frozen=True)
class Length:
    """Tokens: any number from mean - spread to mean + spread, all as likely. Raises UsageError."""

    mean: int
    spread: int = 0

    def __post_init__(self) -> None:
        if self.spread < 0 or self.mean - self.spread < 1:
            raise UsageError(f"a length of {self} tokens", hint="MEAN[:SPREAD], and MEAN - SPREAD is 1 or more")

    def __str__(self) -> str:
        return f"{self.mean}:{self.spread}" if self.spread else str(self.mean)

    def draw(self, dice: random.Random) -> int:
        """One length."""
        return dice.randint(self.mean - self.spread, self.mean + self.spread)


@dataclass(frozen=True)
class LoadPlan:
    """A load. With `rate` requests start at random moments and wait for none; without, `concurrency` are under way."""

    requests: int = 100
    concurrency: int = 8
    rate: float | None = None
    """Requests per second, on average."""
    endpoint: Endpoint = "chat"
    input_tokens: Length = Length(256)
    output_tokens: Length = Length(128)
    shared_prefix: int = 0
    """Tokens before every prompt that are the same for all, and are not counted in `input_tokens`."""
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    warmup: int = 1
    """Requests before those that count; of other words, so that no server remembers anything that is measured."""
    timeout: float = 600.0
    """Seconds for one request, its last token included."""
    goodput: dict[str, float] = field(default_factory=dict)
    """Most seconds that a good request takes, by latency (see LIMITS); {}: not asked for."""

    def __post_init__(self) -> None:
        least: dict[str, float] = {"requests": 1, "concurrency": 1, "shared_prefix": 0, "warmup": 0, "temperature": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:  # which NaN is not either
                raise UsageError(f"{name} is {getattr(self, name)}, must be {bound} or more")
        for name in ("rate", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}, must be above 0")

    def protocol(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "requests": self.requests,
            "concurrency": self.concurrency if self.rate is None else None,
            "request_rate": self.rate,
            "endpoint": self.endpoint,
            "output_tokens": str(self.output_tokens),
            "shared_prefix_tokens": self.shared_prefix,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "warmup": self.warmup,
            "timeout_s": self.timeout,
            "goodput_s": self.goodput or None,
        }


def draw_lengths(plan: LoadPlan) -> list[tuple[int, int]]:
    """Tokens of each random prompt and of its answer."""
    dice = random.Random(f"{plan.seed} lengths")
    return [(plan.input_tokens.draw(dice), plan.output_tokens.draw(dice)) for _ in range(plan.requests)]


def moments(rate: float, requests: int, seed: int) -> list[float]:
    """When requests of a Poisson process start, in seconds since the first."""
    dice, found = random.Random(f"{seed} arrivals"), [0.0]
    while len(found) < requests:
        found.append(found[-1] + dice.expovariate(rate))
    return found


def parse_length(text: str) -> Length:
    """A length out of "128" or "128:64". Raises UsageError."""
    try:
        mean, _, spread = text.partition(":")
        return Length(int(mean), int(spread) if spread else 0)
    except ValueError as error:
        raise UsageError(f"{text!r} is not a length", hint="MEAN or MEAN:SPREAD, such as 128:64") from error


def parse_goodput(text: str) -> dict[str, float]:
    """Bounds in seconds out of "ttft:500,tpot:50", which are milliseconds. Raises UsageError."""
    bounds = {}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        if name not in LIMITS:
            raise UnknownName("latency", name, LIMITS)
        try:
            bounds[name] = float(value) / 1000
        except ValueError as error:
            raise UsageError(f"{part.strip()!r} has no milliseconds", hint="such as ttft:500,tpot:50") from error
        if not 0 < bounds[name] < float("inf"):
            raise UsageError(f"{part.strip()!r}: a bound is above 0")
    return bounds
