"""Numbers and foreign strings as text. Knows no record and no output medium."""

from __future__ import annotations

import math
import unicodedata

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean(text: str, keep: str = "") -> str:
    """The text without control characters (terminal escapes, reordering marks), but those in `keep`."""
    return "".join(
        "\ufffd" if char not in keep and (unicodedata.category(char) in ("Cc", "Cs") or char in _BIDI) else char
        for char in text
    )


def number(value: float, digits: int) -> str:
    """Fixed digits and thousands separators; `NaN` and `inf` by name."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return f"{value:,.{digits}f}"


def amount(value: float) -> str:
    """A size or a speed: one decimal below 100, none above."""
    return number(value, 1 if abs(value) < 99.95 else 0)


def quality(value: float) -> str:
    """Perplexity: two decimals, none from a thousand on."""
    return number(value, 2 if abs(value) < 1000 else 0)


def divergence(value: float) -> str:
    """KL divergence: three significant digits, in decimal notation down to 0.0001."""
    if not math.isfinite(value):
        return number(value, 0)
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def megabytes(count: float) -> str:
    """Bytes as millions of bytes, without the unit."""
    return amount(count / 1e6)


def percent(fraction: float) -> str:
    """A fraction as percent, without the sign."""
    return number(fraction * 100, 1)
