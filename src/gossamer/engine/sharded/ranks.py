"""The processes of a model's ranks: launched here or admitted from other machines, spoken to, watched, and ended.

A rank is lost when its process ends, says that it gives up, or is silent for too long; then all ranks are killed, those
of other machines by the end of their connections, and whatever is asked of them is an EngineError that names the rank.
Knows no step.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import TCPStore

from ... import errors
from ...errors import EngineError, GossamerError
from ...parallel.wire import Message, Wire
from .nodes import Door, Nodes, interface
from .process import stage_memories, start_rank

LOADING_PATIENCE = 12.0
"""While it loads a rank may be silent for so many times longer: one call into a library can take a while."""
SECONDS_TO_END = 2.0
SECONDS_TO_MEET = 300.0

logger = logging.getLogger("gossamer.engine")


@dataclass(frozen=True)
class Watch:
    """When a rank counts as lost."""

    silence: float = 10.0
    """Seconds without a sign of life."""
    step: float = 300.0
    """Seconds for one step of all ranks."""


WATCH = Watch()


class Ranks:
    """The ranks, those of this machine first, and one thread for each that listens to it."""

    def __init__(self, count: int, tp: int, watch: Watch, nodes: Nodes | None) -> None:
        self.count, self.tp, self.watch, self.nodes = count, tp, watch, nodes
        self._folder = tempfile.TemporaryDirectory(prefix="gossamer-ranks-", ignore_cleanup_errors=True)
        self._processes: list[subprocess.Popen[bytes]] = []
        """Of this machine's ranks."""
        self._wires: list[Wire] = []
        self._homes: list[str] = []
        """What a message says of where each rank is."""
        self._heard: list[float] = []
        self._gone: set[int] = set()
        """Ranks that are not listened to any more."""
        self._patience = watch.silence * LOADING_PATIENCE
        self._inbox: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()
        self._lost: GossamerError | None = None
        self._ended = threading.Event()
        self._losing = threading.Lock()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def start(self, spec: dict[str, Any]) -> list[Message]:
        """Launch all ranks and wait until they have loaded their parts; what they say of themselves."""
        try:
            if self.nodes is None:
                self._launch(self.count, "lo" if sys.platform == "linux" else None)
                return self._load(spec | {"store": os.path.join(self._folder.name, "store"), "neighbours": self.tp})
            with Door(self.nodes, self.count, self.tp, self.watch.silence) as door:
                network = interface(door.address[0])
                door.admit()
            self._launch(door.ranks_here, network)
            for rank in range(door.ranks_here, self.count):
                wire, peer = door.admitted[rank]
                self._attach(wire, f" on {peer}")
            store = _store(door.address[0])  # it is there until all have met
            place = {"store": f"tcp://{store.host}:{store.port}", "neighbours": min(self.tp, door.ranks_here)}
            return self._load(spec | place)
        except BaseException:
            self._lost = self._lost or EngineError("the ranks of this model could not be started")
            self.kill()
            raise

    def ask(self, message: Message, ranks: range | None = None) -> list[Message]:
        """Tell these ranks (None: all) the same; their answers. Raises EngineError when a rank is lost."""
        return self.ask_in_turn([message], ranks)[0]

    def ask_in_turn(self, messages: Sequence[Message], ranks: range | None = None) -> list[list[Message]]:
        """The same for several messages, of which no rank waits for the others to have answered."""
        ranks = ranks or range(self.count)
        self.check()
        for message in messages:
            for rank in ranks:
                self._tell(rank, message)
        survivable = all(message.kind == "reserve" for message in messages)
        return self._gather(ranks, len(messages), self.watch.step, survivable)

    def check(self) -> None:
        """Raise EngineError if a rank is lost."""
        if self._lost is not None:
            raise type(self._lost)(self._lost.message, hint=self._lost.hint)

    def kill(self) -> None:
        """End all processes, now. Safe to call twice."""
        if self._lost is None:
            self._lost = EngineError("the ranks of this model have been ended")
            self._dismiss(range(len(self._processes), len(self._wires)))
        self._ended.set()
        self._end_processes()
        for wire in self._wires:
            wire.close()
        self._folder.cleanup()

    def _dismiss(self, ranks: range) -> None:
        """Tell ranks of other machines that no more will be asked, and give them a moment to go."""
        for rank in ranks:
            with contextlib.suppress(OSError):
                self._wires[rank].send(Message("stop"))
        deadline = time.monotonic() + SECONDS_TO_END
        while not self._gone.issuperset(ranks) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _end_processes(self) -> None:
        for process in self._processes:
            process.kill()
        for wire in self._wires[len(self._processes) :]:
            wire.cut()
        for process in self._processes:
            process.wait()

    def _launch(self, count: int, network: str | None) -> None:
        """Start the ranks of this machine."""
        with stage_memories(count, self.tp) as memories:
            for memory in memories:
                ours, theirs = socket.socketpair()
                with theirs:
                    self._processes.append(start_rank(theirs, memory, network))
                self._attach(Wire(ours))

    def _attach(self, wire: Wire, home: str = "") -> None:
        """Listen to the next rank."""
        self._wires.append(wire)
        self._homes.append(home)
        self._heard.append(time.monotonic())
        rank = len(self._wires) - 1
        threading.Thread(target=self._listen, args=(rank,), name=f"rank {rank}", daemon=True).start()

    def _load(self, spec: dict[str, Any]) -> list[Message]:
        """Have all ranks load their parts, and watch them from then on."""
        for rank in range(self.count):
            self._tell(rank, Message("load", spec | {"rank": rank}))
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        (ready,) = self._gather(range(self.count), 1, self.watch.step)
        self._patience = self.watch.silence
        return ready

    def _tell(self, rank: int, message: Message) -> None:
        try:
            self._wires[rank].send(message)
        except OSError as error:
            self._lose(rank, f"cannot be reached ({error})")

    def _listen(self, rank: int) -> None:
        """Take in what a rank says until it is gone."""
        while not self._ended.is_set():
            try:
                message = self._wires[rank].receive()
            except (EOFError, OSError):
                self._gone.add(rank)
                self._lose(rank, "has ended")
                return
            except EngineError as error:
                self._lose(rank, f"failed: {error.message}")
                return
            self._heard[rank] = time.monotonic()
            if message.kind != "beat":
                self._inbox.put((rank, message))

    def _watch(self) -> None:
        """Lose a rank that is silent. Where this process itself was stopped, it heard nobody: silence begins anew."""
        looked = time.monotonic()
        while not self._ended.wait(0.2):
            now = time.monotonic()
            if now - looked > self.watch.silence / 2:
                self._heard = [now] * len(self._heard)
            looked = now
            for rank, heard in enumerate(self._heard):
                if now - heard > self._patience:
                    self._lose(rank, f"has been silent for {now - heard:.0f} s")

    def _lose(self, rank: int, why: str, error: GossamerError | None = None) -> None:
        """Note the first loss, and end all ranks: the others wait for the one that is lost."""
        with self._losing:
            if error is not None and self._lost is not None:
                self._lost = error  # its own words came after its end was seen
            if self._lost is not None or self._ended.is_set():
                return
            name = f"rank {rank} of {self.count}{self._homes[rank]}"
            self._lost = error or EngineError(f"{name} {why}")
            logger.error("%s %s: all ranks are ended", name, why)
            self._ended.set()
        self._end_processes()
        self._inbox.put(None)

    def _gather(self, ranks: range, count: int, seconds: float, survivable: bool = False) -> list[list[Message]]:
        """So many answers of each of these ranks, in their order. Raises what a rank says has failed.

        After that all ranks are ended, unless it was `survivable`: they would not be in step any more.
        """
        found: dict[int, list[Message]] = {rank: [] for rank in ranks}
        deadline = time.monotonic() + seconds
        while late := [rank for rank in ranks if len(found[rank]) < count]:
            try:
                item = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self._lose(late[0], f"has not answered for {seconds:.0f} s")
                continue
            if item is not None and item[1].kind == "failed" and not survivable:
                self._lose(item[0], "failed", self._told(*item))  # its own words, also where its end was seen first
            self.check()
            assert item is not None  # else a rank would be lost
            found[item[0]].append(item[1])
        for rank in ranks:
            for message in found[rank]:
                if message.kind == "failed":
                    raise self._told(rank, message)
        return [list(answers) for answers in zip(*(found[rank] for rank in ranks), strict=True)]

    def _told(self, rank: int, message: Message) -> GossamerError:
        """The error that a rank tells of."""
        kind = getattr(errors, message.value("error", str), EngineError)
        if not (isinstance(kind, type) and issubclass(kind, GossamerError)) or kind is errors.UnknownName:
            kind = EngineError
        hint = message.values.get("hint")
        where = f"rank {rank}{self._homes[rank]}"
        return kind(f"{where}: {message.value('message', str)}", hint=hint if isinstance(hint, str) else None)


def _store(host: str) -> TCPStore:
    """Where the ranks of several machines meet, at this address alone."""
    listener = socket.create_server((host, 0))
    address, port = listener.getsockname()
    patience = datetime.timedelta(seconds=SECONDS_TO_MEET)
    return TCPStore(address, port, None, True, patience, wait_for_workers=False, master_listen_fd=listener.detach())
