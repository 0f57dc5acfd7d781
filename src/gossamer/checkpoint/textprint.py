"""Prints of a text, by which a later measurement can tell that it is about to judge a model on what calibrated it.

Knows nothing of models or corpora: pure functions of a string, shared by whoever writes a print and whoever checks it.
"""

from __future__ import annotations

import hashlib

SHORTEST_LINE = 40
"""Characters below which a line says nothing about its origin (headings, blank lines, braces)."""


def text_sha256(text: str) -> str:
    """The sha256 of the text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def line_hashes(text: str) -> list[str]:
    """Sorted distinct 16-digit sha256 prefixes of the stripped lines of at least SHORTEST_LINE characters."""
    lines = {line.strip() for line in text.splitlines()}
    return sorted({text_sha256(line)[:16] for line in lines if len(line) >= SHORTEST_LINE})
