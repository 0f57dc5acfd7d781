"""Codes of every kind: what they stand for element by element, and that rows can be taken apart and put together."""

from __future__ import annotations

import pytest
import torch

from gossamer.formats import Codes, Outliers

OUT, COLUMNS, GROUPS = 7, 12, 3


def some_codes(kind: str) -> Codes:
    g = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 8, (OUT, COLUMNS), generator=g).to(torch.int8)
    scale = torch.rand(OUT, GROUPS, generator=g)
    zero = torch.randint(-4, 4, (OUT, GROUPS), generator=g).to(torch.int8) if kind == "asymmetric" else None
    levels = {
        "shared levels": torch.randn(8, generator=g),
        "levels of each row": torch.randn(OUT, 8, generator=g),
    }.get(kind)
    outliers = None
    if kind == "outliers":
        rows = torch.tensor([0, 0, 3, 6], dtype=torch.int32)
        columns = torch.tensor([1, 11, 5, 0], dtype=torch.int32)
        outliers = Outliers(rows, columns, torch.tensor([2.0, -3.0, 0.5, 8.0]))
    return Codes(codes, scale, zero, levels, outliers)


KINDS = ["integers", "asymmetric", "shared levels", "levels of each row", "outliers"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_what_its_code_stands_for(kind: str) -> None:
    q = some_codes(kind)
    found = q.dequantize()
    for row in range(OUT):
        for column in range(COLUMNS):
            code, group = int(q.codes[row, column]), column // (COLUMNS // GROUPS)
            value = float(code) - (0.0 if q.zero is None else float(q.zero[row, group]))
            if q.levels is not None:
                value = float(q.levels[code] if q.levels.ndim == 1 else q.levels[row, code])
            expected = value * float(q.scale[row, group])
            if q.outliers is not None:
                here = (q.outliers.rows == row) & (q.outliers.columns == column)
                expected += float(q.outliers.values[here].sum())
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[7], [1, 6], [3, 0, 4], [2, 2, 3]])
def test_parts_stand_for_the_rows_they_were_and_join_to_the_whole(kind: str, sizes: list[int]) -> None:
    q = some_codes(kind)
    parts = q.split(sizes)
    assert [len(p.codes) for p in parts] == sizes
    for part, rows in zip(parts, torch.split(q.dequantize(), sizes), strict=True):
        assert torch.equal(part.dequantize(), rows)
    whole = Codes.cat(parts)
    assert torch.equal(whole.codes, q.codes)
    assert torch.equal(whole.dequantize(), q.dequantize())
    if q.outliers is not None:
        assert whole.outliers is not None
        assert torch.equal(whole.outliers.rows, q.outliers.rows)


def test_codes_of_eight_bits_are_looked_up_past_the_sign_of_a_byte() -> None:
    codes = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    q = Codes(codes, torch.full((1, 1), 2.0), None, torch.arange(256.0))
    assert q.dequantize().tolist() == [[0.0, 254.0, 256.0, 510.0]]
