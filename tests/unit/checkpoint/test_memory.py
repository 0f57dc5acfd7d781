"""Memory that may still be taken: the machine's, or what is left in a control group."""

from __future__ import annotations

import pytest

from gossamer.checkpoint import memory
from gossamer.errors import DoesNotFit


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


@pytest.fixture
def groups(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def test_version_2_takes_the_tightest_of_all_levels(groups):
    (groups / "membership").write_text("0::/outer/inner\n")
    group(groups / "cgroup/outer/inner", memory__max="max", memory__current=10)
    group(groups / "cgroup/outer", memory__max=1000, memory__current=900, memory__stat="anon 5\ninactive_file 40\n")
    group(groups / "cgroup", memory__max=5000, memory__current=900)
    assert memory.available_memory() == 140


def test_version_1_is_read_too(groups):
    (groups / "membership").write_text("3:cpu:/x\n2:memory:/job\n")
    group(groups / "cgroup/memory/job", memory__limit_in_bytes=700, memory__usage_in_bytes=800)
    group(groups / "cgroup/memory", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=900)
    assert memory.available_memory() == 0
    assert memory.total_memory() == 700


def test_without_limits_it_is_what_the_machine_has(groups):
    (groups / "membership").write_text("0::/\n")
    assert memory.available_memory() > 1 << 20
    (groups / "membership").unlink()
    assert 1 << 20 < memory.available_memory() <= memory.total_memory()


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2_500_000)
    memory.require_memory(2_500_000, "x", "y")
    with pytest.raises(DoesNotFit, match=r"the model takes 3\.0 MB, but 2\.5 MB are available\n  buy more"):
        memory.require_memory(3_000_000, "the model", "buy more")
