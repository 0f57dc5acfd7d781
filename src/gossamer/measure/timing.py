"""What runs took, as rates: the same sums for every engine. Knows no engine and no clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .plans import SpeedPlan


@dataclass(frozen=True)
class Timing:
    """Seconds of one run."""

    first_token: float
    decode: float


def rates(timings: Sequence[Timing], plan: SpeedPlan) -> dict[str, dict[str, Any]]:
    """Prefill and decode rates and time to first token over all repetitions, in the order they were taken."""
    return {
        "prefill_tokens_per_s": summary([plan.batch * plan.prompt_tokens / t.first_token for t in timings]),
        "decode_tokens_per_s": summary([plan.batch * (plan.output_tokens - 1) / t.decode for t in timings]),
        "ttft_s": summary([t.first_token for t in timings]),
    }


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, least, most, and every sample."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": list(samples),
    }
