"""What the ranks of a model say to each other while they compute: sums within a stage, hidden states between stages.

The process group is torch.distributed's (gloo); sums of a stage on one machine go through shared memory instead, where
the C++ extension is there. Every wait has an end. Knows no model.
"""

from __future__ import annotations

import datetime
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from ..errors import EngineError

GATHERED_BYTES = 1 << 18
"""Up to this size each rank is sent all parts and adds them up: half of gloo's messages in a row, but more bytes."""


class Peers(Protocol):
    """The other ranks of a model, as one of them sees them."""

    def sum(self, tensor: Tensor) -> None:
        """Replace a contiguous float32 tensor by its sum over the ranks of this stage."""

    def send(self, tensor: Tensor) -> None:
        """Hand float32 hidden states to the same rank of the next stage."""

    def receive(self, tensor: Tensor) -> None:
        """Fill a float32 tensor with what the same rank of the stage before sends."""


class ProcessGroup:
    """Ranks in processes of their own. Raises EngineError where another one does not answer in time."""

    def __init__(self, rank: int, tp: int, pp: int, store: str, timeout: float, shared_sum: Any | None = None) -> None:
        """`store`: where the ranks meet, a file in a folder of the user alone or tcp://HOST:PORT; `timeout`: seconds.

        `shared_sum`: the extension's, for the ranks of this stage.
        """
        self.rank, self.tp, self.pp = rank, tp, pp
        self.shared_sum = shared_sum
        wait = datetime.timedelta(seconds=timeout)
        try:
            dist.init_process_group(
                "gloo", store=_opened(store, tp * pp, wait), rank=rank, world_size=tp * pp, timeout=wait
            )
            stages = [list(range(stage * tp, stage * tp + tp)) for stage in range(pp)]
            groups = [dist.new_group(ranks, timeout=wait) for ranks in stages]  # every rank has to make all of them
        except RuntimeError as error:
            raise EngineError(f"rank {rank}: the other ranks cannot be reached: {error}") from error
        self._stage = groups[rank // tp]

    def sum(self, tensor: Tensor) -> None:
        if self.tp == 1:
            return
        try:
            if self.shared_sum is not None:
                self.shared_sum(tensor.view(-1).numpy())
            elif tensor.nbytes <= GATHERED_BYTES:
                parts = torch.empty(self.tp, tensor.numel())
                dist.all_gather(list(parts), tensor.view(-1), group=self._stage)
                torch.sum(parts, 0, out=tensor.view(-1))
            else:
                dist.all_reduce(tensor, group=self._stage)
        except RuntimeError as error:
            raise EngineError(f"rank {self.rank}: a sum over the ranks failed: {error}") from error

    def send(self, tensor: Tensor) -> None:
        try:
            dist.send(tensor, self.rank + self.tp)
        except RuntimeError as error:
            raise EngineError(f"rank {self.rank}: the next stage does not answer: {error}") from error

    def receive(self, tensor: Tensor) -> None:
        try:
            dist.recv(tensor, self.rank - self.tp)
        except RuntimeError as error:
            raise EngineError(f"rank {self.rank}: the stage before does not answer: {error}") from error

    def close(self) -> None:
        dist.destroy_process_group()


def _opened(store: str, ranks: int, wait: datetime.timedelta) -> Store:
    if not store.startswith("tcp://"):
        return FileStore(store, ranks)
    host, _, port = store.removeprefix("tcp://").rpartition(":")
    return TCPStore(host, int(port), None, False, wait, wait_for_workers=False)
