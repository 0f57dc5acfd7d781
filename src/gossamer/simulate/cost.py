"""What a step costs: seconds out of what is in it, by a line that was fitted to measured steps. Knows no engine.

A step takes its own time (weights are read once), and more for each token of a prompt, each token that is decoded and
each token of context that is looked at.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.scheduler import Piece
from ..errors import MeasureError, UnknownName, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_STEPS = 16
"""Fewer do not tell four numbers."""
ROUNDS = 10
"""Of fitting: each weighs the steps by what the one before made of them."""


@dataclass(frozen=True)
class StepWork:
    """What is in a step."""

    prompt_tokens: int = 0
    decode_tokens: int = 0
    """Sequences that get one more token for the one before."""
    context_tokens: int = 0
    """Tokens in the cache after the step, of all sequences in it."""


def work_of(pieces: Sequence[Piece]) -> StepWork:
    """What is in a step that a scheduler made, drafts left out."""
    prompt = sum(piece.count for piece in pieces if piece.count > 1 or not piece.ends)
    decode = sum(1 for piece in pieces if piece.count == 1 and piece.ends)
    return StepWork(prompt, decode, sum(piece.sequence.computed + piece.count for piece in pieces))


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step. Raises UsageError for numbers that no step has."""

    step_s: float
    prompt_token_s: float
    decode_token_s: float
    context_token_s: float
    request_s: float = 0.0
    """From a client to the engine and back, besides the steps: HTTP, the template, the tokenizer."""
    about: dict[str, Any] = field(default_factory=dict)
    """Of what it was measured, and how well the line fits."""

    def __post_init__(self) -> None:
        for name, value in self.numbers().items():
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if not good:
                raise UsageError(f"{name} is {value!r}, must be a number of seconds, 0 or more")
        if not self.step_s + min(self.prompt_token_s, self.decode_token_s) > 0:
            raise UsageError("a step that takes no time", hint="step_s, or both times of a token, must be above 0")

    def numbers(self) -> dict[str, float]:
        """The coefficients by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "about"}

    def seconds(self, work: StepWork) -> float:
        """Of one step."""
        return (
            self.step_s
            + self.prompt_token_s * work.prompt_tokens
            + self.decode_token_s * work.decode_tokens
            + self.context_token_s * work.context_tokens
        )


def read_cost(path: Path) -> StepCost:
    """The cost in a file that `write_cost` wrote. Raises UsageError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'not JSON'}") from error
    known = [f.name for f in fields(StepCost)]
    if not isinstance(found, dict) or not isinstance(found.get("about", {}), dict):
        raise UsageError(
            f"{path} is no cost of a step", hint="gossamer simulate --measure MODEL --cost FILE writes one"
        )
    for name in found:
        if name not in known:
            raise UnknownName("cost", str(name), known)
    try:
        return StepCost(**found)
    except TypeError as error:
        missing = ", ".join(name for name in known[:4] if name not in found)
        raise UsageError(f"{path} has no {missing}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from error


def write_cost(path: Path, cost: StepCost) -> None:
    """As JSON. Raises UsageError where it cannot be written."""
    try:
        path.write_text(json.dumps(asdict(cost), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error


def fit(steps: Sequence[tuple[StepWork, float]], about: dict[str, Any] | None = None) -> StepCost:
    """The line with the least squared errors, each over the step's own seconds; no coefficient is below 0.

    So weighed, long steps do not drown short ones, and all together keep their sum: the weights are those of the line
    (iterated least squares, Wedderburn, Biometrika 1974). Raises MeasureError for too few steps.
    """
    import numpy as np

    if len(steps) < LEAST_STEPS:
        raise MeasureError(f"{len(steps)} steps do not tell what a step costs", hint="measure a longer load")
    seconds = np.array([took for _, took in steps])
    rows = np.array([(1, w.prompt_tokens, w.decode_tokens, w.context_tokens) for w, _ in steps], float)
    guesses = seconds
    for _ in range(ROUNDS):
        found = _not_below_zero(rows, seconds, np.maximum(guesses, 1e-9) ** -0.5)
        guesses = rows @ found
    errors = [abs(guess - took) / took for guess, took in zip(guesses.tolist(), seconds.tolist(), strict=True)]
    facts = {
        "steps": len(steps),
        "median_relative_error": round(statistics.median(errors), 4),
        "sum_relative_error": round(float(guesses.sum() / seconds.sum()) - 1, 4),
    }
    step, prompt, decode, context = found.tolist()
    return StepCost(step, prompt, decode, context, about={**(about or {}), **facts})


def _not_below_zero(rows: NDArray[np.float64], seconds: NDArray[np.float64], weights: NDArray[np.float64]) -> Any:
    """Least squares [4] without the coefficients that came out below 0."""
    import numpy as np

    used, found = list(range(4)), np.zeros(4)
    while used:
        solved = np.linalg.lstsq(rows[:, used] * weights[:, None], seconds * weights, rcond=None)[0]
        if solved.min() >= 0:
            found[used] = solved
            break
        used.pop(int(solved.argmin()))
    return found
