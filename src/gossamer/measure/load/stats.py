"""What the answers of a load come to: rates, and each latency at its mean, median, p90 and p99.

Knows no server and no clock: numbers in, numbers out. A failed request is counted and its reason kept; its tokens and
its times are in no rate and in no percentile.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LATENCIES = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True)
class Answer:
    """How one request went. Times are seconds since it was sent."""

    arrivals: tuple[float, ...] = ()
    """When each piece of text arrived; a piece may hold more than one token."""
    e2e: float = 0.0
    """When the answer was complete."""
    output_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Tokens of the prompt that the server had computed before, where it says so."""
    counted_by: str = "usage"
    """Who counted the tokens of the output: `usage`, the server; `chunks`, the pieces that arrived."""
    error: str | None = None

    @property
    def ttft(self) -> float:
        """To the first token."""
        return self.arrivals[0] if self.arrivals else self.e2e

    @property
    def tpot(self) -> float | None:
        """For each token after the first; None if there is none."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Between one piece of text and the next."""
        return [late - early for early, late in pairwise(self.arrivals)]

    def meets(self, bounds: Mapping[str, float]) -> bool:
        """True if no latency is above its bound; one that it has not is not above."""
        return all((getattr(self, name) or 0.0) <= bound for name, bound in bounds.items())


def summarize(answers: Sequence[Answer], duration: float, bounds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The results of a load that took `duration` seconds from the first request to the end of the last."""
    good = [answer for answer in answers if answer.error is None]
    output = sum(answer.output_tokens for answer in good)
    prompts = [answer.prompt_tokens for answer in good if answer.prompt_tokens is not None]
    counted = len(prompts) == len(good) > 0
    return {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "failures": dict(Counter(answer.error for answer in answers if answer.error is not None).most_common()),
        "duration_s": round(duration, 4),
        "requests_per_s": _rate(len(good), duration),
        "output_tokens_per_s": _rate(output, duration),
        "total_tokens_per_s": _rate(output + sum(prompts), duration) if counted else None,
        "goodput": _goodput(good, len(answers), duration, bounds),
        "prompt_tokens": _counts(prompts) if counted else None,
        "cached_prompt_tokens": _total([answer.cached_tokens for answer in good]),
        "output_tokens": _counts([answer.output_tokens for answer in good]),
        "output_counted_by": " and ".join(sorted({answer.counted_by for answer in good})) or None,
        **latencies(good),
    }


def latencies(good: Sequence[Answer]) -> dict[str, Any]:
    """Each latency of the answers that came, in seconds; gaps of all answers are one population."""
    tpots = [answer.tpot for answer in good]
    return {
        "ttft_s": spread([answer.ttft for answer in good]),
        "tpot_s": spread([tpot for tpot in tpots if tpot is not None]),
        "itl_s": spread([gap for answer in good for gap in answer.gaps]),
        "e2e_s": spread([answer.e2e for answer in good]),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, p90 and p99; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    shares = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    points = {name: percentile(ordered, share) for name, share in shares.items()}
    return {name: round(value, 6) for name, value in {"mean": math.fsum(ordered) / len(ordered), **points}.items()}


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of sorted values lies, between neighbours by proportion."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _goodput(
    good: Sequence[Answer], sent: int, duration: float, bounds: Mapping[str, float] | None
) -> dict[str, float | None] | None:
    """Requests that kept every bound, per second and as a share of all; a failed one kept none."""
    if not bounds:
        return None
    kept = sum(answer.meets(bounds) for answer in good)
    return {"requests_per_s": _rate(kept, duration), "share": round(kept / sent, 4) if sent else None}


def _rate(count: int, duration: float) -> float | None:
    return round(count / duration, 3) if duration > 0 else None


def _counts(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"total": sum(values), "mean": round(sum(values) / len(values), 1), "min": min(values), "max": max(values)}


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
