"""The backend of a model that several processes hold: hands each step to all of them and joins what they answer.

Knows no request, and of processes only what `ranks.py` says.
"""

from __future__ import annotations

import weakref
from dataclasses import fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...checkpoint.memory import require_memory
from ...errors import EngineError
from ...parallel import Plan
from ...parallel.wire import Message
from ..backend import BLOCK_SIZE, Activations, Backend, Batch, Progress, Weights
from .identity import identity
from .micro import micro_batches
from .nodes import Nodes
from .ranks import WATCH, Ranks, Watch
from .view import plan_checkpoint


class ShardedBackend(Backend):
    """A checkpoint over tp * pp processes, of this machine or of several `nodes` that join it.

    Raises UsageError, EngineError, CheckpointError, DoesNotFit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tp: int,
        pp: int,
        backend: Literal["cpu", "reference"],
        *,
        weights: Weights = "stored",
        activations: Activations = "auto",
        kv_cache: str = "auto",
        nodes: Nodes | None = None,
        watch: Watch = WATCH,
        progress: Progress | None = None,
    ) -> None:
        self.name, self.config, self.watch = backend, checkpoint.config, watch
        self.plan: Plan = plan_checkpoint(checkpoint, tp, pp)
        self._num_blocks = 0
        self._nodes = 1 if nodes is None else nodes.nnodes
        self._stages_at_once = min(pp, self._nodes)  # those of one machine share its processors
        self._ranks = Ranks(tp * pp, tp, watch, nodes)
        self._close = weakref.finalize(self, self._ranks.kill)
        choice = {"backend": backend, "weights": weights, "activations": activations, "kv_cache": kv_cache}
        spec = choice | {"model": checkpoint.name, "tp": tp, "pp": pp, "timeout": watch.step}
        if nodes is not None:
            spec["identity"] = identity(checkpoint)
        if progress is not None:
            first = "loading" if nodes is None else f"waiting for gossamer join {nodes.host}:{nodes.port}"
            progress(first, 0, tp * pp)
        ready = self._ranks.start(spec)
        if progress is not None:
            progress("loading", tp * pp, tp * pp)
        sizes = [r.value("kv_bytes_per_token", float) for r in ready]
        self.kv_bytes_per_token = float(sum(sizes))
        self._kv_bytes_here = float(sum(sizes[: len(self.pids)]))
        self.kv_dtype = ready[0].value("kv_dtype", str)
        coded = any(r.value("activations", str) == "int8" for r in ready)
        self.activations = "int8" if coded else "exact"
        self.rank_bytes = [int(r.value("weight_bytes", int)) for r in ready]
        """Bytes of weights that each rank holds."""
        self._description = ready[0].value("description", str)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks of this machine."""
        return self._ranks.pids

    def reserve(self, num_blocks: int) -> None:
        if 0 < num_blocks <= self._num_blocks:
            return
        require_memory(
            int(self._kv_bytes_here * BLOCK_SIZE * max(0, num_blocks - self._num_blocks)),
            f"the KV cache for {num_blocks * BLOCK_SIZE:,} tokens",
            "ask for fewer tokens, or for fewer prompts at a time",
        )
        self._ranks.ask(Message("reserve", {"blocks": num_blocks}))
        self._num_blocks = num_blocks

    def forward(self, batch: Batch) -> Tensor:
        return self._joined(self._step("forward", batch))

    def argmax(self, batch: Batch) -> Tensor:
        from ..sampling import raise_not_finite

        values, tokens = (np.stack(each) for each in zip(*self._step("argmax", batch), strict=True))
        if not np.isfinite(values).all():
            raise_not_finite()
        best = values.argmax(0)  # of equals the first rank, whose tokens come first
        return torch.from_numpy(np.take_along_axis(tokens, best[None], 0)[0])

    def hidden(self, batch: Batch) -> Tensor:
        (states,) = self._step("hidden", batch)[0]
        return torch.from_numpy(np.array(states))

    def head(self, states: Tensor) -> Tensor:
        if states.ndim != 2 or states.shape[1] != self.config.hidden_size:
            raise EngineError(f"states are {states.dtype} {list(states.shape)}")
        message = Message("head", arrays=(states.float().numpy(),))
        return self._joined([reply.arrays for reply in self._ranks.ask(message, self._last)])

    def check_alive(self) -> None:
        self._ranks.check()

    @property
    def weight_bytes(self) -> int:
        return sum(self.rank_bytes)

    def describe(self) -> str:
        nodes = "" if self._nodes == 1 else f" on {self._nodes} nodes"
        return f"{self._description}; {self.plan.tp} ranks by {self.plan.pp} stages{nodes}"

    def close(self) -> None:
        """End the ranks."""
        self._close()

    @property
    def _last(self) -> range:
        """Ranks of the last stage."""
        count = len(self.plan.shares)
        return range(count - self.plan.tp, count)

    def _step(self, verb: str, batch: Batch) -> list[tuple[np.ndarray, ...]]:
        """Results of the last stage's ranks."""
        batch.check(self.config, self._num_blocks)
        parts, results = zip(*micro_batches(batch, self._stages_at_once), strict=True)
        answers = self._ranks.ask_in_turn([_step_message(verb, part) for part in parts])
        if len(answers) == 1:
            return [answers[0][rank].arrays for rank in self._last]
        order = np.argsort(np.concatenate(results))
        every = (zip(*(answer[rank].arrays for answer in answers), strict=True) for rank in self._last)
        return [tuple(np.concatenate(each)[order] for each in arrays) for arrays in every]

    def _joined(self, parts: list[tuple[np.ndarray, ...]]) -> Tensor:
        return torch.from_numpy(np.concatenate([logits for (logits,) in parts], -1))


def _step_message(verb: str, batch: Batch) -> Message:
    return Message("step", {"verb": verb}, tuple(getattr(batch, field.name) for field in fields(batch)))
