"""The cpu backend: the C++ executor behind the seam. One call a step; packing into the kernels' layout at load.

Integer weights are multiplied by activations rounded to 8 bits in blocks of 32 (`int8`), or by float32 ones (`exact`).
Dense weights always meet float32 activations. Knows checkpoints and the extension; knows no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import settings
from ..checkpoint import Checkpoint
from ..checkpoint.load import resident_bytes
from ..checkpoint.memory import require_memory
from ..errors import EngineError, KernelError, UnknownName
from ..formats import Dense, Integer
from ..kernels import cpu as kernels
from ..kernels import dispatch
from ..model.config import LayerConfig
from ..model.decoder import inverse_frequencies
from ..model.families import FAMILIES, Family
from .backend import BLOCK_SIZE, Activations, Backend, Batch, Progress

KV_DTYPES = {"bf16": "bf16", "fp32": "f32", "int8": "int8"}
"""What the KV cache can be stored as -> its name in the extension."""
MAX_GROUP = 48
"""Most query heads that may share a key-value head."""
BLOCK_COLUMNS = 32
"""Columns of a weight that a kernel multiplies at once: groups of a scale are multiples of it, or whole rows."""

_Form: TypeAlias = "Integer | Literal['bf16', 'float']"


def supports(checkpoint: Checkpoint) -> str | None:
    """Why this checkpoint cannot run here, or None."""
    try:
        kernels.extension()
    except KernelError as error:
        return error.message
    layers = checkpoint.config.layers
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
        self.kv_dtype = "bf16" if kv_dtype == "auto" else kv_dtype
        self.threads = threads
        require_memory(
            resident_bytes(checkpoint, torch.float32, packed=True),
            f"{checkpoint.name}: its weights",
            "compress it further, or free memory",
        )
        loader = _Loader(checkpoint, self._threads(), progress)
        self._model = loader.model()
        self._arena = loader.arena
        self.integers = loader.integers
        """True if some weight is an integer one, so that activations may be rounded."""
        if activations == "int8" and not self.integers:
            raise EngineError(
                f"{checkpoint.name} has no integer weights: its activations are exact",
                hint="leave --activations away, or compress the model",
            )
        self.activations = "exact" if activations == "exact" or not self.integers else "int8"
        item = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / self.config.layers[0].head_dim}[self.kv_dtype]
        self.kv_bytes_per_token = self.config.kv_elements_per_token() * item

    def reserve(self, num_blocks: int) -> None:
        held = self._model.blocks
        if num_blocks and num_blocks <= held:
            return
        require_memory(
            int(self.kv_bytes_per_token * BLOCK_SIZE * max(0, num_blocks - held)),
            f"the KV cache for {num_blocks * BLOCK_SIZE:,} tokens",
            "ask for fewer tokens, or for fewer prompts at a time",
        )
        self._model.allocate(max(num_blocks, 1), KV_DTYPES[self.kv_dtype])

    def forward(self, batch: Batch) -> Tensor:
        out = np.empty((len(batch.logit_rows), self.config.vocab_size), np.float32)
        self._step("logits", batch, out)
        return torch.from_numpy(out)

    def hidden(self, batch: Batch) -> Tensor:
        out = np.empty((len(batch.logit_rows), self.config.hidden_size), np.float32)
        self._step("hidden", batch, out)
        return torch.from_numpy(out)

    def argmax(self, batch: Batch) -> Tensor:
        from .sampling import raise_not_finite

        out = np.empty(len(batch.logit_rows), np.int32)
        if not self._step("best", batch, out):
            raise_not_finite()
        return torch.from_numpy(out).long()

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
        return f"{kernels.isa()}, {self.activations} activations"

    def _threads(self) -> int:
        return settings.threads() if self.threads is None else self.threads

    def _step(self, method: str, batch: Batch, out: NDArray[Any]) -> Any:
        arrays = (batch.tokens, batch.query_start, batch.context_lens, batch.block_tables, batch.logit_rows)
        try:
            return getattr(self._model, method)(*arrays, self.activations == "exact", self._threads(), out)
        except (ValueError, TypeError) as error:
            batch.check(self.config, self._model.blocks)  # says it in the same words as every backend
            raise EngineError(f"batch: {error}") from error


class _Loader:
    """Reads a checkpoint's tensors and packs them, weight by weight."""

    def __init__(self, checkpoint: Checkpoint, threads: int, progress: Progress | None) -> None:
        self.checkpoint, self.threads = checkpoint, threads
        self.progress = progress
        self.extension: Any = kernels.extension()
        self.arena = self.extension.Arena()
        self.integers = False
        self.family: Family = FAMILIES[checkpoint.config.family]

    def model(self) -> Any:
        """The executor's model, with every weight in it."""
        config, total = self.checkpoint.config, self.checkpoint.config.num_layers + 1
        self._report(0, total)
        embedding = self._weight([self.family.module("embed")])
        head = embedding if config.tie_embeddings else self._weight([self.family.module("head")])
        model = self.extension.Model(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            head_dim=config.layers[0].head_dim,
            max_positions=config.max_positions,
            norm_eps=config.norm_eps,
            norm="rms",
            activation=config.activation,
            inverse_frequencies=inverse_frequencies(config.rope, config.layers[0].head_dim).numpy(),
            embedding=embedding,
            head=head,
            final_norm=self._vector(self.family.module("final_norm")),
            final_norm_bias=None,
        )
        for i, layer in enumerate(config.layers):
            self._report(i + 1, total)
            model.add_layer(**self._layer(i, layer))
        self._report(total, total)
        return model

    def _layer(self, i: int, layer: LayerConfig) -> dict[str, Any]:
        """Arguments of the executor's add_layer."""
        name = {role: self.family.module(role, i) for role in self.family.modules}
        qkv, qkv_bias = self._fused([name[r] for r in ("q", "k", "v")], layer.has_bias("q"), interleave=False)
        gate_up, gate_up_bias = self._fused([name[r] for r in ("gate", "up")], layer.has_bias("gate"), interleave=True)
        return {
            "heads": layer.num_heads,
            "kv_heads": layer.num_kv_heads,
            "ffn_width": layer.ffn_width,
            "attention_norm": self._vector(name["attn_norm"]),
            "attention_norm_bias": None,
            "ffn_norm": self._vector(name["ffn_norm"]),
            "ffn_norm_bias": None,
            "qkv": qkv,
            "qkv_bias": qkv_bias,
            "output": self._weight([name["o"]]),
            "output_bias": self._vector(name["o"], "bias") if layer.has_bias("o") else None,
            "gate_up": gate_up,
            "gate_up_bias": gate_up_bias,
            "down": self._weight([name["down"]]),
            "down_bias": self._vector(name["down"], "bias") if layer.has_bias("down") else None,
        }

    def _fused(self, modules: Sequence[str], bias: bool, interleave: bool) -> tuple[list[Any], list[Any]]:
        """Weights that read one input, as one if all are stored alike, and the bias of each."""
        biases = [self._vector(m, "bias") for m in modules] if bias else []
        if len({self._form(m) for m in modules}) > 1:
            return [self._weight([m]) for m in modules], biases or [None] * len(modules)
        return [self._weight(modules, interleave)], [np.concatenate(biases) if bias else None]

    def _weight(self, modules: Sequence[str], interleave: bool = False) -> Any:
        """Rows of these modules as one packed weight; all are stored alike."""
        form = self._form(modules[0])
        if isinstance(form, Integer):
            self.integers = True
            columns = self.checkpoint.shape(f"{modules[0]}.weight")[1]
            parts = [self._integer_part(form, m) for m in modules]
            return self.extension.pack_integer(self.arena, parts, columns, interleave, self.threads)
        if form == "bf16":
            dense = [self.checkpoint.tensor(f"{m}.weight", dtype=torch.bfloat16).contiguous() for m in modules]
            arrays = [t.view(torch.int16).numpy().view(np.uint16) for t in dense]
            return self.extension.pack_bf16(self.arena, arrays, interleave, self.threads)
        floats = [self.checkpoint.tensor(f"{m}.weight").contiguous().numpy() for m in modules]
        return self.extension.pack_f32(self.arena, floats, interleave, self.threads)

    def _form(self, module: str) -> _Form:
        """How a weight is held: as the integers it is stored as, in bfloat16, or in float32 for all else."""
        name = f"{module}.weight"
        form, columns = self.checkpoint.format(name), self.checkpoint.shape(name)[1]
        if isinstance(form, Integer):
            fits = form.group_size in (None, columns) or form.group_size % BLOCK_COLUMNS == 0
            return form if fits else "float"
        held = form.dtype if isinstance(form, Dense) else self.checkpoint.dtype
        return "bf16" if held is torch.bfloat16 else "float"

    def _integer_part(self, form: Integer, module: str) -> Any:
        tensors = self.checkpoint.stored(f"{module}.weight")
        zero = None
        if not form.symmetric:
            rows = self.checkpoint.shape(f"{module}.weight")[0]
            words = tensors["weight_zero_point"].T.contiguous()
            zero = dispatch.unpack_codes(words, form.bits, rows).T.contiguous().numpy()
        packed = tensors["weight_packed"].contiguous().numpy()
        return self.extension.IntegerPart(packed, tensors["weight_scale"].float().contiguous().numpy(), zero, form.bits)

    def _vector(self, module: str, what: str = "weight") -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.checkpoint.tensor(f"{module}.{what}").contiguous().numpy()
        return vector

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("loading", done, total)
