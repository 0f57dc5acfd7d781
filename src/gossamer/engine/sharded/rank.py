"""The process of one rank: it holds a part of the weights and computes its part of every step.

    python -m gossamer.engine.sharded.rank FD PARENT [MEMORY]

FD: its end of a connection to the engine; PARENT: id of the process that started it, the engine's or that of `join.py`;
MEMORY: descriptor of the memory that its stage sums in. The first message says what to load. A thread beats,
so that a stopped process is known from one whose step takes long. The rank ends when the engine does, whatever either
of them is doing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback

import numpy as np
import torch

from ... import settings
from ...checkpoint import open_checkpoint
from ...errors import EngineError, GossamerError
from ...kernels import cpu as kernels
from ...parallel.group import ProcessGroup
from ...parallel.wire import Message, Wire
from ..backend import Batch
from ..child import die_with
from .identity import require_same
from .part import Part
from .view import plan_checkpoint

SECONDS_PER_BEAT = 0.25


def load(message: Message, memory: int | None) -> Part:
    """The part of a model that a message asks for. Raises EngineError, CheckpointError, DoesNotFit."""
    rank, tp, pp, neighbours = (int(message.value(name, int)) for name in ("rank", "tp", "pp", "neighbours"))
    timeout = float(message.value("timeout", (int, float)))
    threads = max(1, settings.threads() // neighbours)
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(message.value("model", str))
    if message.values.get("identity") is not None:
        require_same(checkpoint, message.value("identity", dict))
    plan = plan_checkpoint(checkpoint, tp, pp)
    if not 0 <= rank < len(plan.shares):
        raise EngineError(f"rank {rank} is none of {len(plan.shares)}")
    shared_sum = None
    if memory is not None:
        shared_sum = kernels.extension().SharedSum(memory, rank % tp, tp, timeout)
        os.close(memory)
    peers = ProcessGroup(rank, tp, pp, message.value("store", str), timeout, shared_sum)
    choice = {key: message.value(key, str) for key in ("backend", "weights", "activations", "kv_cache")}
    return Part.load(checkpoint, plan.shares[rank], peers, threads=threads, **choice)


def answer(part: Part, message: Message) -> Message:
    """What a message asks for. Raises EngineError for nonsense, and what the backend raises."""
    results: tuple[torch.Tensor, ...] | None = None
    if message.kind == "reserve":
        part.backend.reserve(message.value("blocks", int))
    elif message.kind == "step":
        verb = message.value("verb", str)
        if verb not in ("forward", "argmax", "hidden") or len(message.arrays) != 5:
            raise EngineError(f"a step of {verb!r:.20} with {len(message.arrays)} arrays")
        results = part.run(verb, Batch(*message.arrays))
    elif message.kind == "head":
        (states,) = message.arrays
        results = part.head(torch.from_numpy(np.array(states)))
    else:
        raise EngineError(f"a rank was sent {message.kind!r}")
    return Message("done", arrays=tuple(result.numpy() for result in results or ()))


def _ready(part: Part) -> Message:
    backend = part.backend
    return Message(
        "ready",
        {
            "kv_bytes_per_token": backend.kv_bytes_per_token,
            "kv_dtype": backend.kv_dtype,
            "activations": backend.activations,
            "weight_bytes": backend.weight_bytes,
            "description": backend.describe(),
        },
    )


def _failed(error: BaseException) -> Message:
    if isinstance(error, GossamerError):
        return Message("failed", {"error": type(error).__name__, "message": error.message, "hint": error.hint})
    return Message("failed", {"error": "EngineError", "message": f"{type(error).__name__}: {error}", "hint": None})


def _serve(wire: Wire, memory: int | None) -> None:
    part = load(wire.receive(), memory)
    wire.send(_ready(part))
    while (message := wire.receive()).kind != "stop":
        try:
            wire.send(answer(part, message))
        except GossamerError as error:
            if message.kind != "reserve":  # which changes nothing when it fails; the ranks are not in step after others
                raise
            wire.send(_failed(error))


def _beat(wire: Wire) -> None:
    while True:
        try:
            wire.send(Message("beat"))
        except OSError:
            os._exit(1)
        time.sleep(SECONDS_PER_BEAT)


def main(arguments: list[str]) -> int:
    """Compute until the engine says stop or goes; exit code 1 if something failed."""
    end, parent, *memory = map(int, arguments)
    die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the engine's process, which ends its ranks
    wire = Wire(socket.socket(fileno=end))
    threading.Thread(target=_beat, args=(wire,), name="beat", daemon=True).start()
    try:
        _serve(wire, memory[0] if memory else None)
    except (EOFError, OSError):
        os._exit(1)
    except Exception as error:
        if settings.debugging():
            traceback.print_exc()
        with contextlib.suppress(OSError):
            wire.send(_failed(error))
        os._exit(1)
    os._exit(0)  # libraries' threads may wait for ranks that have gone


if __name__ == "__main__":
    main(sys.argv[1:])
