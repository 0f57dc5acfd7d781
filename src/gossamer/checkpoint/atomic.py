"""Outputs that are absent or complete, and one writer for each. Knows no model.

What is written goes to a temporary sibling first, reaches the disk (fsync), and takes its name by one rename.
A sibling left by a killed run is told from one in use by its lock, which the system drops with the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from ..errors import DoesNotFit, GossamerError, OutputExists, OutputLocked

SUFFIX = ".partial"


@contextlib.contextmanager
def atomic_folder(out: str | Path, replaced: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` if the block succeeds, and vanishes if it fails.

    `replaced`: where an `out` that exists goes when the new one is complete and on the disk; it stays there.
    Raises OutputExists if `out` exists and `replaced` is not given, DoesNotFit if the disk is full.
    """
    out = Path(out)
    if replaced is None:
        _refuse_existing(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temporary, held = _locked_sibling(out)
    try:
        with disk_errors(out):
            yield temporary
            _sync_tree(temporary)
            if replaced is not None and os.path.lexists(out):
                os.rename(out, replaced)
            _refuse_existing(out)
            os.rename(temporary, out)
            sync(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced is not None and os.path.lexists(replaced) and not os.path.lexists(out):
            os.rename(replaced, out)
        raise
    finally:
        os.close(held)


@contextlib.contextmanager
def atomic_file(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out`; if the block succeeds, the files in it take their places beside `out`.

    The one with the name of `out` comes last, so where it is, the others are. Raises OutputExists, DoesNotFit.
    """
    out = Path(out)
    _refuse_existing(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temporary, held = _locked_sibling(out)
    try:
        with disk_errors(out):
            yield temporary
            _sync_tree(temporary)
            _refuse_existing(out)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == out.name):
                os.rename(path, out.parent / path.name)
            sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(held)


def write_file(path: str | Path, data: bytes) -> None:
    """Replace a file in one step: other processes see the old content or the new, on the disk. Raises DoesNotFit."""
    path = Path(path)
    with disk_errors(path):
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent)
        try:
            os.fchmod(fd, 0o666 & ~_umask())
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        sync(path.parent)


class Lock:
    """Held while an output is being made: `<out>.lock`. A second holder gets OutputLocked naming the first."""

    def __init__(self, out: str | Path) -> None:
        self.path = Path(f"{os.path.abspath(out)}.lock")
        self._fd: int | None = None

    def __enter__(self) -> Lock:
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._acquire()
            try:
                self._sign(self._fd)
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is None:
            return
        with contextlib.suppress(OSError):
            if _names(self.path, fd):  # another's, if somebody removed ours
                os.unlink(self.path)  # before the lock goes: whoever waits sees that the file it opened has no name
        os.close(fd)

    def _sign(self, fd: int) -> None:
        holder = {
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv)[:200],
        }
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(holder).encode(), 0)

    def _acquire(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _describe(os.pread(fd, 4096, 0))
                os.close(fd)
                raise OutputLocked(
                    f"{self.path.with_suffix('')} is being written by {holder}", hint="wait for it, or stop it"
                ) from None
            except OSError:
                os.close(fd)
                raise
            if _names(self.path, fd):
                return fd
            os.close(fd)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write into DoesNotFit (disk full) or GossamerError (any other), naming the path."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            free = _free_bytes(path)
            raise DoesNotFit(
                f"{path}: {error.strerror}" + ("" if free is None else f" ({free / 2**20:.0f} MiB free)"),
                hint="nothing was left behind; free some space or choose an --out on another disk",
            ) from error
        raise GossamerError(f"cannot write {path}: {error.strerror or error}") from error


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise OutputExists(f"{out} exists already", hint="choose another --out, or remove it first")


def _locked_sibling(out: Path) -> tuple[Path, int]:
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=SUFFIX, dir=out.parent))
        held = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_EX)
        if _names(temporary, held):  # not swept between its making and its locking
            temporary.chmod(0o777 & ~_umask())
            return temporary, held
        os.close(held)


def _sweep(out: Path) -> None:
    """Remove what killed runs left of this output: siblings that nobody locks."""
    for stale in out.parent.iterdir():
        if not (stale.name.startswith(f".{out.name}.") and stale.name.endswith(SUFFIX)):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(stale, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale, ignore_errors=True)
            finally:
                os.close(fd)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _names(path: Path, fd: int) -> bool:
    """True if `path` still names the file that `fd` is."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} since {holder['started']}: {holder['command']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
