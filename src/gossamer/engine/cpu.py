"""The cpu backend: the C++ executor behind the seam. One call a step; packing into the kernels' layout at load.

Coded weights (integers, 4-bit codebooks) are multiplied by activations rounded to 8 bits in blocks of 32 (`int8`), or
by float32 ones (`exact`); dense and fp8 weights always by float32 ones. `packing.py` says how each format is held;
`describe` names those that are expanded. Knows checkpoints and the extension; knows no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import settings
from ..checkpoint import Checkpoint
from ..checkpoint.load import resident_bytes
from ..checkpoint.memory import require_memory
from ..errors import EngineError, KernelError, UnknownName
from ..kernels import cpu as kernels
from ..model.config import LayerConfig
from ..model.decoder import alibi_slopes, inverse_frequencies
from ..model.families import FAMILIES, Family
from .backend import BLOCK_SIZE, KV_DTYPES, Activations, Backend, Batch, Progress, kv_head_bytes
from .packing import Packer, expansion

MAX_GROUP = 48
"""Most query heads that may share a key-value head."""
MAX_HEAD_DIM = 1024


def supports(checkpoint: Checkpoint) -> str | None:
    """Why this checkpoint cannot run here, or None."""
    try:
        kernels.extension()
    except KernelError as error:
        return error.message
    layers = checkpoint.config.layers
    if layers[0].head_dim % 2 or layers[0].head_dim > MAX_HEAD_DIM:
        return f"its heads have {layers[0].head_dim} columns, not an even number up to {MAX_HEAD_DIM}"
    if len({layer.head_dim for layer in layers}) > 1:
        return "its layers have heads of different widths"
    if max(layer.group for layer in layers) > MAX_GROUP:
        return f"more than {MAX_GROUP} query heads share a key-value head"
    return None


class CpuBackend(Backend):
    """A checkpoint packed for the C++ executor. Raises CheckpointError, DoesNotFit, EngineError, UnknownName."""

    name = "cpu"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        activations: Activations = "auto",
        kv_dtype: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        if kv_dtype not in ("auto", *KV_DTYPES):
            raise UnknownName("KV cache", kv_dtype, ("auto", *KV_DTYPES))
        self.config = checkpoint.config
        self.kv_dtype = KV_DTYPES[0] if kv_dtype == "auto" else kv_dtype
        self.threads = threads
        require_memory(
            resident_bytes(checkpoint, torch.float32, packed=True) + expansion(checkpoint),
            f"{checkpoint.name}: its weights",
            "compress it further, or free memory",
        )
        loader = _Loader(checkpoint, self._threads(), progress)
        self._model = loader.model()
        self._arena = loader.packer.arena
        self.expanded = loader.packer.expanded
        """Names of formats that are held in bfloat16 -> whether all their weights are exact there."""
        self.filled = loader.packer.filled
        """Names of sparse formats that are held with their zeros."""
        self.integers = loader.packer.coded
        """True if some weight is a coded one, so that activations may be rounded."""
        if activations == "int8" and not self.integers:
            raise EngineError(
                f"{checkpoint.name} has no integer weights, and no 4-bit codes: its activations are exact",
                hint="leave --activations away, or compress the model",
            )
        self.activations = "exact" if activations == "exact" or not self.integers else "int8"
        self.kv_bytes_per_token = float(
            sum(layer.num_kv_heads * kv_head_bytes(self.kv_dtype, layer.head_dim) for layer in self.config.layers)
        )

    def reserve(self, num_blocks: int) -> None:
        held = self._model.blocks
        if num_blocks and num_blocks <= held:
            return
        require_memory(
            int(self.kv_bytes_per_token * BLOCK_SIZE * max(0, num_blocks - held)),
            f"the KV cache for {num_blocks * BLOCK_SIZE:,} tokens",
            "ask for fewer tokens, or for fewer prompts at a time",
        )
        self._model.allocate(max(num_blocks, 1), "f32" if self.kv_dtype == "fp32" else self.kv_dtype)

    def touch(self) -> None:
        self._model.touch(self._threads())

    def forward(self, batch: Batch) -> Tensor:
        out = np.empty((len(batch.logit_rows), self.config.vocab_size), np.float32)
        self._step("logits", batch, out)
        return torch.from_numpy(out)

    def hidden(self, batch: Batch, before: Tensor | None = None) -> Tensor:
        """As the seam says; `before`: [T, hidden_size], what the layers of an earlier stage made of the tokens."""
        out = np.empty((len(batch.logit_rows), self.config.hidden_size), np.float32)
        self._step("hidden", batch, out, *_states(before))
        return torch.from_numpy(out)

    def best(self, batch: Batch, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Largest logit [R], NaN where some are not finite, and its token int64 [R]; `before`: as of `hidden`."""
        tokens, values = np.empty(len(batch.logit_rows), np.int32), np.empty(len(batch.logit_rows), np.float32)
        self._step("best", batch, tokens, values, *_states(before))
        return torch.from_numpy(values), torch.from_numpy(tokens).long()

    def share_with(self, add_up: Any, leads: bool) -> None:
        """Compute as one rank of several: `add_up` replaces a float32 array by its sum over them; one of them leads."""
        self._model.share_with(add_up, leads)

    def argmax(self, batch: Batch) -> Tensor:
        from .sampling import raise_not_finite

        values, tokens = self.best(batch)
        if values.isnan().any():
            raise_not_finite()
        return tokens

    def head(self, states: Tensor) -> Tensor:
        rows = states.contiguous().numpy()
        out = np.empty((len(rows), self.config.vocab_size), np.float32)
        try:
            self._model.head(rows, self.activations == "exact", self._threads(), out)
        except (ValueError, TypeError) as error:
            raise EngineError(f"states are {states.dtype} {list(states.shape)}: {error}") from error
        return torch.from_numpy(out)

    @property
    def weight_bytes(self) -> int:
        return int(self._arena.bytes)

    def describe(self) -> str:
        said = f"{kernels.isa()}, {self.activations} activations"
        for name, exact in sorted(self.expanded.items()):
            said += f"; {name} weights held as bfloat16, {'exactly' if exact else 'rounded to it'}"
        for name in sorted(self.filled):
            said += f"; {name} weights held with their zeros"
        return said

    def _threads(self) -> int:
        return settings.threads() if self.threads is None else self.threads

    def _step(self, method: str, batch: Batch, out: NDArray[Any], *more: NDArray[Any]) -> None:
        arrays = (batch.tokens, batch.query_start, batch.context_lens, batch.block_tables, batch.logit_rows)
        try:
            getattr(self._model, method)(*arrays, self.activations == "exact", self._threads(), out, *more)
        except (ValueError, TypeError) as error:
            batch.check(self.config, self._model.blocks)  # says it in the same words as every backend
            raise EngineError(f"batch: {error}") from error


