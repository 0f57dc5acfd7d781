"""Memory numbers agree with what was allocated and with what the machine and its cgroups say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from gossamer.measure import memory, records
from gossamer.measure.worker import Job, run_job

MB = 1_000_000


def test_an_allocation_shows_in_resident_memory_and_in_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    found = run_job(Job("worker_jobs:allocate", {"size": 200 * MB}))
    assert 195 * MB < found["during"] - found["before"] < 215 * MB
    assert found["after"] - found["before"] < 15 * MB
    assert abs(found["peak"] - found["during"]) < 10 * MB  # the kernel's own count lags by some pages


def test_usage_agrees_with_psutil_and_shared_pages_count_less_in_pss() -> None:
    usage, other = memory.read_usage(), psutil.Process().memory_info().rss
    assert usage.rss == pytest.approx(other, rel=0.1)
    assert 0 < usage.pss <= usage.rss
    assert memory.peak_rss() >= usage.rss * 0.9


def test_records_are_appended_whole_even_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x.jsonl"
    records.append_record(path, {"a": "ä"})
    with open(path, "ab") as file:
        file.write(b'{"torn": ')
    records.append_record(path, {"b": 2})
    lines = path.read_bytes().split(b"\n")
    assert json.loads(lines[0]) == {"a": "ä"}
    assert json.loads(lines[2]) == {"b": 2}
    with pytest.raises(ValueError, match="JSON"):
        records.append_record(path, {"c": float("nan")})
    assert path.read_bytes().count(b"\n") == 3


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_THREADS", "3")
    machine = records.machine_block()
    assert machine["threads"] == 3
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["cpu"]
    assert machine["torch"].startswith("2.")


@pytest.mark.parametrize(
    ("cpuinfo", "isa"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16\n", "avx2+avx512+vnni+bf16"),
        ("Features\t: fp asimd asimddp sve\n", "neon+dotprod+sve"),
    ],
)
def test_instruction_sets_are_named_shortly(monkeypatch: pytest.MonkeyPatch, cpuinfo: str, isa: str) -> None:
    monkeypatch.setattr(records, "_cpuinfo", lambda: cpuinfo)
    assert records.isa() == isa


def test_a_failed_record_has_a_reason_and_no_results() -> None:
    common = {"model": records.unknown_model_block("m"), "engine": records.engine_block(), "protocol": {"context": 8}}
    record = records.make_record("eval", **common, results={"perplexity": 1.0}, error="killed")
    assert (record["status"], record["error"], record["results"]) == ("failed", "killed", {})
    assert record["model"]["name"] == "m"
    assert records.make_record("eval", **common, results={"perplexity": 1.0})["status"] == "ok"
