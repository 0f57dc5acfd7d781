"""Pairs of compressions as a matrix: what the second one costs behind the first. Knows the rows of a study only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .columns import MISSING
from .study import StudyRow, protocol_sentences
from .text import divergence, number, percent

THEN = "-then-"
MARGIN = 0.1
"""Share of the sum by which a pair may differ from it and still be said to add up."""


@dataclass(frozen=True)
class Pair:
    """Two stages, one behind the other; divergences in nats per token, None where it was not measured."""

    first: str
    second: str
    both: float | None
    alone: tuple[float | None, float | None]
    bits: float | None

    @property
    def verdict(self) -> str:
        """`add up`, `help`, `hurt`: the pair's divergence beside the sum of both alone.

        A stage that cannot stand alone is there to lower what the other one loses: by so much.
        """
        alone = [kld for kld in self.alone if kld]
        if self.both is None or not alone:
            return MISSING
        if len(alone) == 1:
            change = 1 - self.both / alone[0]
            return f"{percent(abs(change))}% {'less' if change >= 0 else 'more'} than {self._standing} alone"
        ratio = self.both / sum(alone)
        word = "add up" if abs(ratio - 1) <= MARGIN else "help" if ratio < 1 else "hurt"
        return f"{word} ({number(ratio, 2)} of the sum)"

    @property
    def _standing(self) -> str:
        return self.first if self.alone[0] else self.second


def pairs_of(rows: Sequence[StudyRow]) -> list[Pair]:
    """Every pair among the rows of a study, in their order."""
    by_name = {row.name: row for row in rows}
    found = []
    for row in rows:
        first, then, second = row.name.partition(THEN)
        if then:
            alone = tuple(by_name[name].kld if name in by_name else None for name in (first, second))
            found.append(Pair(first, second, row.kld, (alone[0], alone[1]), row.bits))
    return found


def combine_tables(
    rows: Sequence[StudyRow], refused: Mapping[str, str]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables as (what it says, titles, cells): each stage alone, the matrix of pairs, what is refused and why."""
    alone = [row for row in rows if THEN not in row.name]
    pairs = pairs_of(rows)
    single = [[r.name, _bits(r.bits), _kld(r.kld), "; ".join(r.errors)] for r in alone]
    cells = [[p.first, p.second, _bits(p.bits), _kld(p.both), p.verdict] for p in pairs]
    why = [[name.replace(THEN, ", then "), reason] for name, reason in refused.items()]
    return [
        ("Alone", ["stage", "bits/weight", "KLD", ""], single),
        ("One behind the other", ["first", "second", "bits/weight", "KLD", "together"], cells),
        ("Refused", ["stages", "reason"], why),
    ]


def combine_markdown(rows: Sequence[StudyRow], refused: Mapping[str, str], values: Sequence[Mapping[str, Any]]) -> str:
    """The whole study as a page."""
    parts = ["# Compressions, combined"]
    for what, titles, cells in combine_tables(rows, refused):
        lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
        parts += [f"## {what}", "\n".join(lines)] if cells else []
    return "\n\n".join([*parts, *protocol_sentences(values)]) + "\n"


def _bits(bits: float | None) -> str:
    return MISSING if bits is None else number(bits, 2)


def _kld(kld: float | None) -> str:
    return MISSING if kld is None else divergence(kld)
