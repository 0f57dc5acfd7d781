"""Machines that hold ranks: where they meet, who may join, and which ranks each is given. Knows no model.

The engine listens at an address until the ranks of all other nodes have connected; `join.py` is the other side. Each
proves to the other that it knows a token, which is not sent. What follows is neither encrypted nor signed.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeAlias
from urllib.parse import urlsplit

import psutil

from ... import __version__, settings
from ...errors import EngineError, GossamerError, UsageError
from ...parallel.roofline import place
from ...parallel.wire import Message, Wire

PORT = 29500
SECONDS_TO_JOIN = 300.0
SECONDS_TO_PROVE = 5.0
"""Most that a door waits for the one who stands there."""
SECONDS_AT_DOOR = 60.0
"""Most that a node waits at a door, where others may stand before it."""
NONCE_BYTES = 32
MAC_BYTES = 32
_PURPOSE = b"gossamer join 1"

Side: TypeAlias = Literal["engine", "node"]

logger = logging.getLogger("gossamer.engine")


class Nodes(NamedTuple):
    """So many machines with as many ranks each, in order, the first ranks beside the engine, which listens here."""

    nnodes: int
    host: str
    port: int

    @classmethod
    def at(cls, nnodes: int, address: str) -> Nodes:
        """Nodes that meet at HOST[:PORT]. Raises UsageError."""
        return cls(nnodes, *host_and_port(address))


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST[:PORT]. Raises UsageError."""
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.netloc != address or "@" in address:
        raise UsageError(f"{address!r} is not HOST or HOST:PORT", hint=f"such as 10.0.0.1 or 10.0.0.1:{PORT}")
    return host, PORT if port is None else port


def interface(address: str) -> str:
    """The network interface of this machine that has an IPv4 address. Raises UsageError."""
    for name, found in psutil.net_if_addrs().items():
        if any(each.address == address for each in found):
            return str(name)
    raise UsageError(
        f"no network interface of this machine has the address {address}",
        hint="--master-addr is where the other machines reach this one",
    )


def prove(end: socket.socket, token: bytes, side: Side) -> None:
    """Show that this side knows the token, and have the other side show it. Raises EngineError, OSError.

    Both send random bytes; then the node an HMAC-SHA256 of all of them, and if that is right the engine another.
    """
    ours = secrets.token_bytes(NONCE_BYTES)
    end.sendall(ours)
    theirs = _exactly(end, NONCE_BYTES)
    nonces = ours + theirs if side == "engine" else theirs + ours

    def mac(of: bytes) -> bytes:
        return hmac.digest(token, _PURPOSE + of + nonces, "sha256")

    if side == "node":
        end.sendall(mac(b"node"))
    if not hmac.compare_digest(_exactly(end, MAC_BYTES), mac(b"engine" if side == "node" else b"node")):
        raise _another_token()
    if side == "engine":
        end.sendall(mac(b"engine"))


class Door:
    """Where the ranks of other nodes come in. Raises UsageError, EngineError where it cannot be."""

    def __init__(self, nodes: Nodes, ranks: int, tp: int, silence: float) -> None:
        """`ranks`: of all nodes; `silence`: seconds after which a node gives up an engine that does not answer."""
        self.nodes, self.tp, self.silence = nodes, tp, silence
        self._token = settings.join_token()
        homes = place(ranks, nodes.nnodes)
        self.ranks_here = homes.count(0)
        self.admitted: dict[int, tuple[Wire, str]] = {}
        """Of each rank that has come: the connection, and the address that it came from."""
        self._placed = 1
        try:
            self._listener = socket.create_server((nodes.host, nodes.port))
        except OSError as error:
            raise EngineError(
                f"cannot listen at {nodes.host}:{nodes.port}: {error}",
                hint="--master-addr is an address of this machine, with a port that is free",
            ) from error
        self.address: tuple[str, int] = self._listener.getsockname()
        """IPv4 address and port."""

    def admit(self, seconds: float = SECONDS_TO_JOIN) -> None:
        """Let in all ranks of the other nodes. Raises EngineError if they have not come in time."""
        deadline, missing = time.monotonic() + seconds, self.ranks_here * (self.nodes.nnodes - 1)
        host, port = self.address
        logger.info("waiting for %d more nodes: gossamer join %s:%d", self.nodes.nnodes - 1, host, port)
        while len(self.admitted) < missing:
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                end, (peer, _) = self._listener.accept()
            except TimeoutError:
                come = f"{len(self.admitted)} of {missing} ranks of other nodes"
                raise EngineError(
                    f"{come} have joined in {seconds:.0f} s", hint=f"gossamer join {host}:{port} on each other machine"
                ) from None
            try:
                self._take(end, peer)
            except (EOFError, OSError, GossamerError) as error:
                logger.warning("%s was turned away: %s", peer, error or "it went")
                end.close()

    def close(self) -> None:
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        if kind is not None:
            for wire, _ in self.admitted.values():
                wire.close()

    def _take(self, end: socket.socket, peer: str) -> None:
        end.settimeout(SECONDS_TO_PROVE)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        prove(end, self._token, "engine")
        wire = Wire(end)
        asked = wire.receive()
        try:
            rank = self._asked_for(asked)
        except EngineError as error:
            wire.send(Message("failed", {"message": error.message, "hint": error.hint}))
            raise
        if rank is None:
            first = self._placed * self.ranks_here
            own = {"first": first, "ranks": self.ranks_here, "tp": self.tp, "silence": self.silence}
            wire.send(Message("place", own))
            wire.close()
            self._placed += 1
        else:
            end.settimeout(None)
            self.admitted[rank] = wire, peer

    def _asked_for(self, asked: Message) -> int | None:
        """The rank that somebody brings; None: it asks which ranks it may bring. Raises EngineError."""
        version = asked.value("version", str)
        if version != __version__:
            raise EngineError(f"the engine is gossamer {__version__}, not {version:.40}", hint="install the same there")
        if asked.values.get("rank") is None:
            if self._placed == self.nodes.nnodes:
                raise EngineError(f"all {self.nodes.nnodes} nodes have joined already")
            return None
        rank: int = asked.value("rank", int)
        if rank not in range(self.ranks_here, self._placed * self.ranks_here) or rank in self.admitted:
            raise EngineError(f"rank {rank} is not wanted")
        return rank


def knock(address: tuple[str, int], token: bytes, values: Mapping[str, Any]) -> socket.socket:
    """A connection to an engine's door, after both proofs and the node's first words. Raises EngineError, OSError."""
    end = socket.create_connection(address, SECONDS_AT_DOOR)
    try:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            prove(end, token, "node")
        except (EOFError, ConnectionResetError):
            raise _another_token() from None
        Wire(end).send(Message("join", {"version": __version__, **values}))
    except BaseException:
        end.close()
        raise
    return end


def _another_token() -> EngineError:
    return EngineError(
        "the other side does not know the same token", hint=f"set {settings.JOIN_TOKEN} to the same on every machine"
    )


def _exactly(end: socket.socket, count: int) -> bytes:
    """So many bytes. Raises EOFError, OSError."""
    data = b""
    while len(data) < count:
        piece = end.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
