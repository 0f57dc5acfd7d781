"""Joining a Ray cluster. Ray is the extra `gossamer[ray]`, and is imported when a cluster is asked for.

Knows nothing of what runs there.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ..errors import ClusterError

INSTALL = "pip install 'gossamer[ray]'"
AUTO = "auto"
LOCAL = "local"
OBJECT_STORE_BYTES = 128 << 20
"""Of a cluster that is started here: only records and text pass through it."""


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """The module `ray` in a cluster: `auto` (which this machine is part of), HOST:PORT, or `local` (a new one).

    Raises ClusterError if Ray is not installed, or there is no such cluster.
    """
    ray = _imported()
    new = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **new)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = "this machine is part of no Ray cluster" if address == AUTO else f"no Ray cluster at {address}"
        raise ClusterError(
            f"{where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="`ray start --head` begins one, `--ray local` uses this machine alone",
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # Ray prints its troubles on stdout, where only results belong
            yield ray
    finally:
        ray.shutdown()


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
    except ImportError as error:
        raise ClusterError("Ray is not installed", hint=INSTALL) from error
    return ray
