"""Replicas on a cluster behind one address, whole: bind, deploy, serve, drain, remove."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from ...cluster.join import joined
from ..server import ServerOptions, Signals, bind, http_server, url
from .deploy import Deployment, Scale
from .front import Front
from .replica import Specs


def serve_on_ray(
    name: str,
    specs: Specs,
    options: ServerOptions,
    scale: Scale,
    address: str,
    ready: Callable[[str], None],
) -> None:
    """Serve until a signal; `specs` is called on every node, and must be picklable. Raises ClusterError, UsageError.

    A second command of the same name on one cluster takes the replicas of the first.
    """
    with bind(options) as bound, joined(address) as ray:
        deployment = Deployment(ray, name)
        try:
            deployment.start(specs, scale, options.limits, options.watch)
            asyncio.run(
                _serve(Front(deployment.ask, deployment.gather, options.limits, options.api_key), options, bound, ready)
            )
        finally:
            deployment.remove()


async def _serve(front: Front, options: ServerOptions, bound: socket.socket, ready: Callable[[str], None]) -> None:
    signals = Signals()
    http = http_server(front.app, options.limits.body_seconds)
    serving = asyncio.ensure_future(http.serve([bound]))
    signalled = asyncio.ensure_future(signals.first.wait())
    try:
        bound.listen(1024)
        ready(url(bound))
        await asyncio.wait({serving, signalled}, return_when=asyncio.FIRST_COMPLETED)
        await signals.drained(front, options.drain_seconds)
    finally:
        front.draining = True
        http.should_exit = True
        await serving
        signalled.cancel()
