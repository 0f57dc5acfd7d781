"""One GGUF file for llama.cpp and whatever else reads GGUF: its family's architecture, or `deci` where layers differ.

As it is stored, a weight becomes the smallest GGML type that holds it exactly (ggml.py), and a GGUF file's own blocks
stay what they are; layers that lie in one tensor get the smallest that holds each. A layout of integers rounds float
weights by ggml's own rule; K-quants are left to llama.cpp's tool. What llama.cpp calls and knows of a family is in
checkpoint/gguf_architectures.py.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.files import RandomAccessFile
from ..checkpoint.gguf import GGMLBlocks
from ..checkpoint.gguf_architectures import DECI, WRITTEN, Architecture, misread, tensors_of
from ..checkpoint.gguf_blocks import SIZES
from ..checkpoint.gguf_header import read_header
from ..errors import ExportError, ProofFailed
from ..formats import Codebook, Dense, Format, Integer
from ..model import FAMILIES, Rope
from ..model.decoder import inverse_frequencies
from ..model.pieces import pieces
from . import ggml, gguf_tokens
from .base import (
    FLOATS,
    FOLDER,
    MISTAKE,
    RAGGED,
    Export,
    Options,
    Progress,
    form_of,
    holds,
    is_uniform,
    stored_of,
)

K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
ROUNDED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "MXFP4": 38}
"""GGML type of most weights -> general.file_type, which is for show."""
WAY_OUT = (
    "recipes whose grids it can say: int4-gptq, int4-rtn, int8-rtn, mxfp4 "
    "(symmetric integers or mxfp4, groups a multiple of 32)"
)
ENDS = ("token_embd", "output", "position_embd")
"""Matrices outside of the blocks."""
_Data: TypeAlias = Callable[[], Tensor]
"""What makes the bytes of a matrix: uint8 [rows, bytes of a row]."""
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
    families = tuple(WRITTEN)
    unknown = "is no architecture of llama.cpp"
    one_file = True
    kinds: tuple[str, ...] = tuple(SIZES)
    """GGML types of matrices that the target reads."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        super().__init__(checkpoint, options)
        config = checkpoint.config
        self.row = self._architecture()
        self.tool = find_tool("llama-quantize", options.llama_cpp) if self.layout in K_QUANTS else None
        self.tokens = gguf_tokens.tokenizer_metadata(checkpoint.tokenizer(), checkpoint.hf_config, config.vocab_size)
        tensors = tensors_of(self.row, config)
        self.placed = [placed for key, names in tensors.items() for placed in self._place(key, names)]
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

    def same(self, name: str, ours: Tensor, theirs: Tensor) -> bool:
        """What the file has added to a norm weight, the model adds before it uses it."""
        offset = self._norm_offset(name)
        return torch.equal(ours + offset, theirs + offset)

    def _architecture(self) -> Architecture:
        """Raises ExportError for what llama.cpp would read wrongly."""
        config, row = self.checkpoint.config, WRITTEN[self.checkpoint.config.family]
        if not is_uniform(self.checkpoint):
            if row.name != "llama":
                raise ExportError(
                    f"{self.target}: the layers of {self.checkpoint.name} differ in heads, width or biases, and "
                    f"architecture {row.name} has one shape for all",
                    hint=RAGGED,
                )
            row = DECI
        if any(layer.window for layer in config.layers) and not row.windows:
            raise ExportError(
                f"{self.target}: architecture {row.name} has no sliding window in llama.cpp",
                hint='if the model attends to everything, say "sliding_window": null in its config.json',
            )
        for why in misread(row, config):
            raise ExportError(f"{self.target}: {why}", hint=FOLDER)
        return row

    def _norm_offset(self, name: str) -> float:
        """What the file adds to a tensor: the only vectors that are weights are those of norms."""
        vector = len(self.checkpoint.shape(name)) == 1
        return self.checkpoint.config.norm_offset if vector and name.endswith(".weight") else 0.0

    def _write(self, path: Path, progress: Progress) -> None:
        writer = gguf.GGUFWriter(path, self.row.name)
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

    def _place(self, key: str, names: Sequence[str]) -> Iterator[_Placed]:
        """As what a tensor of the file is written. Raises ExportError if that would round a part of it unasked."""
        shapes = [self.checkpoint.shape(name) for name in names]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        if len(shape) == 1:
            yield _Placed(key, "F32", shape, partial(self._vector, names))
            return
        kind, parts = self._matrices(key, names)
        if kind not in self.kinds:
            for name in names:
                self.round_or_refuse(name, f"would be {kind}, which {self.target} does not read", WAY_OUT)
            kind, parts = "Q8_0", [self._to_be_rounded(name, "Q8_0") for name in names]
        yield _Placed(key, kind, shape, partial(self._joined, names, parts))
        if kind == "NVFP4":
            yield _Placed(key.replace(".weight", ".scale"), "F32", (1,), partial(self._inverse_scale, names[0]))

    def _matrices(self, key: str, names: Sequence[str]) -> tuple[str, list[_Data]]:
        """GGML type and data of the matrices that lie in one tensor."""
        found = [self._matrix(key, name) for name in names]
        kinds = {kind for kind, _ in found}
        if len(kinds) == 1:
            return found[0][0], [data for _, data in found]
        if kinds <= set(_KINDS.values()):
            return "F32", [partial(self._floats, name, "F32") for name in names]
        integers = (kind for kind in ggml.BY_SIZE if kind in self.kinds)
        kind = next((k for k in integers if all(self._held(name, k) for name in names)), "Q8_0")
        return kind, [self._held(name, kind) or self._beside_others(name, kind) for name in names]

    def _beside_others(self, name: str, kind: str) -> _Data:
        self.round_or_refuse(name, "lies in one tensor with others, and no type holds all of them", WAY_OUT)
        return self._to_be_rounded(name, kind)

    def _matrix(self, key: str, name: str) -> tuple[str, _Data]:
        """GGML type and data of a matrix."""
        form, end = form_of(self.checkpoint, name), key.removesuffix(".weight") in ENDS
        if self.layout in FLOATS or self.layout in K_QUANTS:
            return self._as_floats(name, form)
        if self.layout in ROUNDED and key != "position_embd.weight":
            return self._as_integers(name, self.layout.upper())
        if isinstance(form, Dense):
            kind = self.float_kind(name, form)
            return kind, partial(self._floats, name, kind)
        if isinstance(form, GGMLBlocks):
            return form.kind, partial(self._blocks, name)
        exact = self._exact_kind(name, form)
        if exact is not None and not (exact == "NVFP4" and (end or not self.row.scales)):
            return exact, partial(self._encoded, name, exact)
        self.round_or_refuse(name, f"is held exactly by no type of GGUF that {self.target} reads", WAY_OUT)
        kind = self._nearest_kind(form)
        return kind, self._to_be_rounded(name, kind)

    def float_kind(self, name: str, form: Dense) -> str:
        """The type that a float matrix keeps."""
        return _KINDS[form.dtype]

    def _as_floats(self, name: str, form: Format) -> tuple[str, _Data]:
        if self.layout in K_QUANTS:
            kind = _KINDS[form.dtype] if isinstance(form, Dense) else "F32"
            self.round_as_asked(name, f"is quantized already, and {self.layout} is another grid", WAY_OUT)
        else:
            kind = self.layout.upper()
            if not holds(self.checkpoint, name, FLOATS[self.layout]):
                self.round_as_asked(name, f"is not exact in {self.layout}", "--layout f32 or stored keep it")
        return kind, partial(self._floats, name, kind)

    def _as_integers(self, name: str, kind: str) -> tuple[str, _Data]:
        held = self._held(name, kind)
        if held is None:
            self.round_as_asked(name, f"is not exact in {kind}", WAY_OUT)
        return kind, held or self._to_be_rounded(name, kind)

    def _held(self, name: str, kind: str) -> _Data | None:
        """The data of a weight that this type of integers holds as it is, else None."""
        form = form_of(self.checkpoint, name)
        if isinstance(form, Integer) and ggml.is_exact(kind, form, form.codes(stored_of(self.checkpoint, name))):
            return partial(self._encoded, name, kind)
        if isinstance(form, GGMLBlocks) and form.kind == kind:
            return partial(self._blocks, name)
        return None

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

    def _blocks(self, name: str) -> Tensor:
        return stored_of(self.checkpoint, name)["weight"]

    def _to_be_rounded(self, name: str, kind: str) -> _Data:
        columns = self.checkpoint.shape(name)[1]
        if columns % ggml.BLOCK:
            raise ExportError(
                f"{self.target}: {name} has {columns} columns, and {kind} comes in blocks of {ggml.BLOCK}",
                hint="--layout f16 or f32 take any width",
            )
        return partial(self._rounded, name, kind)

    def _rounded(self, name: str, kind: str) -> Tensor:
        blocks = gguf.quants.quantize(self.checkpoint.tensor(name).numpy(), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(blocks)

    def _floats(self, name: str, kind: str) -> Tensor:
        dtype = {text: dtype for dtype, text in _KINDS.items()}[kind]
        return self.checkpoint.tensor(name).to(dtype).contiguous().view(torch.uint8)

    def _vector(self, names: Sequence[str]) -> Tensor:
        parts = [self._in_order(name, self.checkpoint.tensor(name) + self._norm_offset(name)) for name in names]
        return torch.cat(parts).view(torch.uint8)

    def _joined(self, names: Sequence[str], parts: Sequence[_Data]) -> Tensor:
        """Rows of all parts, one after another."""
        return torch.cat([self._in_order(name, part()) for name, part in zip(names, parts, strict=True)])

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a layer as the file has them."""
        if not self.row.pairs or not (".q_proj." in name or ".k_proj." in name):
            return rows
        return _permuted(rows, len(rows) // self.checkpoint.config.layers[0].head_dim)

    def _inverse_scale(self, name: str) -> Tensor:
        return (1.0 / stored_of(self.checkpoint, name)["weight_global_scale"].float()).view(torch.uint8)

    def _metadata(self) -> dict[str, Any]:
        checkpoint, config = self.checkpoint, self.checkpoint.config
        kinds: Counter[str] = Counter()
        for placed in self.placed:
            kinds[placed.kind] += math.prod(placed.shape)
        own = {**self._sizes(), **self._positions(), **self.row.says(config)}
        return {
            "general.name": Path(checkpoint.name).name,
            "general.file_type": FILE_TYPES.get(kinds.most_common(1)[0][0], 0),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            "gossamer.fingerprint": checkpoint.fingerprint(),
            **{f"{self.row.name}.{key}": value for key, value in own.items()},
        }

    def _sizes(self) -> dict[str, Any]:
        config = self.checkpoint.config
        return {
            "vocab_size": config.vocab_size,
            "context_length": config.max_positions,
            "embedding_length": config.hidden_size,
            "block_count": config.num_layers,
            "feed_forward_length": self._by_layer("ffn_width"),
            "attention.head_count": self._by_layer("num_heads"),
            "attention.head_count_kv": self._by_layer("num_kv_heads"),
            "attention.key_length": config.layers[0].head_dim,
            "attention.value_length": config.layers[0].head_dim,
            self.row.epsilon: float(config.norm_eps),
        }

    def _positions(self) -> dict[str, Any]:
        config, rope = self.checkpoint.config, self.checkpoint.config.rope
        if config.positions != "rotary":
            return {}
        values: dict[str, Any] = {
            "rope.dimension_count": rope.width(config.layers[0].head_dim),
            "rope.freq_base": float(rope.theta),
        }
        if rope.kind == "linear":
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
        return values

    def _by_layer(self, field: str) -> int | list[int]:
        """A number of all layers, or one for each."""
        found = [int(getattr(layer, field)) for layer in self.checkpoint.config.layers]
        return found if self.row is DECI else found[0]


class GGUFReader:
    """The file as the package `gguf` reads it: its names and its formulas, and everything put back by position."""

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self.name = f"package gguf {version('gguf')}"
        reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.nbytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        self._config, self._family = checkpoint.config, FAMILIES[checkpoint.config.family]
        self._arch = str(reader.fields["general.architecture"].contents())
        arch = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[self._arch]
        self._names = gguf.get_tensor_name_map(arch, checkpoint.config.num_layers)
        self._rows: dict[str, tuple[str, int, int]] = {}
        last: Counter[str] = Counter()
        places = pieces(checkpoint.config)
        for name in checkpoint.names():
            whole, rows = places[name].name if name in places else name, checkpoint.shape(name)[0]
            self._rows[name] = (whole, last[whole], last[whole] + rows)
            last[whole] += rows

    def weight(self, name: str) -> Tensor:
        whole, first, last = self._rows[name]
        found = self._whole(self._key(whole))[first:last]
        if self._config.norm_offset and name.endswith("norm.weight"):
            return found - self._config.norm_offset
        if self._arch not in ("llama", "deci") or not (".q_proj." in name or ".k_proj." in name):
            return found
        width = self._config.layers[0].head_dim
        row = torch.arange(len(found))
        inside = row % width
        return found[row - inside + 2 * (inside % (width // 2)) + inside // (width // 2)]

    def _key(self, name: str) -> str:
        """Of some families the package knows names with what they begin with, of others without."""
        for known in (name, name.removeprefix(self._family.prefix)):
            key = self._names.get_name(known, try_suffixes=(".weight", ".bias"))
            if key in self._tensors:
                return str(key)
        raise ProofFailed(f"{self.name} finds no {name} in a file of architecture {self._arch}", hint=MISTAKE)

    def _whole(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        scale = self._tensors.get(key.replace(".weight", ".scale"))
        if scale is not None and key.endswith(".weight"):
            values = values * scale.data
        return torch.from_numpy(np.array(values)).view(*(int(n) for n in reversed(tensor.shape)))


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
    way_out = "name another build of llama.cpp with --llama-cpp, or take another --layout"
    try:
        done = subprocess.run([tool, floats, out, layout.upper()], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ExportError(f"gguf: {tool} cannot be started: {error.strerror}", hint=way_out) from error
    if done.returncode or not out.exists():
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["nothing"]
        made = f"failed with code {done.returncode}" if done.returncode else f"made no file of {layout}"
        raise ExportError(f"gguf: {tool} {made}, and said: {said[0][:300]}", hint=way_out)


def rope_factors(rope: Rope, head_dim: int) -> Tensor | None:
    """float32 [head_dim / 2]: what LLaMA 3's scaling divides each frequency by; None for other scalings."""
    if rope.kind != "llama3":
        return None
    return inverse_frequencies(Rope(rope.theta), head_dim) / inverse_frequencies(rope, head_dim)


def _permuted(rows: Tensor, heads: int) -> Tensor:
    """Rows of q and k as GGUF has them: in each head, the two of a rotary pair side by side."""
    return rows.view(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape).contiguous()


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
