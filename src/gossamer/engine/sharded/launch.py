"""The backend of a model that several processes hold: launches the ranks, hands each step to all, and watches them.

A rank is lost when its process ends, says that it gives up, or is silent for too long; then all ranks are killed, those
of other machines by the end of their connections, and whatever is asked of the backend is an EngineError that names the
rank. Knows no request.
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
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from ... import errors
from ...checkpoint import Checkpoint
from ...checkpoint.memory import require_memory
from ...errors import EngineError, GossamerError
from ...parallel import Plan
from ...parallel.wire import Message, Wire
from ..backend import BLOCK_SIZE, Activations, Backend, Batch, Progress, Weights
from .identity import identity
from .micro import micro_batches
from .nodes import Door, Nodes, interface
from .process import stage_memories, start_rank
from .view import plan_checkpoint

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


class ShardedBackend(Backend):
    """A checkpoint over tp * pp processes, of this machine or of several `nodes` that join it.

    Raises UsageError, EngineError, CheckpointError, DoesNotFit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tp: int,
        pp: int,
        backend: Literal["cpu", "reference"],
        *,
        weights: Weights = "stored",
        activations: Activations = "auto",
        kv_cache: str = "auto",
        nodes: Nodes | None = None,
        watch: Watch = Watch(),
        progress: Progress | None = None,
    ) -> None:
        self.name, self.config, self.watch = backend, checkpoint.config, watch
        self.plan: Plan = plan_checkpoint(checkpoint, tp, pp)
        self._num_blocks = 0
        self._nodes = 1 if nodes is None else nodes.nnodes
        self._stages_at_once = min(pp, self._nodes)  # those of one machine share its processors
        self._ranks = _Ranks(tp * pp, tp, watch, nodes)
        self._close = weakref.finalize(self, self._ranks.kill)
        choice = {"backend": backend, "weights": weights, "activations": activations, "kv_cache": kv_cache}
        spec = choice | {"model": checkpoint.name, "tp": tp, "pp": pp, "timeout": watch.step}
        if nodes is not None:
            spec["identity"] = identity(checkpoint)
        if progress is not None:
            first = "loading" if nodes is None else f"waiting for gossamer join {nodes.host}:{nodes.port}"
            progress(first, 0, tp * pp)
        ready = self._ranks.start(spec)
        if progress is not None:
            progress("loading", tp * pp, tp * pp)
        sizes = [r.value("kv_bytes_per_token", float) for r in ready]
        self.kv_bytes_per_token = float(sum(sizes))
        self._kv_bytes_here = float(sum(sizes[: len(self.pids)]))
        self.kv_dtype = ready[0].value("kv_dtype", str)
        coded = any(r.value("activations", str) == "int8" for r in ready)
        self.activations = "int8" if coded else "exact"
        self.rank_bytes = [int(r.value("weight_bytes", int)) for r in ready]
        """Bytes of weights that each rank holds."""
        self._description = ready[0].value("description", str)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks of this machine."""
        return self._ranks.pids

    def reserve(self, num_blocks: int) -> None:
        if 0 < num_blocks <= self._num_blocks:
            return
        require_memory(
            int(self._kv_bytes_here * BLOCK_SIZE * max(0, num_blocks - self._num_blocks)),
            f"the KV cache for {num_blocks * BLOCK_SIZE:,} tokens",
            "ask for fewer tokens, or for fewer prompts at a time",
        )
        self._ranks.ask(Message("reserve", {"blocks": num_blocks}))
        self._num_blocks = num_blocks

    def forward(self, batch: Batch) -> Tensor:
        return self._joined(self._step("forward", batch))

    def argmax(self, batch: Batch) -> Tensor:
        from ..sampling import raise_not_finite

        values, tokens = (np.stack(each) for each in zip(*self._step("argmax", batch), strict=True))
        if not np.isfinite(values).all():
            raise_not_finite()
        best = values.argmax(0)  # of equals the first rank, whose tokens come first
        return torch.from_numpy(np.take_along_axis(tokens, best[None], 0)[0])

    def hidden(self, batch: Batch) -> Tensor:
        (states,) = self._step("hidden", batch)[0]
        return torch.from_numpy(np.array(states))

    def head(self, states: Tensor) -> Tensor:
        if states.ndim != 2 or states.shape[1] != self.config.hidden_size:
            raise EngineError(f"states are {states.dtype} {list(states.shape)}")
        message = Message("head", arrays=(states.float().numpy(),))
        return self._joined([reply.arrays for reply in self._ranks.ask(message, self._last)])

    def check_alive(self) -> None:
        self._ranks.check()

    @property
    def weight_bytes(self) -> int:
        return sum(self.rank_bytes)

    def describe(self) -> str:
        nodes = "" if self._nodes == 1 else f" on {self._nodes} nodes"
        return f"{self._description}; {self.plan.tp} ranks by {self.plan.pp} stages{nodes}"

    def close(self) -> None:
        """End the ranks."""
        self._close()

    @property
    def _last(self) -> range:
        """Ranks of the last stage."""
        count = len(self.plan.shares)
        return range(count - self.plan.tp, count)

    def _step(self, verb: str, batch: Batch) -> list[tuple[np.ndarray, ...]]:
        """Results of the last stage's ranks."""
        batch.check(self.config, self._num_blocks)
        parts, results = zip(*micro_batches(batch, self._stages_at_once), strict=True)
        answers = self._ranks.ask_in_turn([_step_message(verb, part) for part in parts])
        if len(answers) == 1:
            return [answers[0][rank].arrays for rank in self._last]
        order = np.argsort(np.concatenate(results))
        every = (zip(*(answer[rank].arrays for answer in answers), strict=True) for rank in self._last)
        return [tuple(np.concatenate(each)[order] for each in arrays) for arrays in every]

    def _joined(self, parts: list[tuple[np.ndarray, ...]]) -> Tensor:
        return torch.from_numpy(np.concatenate([logits for (logits,) in parts], -1))


class _Ranks:
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
                self._lose(item[0], "failed", _told(*item))  # its own words, also where its end was seen first
            self.check()
            assert item is not None  # else a rank would be lost
            found[item[0]].append(item[1])
        for rank in ranks:
            for message in found[rank]:
                if message.kind == "failed":
                    raise _told(rank, message)
        return [list(answers) for answers in zip(*(found[rank] for rank in ranks), strict=True)]


def _step_message(verb: str, batch: Batch) -> Message:
    return Message("step", {"verb": verb}, tuple(getattr(batch, field.name) for field in fields(batch)))


def _told(rank: int, message: Message) -> GossamerError:
    """The error that a rank tells of."""
    kind = getattr(errors, message.value("error", str), EngineError)
    if not (isinstance(kind, type) and issubclass(kind, GossamerError)) or kind is errors.UnknownName:
        kind = EngineError
    hint = message.values.get("hint")
    return kind(f"rank {rank}: {message.value('message', str)}", hint=hint if isinstance(hint, str) else None)


def _store(host: str) -> TCPStore:
    """Where the ranks of several machines meet, at this address alone."""
    listener = socket.create_server((host, 0))
    address, port = listener.getsockname()
    patience = datetime.timedelta(seconds=SECONDS_TO_MEET)
    return TCPStore(address, port, None, True, patience, wait_for_workers=False, master_listen_fd=listener.detach())
