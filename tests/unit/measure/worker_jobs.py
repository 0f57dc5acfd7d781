"""Jobs that a worker is made to run by tests: some work, some go wrong in every way that a process can."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from gossamer.errors import DoesNotFit
from gossamer.measure.memory import peak_rss, read_usage
from gossamer.measure.worker import Channel


def add(channel: Channel, a: int, b: int) -> int:
    channel.progress("adding", 1, 1)
    channel.fact("first", a)
    return a + b


def count(channel: Channel, end: int) -> Iterator[int]:
    for n in range(end):
        channel.fact("begun", n)
        yield n


def chatter(channel: Channel) -> str:
    print("on stdout from Python")
    os.system("echo on stdout from a child")
    return "heard"


def environment(channel: Channel) -> dict[str, Any]:
    return {"pid": os.getpid(), "threads": os.environ.get("GOSSAMER_THREADS")}


def refuse(channel: Channel) -> None:
    raise DoesNotFit("needs 8 GB, there are 2", hint="take a smaller one")


def stumble(channel: Channel) -> None:
    channel.fact("model", {"name": "m"})
    raise ZeroDivisionError("by nothing")


def kill_itself(channel: Channel) -> None:
    channel.fact("model", {"name": "m"})
    print("the end is near", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(channel: Channel) -> None:
    os._exit(7)


def not_json(channel: Channel) -> object:
    return object()


def sleep(channel: Channel) -> None:
    time.sleep(60)


def spawn_and_sleep(pid_file: str) -> None:
    """As a parent that is about to be killed: start a worker that sleeps, tell its pid."""
    from gossamer.measure.worker import Job, Worker

    worker = Worker(Job("worker_jobs:sleep"))
    with open(pid_file + ".part", "w") as file:
        file.write(str(worker.pid))
    os.rename(pid_file + ".part", pid_file)
    next(worker)


def allocate(channel: Channel, size: int) -> dict[str, int]:
    before = read_usage(settle=True).rss
    block = bytearray(b"\1") * size
    during = read_usage(settle=True).rss
    del block
    return {"before": before, "during": during, "after": read_usage(settle=True).rss, "peak": peak_rss()}
