"""The one sentence that the page opens with, computed from the rows, and the sentence that says how it was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from .protocol import Protocols, protocols
from .rows import Row, finite, references_of
from .sources import held_as
from .text import amount, clean, megabytes, quality

Pair: TypeAlias = tuple[Row, Row]
"""A compressed row and the row it is measured against."""

ENOUGH = 0.9
"""Top-1 agreement from which on a model counts as kept; the page says so beside the headline."""


def headline(rows: Sequence[Row]) -> tuple[str, str]:
    """What these rows show, and how that row was chosen."""
    sound = [row for row in rows if not row.failed]
    if not sound:
        return "No measurement succeeded", "Every run failed; the reasons stand below the table."
    found = protocols(rows)
    compressed = [(row, reference) for row in sound if (reference := _counterpart(row, rows, found))]
    judged = [(row, ref) for row, ref in compressed if finite(row.top1_agreement) is not None and row.size_bytes]
    if judged:
        return _agreement(*_one_protocol(judged, rows))
    measured = [(r, ref) for r, ref in compressed if _comparable_quality(r, ref, rows) and r.size_bytes]
    if measured:
        row, reference = min(measured, key=lambda pair: finite(pair[0].perplexity) or 0)
        sentence = (
            f"{clean(row.label)} reaches perplexity {quality(row.perplexity or 0)} against {_whose(reference)} "
            f"{quality(reference.perplexity or 0)}{_size(row, reference, 'its')}"
        )
        return sentence, "The lowest perplexity of the compressed models; no divergence to the baseline was measured."
    return _alone(sound, len(rows))


def _counterpart(row: Row, rows: Sequence[Row], found: Protocols) -> Row | None:
    """The sound row of the reference that shares most of this row's protocols; None if there is none."""
    marks = found.marks(rows.index(row))

    def shared(other: Row) -> int:
        return sum(ours == theirs for ours, theirs in zip(marks, found.marks(rows.index(other)), strict=True))

    return max((other for other in references_of(row, rows) if not other.failed), key=shared, default=None)


def _one_protocol(judged: list[Pair], rows: Sequence[Row]) -> tuple[list[Pair], Sequence[Row], str]:
    """The pairs of the protocol that most were judged under, and its mark: others cannot be compared with them."""
    found = protocols(rows)
    marks = [found.marks(rows.index(row))[0] for row, _ in judged]
    most = max(dict.fromkeys(marks), key=marks.count)
    return [pair for pair, mark in zip(judged, marks, strict=True) if mark == most], rows, most


def _agreement(judged: list[Pair], rows: Sequence[Row], mark: str) -> tuple[str, str]:
    """The smallest model that keeps enough, or else the one that keeps most."""
    enough = [pair for pair in judged if (pair[0].top1_agreement or 0) >= ENOUGH]
    if enough:
        # Of one model under several speed protocols the first, which is the smallest batch, not the fastest.
        marks = protocols(rows).marks
        row, reference = min(
            enough,
            key=lambda pair: (
                pair[0].size_bytes or 0,
                marks(rows.index(pair[0]))[1],
                -(pair[0].decode_tokens_per_s or 0),
            ),
        )
        why = f"The smallest model here that keeps at least {ENOUGH:.0%} top-1 agreement with {clean(reference.label)}"
    else:
        row, reference = max(judged, key=lambda pair: pair[0].top1_agreement or 0)
        why = f"The closest to {clean(reference.label)}; no model here keeps {ENOUGH:.0%} top-1 agreement"
    speed = _speed(row, reference, rows)
    used = " ".join(m for m in (mark, protocols(rows).marks(rows.index(row))[1] if speed else "") if m)
    why += f", under protocol {used}." if used else "."
    # Rounding down: 99.6 % must not read as all of it.
    kept = int((row.top1_agreement or 0) * 100 + 1e-9)
    return f"{clean(row.label)} keeps {kept}% top-1 agreement{_size(row, reference)}{speed}", why


def _whose(reference: Row) -> str:
    """`the baseline's`; `the bf16 baseline's` where its own source is smaller than what it is compared as."""
    held = held_as(reference.note, reference.bits_per_weight, reference.format)
    return f"the {held} baseline\u2019s" if held else "the baseline\u2019s"


def _size(row: Row, reference: Row, whose: str | None = None) -> str:
    """` in 58% of the baseline's size`, or how many times larger."""
    whose = whose or _whose(reference)
    if not row.size_bytes or not reference.size_bytes:
        return ""
    ratio = row.size_bytes / reference.size_bytes
    if ratio < 0.995:
        return f" in {max(ratio * 100, 1):.0f}% of {whose} size"
    return f" at {whose} size" if ratio < 1.05 else f" at {ratio:.1f} times {whose} size"


def _speed(row: Row, reference: Row, rows: Sequence[Row]) -> str:
    """` and decodes 1.8 times as fast`, if both were benched the same way in the same engine."""
    found = protocols(rows)
    same = found.marks(rows.index(row))[1] == found.marks(rows.index(reference))[1] and row.engine == reference.engine
    ours, theirs = finite(row.decode_tokens_per_s), finite(reference.decode_tokens_per_s)
    if not same or not ours or not theirs:
        return ""
    ratio = ours / theirs
    if 0.95 <= ratio <= 1.05:
        return " and decodes as fast"
    if ratio > 1:
        return f" and decodes {ratio:.1f} times as fast"
    return f" and decodes at {ratio * 100:.0f}% of its speed"


def _comparable_quality(row: Row, reference: Row, rows: Sequence[Row]) -> bool:
    """True if both perplexities are numbers of one protocol."""
    found = protocols(rows)
    same = found.marks(rows.index(row))[0] == found.marks(rows.index(reference))[0]
    return same and finite(row.perplexity) is not None and finite(reference.perplexity) is not None


def _alone(sound: list[Row], total: int) -> tuple[str, str]:
    """Rows with nothing to compare: what is known of the first."""
    row = sound[0]
    facts = []
    if row.size_bytes:
        facts.append(f"{megabytes(row.size_bytes)} MB of weights")
    if (ppl := finite(row.perplexity)) is not None:
        facts.append(f"perplexity {quality(ppl)}")
    if (speed := finite(row.decode_tokens_per_s)) is not None:
        facts.append(f"{amount(speed)} tokens/s")
    if total == 1:
        why = "Measured alone: add a compressed model to see what compression costs."
    else:
        why = "The first of these models; no measurement of one against another succeeded."
    return f"{clean(row.label)}: {', '.join(facts)}" if facts else f"{clean(row.label)}, not measured yet", why
