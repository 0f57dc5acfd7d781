"""What a table must say of where weights come from: a baseline that is 4-bit already gains little by 4-bit recipes.

A checkpoint notes how its source was stored. That source may since have been converted to floats: the sentence here is
true of both. Knows notes and numbers; knows no rows.
"""

from __future__ import annotations

import re

_NOTE = re.compile(
    r"(?P<made>made from a baseline )?stored as (?P<form>.+?)(?P<gguf> \(GGUF\))?: already (?P<bits>\d+)-bit"
)
_FLOATS = {"bf16", "fp16", "fp32"}
FLOAT_BITS = 16
"""Bits per weight from which on weights are held as floats, whatever they were made from."""


def source_sentence(note: str, bits_per_weight: float | None, form: str | None = None) -> str:
    """The note as a sentence about weights held at `bits_per_weight` in the format `form`, as far as they are known."""
    found = _NOTE.fullmatch(note)
    if found is None:
        return note
    origin = f"{found['form']} GGUF file" if found["gguf"] else f"{found['form']} checkpoint"
    origin = f"{'an' if origin[0] in 'AEIOaeio' else 'a'} {origin}, so they are already {found['bits']}-bit"
    if found["made"]:
        return f"made from a baseline whose weights come from {origin}"
    held = held_as(note, bits_per_weight, form)
    if held is None:
        return note
    return f"weights come from {origin}; held here as {held}{'' if held in _FLOATS else ' floats'}"


def held_as(note: str | None, bits_per_weight: float | None, form: str | None = None) -> str | None:
    """`bf16`, or `16-bit`, if a source that was smaller is held as floats here; None if not."""
    if note is None or _NOTE.fullmatch(note) is None or bits_per_weight is None or bits_per_weight < FLOAT_BITS:
        return None
    return form if form in _FLOATS else f"{bits_per_weight:.0f}-bit"
