"""Outputs are absent or complete, whatever happens while they are written; one writer at a time."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.atomic import Lock, atomic_file, atomic_folder, write_file
from gossamer.errors import DoesNotFit, GossamerError, OutputExists, OutputLocked


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not out.exists()
        assert folder.parent == out.parent
    assert {p.relative_to(out).as_posix() for p in out.rglob("*")} == {"a", "sub", "sub/b"}
    assert list(out.parent.iterdir()) == [out]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


def test_a_file_appears_with_what_belongs_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.bin"
    with atomic_file(out) as folder:
        (folder / "out.bin").write_text("1")
        (folder / "out.bin.json").write_text("2")
        assert [p for p in out.parent.iterdir() if not p.name.startswith(".")] == []
    assert {p.name: p.read_text() for p in out.parent.iterdir()} == {"out.bin": "1", "out.bin.json": "2"}
    with pytest.raises(OutputExists), atomic_file(out):
        pass
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "deep" / "other"):
        raise RuntimeError("x")
    assert {p.name for p in out.parent.iterdir()} == {"out.bin", "out.bin.json"}


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), GossamerError("x")])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputExists, match="out"), atomic_folder(tmp_path / "out"):
        pass
    late = tmp_path / "late"
    with pytest.raises(OutputExists), atomic_folder(late):  # noqa: PT012
        late.mkdir()
        (late / "theirs").write_text("precious")
    assert (tmp_path / "out" / "mine").read_text() == (late / "theirs").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late", "out"]


def fail(number: int) -> Any:
    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DoesNotFit), (errno.EDQUOT, DoesNotFit), (errno.EIO, GossamerError)]
)
def test_a_disk_that_fails_leaves_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[GossamerError]
) -> None:
    with pytest.raises(kind, match="out"), atomic_folder(tmp_path / "out") as folder:  # noqa: PT012
        monkeypatch.setattr(os, call, fail(number))
        write_file(folder / "a", b"data")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "x"
    write_file(path, b"old")
    monkeypatch.setattr(os, call, fail(errno.ENOSPC))
    with pytest.raises(DoesNotFit, match="x"):
        write_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    write_file(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


HOLD = (
    "import sys; from gossamer.checkpoint.atomic import Lock\n"
    "with Lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
)


def test_a_second_process_is_locked_out_and_told_by_whom(tmp_path: Path) -> None:
    out = tmp_path / "out.v1"
    with run(HOLD, str(out)) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(OutputLocked, match=rf"out\.v1 is being written by process {first.pid} since"), Lock(out):
            pass
        first.communicate("")
    with Lock(out):
        assert (tmp_path / "out.v1.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    with run(HOLD, str(tmp_path / "out")) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGKILL)
    with Lock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_not_given_twice_in_one_process(tmp_path: Path) -> None:
    with Lock(tmp_path / "out"):
        with pytest.raises(OutputLocked, match=str(os.getpid())), Lock(tmp_path / "out"):
            pass
        with Lock(tmp_path / "other"):
            pass


def test_what_a_killed_run_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    code = (
        "import sys; from gossamer.checkpoint.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as f: (f / 'x').write_text('x'); print(f, flush=True); sys.stdin.read()"
    )
    out = tmp_path / "out"
    with run(code, str(out)) as killed:
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        killed.send_signal(signal.SIGKILL)
    assert left.exists()
    with run(code, str(out)) as alive:
        assert alive.stdout is not None
        working = Path(alive.stdout.readline().strip())
        assert not left.exists()
        with atomic_folder(out) as mine:
            assert working.exists()
            (mine / "y").write_text("y")
        alive.communicate("")
    assert [p.name for p in out.iterdir()] == ["y"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_lock_that_cannot_be_signed_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail(errno.ENOSPC))
        lock = Lock(tmp_path / "out")
        with pytest.raises(DoesNotFit, match="out"), lock:
            pass
    assert list(tmp_path.iterdir()) == []
    with Lock(tmp_path / "out"):
        pass


def test_a_lock_file_that_another_has_made_since_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    with Lock(tmp_path / "out"):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"
