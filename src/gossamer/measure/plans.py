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


@dataclass(frozen=True)
class SoakPlan:
    """How long a model is watched, and over what. Raises UsageError."""

    minutes: float = 60.0
    rounds: int | None = None
    """Most conversations, whatever time is left."""
    context: int | None = None
    """Tokens of a conversation and of a window; None: as many as the model has positions."""
    windows: int = 1
    """Of the text, judged before and after."""
    turn: int = 64
    """Tokens of a piece of text, and of an answer."""
    bound: float | None = None
    """Nats by which a repeated number may differ; None: the backend's (none for cpu)."""
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"rounds": 0, "context": 32, "windows": 1, "turn": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise UsageError(f"{name} is {value}, must be {smallest} or more")
        for name in ("minutes", "bound"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{name} is {value}, must be a number from 0 up")

    def check(self, max_positions: int, tokens: int) -> int:
        """Tokens of a context, for a model of so many positions and a text of so many tokens. Raises MeasureError."""
        context = max_positions if self.context is None else self.context
        if context > max_positions:
            raise MeasureError(f"the model sees {max_positions} tokens, not {context}", hint="lower --context")
        if 2 * self.turn > context:
            raise MeasureError(f"a turn of {self.turn} and {self.turn} tokens does not fit a context of {context}")
        if tokens < self.windows * context:
            raise MeasureError(
                f"the text has {tokens} tokens, less than {self.windows} x {context}",
                hint="lower --context or --windows, or take a longer --corpus",
            )
        return context
