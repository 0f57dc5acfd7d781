"""Which replica a prompt goes to: prompts that begin alike to the same one, whose KV cache then holds that beginning.

Ray Serve loads this by its name, and nothing here does, so that Ray is imported only where it runs. Every process that
routes ranks the replicas by a hash of the beginning and of the replica (rendezvous hashing: Thaler and Ravishankar,
1998), so they agree without speaking, and a replica that comes or goes moves only its own share.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from ray.serve.request_router import RequestRouter


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types here
    """The replica that a beginning belongs to, unless it has much more to do than another: then the least busy one."""

    def initialize_state(self, slack: int) -> None:
        """`slack`: so many more requests than the least busy replica may have before another one is taken."""
        self._slack = slack

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Ranks of replicas; of those in a rank, Ray Serve takes the least busy one that has room."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        beginning = pending_request.metadata.session_id
        if not beginning or not candidate_replicas:
            return [candidate_replicas]
        load = {replica.replica_id: self._load(replica) for replica in candidate_replicas}
        own = max(candidate_replicas, key=lambda replica: _weight(beginning, replica.replica_id.unique_id))
        if load[own.replica_id] > min(load.values()) + self._slack:
            return [candidate_replicas]
        return [[own], [replica for replica in candidate_replicas if replica is not own]]

    def _load(self, replica: Any) -> int:
        """Requests that it has, as far as is known here."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _weight(beginning: str, replica: str) -> bytes:
    return blake2b(f"{beginning}\n{replica}".encode(), digest_size=8).digest()
