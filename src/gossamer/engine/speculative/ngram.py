"""Prompt look-up: what followed the last time that these tokens stood here (Saxena, 2023, "Prompt Lookup Decoding")."""

from __future__ import annotations

from collections.abc import Sequence as Many

from ..sampler import Sampler
from ..sequence import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that must agree: the longest match is tried first."""


class NgramDrafter:
    """Guesses from a sequence's own tokens; costs no model."""

    name = "ngram"
    most = 12
    """Tokens that are worth guessing at once."""

    def __init__(self) -> None:
        self._indexes: dict[Sequence, _Index] = {}

    def propose(self, sequences: Many[Sequence], samplers: Many[Sampler], count: int) -> list[list[int]]:
        """Up to `count` tokens for each sequence; none where nothing like its end came before."""
        return [self._indexes.setdefault(s, _Index()).guess(s.ids, count) for s in sequences]

    def behind(self, sequences: Many[Sequence]) -> float:
        return 0.0

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)


class _Index:
    """Where in one sequence each run of tokens last ended, and the time before."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def guess(self, ids: list[int], count: int) -> list[int]:
        """What followed the latest earlier place like the end of these ids, which only ever grow."""
        for end in range(self._indexed, len(ids)):  # of the end itself nothing is known yet
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(ids[end - size : end])] = end
        self._indexed = len(ids)
        for size in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
            start = self._ends.get(tuple(ids[-size:]))
            if start is not None:
                guessed: list[int] = []
                for at in range(start, start + count):  # a loop goes on into what was guessed itself
                    guessed.append(ids[at] if at < len(ids) else guessed[at - len(ids)])
                return guessed
        return []
