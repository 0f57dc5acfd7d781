"""Bits to where they help most: one grid for each group of layers, under a budget for the whole model.

A multiple-choice knapsack: of each group's candidates (bytes, loss) take one, such that the bytes stay within the
budget and the sum of the losses is least. Losses of groups are taken to add up, as they do while they are small. Knows
numbers only: what they mean is said in `sensitivity.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import CompressionError

UNITS = 1 << 14
"""The budget is cut into at most so many units; a budget of fewer bytes is met exactly."""


@dataclass(frozen=True)
class Choice:
    """One candidate of a group: what it stores, and what it loses."""

    nbytes: int
    loss: float


def allocate(groups: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The index of one choice for each group: least total loss whose bytes are within `budget`.

    Exact if the budget is at most UNITS times the common divisor of all sizes. Else sizes are rounded up to a unit, so
    the budget holds all the same, and what is left over goes to the steps that gain the most for each byte. Of equal
    losses the earlier choice counts. Raises CompressionError if even the smallest choices are over the budget.
    """
    smallest = sum(min(choice.nbytes for choice in group) for group in groups)
    if smallest > budget:
        raise CompressionError(
            f"the budget is {budget} bytes, but the smallest candidates of all layers take {smallest}",
            hint="raise the budget, or give candidates of fewer bits (of the embedding, too)",
        )
    unit = _unit(groups, budget)
    picks = _exact([[(math.ceil(c.nbytes / unit), c.loss) for c in group] for group in groups], budget // unit)
    if picks is None:  # the rounding up left no room
        picks = [_smallest(group) for group in groups]
    return _spend_the_rest(groups, picks, budget)


def _smallest(group: Sequence[Choice]) -> int:
    return min(range(len(group)), key=lambda i: (group[i].nbytes, group[i].loss))


def _unit(groups: Sequence[Sequence[Choice]], budget: int) -> int:
    """Bytes of a unit: the common divisor of all sizes, or a multiple of it such that UNITS are enough."""
    common = math.gcd(*(choice.nbytes for group in groups for choice in group)) or 1
    return common * max(1, math.ceil(budget / common / UNITS))


def _exact(groups: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """Choices (units, loss) of least total loss within `budget` units, or None: dynamic programming over the budget."""
    least = np.zeros(budget + 1)  # by units that may be spent on the groups so far
    taken = []
    for group in groups:
        options = np.full((len(group), budget + 1), np.inf)
        for i, (units, loss) in enumerate(group):
            if units <= budget:
                options[i, units:] = least[: budget + 1 - units] + loss
        taken.append(options.argmin(0))
        least = options.min(0)
    if not np.isfinite(least[budget]):
        return None
    picks, left = [], budget
    for group, pick in zip(reversed(groups), reversed(taken), strict=True):
        picks.append(int(pick[left]))
        left -= group[picks[-1]][0]
    return picks[::-1]


def _spend_the_rest(groups: Sequence[Sequence[Choice]], picks: list[int], budget: int) -> list[int]:
    """The picks with the steps that still fit, those first that gain the most for each byte."""
    picks, left = list(picks), budget - sum(g[i].nbytes for g, i in zip(groups, picks, strict=True))
    while True:
        best, gain = None, 0.0
        for n, group in enumerate(groups):
            now = group[picks[n]]
            for i, choice in enumerate(group):
                more, less = choice.nbytes - now.nbytes, now.loss - choice.loss
                if more <= left and less > 0 and (more <= 0 or less / more > gain):
                    best, gain = (n, i), math.inf if more <= 0 else less / more
        if best is None:
            return picks
        n, i = best
        left -= groups[n][i].nbytes - groups[n][picks[n]].nbytes
        picks[n] = i
