"""The seam between what generates or judges and what computes: one verb over a flat batch, and the choice of backend.

A step is a `Batch`: some tokens of some sequences, prompts and answers mixed, whose keys and values lie in blocks of
BLOCK_SIZE tokens that the caller deals out. A `Backend` computes it. Knows no request, no sampling and no schedule.
"""

from __future__ import annotations

import abc
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError, UnknownName

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint import Checkpoint
    from ..model.config import ModelConfig
    from .sharded.nodes import Nodes

BackendName: TypeAlias = Literal["auto", "cpu", "reference"]
Weights: TypeAlias = Literal["stored", "float"]
Activations: TypeAlias = Literal["auto", "int8", "exact"]
Progress: TypeAlias = Callable[[str, int, int], None]
Ints: TypeAlias = NDArray[np.int32]

BLOCK_SIZE = 16
"""Tokens whose keys and values lie in one block of the KV cache."""
KV_DTYPES = ("bf16", "fp32", "int8", "int4")
"""What the cpu backend can store keys and values as; the first is its choice."""

logger = logging.getLogger("gossamer.engine")


@dataclass(frozen=True, eq=False)
class Batch:
    """One step: T tokens of S sequences, one sequence after another; every array int32 and C-contiguous.

    The j-th of n query tokens of sequence s has position `context_lens[s] - n + j`; it sees all up to its own.
    """

    tokens: Ints
    """[T]."""
    query_start: Ints
    """[S + 1]: sequence s has tokens query_start[s] to query_start[s + 1] - 1, at least one."""
    context_lens: Ints
    """[S]: tokens of each sequence in the cache after this step, this step's own included."""
    block_tables: Ints
    """[S, max_blocks]: block of each BLOCK_SIZE tokens of context; what stands past the last of them is not read."""
    logit_rows: Ints
    """[R]: which of the T tokens results are wanted for, in this order; may be empty."""

    @property
    def query_lens(self) -> Ints:
        """[S]: tokens of each sequence in this step."""
        return np.diff(self.query_start)

    def check(self, config: ModelConfig, num_blocks: int) -> None:
        """Raise EngineError unless a model of this config with so many blocks can compute it."""
        self._check_arrays()
        _require(self.query_start[0] == 0, f"query_start begins with {self.query_start[0]}, expected 0")
        _require(bool((self.query_lens > 0).all()), "query_start does not rise: a sequence has no token")
        _require(
            int(self.query_start[-1]) == len(self.tokens),
            f"query_start ends with {self.query_start[-1]}, but there are {len(self.tokens)} tokens",
        )
        _check_range("tokens", self.tokens, 0, config.vocab_size)
        _check_range("logit_rows", self.logit_rows, 0, len(self.tokens))
        _check_range("context_lens", self.context_lens, 1, config.max_positions + 1)
        _require(bool((self.context_lens >= self.query_lens).all()), "context_lens is below what a sequence brings")
        used = -(-self.context_lens // BLOCK_SIZE)
        held = self.block_tables.shape[1]
        _require(bool((used <= held).all()), f"block_tables holds {held} blocks of a sequence that needs {used.max()}")
        _check_range("block_tables", self.block_tables[np.arange(held) < used[:, None]], 0, num_blocks)

    def _check_arrays(self) -> None:
        """Types and shapes."""
        count = max(len(self.context_lens), 1) if self.context_lens.ndim else 1
        shapes: dict[str, tuple[int | None, ...]] = {
            "tokens": (None,), "query_start": (count + 1,), "context_lens": (count,),
            "block_tables": (count, None), "logit_rows": (None,),
        }  # fmt: skip
        for field in fields(self):
            array, shape = getattr(self, field.name), shapes[field.name]
            fits = len(array.shape) == len(shape) and all(
                n in (m, None) for m, n in zip(array.shape, shape, strict=True)
            )
            wanted = f"int32 [{', '.join('any' if n is None else str(n) for n in shape)}]"
            found = f"{array.dtype} {list(array.shape)}"
            _require(fits and array.dtype == np.int32, f"{field.name} is {found}, expected {wanted}")
            _require(array.flags.c_contiguous, f"{field.name} is not contiguous")


class Backend(abc.ABC):
    """A loaded model that computes batches. Tensors that it returns are the caller's.

    Every method that takes a batch writes the keys and values of its tokens and raises EngineError for one that makes
    no sense.
    """

    name: str
    """`reference` or `cpu`."""
    config: ModelConfig
    kv_bytes_per_token: float
    """Bytes of KV cache for each token of context, over all layers; scales of integers may make it fractional."""
    kv_dtype: str = "fp32"
    """What keys and values are stored as."""
    activations: Activations = "exact"
    """`int8`: rounded before they meet packed weights; `exact`: float32. Never `auto`."""
    cache_epoch: int = 0
    """Counts how often somebody began to use blocks that others may remember the contents of."""

    @abc.abstractmethod
    def reserve(self, num_blocks: int) -> None:
        """Make room for at least so many blocks, numbered from 0; 0 gives back what there is.

        What is cached may be lost. Raises DoesNotFit before anything is allocated, with everything as it was.
        """

    def touch(self) -> None:  # noqa: B027 - where memory is not given page by page there is nothing to do
        """Have the memory of the reserved blocks given by the system now, and not in the steps that first write it."""

    @abc.abstractmethod
    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states float32 [R, hidden_size] before the final norm, of the tokens in `logit_rows`."""

    @abc.abstractmethod
    def head(self, states: Tensor) -> Tensor:
        """Final norm and head: hidden states float32 [rows, hidden_size] to logits float32 [rows, vocab_size]."""

    @abc.abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Logits float32 [R, vocab_size] of the tokens in `logit_rows`, finite or not."""

    def argmax(self, batch: Batch) -> Tensor:
        """Likeliest tokens int64 [R], the first of equals. Raises EngineError where logits are not finite."""
        from .sampling import require_finite

        logits = self.forward(batch)
        require_finite(logits)
        return logits.argmax(-1)

    @property
    def pids(self) -> list[int]:
        """Other processes that hold parts of the model."""
        return []

    def check_alive(self) -> None:  # noqa: B027 - most backends are one process, which is
        """Raise EngineError if it can compute nothing any more."""

    @property
    @abc.abstractmethod
    def weight_bytes(self) -> int:
        """Bytes that the weights take in memory, each counted once."""

    @abc.abstractmethod
    def describe(self) -> str:
        """What computes, in a few words after the name: `avx512, int8 activations`."""


def choose(
    checkpoint: Checkpoint,
    backend: BackendName = "auto",
    weights: Weights = "stored",
    activations: Activations = "auto",
    kv_cache: str = "auto",
    progress: Progress | None = None,
    tp: int = 1,
    pp: int = 1,
    nodes: Nodes | None = None,
) -> Backend:
    """Load a checkpoint into the backend that is asked for; `auto` takes cpu wherever that can run it.

    `tp`: processes that share every layer; `pp`: stages of layers, each of so many processes; `nodes`: machines that
    they are on. Raises UsageError, UnknownName, EngineError (it cannot be run as asked), CheckpointError, DoesNotFit.
    What was chosen, and why it is not cpu, is logged by `gossamer.engine`.
    """
    name, reason = resolve(checkpoint, backend, weights, activations, kv_cache)
    loaded: Backend
    if (tp, pp) != (1, 1) or nodes is not None:
        from .sharded.launch import ShardedBackend

        choice: dict[str, Any] = {"weights": weights, "activations": activations, "kv_cache": kv_cache}
        loaded = ShardedBackend(checkpoint, tp, pp, name, nodes=nodes, progress=progress, **choice)
    elif name == "cpu":
        from . import cpu

        loaded = cpu.CpuBackend(checkpoint, activations=activations, kv_dtype=kv_cache, progress=progress)
    else:
        from .reference import ReferenceBackend

        loaded = ReferenceBackend.load(checkpoint, weights, progress)
    logger.info("backend %s (%s)%s", name, loaded.describe(), f": {reason}" if reason else "")
    return loaded


def resolve(
    checkpoint: Checkpoint | None,
    backend: BackendName = "auto",
    weights: Weights = "stored",
    activations: Activations = "auto",
    kv_cache: str = "auto",
) -> tuple[Literal["cpu", "reference"], str | None]:
    """The backend that `choose` will take, and why not cpu; without a checkpoint, as far as can be said.

    Raises UnknownName for a choice that does not exist, EngineError for one that cannot be had.
    """
    _known("backend", backend, ("auto", "cpu", "reference"))
    _known("way to hold weights", weights, ("stored", "float"))
    _known("kind of activations", activations, ("auto", "int8", "exact"))
    reason = "as asked" if backend == "reference" else _obstacle(checkpoint, weights)
    if reason is None:
        return "cpu", None
    for option, unmet in (
        ("the cpu backend", backend == "cpu"),
        ("int8 activations", activations == "int8"),
        (f"a KV cache in {kv_cache}", kv_cache not in ("auto", "fp32")),
    ):
        if unmet:
            of = "" if checkpoint is None else f" for {checkpoint.name}"
            why = f"the reference backend, {reason}, has none" if backend == "reference" else reason
            raise EngineError(f"{option} cannot be had{of}: {why}", hint="leave the choice of backend to auto")
    return "reference", reason


def kv_bytes_per_token(
    checkpoint: Checkpoint, backend: BackendName = "auto", weights: Weights = "stored", kv_cache: str = "auto"
) -> float:
    """Bytes of KV cache for each token in the backend that `choose` would take; never less than it takes."""
    cpu = resolve(checkpoint, backend, weights, kv_cache=kv_cache)[0] == "cpu"
    layers = checkpoint.config.layers
    dtype = kv_cache if cpu else "fp32"
    return float(sum(layer.num_kv_heads * kv_head_bytes(dtype, layer.head_dim) for layer in layers))


def kv_head_bytes(dtype: str, head_dim: int) -> int:
    """Bytes of key and value of one token and head: an int8 one has a float32 scale for each of the two; an int4 one
    bfloat16 scale and least value for each of the two and 64 columns, and its value takes whole runs of 32 columns.
    """
    match dtype:
        case "fp32":
            return 8 * head_dim
        case "int8":
            return 2 * (head_dim + 4)
        case "int4":
            return head_dim // 2 + 16 * -(-head_dim // 32) + 8 * -(-head_dim // 64)
    return 4 * head_dim


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens of one sequence."""
    return -(-tokens // BLOCK_SIZE)


def cache_bytes(bytes_per_token: float, rows: int, length: int) -> int:
    """Bytes of the KV cache of `rows` sequences of `length` tokens, in whole blocks."""
    return math.ceil(bytes_per_token * rows * blocks_for(length) * BLOCK_SIZE)


def _obstacle(checkpoint: Checkpoint | None, weights: Weights) -> str | None:
    """Why the cpu backend is not for this, or None."""
    from ..kernels import dispatch

    if weights == "float":
        return "weights are expanded to floats"
    if dispatch.isa() == "reference":
        return "GOSSAMER_KERNELS=reference"
    if checkpoint is None:
        return None
    from . import cpu

    return cpu.supports(checkpoint)


def _known(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UnknownName(kind, str(name), known)


def _require(condition: bool | np.bool_, complaint: str) -> None:
    if not condition:
        raise EngineError(f"batch: {complaint}")


def _check_range(name: str, values: Ints, low: int, high: int) -> None:
    """Raise EngineError unless low <= value < high for all values."""
    wrong = values[(values < low) | (values >= high)]
    _require(len(wrong) == 0, f"{name} has {wrong[0] if len(wrong) else ''}, expected {low} to {high - 1}")
