"""One copy of the server without its HTTP side: what an actor on a node of the cluster holds.

It has engine workers of its own, watched and restarted as those of `serve/server.py`, and answers what ASGI would
bring: a scope and a body. Where its model is on several nodes, `group.py` brings the others; it knows no Ray itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeAlias

from starlette.types import ASGIApp, Message, Scope

from ...cluster.place import Place
from ...engine.sharded.nodes import Nodes
from ..app import make_app
from ..client import EngineClient, Watch
from ..server import ModelSpec, started
from ..service import Limits, Service
from .group import gathered

Specs: TypeAlias = Callable[[Nodes | None], Sequence[ModelSpec]]
"""(where other nodes bring ranks of the model; None: nowhere) -> models to serve. To be picklable."""

logger = logging.getLogger("gossamer.serve")


class Replica:
    """Models, loaded in this process's workers; or one model, of which `nodes` - 1 others hold ranks."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, specs: Specs, limits: Limits, watch: Watch, place: Place, threads: int, nodes: int
    ) -> None:
        place.take()
        os.environ["GOSSAMER_THREADS"] = str(threads)
        meeting, others = gathered(nodes, place, threads) if nodes > 1 else (None, [])
        self._watching = [asyncio.ensure_future(other) for other in others]
        models = specs(meeting)
        clients = [EngineClient(spec.worker, spec.name, watch) for spec in models]
        self._service = await self._unless_lost(started(models, clients, limits))
        self._app = make_app(self._service, None)
        self._watching += [asyncio.ensure_future(client.supervise()) for client in clients]

    async def _unless_lost(self, starting: Coroutine[Any, Any, Service]) -> Service:
        """What this gives. Raises what it does, and what a node says that is waited for and cannot come."""
        task = asyncio.ensure_future(starting)
        await asyncio.wait([task, *self._watching], return_when=asyncio.FIRST_COMPLETED)
        try:
            self.check_health()
            return await task
        finally:
            task.cancel()

    def check_health(self) -> None:
        """Raises WorkerLost once a worker was lost too often, and what another node says that cannot hold ranks.

        Then this replica is ended, and another one started.
        """
        for task in self._watching:
            if task.done():
                task.result()

    def metrics(self) -> tuple[str, bytes]:
        """A name of this replica, and what Prometheus reads of it."""
        return f"{socket.gethostname()}:{os.getpid()}", self._service.metrics.text()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """What the application sends, as it comes; whoever closes this early has gone away."""
        async for messages in sent(self._app, scope, body):
            yield messages


async def sent(app: ASGIApp, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
    """Run an application on one request: the messages that it sends, those that come together as one list."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # for ever: who goes away cancels everything
        raise AssertionError

    async def run() -> None:
        try:
            await app(scope, receive, messages.put)
        except Exception:
            logger.exception("%s failed", scope.get("path"))
        finally:
            messages.put_nowait(None)

    running = asyncio.ensure_future(run())
    try:
        over = False
        while not over:
            some: list[Any] = [await messages.get()]
            while not messages.empty():
                some.append(messages.get_nowait())
            over = some[-1] is None
            if whole := [message for message in some if message is not None]:
                yield whole
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
