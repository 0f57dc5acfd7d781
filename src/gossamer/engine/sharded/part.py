"""A rank's part of a step: its weights in a backend of its own, the sums with its peers, states to the next stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...parallel import Share
from ...parallel.group import Peers
from ...parallel.modules import share_decoder
from ..backend import Activations, Batch, Progress, Weights
from ..cpu import CpuBackend
from ..reference import ReferenceBackend
from .view import ShardedCheckpoint

Verb: TypeAlias = Literal["forward", "argmax", "hidden"]


class Part:
    """What one rank computes. Results are None on ranks that have none to tell."""

    def __init__(self, backend: ReferenceBackend | CpuBackend, share: Share, peers: Peers) -> None:
        self.backend, self.share, self.peers = backend, share, peers
        if isinstance(backend, ReferenceBackend):
            backend.whole = share.config
            share_decoder(backend.decoder, share, peers)
        elif share.tp > 1:
            backend.share_with(_summing(peers), leads=share.tp_rank == 0)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        share: Share,
        peers: Peers,
        backend: Literal["cpu", "reference"],
        weights: Weights = "stored",
        activations: Activations = "auto",
        kv_cache: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Part:
        """Read this rank's weights. Raises CheckpointError, DoesNotFit, EngineError."""
        own = ShardedCheckpoint(checkpoint, share)
        if backend == "reference":
            return cls(ReferenceBackend.load(own, weights, progress), share, peers)
        loaded = CpuBackend(own, activations=activations, kv_dtype=kv_cache, threads=threads, progress=progress)
        return cls(loaded, share, peers)

    def run(self, verb: Verb, batch: Batch) -> tuple[Tensor, ...] | None:
        """This rank's results: logits [R, its tokens]; largest logit [R] and its token [R]; or states [R, hidden]."""
        before = None
        if not self.share.is_first:
            before = torch.empty(len(batch.tokens), self.share.config.hidden_size)
            self.peers.receive(before)
        if not self.share.is_last:
            every = replace(batch, logit_rows=np.arange(len(batch.tokens), dtype=np.int32))
            self.peers.send(self._hidden(every, before))
            return None
        if verb == "argmax" and isinstance(self.backend, CpuBackend):
            value, token = self.backend.best(self._own(batch, before), before)
            return value, token + self.share.vocab[0]
        states = self._hidden(batch, before)
        if verb == "hidden":
            return (states,) if self.share.tp_rank == 0 else None
        return self.head(states, verb)

    def head(self, states: Tensor, verb: Verb = "forward") -> tuple[Tensor, ...]:
        """Logits of hidden states [R, hidden_size], or the largest of them, over this rank's part of the vocabulary."""
        logits = self.backend.head(states)
        if verb == "forward":
            return (logits,)
        value, token = logits.max(-1)
        value = torch.where(logits.isfinite().all(-1), value, torch.nan)
        return value, token + self.share.vocab[0]

    def _hidden(self, batch: Batch, before: Tensor | None) -> Tensor:
        return self.backend.hidden(self._own(batch, before), before)

    def _own(self, batch: Batch, before: Tensor | None) -> Batch:
        """The batch with the tokens whose embeddings lie here; only C++ looks them up in a part of the vocabulary."""
        if isinstance(self.backend, CpuBackend) and self.share.tp > 1 and before is None:
            return replace(batch, tokens=_own_tokens(batch.tokens, *self.share.vocab))
        return batch


def _own_tokens(tokens: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Tokens counted from the first of this rank, -1 for those of others."""
    return np.where((tokens >= first) & (tokens < stop), tokens - first, -1).astype(np.int32)


def _summing(peers: Peers) -> object:
    """What the C++ executor calls for a sum: C++ where the peers have it, else a function of an array."""
    shared = getattr(peers, "shared_sum", None)
    return shared if shared is not None else lambda array: peers.sum(torch.from_numpy(array))