def _states(before: Tensor | None) -> list[NDArray[Any]]:
    return [] if before is None else [before.contiguous().numpy()]


class _Loader:
    """Reads a checkpoint's tensors and packs them, weight by weight."""

    def __init__(self, checkpoint: Checkpoint, threads: int, progress: Progress | None) -> None:
        self.checkpoint = checkpoint
        self.progress = progress
        self.packer = Packer(checkpoint, threads)
        self.family: Family = FAMILIES[checkpoint.config.family]
        config = checkpoint.config
        self.ropes = list(dict.fromkeys(rope for layer in config.layers if (rope := config.rope_of(layer)) is not None))
        """Rotary positions, each of some layers."""

    def model(self) -> Any:
        """The executor's model, with every weight in it."""
        config, total = self.checkpoint.config, self.checkpoint.config.num_layers + 1
        self._report(0, total)
        embedding = self._table("embed")
        head = embedding if config.tie_embeddings else self._table("head")
        model = kernels.extension().Model(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            head_dim=config.layers[0].head_dim,
            max_positions=config.max_positions,
            norm_eps=config.norm_eps,
            norm=config.norm,
            activation=config.activation,
            inverse_frequencies=[inverse_frequencies(rope, config.layers[0].head_dim).numpy() for rope in self.ropes],
            embedding=embedding,
            head=head,
            **self._final_norm(head is not None),
            query_scale=config.query_scale,
            embed_scale=config.embed_scale,
            parallel=config.parallel,
            attention_softcap=config.attention_softcap or 0.0,
            final_softcap=config.final_softcap or 0.0,
            positions=self._positions(),
            **(self._norm("embed_norm", "embed_norm") if config.embed_norm else {}),
        )
        for i, layer in enumerate(config.layers):
            self._report(i + 1, total)
            model.add_layer(**self._layer(i, layer))
        self._report(total, total)
        return model

    def _table(self, role: str) -> Any | None:
        """The packed embedding or head; None in a part of a model that has none."""
        module = self.family.module(role)
        return self.packer.pack_rows(module) if f"{module}.weight" in self.checkpoint.names() else None

    def _final_norm(self, held: bool) -> dict[str, Any]:
        """Arguments of the final norm; ones where the model ends elsewhere."""
        if held:
            return self._norm("final_norm", "final_norm")
        return {"final_norm": np.ones(self.checkpoint.config.hidden_size, np.float32), "final_norm_bias": None}

    def _layer(self, i: int, layer: LayerConfig) -> dict[str, Any]:
        """Arguments of the executor's add_layer."""
        qkv, qkv_bias = self._fused(i, ("q", "k", "v"), interleave=False)
        gate_up, gate_up_bias = self._fused(i, ("gate", "up") if layer.gated else ("up",), interleave=layer.gated)
        rope = self.checkpoint.config.rope_of(layer)
        alibi = self.checkpoint.config.positions == "alibi"
        return {
            "heads": layer.num_heads,
            "kv_heads": layer.num_kv_heads,
            "ffn_width": layer.ffn_width,
            **self._norm("attention_norm", "attn_norm", i),
            **self._norm("ffn_norm", "ffn_norm", i),
            "qkv": qkv,
            "qkv_bias": qkv_bias,
            "output": self.packer.pack([self.family.module("o", i)]),
            "output_bias": self._bias(i, "o"),
            "gate_up": gate_up,
            "gate_up_bias": gate_up_bias,
            "down": self.packer.pack([self.family.module("down", i)]),
            "down_bias": self._bias(i, "down"),
            "gated": layer.gated,
            "window": layer.window or 0,
            "rope": -1 if rope is None else self.ropes.index(rope),
            "slopes": alibi_slopes(layer.num_heads).numpy() if alibi else None,
            **self._more_norms(i, layer),
        }

    def _more_norms(self, i: int, layer: LayerConfig) -> dict[str, Any]:
        """Weights of norms that only some families have."""
        names = {
            "q_norm": "q_norm",
            "k_norm": "k_norm",
            "attn_post_norm": "attention_post_norm",
            "ffn_post_norm": "ffn_post_norm",
        }
        there = layer.norm_sizes(self.checkpoint.config.hidden_size)
        return {name: self._norm(name, role, i)[name] for role, name in names.items() if role in there}

    def _norm(self, name: str, role: str, i: int | None = None) -> dict[str, Any]:
        """Arguments `name` and `name`_bias: what a norm multiplies by and adds."""
        config, module = self.checkpoint.config, self.family.module(role, i)
        weight = self._vector(module) + np.float32(config.norm_offset)
        return {name: weight, f"{name}_bias": self._vector(module, "bias") if config.norm == "layer" else None}

    def _positions(self) -> NDArray[np.float32] | None:
        """Learned positions [max_positions, hidden_size]."""
        config = self.checkpoint.config
        if config.positions != "learned":
            return None
        table = self.checkpoint.tensor(f"{self.family.module('positions')}.weight", slice(config.position_offset, None))
        return table.contiguous().numpy()

    def _fused(self, i: int, roles: Sequence[str], interleave: bool) -> tuple[list[Any], list[Any]]:
        """Weights that read one input, as one if all are stored alike, and the bias of each."""
        modules = [self.family.module(role, i) for role in roles]
        biases = [self._bias(i, role) for role in roles]
        if not self.packer.alike(modules):
            return [self.packer.pack([m]) for m in modules], biases
        if all(bias is None for bias in biases):
            return [self.packer.pack(modules, interleave)], [None]
        rows = [self.checkpoint.shape(f"{m}.weight")[0] for m in modules]
        filled = [np.zeros(n, np.float32) if b is None else b for b, n in zip(biases, rows, strict=True)]
        return [self.packer.pack(modules, interleave)], [np.concatenate(filled)]

    def _bias(self, i: int, role: str) -> NDArray[np.float32] | None:
        if not self.checkpoint.config.layers[i].has_bias(role):
            return None
        return self._vector(self.family.module(role, i), "bias")

    def _vector(self, module: str, what: str = "weight") -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.checkpoint.tensor(f"{module}.{what}").contiguous().numpy()
        return vector

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("loading", done, total)
