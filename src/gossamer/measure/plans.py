"""How a measurement is laid out: the numbers that a user chooses and every record repeats. Knows no torch.

Bad numbers are refused when a plan is made, before any work.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import MeasureError, UsageError

LARGEST_NLL = 700.0
"""Beyond it, exp() leaves float64."""


@dataclass(frozen=True)
class WindowPlan:
    """Which tokens are scored, and with how much before them. Raises UsageError if a token would be scored twice."""

    context: int = 1024
    stride: int = 1024
    scored: int = 512

    def __post_init__(self) -> None:
        if self.context < 2:
            raise UsageError(f"context {self.context} is too short", hint="give one token to see and one to score")
        if not 1 <= self.scored < self.context:
            raise UsageError(
                f"cannot score {self.scored} tokens of a window of {self.context}", hint="at most context - 1"
            )
        if self.stride < self.scored:
            raise UsageError(f"stride {self.stride} is below scored {self.scored}: tokens would count more than once")

    def starts(self, tokens: int) -> range:
        """Where each complete window of a text of this many tokens starts."""
        return range(0, tokens - self.context + 1, self.stride)

    def check(self, tokens: int) -> None:
        """Raises MeasureError if a text of this many tokens has no complete window."""
        if tokens < self.context:
            raise MeasureError(
                f"the text has {tokens} tokens, less than one window of {self.context}",
                hint="lower --context, or judge more --tokens",
            )


@dataclass(frozen=True)
class SpeedPlan:
    """The shape of one run. Raises UsageError."""

    prompt_tokens: int = 512
    output_tokens: int = 64
    batch: int = 1
    repetitions: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 1, "output_tokens": 2, "batch": 1, "repetitions": 1, "warmup": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UsageError(f"{name} is {getattr(self, name)}, must be {bound} or more")

    def check(self, max_positions: int) -> None:
        """Raises MeasureError if the model's context is too short for it."""
        if self.prompt_tokens + self.output_tokens > max_positions:
            raise MeasureError(
                f"{self.prompt_tokens} + {self.output_tokens} tokens do not fit a context of {max_positions}",
                hint="lower --prompt-tokens or --output-tokens",
            )
