"""The soak runs, and would see what it is there to see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import soak
from gossamer.engine.params import SamplingParams

SOAK = Path(soak.__file__)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SOAK), *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["engine", "server"])
def test_a_few_seconds_of_load_leave_nothing_behind(part):
    found = run("3", "--only", part)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.startswith(f"{part}: ")


def test_what_grows_is_told():
    gauge = soak.Gauge("files", slack=2)
    gauge.values = [9, 1, 1, 2, 2, 2, 4, 4]
    gauge.check()
    gauge.values = [1, 1, 2, 2, 3, 4, 5, 5]
    with pytest.raises(soak.Grew, match="files rose from 2 to 5 in 8 rounds"):
        gauge.check()


def test_an_object_that_outlives_its_request_is_told():
    engine = soak.make_engines()[0]
    engine.add("a", [1], SamplingParams(max_tokens=2))
    kept = engine.scheduler.waiting[0]
    while engine.has_work:
        engine.step()
    with pytest.raises(soak.Grew, match=r"objects of requests that have ended are alive"):
        soak.require_idle(engine)
    assert kept.finish_reason == "length"


def test_blocks_that_are_not_given_back_are_told():
    engine = soak.make_engines()[0]
    assert engine.blocks.grow(soak.BlockTable(), 40)
    with pytest.raises(soak.Grew, match="3 blocks of the KV cache"):
        soak.require_idle(engine)
