"""One GGUF file for llama.cpp and whatever else reads GGUF: architecture `llama`, or `deci` where layers differ.

As it is stored, a weight becomes the smallest GGML type that holds it exactly (ggml.py), and a GGUF file's own blocks
stay what they are. A layout of integers rounds float weights by ggml's own rule; K-quants are left to llama.cpp's tool.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.files import RandomAccessFile
from ..checkpoint.gguf import GGMLBlocks
from ..checkpoint.gguf_blocks import SIZES
from ..checkpoint.gguf_header import read_header
from ..errors import ExportError
from ..formats import Codebook, Dense, Format, Integer
from ..model import FAMILIES, Rope
from ..model.decoder import inverse_frequencies
from . import ggml, gguf_tokens
from .base import FLOATS, Export, Options, Progress, form_of, holds, is_uniform, stored_of

TENSORS = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
"""Role -> name in the file, in a block after `blk.N.`."""
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
ROUNDED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "MXFP4": 38}
"""GGML type of most weights -> general.file_type, which is for show."""
WAY_OUT = (
    "recipes whose grids it can say: int4-gptq, int4-rtn, int8-rtn, mxfp4 "
    "(symmetric integers or mxfp4, groups a multiple of 32)"
)
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Placed:
    """One tensor of the file."""

    key: str
    kind: str
    """GGML type."""
    shape: tuple[int, ...]
    data: Callable[[], Tensor]
    """Its bytes, uint8 [rows, bytes of a row] or [bytes]."""


class GGUFExport(Export):
    """A checkpoint as a GGUF file."""

    target = "gguf"
    layouts = ("stored", *FLOATS, *ROUNDED, *K_QUANTS)
    engine = "llama.cpp"
    one_file = True
    kinds: tuple[str, ...] = tuple(SIZES)
    """GGML types of matrices that the target reads."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        super().__init__(checkpoint, options)
        config = checkpoint.config
        if config.activation != "silu":
            raise ExportError(f"{self.target}: the activation {config.activation} is not llama's, which is silu")
        if any(layer.window for layer in config.layers):
            raise ExportError(
                f"{self.target}: architecture llama has no sliding window",
                hint='if the model attends to everything, say "sliding_window": null in its config.json',
            )
        self.architecture = "llama" if is_uniform(checkpoint) else "deci"
        self.tool = find_tool("llama-quantize", options.llama_cpp) if self.layout in K_QUANTS else None
        self.tokens = gguf_tokens.tokenizer_metadata(checkpoint.tokenizer(), checkpoint.hf_config, config.vocab_size)
        self.placed = [placed for name in checkpoint.names() for placed in self._place(name)]
        factors = rope_factors(config.rope, config.layers[0].head_dim)
        if factors is not None:
            data = partial(torch.Tensor.view, factors, torch.uint8)
            self.placed.append(_Placed("rope_freqs.weight", "F32", tuple(factors.shape), data))

    def write(self, path: Path, progress: Progress) -> None:
        if self.tool is None:
            self._write(path, progress)
        else:
            floats = path.with_name(f"{path.name}.floats")
            self._write(floats, progress)
            _run_quantize(self.tool, floats, path, self.layout)
            floats.unlink()
        file = RandomAccessFile(path)
        tokenizer = self.checkpoint.tokenizer()
        gguf_tokens.check(tokenizer, read_header(file)[0], self.checkpoint.config.vocab_size, path)
        file.close()

    def reader(self, path: Path) -> GGUFReader:
        return GGUFReader(path, self.checkpoint)

    def _write(self, path: Path, progress: Progress) -> None:
        writer = gguf.GGUFWriter(path, self.architecture)
        try:
            for key, value in {**self._metadata(), **self.tokens}.items():
                _add(writer, key, value)
            for placed in self.placed:
                kind = gguf.GGMLQuantizationType[placed.kind]
                block, size = gguf.GGML_QUANT_SIZES[kind]
                row = placed.shape[-1] // block * size
                nbytes = math.prod(placed.shape[:-1]) * row
                writer.add_tensor_info(placed.key, (*placed.shape[:-1], row), np.dtype(np.uint8), nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, placed in enumerate(self.placed):
                progress("writing", done, len(self.placed))
                writer.write_tensor_data(placed.data().numpy())
            progress("writing", len(self.placed), len(self.placed))
        finally:
            writer.close()

    def _place(self, name: str) -> Iterator[_Placed]:
        """Where and as what a tensor goes. Raises ExportError if that would round it unasked."""
        checkpoint, (role, block, suffix) = self.checkpoint, _role(self.checkpoint, name)
        key = f"{TENSORS[role]}.{suffix}" if block is None else f"blk.{block}.{TENSORS[role]}.{suffix}"
        shape, form = checkpoint.shape(name), form_of(checkpoint, name)
        heads = {"q": "num_heads", "k": "num_kv_heads"}.get(role)
        count = getattr(checkpoint.config.layers[block or 0], heads) if heads else None
        if len(shape) == 1:
            yield _Placed(key, "F32", shape, partial(self._floats, name, "F32", count))
            return
        kind, data = self._matrix(name, form, role)
        if kind not in self.kinds:
            self.round_or_refuse(name, f"would be {kind}, which {self.target} does not read", WAY_OUT)
            kind, data = self._to_be_rounded(name, "Q8_0")
        yield _Placed(key, kind, shape, lambda: _permuted(data(), count))
        if kind == "NVFP4":
            yield _Placed(key.replace(".weight", ".scale"), "F32", (1,), partial(self._inverse_scale, name))

    def _matrix(self, name: str, form: Format, role: str) -> tuple[str, Callable[[], Tensor]]:
        """GGML type and data of a matrix."""
        if self.layout in FLOATS or self.layout in K_QUANTS:
            return self._as_floats(name, form)
        if self.layout in ROUNDED:
            return self._as_integers(name, form, self.layout.upper())
        if isinstance(form, Dense):
            kind = self.float_kind(name, form)
            return kind, partial(self._floats, name, kind, None)
        if isinstance(form, GGMLBlocks):
            return form.kind, lambda: stored_of(self.checkpoint, name)["weight"]
        exact = self._exact_kind(name, form)
        if exact is not None and not (exact == "NVFP4" and role in ("embed", "head")):
            return exact, partial(self._encoded, name, exact)
        self.round_or_refuse(name, f"is held exactly by no type of GGUF that {self.target} reads", WAY_OUT)
        return self._to_be_rounded(name, self._nearest_kind(form))

    def float_kind(self, name: str, form: Dense) -> str:
        """The type that a float matrix keeps."""
        return _KINDS[form.dtype]

    def _as_floats(self, name: str, form: Format) -> tuple[str, Callable[[], Tensor]]:
        if self.layout in K_QUANTS:
            kind = _KINDS[form.dtype] if isinstance(form, Dense) else "F32"
            self.round_as_asked(name, f"is quantized already, and {self.layout} is another grid", WAY_OUT)
        else:
            kind = self.layout.upper()
            if not holds(self.checkpoint, name, FLOATS[self.layout]):
                self.round_as_asked(name, f"is not exact in {self.layout}", "--layout f32 or stored keep it")
        return kind, partial(self._floats, name, kind, None)

    def _as_integers(self, name: str, form: Format, kind: str) -> tuple[str, Callable[[], Tensor]]:
        if isinstance(form, Integer) and ggml.is_exact(kind, form, form.codes(stored_of(self.checkpoint, name))):
            return kind, partial(self._encoded, name, kind)
        if isinstance(form, GGMLBlocks) and form.kind == kind:
            return kind, lambda: stored_of(self.checkpoint, name)["weight"]
        self.round_as_asked(name, f"is not exact in {kind}", WAY_OUT)
        return self._to_be_rounded(name, kind)

    def _exact_kind(self, name: str, form: Format) -> str | None:
        if not isinstance(form, Integer) and not (isinstance(form, Codebook) and form.kind in ggml.FLOATS):
            return None
        return ggml.exact_kind(form, form.codes(stored_of(self.checkpoint, name)), self.kinds)

    def _nearest_kind(self, form: Format) -> str:
        """The type of integers that a weight of no exact type is rounded to: that of its bits, or 8 bits."""
        bits, symmetric = getattr(form, "bits", 8), getattr(form, "symmetric", True)
        return "Q8_0" if symmetric or bits > 5 else "Q4_1" if bits <= 4 else "Q5_1"

    def _encoded(self, name: str, kind: str) -> Tensor:
        form, stored = form_of(self.checkpoint, name), stored_of(self.checkpoint, name)
        if kind in ggml.FLOATS.values():
            return ggml.encode_floats(kind, stored)
        return ggml.encode(kind, form, form.codes(stored))

    def _to_be_rounded(self, name: str, kind: str) -> tuple[str, Callable[[], Tensor]]:
        columns = self.checkpoint.shape(name)[1]
        if columns % ggml.BLOCK:
            raise ExportError(
                f"{self.target}: {name} has {columns} columns, and {kind} comes in blocks of {ggml.BLOCK}",
                hint="--layout f16 or f32 take any width",
            )
        return kind, partial(self._rounded, name, kind)

    def _rounded(self, name: str, kind: str) -> Tensor:
        blocks = gguf.quants.quantize(self.checkpoint.tensor(name).numpy(), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(blocks)

    def _floats(self, name: str, kind: str, heads: int | None) -> Tensor:
        dtype = {text: dtype for dtype, text in _KINDS.items()}[kind]
        values = self.checkpoint.tensor(name).to(dtype)
        if values.dim() == 1:
            return _permuted(values, heads).contiguous().view(torch.uint8)
        return values.contiguous().view(torch.uint8)

    def _inverse_scale(self, name: str) -> Tensor:
        return (1.0 / stored_of(self.checkpoint, name)["weight_global_scale"].float()).view(torch.uint8)

    def _metadata(self) -> dict[str, Any]:
        checkpoint, config, arch = self.checkpoint, self.checkpoint.config, self.architecture
        first = config.layers[0]
        kinds: Counter[str] = Counter()
        for placed in self.placed:
            kinds[placed.kind] += math.prod(placed.shape)
        values: dict[str, Any] = {
            "general.name": Path(checkpoint.name).name,
            "general.file_type": FILE_TYPES.get(kinds.most_common(1)[0][0], 0),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            "gossamer.fingerprint": checkpoint.fingerprint(),
            f"{arch}.vocab_size": config.vocab_size,
            f"{arch}.context_length": config.max_positions,
            f"{arch}.embedding_length": config.hidden_size,
            f"{arch}.block_count": config.num_layers,
            f"{arch}.feed_forward_length": self._by_layer("ffn_width"),
            f"{arch}.attention.head_count": self._by_layer("num_heads"),
            f"{arch}.attention.head_count_kv": self._by_layer("num_kv_heads"),
            f"{arch}.attention.key_length": first.head_dim,
            f"{arch}.attention.value_length": first.head_dim,
            f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
            f"{arch}.rope.dimension_count": first.head_dim,
            f"{arch}.rope.freq_base": float(config.rope.theta),
        }
        if config.rope.kind == "linear":
            values |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": float(config.rope.factor)}
        return values

    def _by_layer(self, field: str) -> int | list[int]:
        """A number of all layers, or one for each."""
        found = [int(getattr(layer, field)) for layer in self.checkpoint.config.layers]
        return found if self.architecture == "deci" else found[0]


class GGUFReader:
    """The file as the package `gguf` reads it: its names, its formulas, and rows of q and k put back by position."""

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self.name = f"package gguf {version('gguf')}"
        reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.nbytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        self._config = checkpoint.config
        arch = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[
            str(reader.fields["general.architecture"].contents())
        ]
        self._names = gguf.get_tensor_name_map(arch, checkpoint.config.num_layers)

    def weight(self, name: str) -> Tensor:
        key = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = self._tensors[key]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        scale = self._tensors.get(key.replace(".weight", ".scale"))
        if scale is not None and key.endswith(".weight"):
            values = values * scale.data
        found = torch.from_numpy(np.array(values)).view(*(int(n) for n in reversed(tensor.shape)))
        if ".q_proj." not in name and ".k_proj." not in name:
            return found
        width = self._config.layers[0].head_dim
        row = torch.arange(len(found))
        inside = row % width
        return found[row - inside + 2 * (inside % (width // 2)) + inside // (width // 2)]


def find_tool(name: str, folder: Path | None) -> Path:
    """One of llama.cpp's programs, in this folder or on PATH. Raises ExportError."""
    found = shutil.which(name, path=None if folder is None else str(folder))
    if found is None:
        where = "PATH" if folder is None else str(folder)
        raise ExportError(
            f"gguf: {name} is not on {where}, and K-quants are made by it",
            hint="name the folder of llama.cpp's programs with --llama-cpp, or take another --layout",
        )
    return Path(found)


def _run_quantize(tool: Path, floats: Path, out: Path, layout: str) -> None:
    done = subprocess.run([tool, floats, out, layout.upper()], capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["nothing"]
        raise ExportError(f"gguf: {tool} failed with code {done.returncode}: {said[0][:300]}")


def rope_factors(rope: Rope, head_dim: int) -> Tensor | None:
    """float32 [head_dim / 2]: what LLaMA 3's scaling divides each frequency by; None for other scalings."""
    if rope.kind != "llama3":
        return None
    return inverse_frequencies(Rope(rope.theta), head_dim) / inverse_frequencies(rope, head_dim)


def _permuted(rows: Tensor, heads: int | None) -> Tensor:
    """Rows of q and k as GGUF has them: in each head, the two of a rotary pair side by side."""
    if heads is None:
        return rows.contiguous()
    return rows.view(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape).contiguous()


def _role(checkpoint: Checkpoint, name: str) -> tuple[str, int | None, str]:
    """Role, block (None: of the model) and `weight` or `bias` of a tensor."""
    family = FAMILIES[checkpoint.config.family]
    module, _, suffix = name.rpartition(".")
    for role in ("embed", "final_norm", "head"):
        if family.module(role) == module:
            return role, None, suffix
    block = int(module.split(".")[2])
    role = next(role for role in family.modules if family.module(role, block) == module)
    return role, block, suffix


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if key == "tokenizer.ggml.scores":
        writer.add_token_scores(value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
