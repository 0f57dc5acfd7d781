"""The matrix of pairs: what is said of divergences that add up, help and hurt."""

from __future__ import annotations

import pytest

from gossamer.report.columns import MISSING
from gossamer.report.combine import Pair, combine_markdown, pairs_of
from gossamer.report.study import StudyRow


@pytest.mark.parametrize(
    ("both", "alone", "said"),
    [
        (0.31, (0.1, 0.2), "add up (1.03 of the sum)"),
        (0.2, (0.1, 0.2), "help (0.67 of the sum)"),
        (0.6, (0.1, 0.2), "hurt (2.00 of the sum)"),
        (0.05, (0.2, None), "75.0% less than a alone"),
        (0.3, (None, 0.2), "50.0% more than b alone"),
        (None, (0.1, 0.2), MISSING),
        (0.1, (None, None), MISSING),
    ],
)
def test_the_verdict_compares_with_the_sum(
    both: float | None, alone: tuple[float | None, float | None], said: str
) -> None:
    assert Pair("a", "b", both, alone, 4.0).verdict == said


def test_pairs_find_their_stages_and_the_page_holds_all_tables() -> None:
    rows = [
        StudyRow("model", baseline=True, bits=16.0),
        StudyRow("int4", kld=0.2, bits=4.5),
        StudyRow("flap", kld=0.5, bits=16.0, errors=("judging it failed: x | y",)),
        StudyRow("flap-then-int4", kld=0.8, bits=4.6),
    ]
    (pair,) = pairs_of(rows)
    assert (pair.first, pair.second, pair.alone) == ("flap", "int4", (0.5, 0.2))
    page = combine_markdown(rows, {"int4-then-flap": "quantized already"}, [])
    assert "| flap | int4 | 4.60 | 0.800 | hurt (1.14 of the sum) |" in page
    assert "| int4, then flap | quantized already |" in page
    assert "x \\| y" in page
