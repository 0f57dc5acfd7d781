"""Which replica gets a request. A router knows what it has sent and how many requests each replica has; no cache.

`prefix` follows SGLang's cache-aware balancing (Zheng et al., arXiv 2312.07104): a request goes where its beginning
went before, unless that replica has too much to do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, get_args

from ..errors import UnknownName

Routing: TypeAlias = Literal["round-robin", "least-loaded", "prefix"]

AHEAD = 4
"""Requests that a replica may have more than the least loaded one and still get what begins like its own."""
REMEMBERED = 1 << 17
"""Blocks whose way a router remembers; the one that was not seen for longest is forgotten first."""


class Router(Protocol):
    """Chooses."""

    def choose(self, digests: Sequence[bytes], loads: Sequence[int]) -> int:
        """Number of the replica; `digests`: of the prompt's blocks, `loads`: requests that each replica has."""


def make_router(routing: Routing) -> Router:
    """Raises UnknownName."""
    if routing not in ROUTERS:
        raise UnknownName("routing", routing, get_args(Routing))
    return ROUTERS[routing]()


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, digests: Sequence[bytes], loads: Sequence[int]) -> int:
        chosen = self._next % len(loads)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """Whoever has the fewest requests; of equals, the next in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, digests: Sequence[bytes], loads: Sequence[int]) -> int:
        least = min(loads)
        try:
            chosen = loads.index(least, self._next)
        except ValueError:
            chosen = loads.index(least)
        self._next = chosen + 1
        return chosen


class PrefixAware:
    """Whoever was sent the longest beginning of this prompt; the least loaded if it has AHEAD requests more."""

    def __init__(self) -> None:
        self._otherwise = LeastLoaded()
        self._sent: OrderedDict[bytes, dict[int, None]] = OrderedDict()
        """Digest of a block -> replicas that prompts with it went to."""

    def choose(self, digests: Sequence[bytes], loads: Sequence[int]) -> int:
        known: dict[int, None] = next((self._sent[d] for d in reversed(digests) if d in self._sent), {})
        chosen = min(known, key=lambda replica: loads[replica], default=None)
        if chosen is None or loads[chosen] > min(loads) + AHEAD:
            chosen = self._otherwise.choose(digests, loads)
        for digest in digests:
            self._sent.setdefault(digest, {})[chosen] = None
            self._sent.move_to_end(digest)
        while len(self._sent) > REMEMBERED:
            self._sent.popitem(last=False)
        return chosen


ROUTERS: dict[str, type[RoundRobin | LeastLoaded | PrefixAware]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix": PrefixAware,
}
