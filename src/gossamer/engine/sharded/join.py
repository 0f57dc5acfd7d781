"""A machine that holds ranks for an engine on another one: asks which, starts them, and ends when they do."""

from __future__ import annotations

import logging
import socket
import subprocess
import time

from ... import settings
from ...errors import EngineError
from ...parallel.wire import Message, Wire
from .nodes import SECONDS_TO_JOIN, interface, knock
from .process import stage_memories, start_rank

SECONDS_BETWEEN_TRIES = 0.5

logger = logging.getLogger("gossamer.engine")


def join(address: tuple[str, int], seconds: float = SECONDS_TO_JOIN) -> None:
    """Hold ranks until the engine at this address has ended. Raises EngineError if it, or a rank, was lost.

    `seconds`: how long to wait for an engine that takes in nodes.
    """
    token = settings.join_token()
    given = _place(address, token, seconds)
    first, count, tp = (int(given.value(name, int)) for name in ("first", "ranks", "tp"))
    silence = float(given.value("silence", (int, float)))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with stage_memories(count, tp) as memories:
            for rank, memory in enumerate(memories, first):
                try:
                    end = knock(address, token, {"rank": rank})
                except OSError as error:
                    raise EngineError(f"the engine at {_said(address)} has gone: {error}") from error
                with end:
                    _give_up_after(end, silence)
                    processes.append(start_rank(end, memory, interface(end.getsockname()[0])))
        logger.info("holding ranks %s of the engine at %s", [*range(first, first + count)], _said(address))
        _wait(processes, first, address)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _place(address: tuple[str, int], token: bytes, seconds: float) -> Message:
    """Which ranks the engine wants here, once it is there. Raises EngineError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with knock(address, token, {}) as end:
                answer = Wire(end).receive()
            break
        except (EOFError, OSError) as error:
            if time.monotonic() > deadline:
                raise EngineError(f"no engine takes in nodes at {_said(address)}: {error}") from error
            time.sleep(SECONDS_BETWEEN_TRIES)
    if answer.kind != "place":
        hint = answer.values.get("hint")
        said = answer.values.get("message")
        raise EngineError(f"the engine at {_said(address)}: {said}", hint=hint if isinstance(hint, str) else None)
    return answer


def _give_up_after(end: socket.socket, silence: float) -> None:
    """Have the kernel end a connection over which beats go unacknowledged for so many seconds (Linux)."""
    end.settimeout(None)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence * 1000))


def _wait(processes: list[subprocess.Popen[bytes]], first: int, address: tuple[str, int]) -> None:
    """Until all have ended. Raises EngineError for one that failed: no other can go on without it."""
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        _require_sound(processes, first, address)
    _require_sound(processes, first, address)


def _require_sound(processes: list[subprocess.Popen[bytes]], first: int, address: tuple[str, int]) -> None:
    for rank, process in enumerate(processes, first):
        if process.returncode:
            raise EngineError(
                f"rank {rank} has ended with exit code {process.returncode}",
                hint=f"the engine at {_said(address)} is gone, cannot be reached any more, or says why",
            )


def _said(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"
