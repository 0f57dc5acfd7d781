"""The server's side of one worker process: requests in, outputs back, watched, and restarted when it fails.

All of it runs in one asyncio loop. A worker is lost when its process ends, says that it gives up, is silent, or has
been at one step for too long; everything that it was doing then ends with WorkerLost, and another worker is started,
unless that happens again and again. Knows no HTTP and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.params import SamplingParams
from ..engine.sequence import EngineStats, Output
from ..errors import EngineError, GossamerError
from .messages import (
    HEADER,
    Abort,
    Add,
    Added,
    Beat,
    Failed,
    Ready,
    Refused,
    Stepped,
    Stop,
    ToWorker,
    WorkerSpec,
    frame,
    parsed,
    size,
)

SECONDS_TO_EXIT = 5.0
LOADING_PATIENCE = 12.0
"""While a worker loads it may be silent for so many times longer: one call into a library can take a while."""

logger = logging.getLogger("gossamer.serve")


class WorkerLost(GossamerError):
    """The engine's process is gone, or there is none at the moment."""


@dataclass(frozen=True)
class Watch:
    """When a worker counts as lost, and when to give up."""

    silence: float = 10.0
    """Seconds without a sign of life."""
    step: float = 300.0
    """Seconds of one step."""
    losses: int = 3
    """So many lost workers within `window` seconds are too many."""
    window: float = 300.0


@dataclass(frozen=True)
class Started:
    """A request left the engine's queue."""

    request_id: str


class Generation:
    """Some prompts in the engine: iterate for what becomes of them, and close it in any case."""

    def __init__(self, client: EngineClient, ids: tuple[str, ...], params: SamplingParams) -> None:
        self.ids, self.params = ids, params
        self._client = client
        self._inbox: asyncio.Queue[Started | Output | WorkerLost] = asyncio.Queue()
        self._open = len(ids) * params.n
        self._lost = False

    async def events(self) -> AsyncIterator[Started | Output]:
        """Until every choice of every prompt has ended. Raises WorkerLost."""
        while self._open:
            event = await self._inbox.get()
            if isinstance(event, WorkerLost):
                self._lost = True
                raise event
            if isinstance(event, Output) and event.finish_reason is not None:
                self._open -= 1
            yield event

    def take(self, event: Started | Output | WorkerLost) -> None:
        self._inbox.put_nowait(event)

    def close(self) -> None:
        """Nobody listens any more: what still runs is aborted. Safe to call twice."""
        self._client.forget(self, abort=self._open > 0 and not self._lost)
        self._open = 0


