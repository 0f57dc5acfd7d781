"""How the processes of ranks are started on a machine, and the memory that those of one stage sum in there."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

from ...kernels import cpu as kernels
from ...kernels import dispatch


def start_rank(end: socket.socket, memory: int | None, interface: str | None) -> subprocess.Popen[bytes]:
    """A process that is told at this end of a connection what to do; it has the end, and no one else needs it.

    `memory`: descriptor of what its stage sums in; `interface`: of the network, by which it talks to other ranks.
    """
    passed = [end.fileno(), *([] if memory is None else [memory])]
    environment = dict(os.environ)
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    own = [str(end.fileno()), str(os.getpid()), *map(str, passed[1:])]
    command = [sys.executable, "-m", __package__ + ".rank", *own]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=passed, env=environment
    )


@contextlib.contextmanager
def stage_memories(ranks: int, tp: int) -> Iterator[list[int | None]]:
    """For each rank of this machine a descriptor of memory that its stage sums in; None where gloo has to do.

    That is so where such memory cannot be had, and where stages have ranks on other machines.
    """
    stages = [_shared_memory(tp) if ranks % tp == 0 else None for _ in range(-(-ranks // tp))]
    try:
        yield [stages[rank // tp] for rank in range(ranks)]
    finally:
        for memory in stages:
            if memory is not None:
                os.close(memory)


def _shared_memory(tp: int) -> int | None:
    if tp == 1 or not hasattr(os, "memfd_create") or dispatch.isa() == "reference":
        return None
    with contextlib.suppress(OSError):
        memory = os.memfd_create("gossamer-ranks")
        os.ftruncate(memory, kernels.extension().SharedSum.bytes(tp))
        return memory
    return None
