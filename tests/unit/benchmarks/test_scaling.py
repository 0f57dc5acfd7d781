"""The scaling page: its tables hold the simulations, its pictures are whole."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

import scaling
from gossamer.simulate.cost import read_cost
from line_chart import chart


def test_tables_and_pictures_hold_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PREFIXES", 3)
    cost = read_cost(scaling.COST)
    rate = scaling.rate_of(cost)
    rows = [scaling.fleet(cost, n, way, rate * n, 5 * n) for n in (1, 2) for way in scaling.ROUTINGS]
    ranks = [scaling.ranks(link, tp, batch) for link in scaling.LINKS for batch in scaling.BATCHES for tp in (1, 16)]
    run = {"rate": rate, "proportional": rows, "fixed": rows, "ranks": ranks}
    text = scaling.tables(run, cost)
    assert all(text.count(f"| 2 | {way} |") == 2 for way in scaling.ROUTINGS)
    assert all(row["completed"] == 5 * row["replicas"] for row in rows)
    for panels in scaling.pictures(run).values():
        assert len(ET.fromstring(chart(panels))) == 1 + len(panels)


def test_more_ranks_read_less_each_and_wait_more() -> None:
    name = next(iter(scaling.LINKS))
    one, many = (scaling.ranks(name, tp, 1) for tp in (1, 16))
    assert one["link_latency"] == one["link_transfer"] == 0
    assert many["memory"] < one["memory"] / 10
    assert many["bottleneck"] == "link latency"
