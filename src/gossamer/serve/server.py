"""The whole server: bind, start the workers, serve, drain, exit. `cli/serve.py` says what is asked for.

SIGTERM and SIGINT begin a drain: new requests get 503, those in flight have `drain_seconds` to finish, then everything
ends and the exit code is 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from ..checkpoint import Tokenizer, chat_template
from ..errors import GossamerError, UsageError
from .admission import Queue
from .app import make_app
from .client import EngineClient, Watch, WorkerLost
from .messages import WorkerSpec
from .service import Limits, Served, Service
from .transport import PatientProtocol

SECONDS_TO_CLOSE = 3
"""For connections, once their answers are over."""
SECONDS_PER_LOOK = 0.05


@dataclass(frozen=True)
class ModelSpec:
    """A model to serve: its name in requests, its tokenizer, and how its worker makes the engine."""

    name: str
    tokenizer: Callable[[], Tokenizer]
    worker: WorkerSpec


@dataclass(frozen=True)
class ServerOptions:
    """How to serve."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = field(default=None, repr=False)
    insecure: bool = False
    """Serve beyond this machine without a key."""
    drain_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)
    watch: Watch = field(default_factory=Watch)


def bind(options: ServerOptions) -> socket.socket:
    """A socket on the address, on which nobody listens yet. Raises UsageError."""
    if options.api_key == "":
        raise UsageError("the API key is empty", hint="leave --api-key and GOSSAMER_API_KEY out to serve without one")
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise UsageError(f"there is no address {options.host!r}: {error}") from error
    if not _is_loopback(str(address[0])) and options.api_key is None and not options.insecure:
        raise UsageError(
            f"{options.host} can be reached from other machines, and there is no API key",
            hint="set one with --api-key or GOSSAMER_API_KEY, or say --insecure",
        )
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise UsageError(
            f"cannot serve on {options.host} port {options.port}: {error}", hint="--port 0 takes a free one"
        ) from error
    return bound


def serve(models: Sequence[ModelSpec], options: ServerOptions, ready: Callable[[str], None]) -> None:
    """Serve until a signal; `ready` is called with the URL. Raises GossamerError if it cannot begin or go on."""
    with bind(options) as bound:
        asyncio.run(_Server(models, options, bound, ready).run())


async def started(specs: Sequence[ModelSpec], clients: Sequence[EngineClient], limits: Limits) -> Service:
    """A service over models: workers load while tokenizers are read here. Raises GossamerError."""
    chat_template.prepare()
    loading = [asyncio.ensure_future(client.start()) for client in clients]
    tokenizers = [asyncio.ensure_future(asyncio.to_thread(spec.tokenizer)) for spec in specs]
    try:
        engines = await asyncio.gather(*loading)
        read = await asyncio.gather(*tokenizers)
    except WorkerLost as lost:
        raise GossamerError(lost.message, hint=lost.hint) from None
    finally:
        for task in (*loading, *tokenizers):
            task.cancel()
        await asyncio.gather(*loading, *tokenizers, return_exceptions=True)
    served = [
        Served(client.name, client, tokenizer, Queue(engine.max_sequences, limits.max_queue))
        for client, tokenizer, engine in zip(clients, read, engines, strict=True)
    ]
    return Service(served, limits)


class Signals:
    """SIGTERM and SIGINT, counted. To be made in the loop that is to hear of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    async def drained(self, work: InFlight, seconds: float) -> None:
        """Let what is in flight finish, in bounded time; a second signal ends that too."""
        work.draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while work.in_flight and loop.time() < deadline and self.count < 2:
            await asyncio.sleep(SECONDS_PER_LOOK)

    def _on_signal(self) -> None:
        self.count += 1
        self.first.set()


class InFlight(Protocol):
    """Whatever takes requests in, until it is told to take no more."""

    draining: bool
    in_flight: int


def http_server(app: ASGIApp, body_seconds: float) -> uvicorn.Server:
    """What speaks HTTP for an application; `serve` takes the socket."""
    config = uvicorn.Config(
        app, http=type("Protocol", (PatientProtocol,), {"seconds": body_seconds}), ws="none",
        lifespan="off", log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
    )  # fmt: skip
    return _Uvicorn(config)


class _Server:
    def __init__(
        self, models: Sequence[ModelSpec], options: ServerOptions, bound: socket.socket, ready: Callable[[str], None]
    ) -> None:
        self._specs, self._options, self._bound, self._ready = models, options, bound, ready
        self._clients = [EngineClient(spec.worker, spec.name, options.watch) for spec in models]

    async def run(self) -> None:
        signals = Signals()
        try:
            starting = asyncio.ensure_future(started(self._specs, self._clients, self._options.limits))
            signalled = asyncio.ensure_future(signals.first.wait())
            await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await self._serve(starting.result(), signals)
            else:
                starting.cancel()
        finally:
            await asyncio.gather(*(client.stop() for client in self._clients))

    async def _serve(self, service: Service, signals: Signals) -> None:
        """Until a signal, and then to the end of what runs. Raises GossamerError if a worker cannot be kept."""
        http = http_server(make_app(service, self._options.api_key), service.limits.body_seconds)
        serving = asyncio.ensure_future(http.serve([self._bound]))
        watching = [asyncio.ensure_future(client.supervise()) for client in self._clients]
        signalled = asyncio.ensure_future(signals.first.wait())
        try:
            self._bound.listen(1024)
            self._ready(url(self._bound))
            await asyncio.wait({serving, signalled, *watching}, return_when=asyncio.FIRST_COMPLETED)
            if signals.count:
                await signals.drained(service, self._options.drain_seconds)
        finally:
            service.draining = True
            for client in self._clients:
                client.give_up()  # streams that are left end with an error
            await asyncio.sleep(0)
            http.should_exit = True
            await serving
            service.close()
            for task in (signalled, *watching):
                task.cancel()
            results = await asyncio.gather(*watching, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not signals.count:
                raise result


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own handling of signals, which would end the process before the drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def url(bound: socket.socket) -> str:
    """Where it is served."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
