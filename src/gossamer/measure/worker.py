"""A process for one measurement: what it allocates, breaks or leaks is its own, and a crash is a result, not an end.

The parent makes a `Worker` of a job and takes values from it; the child is `python -m gossamer.measure.worker`, which
reads the job as one JSON line from stdin and answers with JSON lines on stdout: progress, facts, values, an error.
A job is a function `f(channel, **arguments)` named as `module:function`. If it returns an iterator, the child computes
the next value only when the parent asks for it; so several workers can stay alive and take turns. Knows no models.

The child ends with its parent: it ignores Ctrl-C (the parent sees that and ends it) and on Linux the kernel kills it if
the parent thread that started it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias

from .. import settings
from ..errors import GossamerError, MeasureError

Progress: TypeAlias = Callable[[str, int, int], None]
"""progress(label, done, total)."""

SECONDS_TO_EXIT = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What a worker does: `function` as "module:name", called with a Channel and these JSON-able arguments."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    """Compute threads of the child; None leaves them to settings.threads()."""
    command: tuple[str, ...] = ()
    """What else is started, with this process's id at its end; (): this file. It stands still between its values."""
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variables that a `command` has or (None) has not, beside those of this process."""
    seconds: float | None = None
    """Most that may pass before an answer."""


class WorkerError(MeasureError):
    """The job raised: `kind` is the class of its exception."""

    def __init__(self, message: str, *, hint: str | None = None, kind: str = "MeasureError") -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class WorkerDiedError(WorkerError):
    """The process ended without an answer: a signal, the out-of-memory killer, an abort in native code."""


def _silent(label: str, done: int, total: int) -> None:
    pass


# --- parent ----------------------------------------------------------------------------------------------------------


class Worker(Iterator[Any]):
    """A child process that works on one job; iterate for its values. Raises WorkerError or WorkerDiedError."""

    def __init__(self, job: Job, progress: Progress = _silent) -> None:
        self.progress = progress
        self.facts: dict[str, Any] = {}
        """What the job reported so far with `channel.fact`; outlives a crash."""
        self._oom_kills = _oom_kills()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        self._seconds, self._foreign, self._late = job.seconds, bool(job.command), False
        command = job.command or (sys.executable, "-P", "-m", "gossamer.measure.worker")
        self._process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_foreign_environment(job) if job.command else _environment(job.threads),
            start_new_session=bool(job.command),  # a group of its own: signals reach its children and nobody else
        )
        self._send({"function": job.function, "arguments": dict(job.arguments)})

    @property
    def pid(self) -> int:
        return self._process.pid

    def __next__(self) -> Any:
        """The job's next value; StopIteration when there are no more."""
        self._signal(signal.SIGCONT)
        try:
            return self._next()
        finally:
            # Runtimes that spin while they wait would take the cores from whoever has the next turn.
            self._signal(signal.SIGSTOP)

    def _next(self) -> Any:
        self._send({"next": True})
        while True:
            event = self._receive()
            match event["event"]:
                case "progress":
                    self.progress(event["label"], event["done"], event["total"])
                case "fact":
                    self.facts[event["name"]] = event["value"]
                case "value":
                    return event["value"]
                case "error":
                    raise WorkerError(event["message"], hint=event["hint"], kind=event["kind"])
                case "end":
                    raise StopIteration

    def close(self, kill: bool = False) -> None:
        """End the child: by the end of its input, or at once. Safe to call twice.

        With GOSSAMER_DEBUG, what it wrote on stderr is shown: its traceback, if it failed.
        """
        self._signal(signal.SIGKILL if kill else signal.SIGCONT)
        if kill:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # the child went first, with our last line unread
                    pipe.close()
        try:
            self._process.wait(SECONDS_TO_EXIT)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        if settings.debugging() and not self._stderr.closed:
            sys.stderr.write(self._said())
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kill=error is not None)

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the child is gone: _receive finds out why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(self._seconds or 0, self._give_up)
        if self._seconds is not None:
            timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            raise WorkerDiedError(self._cause_of_death(), kind="WorkerDied")
        event: dict[str, Any] = json.loads(line)
        return event

    def _give_up(self) -> None:
        self._late = True
        self._signal(signal.SIGKILL)
        self._process.kill()

    def _signal(self, number: int) -> None:
        """Send a signal to a child of another program, and to its children; our own needs none."""
        if self._foreign:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        if self._late:
            return f"the worker gave no answer within {self._seconds:g} s, and was ended"
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return "the worker ran out of memory: killed by the kernel's out-of-memory killer (SIGKILL)"
        cause = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended early with exit code {code}"
        said = self._said().strip().splitlines()
        return f"the worker {cause}" + (f"; its last words: {said[-1].strip()[:300]}" if said else "")

    def _said(self) -> str:
        """All that the child wrote on stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")


def run_job(job: Job, progress: Progress = _silent) -> Any:
    """Run a job in a process of its own and return its last value. Raises WorkerError or WorkerDiedError."""
    value = None
    with Worker(job, progress) as worker:
        for answer in worker:
            value = answer
    return value


def _environment(threads: int | None) -> dict[str, str]:
    """The child's environment: it imports from where the parent does, and no thread pool is wider than asked."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}
    if threads is not None:
        environment |= {"GOSSAMER_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return environment


def _foreign_environment(job: Job) -> dict[str, str]:
    """The environment of another program: this process's, but for what the job changes."""
    changed = {**os.environ, "PYTHONUNBUFFERED": "1", **job.environment}
    return {name: value for name, value in changed.items() if value is not None}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory since it started."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


# --- child -----------------------------------------------------------------------------------------------------------


class Channel:
    """How a job speaks to the parent while it works: progress for people, facts for the record."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def progress(self, label: str, done: int, total: int) -> None:
        self.send(event="progress", label=label, done=done, total=total)

    def fact(self, name: str, value: Any) -> None:
        """Something the parent should know even if this process dies next."""
        self.send(event="fact", name=name, value=value)

    def send(self, **event: Any) -> None:
        self._stream.write(json.dumps(event, allow_nan=False).encode() + b"\n")
        self._stream.flush()


def serve(requests: BinaryIO, channel: Channel) -> None:
    """Read one job, then answer each further line with the job's next value, until the input ends or the job fails."""
    request = json.loads(requests.readline() or b"null")
    values: Iterator[Any] | None = None
    for _ in requests:
        try:
            values = values or _start(channel, **request)
            answer = {"event": "value", "value": next(values)}
        except StopIteration:
            answer = {"event": "end"}
        except Exception as error:
            answer = {"event": "error", **describe(error)}
            traceback.print_exc()
        channel.send(**answer)
        if answer["event"] != "value":
            return


def describe(error: Exception) -> dict[str, Any]:
    """An exception as {"kind", "message", "hint"}; one that nobody meant to raise names the line that did."""
    if isinstance(error, GossamerError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return {"kind": type(error).__name__, "message": f"{error}{where}", "hint": None}


def _start(channel: Channel, function: str, arguments: Mapping[str, Any]) -> Iterator[Any]:
    module, _, name = function.partition(":")
    result = getattr(import_module(module), name)(channel, **arguments)
    return result if isinstance(result, Iterator) else iter([result])


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the parent is gone (Linux; elsewhere the end of stdin has to do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before the request was made
            os._exit(1)


def main(arguments: list[str]) -> None:
    """Serve on stdin and stdout. What libraries print goes to stderr, so that stdout carries only answers."""
    if arguments:
        _die_with(int(arguments[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, Channel(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
