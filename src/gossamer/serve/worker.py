"""The process of one served model: it holds the weights and runs the engine, step after step. Knows no HTTP.

    python -m gossamer.serve.worker FD PARENT     FD: its end of a socket pair; PARENT: the server's process id

The first message is a WorkerSpec; the engine that it makes is told as Ready or Failed. Then requests are taken and
forgotten between steps, and each step's outputs go back at once. A thread beats, so that a stopped process is known
from one whose step takes long. The worker ends when its parent does, whatever either of them is doing.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..engine.child import die_with
from ..errors import EngineError
from ..settings import debugging
from .messages import Abort, Add, Added, Beat, Failed, Pipe, Ready, Refused, Stepped, Stop, WorkerSpec

if TYPE_CHECKING:
    from ..engine.engine import Engine, EngineOptions

SECONDS_PER_BEAT = 0.25
GRAMMAR_THREADS = 2


class Worker:
    """An engine that works for a pipe."""

    def __init__(self, engine: Engine, pipe: Pipe) -> None:
        self.engine, self.pipe = engine, pipe
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._queued: set[str] = set()
        """Requests that have not left the engine's queue."""
        self._checking: set[tuple[str, ...]] = set()
        """Ids of requests whose grammar is being tried."""
        self._gone: set[tuple[str, ...]] = set()
        """Of those, the ones that were aborted meanwhile."""
        self._trials = ThreadPoolExecutor(GRAMMAR_THREADS, "grammar")
        self.began = time.monotonic()
        """When it last turned to something new."""

    def run(self) -> None:
        """Work until Stop. Raises what the engine raises: nobody knows in what state it is then."""
        threading.Thread(target=self._read, name="pipe", daemon=True).start()
        while True:
            self.began = time.monotonic()
            for message in self._messages():
                if isinstance(message, Stop):
                    return
                self._handle(message)
            outputs = self.engine.step() if self.engine.has_work else []
            self.engine.check_idle()
            self.pipe.send(Stepped(tuple(outputs), self._started(), self.engine.stats()))

    def _messages(self) -> Iterator[Any]:
        """What has come in; if there is nothing else to do, at least one message."""
        if not self.engine.has_work:
            message = self._inbox.get()
            self.began = time.monotonic()
            yield message
        while not self._inbox.empty():
            yield self._inbox.get()

    def _handle(self, message: Add | Refused | Abort) -> None:
        if isinstance(message, Abort):
            if message.ids in self._checking:
                self._gone.add(message.ids)
            for request in message.ids:
                self.engine.abort(request)
                self._queued.discard(request)
            return
        self._checking.discard(message.ids)
        if message.ids in self._gone:
            self._gone.discard(message.ids)
        elif isinstance(message, Add):
            self._add(message)
        else:
            self.pipe.send(message)

    def _add(self, message: Add) -> None:
        """All prompts or none."""
        try:
            for request, prompt in zip(message.ids, message.prompts, strict=True):
                self.engine.add(request, prompt, message.params)
        except EngineError as error:
            for request in message.ids:
                self.engine.abort(request)
            self.pipe.send(Refused(message.ids, error.message, error.hint))
            return
        self._queued.update(message.ids)
        self.pipe.send(Added(message.ids))

    def _started(self) -> tuple[str, ...]:
        """Requests that left the queue since this was asked last: they run, or have ended already."""
        if not self._queued:
            return ()
        running = {sequence.request_id for sequence in self.engine.scheduler.running}
        started = tuple(r for r in self._queued if r in running or not self.engine.holds(r))
        self._queued.difference_update(started)
        return started

    def _read(self) -> None:
        """Take messages off the pipe as they come; the end of the pipe is the end of the process."""
        while True:
            try:
                message = self.pipe.receive()
            except (EOFError, OSError):
                os._exit(1)
            if isinstance(message, Add) and message.params.grammar is not None:
                self._checking.add(message.ids)
                self._trials.submit(self._try_grammar, message)
            else:
                self._inbox.put(message)

    def _try_grammar(self, message: Add) -> None:
        """Compile a grammar elsewhere first: one that takes seconds must not hold up the steps of others."""
        from ..engine.structured import check

        assert message.params.grammar is not None
        try:
            check(message.params.grammar)
            self._inbox.put(message)
        except Exception as error:
            failed = Failed.of(error)
            self._inbox.put(Refused(message.ids, failed.message, failed.hint))


def load(
    model: str, options: dict[str, Any], choice: dict[str, Any], draft: str | None = None, models: int = 1
) -> Engine:
    """The factory of real models: `options` are EngineOptions, `choice` says what computes.

    `models`: how many share this machine; without a number for it, each has so much less memory for its KV cache.
    """
    from ..engine.build import build_engine
    from ..engine.engine import EngineOptions

    asked = EngineOptions(**options)
    if asked.kv_memory is None and models > 1:
        asked = replace(asked, kv_memory=_share(model, asked, choice, models))
    engine = build_engine(model, asked, draft=draft, **choice)
    engine.settle()
    return engine


def _share(model: str, options: EngineOptions, choice: dict[str, Any], models: int) -> int:
    """Bytes of KV cache for one of several models: as `EngineOptions` says of one, of its part of the memory."""
    from ..checkpoint import open_checkpoint
    from ..checkpoint.memory import available_memory
    from ..engine.backend import cache_bytes, kv_bytes_per_token

    checkpoint = open_checkpoint(model)
    size = kv_bytes_per_token(checkpoint, choice["backend"], choice["weights"], choice["kv_cache"])
    most = cache_bytes(size, options.max_sequences, checkpoint.config.max_positions)
    return max(min(most, available_memory() // 2 // models), cache_bytes(size, 1, 1))


def _ready(engine: Engine) -> Ready:
    backend = engine.backend
    description = f"{backend.name} ({backend.describe()}), KV cache {backend.kv_dtype}"
    return Ready(engine.max_prompt_tokens, engine.options.max_sequences, description)


def _made(spec: WorkerSpec) -> Engine:
    module, _, name = spec.factory.partition(":")
    engine: Engine = getattr(import_module(module), name)(**spec.arguments)
    return engine


def _beat(pipe: Pipe, worker: list[Worker]) -> None:
    """Tell again and again that the process lives; once there is a worker, also how long it has been at one thing."""
    while True:
        at_work = worker[0] if worker else None
        busy = time.monotonic() - at_work.began if at_work is not None and at_work.engine.has_work else 0.0
        try:
            if at_work is not None:
                at_work.engine.backend.check_alive()
            pipe.send(Beat(busy))
        except EngineError as error:  # a part of the model is gone, and nobody has asked for a step that would say so
            pipe.send(Failed.of(error))
            os._exit(1)
        except OSError:
            os._exit(1)
        time.sleep(SECONDS_PER_BEAT)


def main(arguments: list[str]) -> int:
    """Serve one pipe to its end; exit code 1 if the engine could not be made or broke."""
    end, parent = map(int, arguments)
    die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the server, which lets requests finish first
    pipe = Pipe(socket.socket(fileno=end))
    spec: WorkerSpec = pipe.receive()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gossamer").setLevel(logging.INFO if spec.verbose else logging.WARNING)
    at_work: list[Worker] = []
    threading.Thread(target=_beat, args=(pipe, at_work), name="beat", daemon=True).start()
    try:
        worker = Worker(_made(spec), pipe)
        at_work.append(worker)
        pipe.send(_ready(worker.engine))
        worker.run()
    except Exception as error:
        if debugging():
            traceback.print_exc()
        pipe.send(Failed.of(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