class EngineClient:
    """One served model's engine."""

    def __init__(self, spec: WorkerSpec, name: str, watch: Watch = Watch()) -> None:
        self.spec, self.name, self.watch = spec, name, watch
        self.ready: Ready | None = None
        """What the worker said of itself; None while there is none."""
        self.stats = EngineStats()
        self.restarts = 0
        self._process: _Process | None = None
        self._numbers = itertools.count()
        self._waiting: dict[tuple[str, ...], asyncio.Future[None]] = {}
        """Adds that were not answered yet."""
        self._generations: dict[str, Generation] = {}
        self._stopping = self._loaded = False

    async def start(self) -> Ready:
        """Start a worker and wait until its engine is there. Raises WorkerLost with the worker's own words."""
        process = self._process = _Process(self.spec)
        patience = self.watch.silence * LOADING_PATIENCE
        try:
            while not isinstance(message := await process.receive(patience), Ready):
                if isinstance(message, Failed):
                    raise WorkerLost(message.message, hint=message.hint)
        except BaseException:
            process.kill()
            raise
        self.stats = EngineStats()
        self.ready = message
        return message

    async def supervise(self) -> None:
        """Serve until `stop`, with a new worker for each that is lost. Raises WorkerLost when it happens too often."""
        losses: deque[float] = deque(maxlen=self.watch.losses)
        while not self._stopping:
            reason: WorkerLost | None = await self._serve()
            while reason is not None and not self._stopping:
                self._lose(reason)
                losses.append(time.monotonic())
                if len(losses) == self.watch.losses and losses[-1] - losses[0] < self.watch.window:
                    raise WorkerLost(f"{self.name}: {reason.message}; {len(losses)} workers were lost, giving up")
                logger.warning("%s: %s; starting another worker", self.name, reason.message)
                self.restarts += 1
                reason = await self._started_again()

    async def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Generation:
        """Hand prompts to the engine. Raises EngineError for what it refuses, WorkerLost."""
        if self.ready is None or self._process is None:
            raise WorkerLost(f"the engine of {self.name} is being restarted")
        ids = tuple(f"{next(self._numbers)}" for _ in prompts)
        generation = Generation(self, ids, params)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[ids] = answer
        self._generations |= dict.fromkeys(ids, generation)
        try:
            self._process.send(Add(ids, tuple(map(tuple, prompts)), params))
            await answer
        except BaseException as error:
            self.forget(generation, abort=not isinstance(error, EngineError | WorkerLost))
            raise
        finally:
            self._waiting.pop(ids, None)
        return generation

    def forget(self, generation: Generation, abort: bool) -> None:
        """Listen no more to these requests."""
        known = [self._generations.pop(request, None) for request in generation.ids]
        if abort and any(known) and self._process is not None:
            self._process.send(Abort(generation.ids))

    def give_up(self) -> None:
        """Everything that runs ends with WorkerLost, and no worker is started any more."""
        self._stopping = True
        self._loaded = self.ready is not None
        self._lose(WorkerLost("the server is shutting down"), kill=False)

    async def stop(self) -> None:
        """End the worker."""
        if not self._stopping:
            self.give_up()
        if self._process is not None and self._loaded:
            await self._process.stop()
        elif self._process is not None:
            self._process.kill()  # one that loads would not listen

    async def _started_again(self) -> WorkerLost | None:
        """Start another worker; what came of it, if it was lost at once."""
        try:
            await self.start()
        except WorkerLost as lost:
            return lost
        return None

    async def _serve(self) -> WorkerLost:
        """Take in what the worker sends, until it is lost; why it was."""
        assert self._process is not None
        process = self._process
        try:
            while True:
                self._take(await process.receive(self.watch.silence))
        except WorkerLost as lost:
            return lost

    def _take(self, message: Any) -> None:
        if isinstance(message, Stepped):
            self.stats = message.stats
            for request in message.started:
                if request in self._generations:
                    self._generations[request].take(Started(request))
            for output in message.outputs:
                if output.request_id in self._generations:
                    self._generations[output.request_id].take(output)
        elif isinstance(message, Added | Refused):
            self._answer(message)
        elif isinstance(message, Failed):
            raise WorkerLost(f"the engine failed: {message.message}", hint=message.hint)
        elif isinstance(message, Beat) and message.busy > self.watch.step:
            raise WorkerLost(f"the engine has been at one step for {message.busy:.0f} s")

    def _answer(self, message: Added | Refused) -> None:
        answer = self._waiting.get(message.ids)
        if answer is None or answer.done():
            return
        if isinstance(message, Added):
            answer.set_result(None)
        else:
            answer.set_exception(EngineError(message.message, hint=message.hint))

    def _lose(self, reason: WorkerLost, kill: bool = True) -> None:
        """There is no worker any more: nothing that was asked of it will come."""
        self.ready = None
        self.stats = EngineStats()
        if kill and self._process is not None:
            self._process.kill()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(reason)
        for generation in dict.fromkeys(self._generations.values()):
            generation.take(reason)
        self._generations.clear()


class _Process:
    """A worker process and the pipe to it."""

    def __init__(self, spec: WorkerSpec) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "gossamer.serve.worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        ours.setblocking(False)
        self._socket = ours
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._unsent = [frame(spec)]

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send(self, message: ToWorker) -> None:
        """Send soon. A process that is gone gets nothing, and `receive` tells."""
        if self._streams is None:
            self._unsent.append(frame(message))
        elif not self._streams[1].is_closing():
            self._streams[1].write(frame(message))

    async def receive(self, patience: float) -> Any:
        """The next message. Raises WorkerLost if the process ends, or says nothing for `patience` seconds."""
        try:
            if self._streams is None:
                await self._connect()
            assert self._streams is not None
            reader = self._streams[0]
            length = size(await self._heard(reader, patience))
            async with asyncio.timeout(patience):
                return parsed(await reader.readexactly(length))
        except TimeoutError:
            raise WorkerLost(f"the engine's process has given no sign of life for {patience:g} s") from None
        except (asyncio.IncompleteReadError, OSError):
            raise WorkerLost(await self._cause_of_death()) from None

    def kill(self) -> None:
        """End it at once, whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.kill()
        # The kernel may take a while to take a large process apart: no reason for everybody else to wait.
        threading.Thread(target=self._popen.wait, daemon=True).start()
        self._close()

    async def stop(self) -> None:
        """Ask it to end, and see to it that it does."""
        self.send(Stop())
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._popen.wait, SECONDS_TO_EXIT)
        self.kill()

    async def _connect(self) -> None:
        self._streams = await asyncio.open_connection(sock=self._socket)
        for data in self._unsent:
            self._streams[1].write(data)
        self._unsent.clear()

    async def _heard(self, reader: asyncio.StreamReader, patience: float) -> bytes:
        """The next header. Patience is counted in short waits: if this process was stopped, that was no silence."""
        header = asyncio.ensure_future(reader.readexactly(HEADER))
        try:
            for _ in range(10):
                await asyncio.wait([header], timeout=patience / 10)
                if header.done():
                    return header.result()
            raise TimeoutError
        finally:
            header.cancel()

    async def _cause_of_death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = await asyncio.to_thread(self._popen.wait, SECONDS_TO_EXIT)
            how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            return f"the engine's process {how}"
        return "the engine's process closed its pipe"

    def _close(self) -> None:
        if self._streams is None:
            self._socket.close()
        else:
            self._streams[1].close()


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
