"""A GGUF file as a checkpoint with Hugging Face names and layout.

What differs from the Hugging Face folder is undone here: tensor names, layers that lie in one tensor, 1 added to norm
weights, and in architecture `llama` (LLaMA, Mistral, SmolLM2) the order of the rows of the query and key projections,
which GGUF permutes within each head so that rotary pairs are neighbours.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CorruptCheckpoint, KernelError, UnsupportedModel
from ..formats import Dense, Format, Tensors
from ..model.families import NORMS, norm_parts
from .base import Checkpoint, check_tensors, expected_shapes, parse_config, row_blocks
from .files import RandomAccessFile
from .gguf_architectures import ARCHITECTURES, BLOCK, ENDS, Architecture
from .gguf_blocks import SIZES, dequantize, has_floats
from .gguf_header import GGUFTensor, read_header, shown

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every LLaMA 3 uses; GGUF keeps only the resulting factors, from which these are confirmed."""


@dataclass(frozen=True)
class GGMLBlocks(Format):
    """`weight` uint8 [out_features, row_bytes]: blocks of a GGML type, such as `Q4_1`."""

    kind: str

    @property
    def name(self) -> str:
        return self.kind.lower()

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        block, size = SIZES[self.kind]
        return {"weight": (torch.uint8, (*shape[:-1], shape[-1] // block * size))}

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> torch.Tensor:
        data = tensors["weight"]
        if data.dtype != torch.uint8 or data.shape[-1] % SIZES[self.kind][1]:
            raise KernelError(f"{self.name}: {data.dtype} {list(data.shape)} are not rows of whole blocks")
        return dequantize(self.kind, data if rows is None else data[rows])


class GGUFCheckpoint(Checkpoint):
    """One .gguf file. Raises CorruptCheckpoint, UnsupportedModel."""

    def __init__(self, path: Path, name: str) -> None:
        self.name, self.path = name, path
        self._file = RandomAccessFile(path)
        self.metadata, raw = read_header(self._file)
        self._architecture = self._known_architecture()
        self._check_kinds(raw)
        scaling = self._rope_factors(raw.pop(_ROPE_FREQS, None))
        names = {gguf_name: self._hf_names(gguf_name) for gguf_name in raw}
        self.dtype = _save_dtype(raw)
        self.hf_config = self._config(raw, scaling)
        self.config = parse_config(self.hf_config, 3 * len(raw), path)
        self._shapes = expected_shapes(self.config)
        self._norms = self._offset_norms()
        tensors = {
            name: part for gguf_name, tensor in raw.items() for name, part in self._parts(names[gguf_name], tensor)
        }
        check_tensors(self._shapes, {name: tensor.shape for name, tensor in tensors.items()}, path)
        self._tensors = tensors
        self.source_note = _note(tensors, self._architecture.family.embed)

    def format(self, name: str) -> Format:
        self.shape(name)
        kind = self._tensors[name].kind
        return Dense(_FLOATS[kind]) if kind in _FLOATS else GGMLBlocks(kind)

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        shape = self.shape(name)
        data, kind = self._rows(name, 0, shape[0]), self._tensors[name].kind
        if name in self._norms:
            return {"weight": self._read(name, 0, shape[0])}
        return {"weight": data.view(_FLOATS[kind]) if kind in _FLOATS else data}

    def _make_tokenizer(self) -> Tokenizer:
        from .gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(self.metadata, self.config.vocab_size, self.path)

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        data, kind = self._rows(name, start, stop), self._tensors[name].kind
        if kind in _FLOATS:
            floats = data.view(_FLOATS[kind])
            return floats - self.config.norm_offset if name in self._norms else floats
        return GGMLBlocks(kind).unpack({"weight": data})

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Stored bytes of these rows in Hugging Face order: uint8 [stop - start, row_bytes] (a vector: [bytes])."""
        tensor = self._tensors[name]
        permuted = self._architecture.pairs and (".q_proj." in name or ".k_proj." in name)
        if len(tensor.shape) == 1:
            if permuted:  # the bias of permuted rows: one number per row
                itemsize = tensor.nbytes // tensor.shape[0]
                data = self._file.read(tensor.offset, tensor.nbytes).reshape(-1, itemsize)
                return data[self._order(0, len(data))][start:stop].reshape(-1)
            row = tensor.nbytes // tensor.shape[0]
            return self._file.read(tensor.offset + start * row, (stop - start) * row)
        if not permuted:
            return self._plain_rows(tensor, start, stop)
        head = self.config.layers[0].head_dim
        first, last = start // head * head, -(-stop // head) * head
        rows = self._plain_rows(tensor, first, last)
        return rows[self._order(first, last)[start - first : stop - first]]

    def _plain_rows(self, tensor: GGUFTensor, start: int, stop: int) -> torch.Tensor:
        data = self._file.read(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        return data.reshape(stop - start, tensor.row_bytes)

    def _order(self, first: int, last: int) -> torch.Tensor:
        """For whole heads of rows first..last: where, from `first`, row r of the Hugging Face layout is in the file."""
        head = self.config.layers[0].head_dim
        rows = torch.arange(last - first)
        half, pair = rows % head // (head // 2), rows % (head // 2)
        return rows // head * head + 2 * pair + half

    def _files(self) -> list[Path]:
        return [self.path]

    def _contents(self) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        for name in sorted(self._tensors):
            tensor = self._tensors[name]
            yield f"{name} {tensor.kind} {list(tensor.shape)}", self._chunks(tensor)

    def _chunks(self, tensor: GGUFTensor) -> Iterator[torch.Tensor]:
        for start, stop in row_blocks(0, tensor.nbytes, 1):
            yield self._file.read(tensor.offset + start, stop - start)

    def _check_kinds(self, raw: dict[str, GGUFTensor]) -> None:
        for name, tensor in raw.items():
            if tensor.kind in _FLOATS:
                continue
            where = f"{self.path}: tensor {name!r} {list(tensor.shape)}"
            if not has_floats(tensor.kind):
                raise UnsupportedModel(f"{where}: GGML type {tensor.kind} cannot be turned into floats")
            if len(tensor.shape) == 1:
                raise UnsupportedModel(f"{where}: a vector as {tensor.kind}", hint="supported: " + ", ".join(_FLOATS))

    def _known_architecture(self) -> Architecture:
        architecture = self.metadata.text("general.architecture")
        if architecture is None:
            raise CorruptCheckpoint(f"{self.path}: general.architecture is missing")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModel(
                f"{self.path}: architecture {architecture!r}", hint="supported in GGUF: " + ", ".join(ARCHITECTURES)
            )
        parts = self.metadata.integer("split.count", 0) or 0
        if parts > 1:
            raise UnsupportedModel(f"{self.path}: one of {parts} parts", hint="join them: llama-gguf-split --merge")
        if self.metadata.integer(f"{architecture}.expert_count", 0):
            raise UnsupportedModel(f"{self.path}: a mixture of experts")
        return ARCHITECTURES[architecture]

    def _hf_names(self, name: str) -> list[str]:
        """Names of the tensors that lie in this one, in order."""
        stem, _, suffix = name.rpartition(".")
        arch = self._architecture
        role = ENDS.get(stem, "")
        if role in arch.family.ends and suffix in ("weight", "bias"):
            return [f"{arch.family.module(role)}.{suffix}"]
        match = _BLOCK_NAME.fullmatch(name)
        if match:
            roles = arch.fused.get(match[2]) or (BLOCK.get(match[2], ""),)
            if all(role in arch.family.modules for role in roles):
                return [f"{arch.family.module(role, int(match[1]))}.{match[3]}" for role in roles]
        raise UnsupportedModel(f"{self.path}: tensor {name!r} is not one of architecture {arch.name!r}")

    def _parts(self, names: list[str], tensor: GGUFTensor) -> Iterator[tuple[str, GGUFTensor]]:
        """The tensors that lie in this one, as many rows each as the config says."""
        if len(names) == 1:
            yield names[0], tensor
            return
        rows = [self._shapes.get(name, (0,))[0] for name in names]
        if sum(rows) != tensor.shape[0]:
            raise CorruptCheckpoint(
                f"{self.path}: a tensor of {tensor.shape[0]} rows for {', '.join(names)}, which have {sum(rows)}"
            )
        size, offset = tensor.nbytes // tensor.shape[0], tensor.offset
        for name, count in zip(names, rows, strict=True):
            yield name, replace(tensor, shape=(count, *tensor.shape[1:]), offset=offset, nbytes=count * size)
            offset += count * size

    def _offset_norms(self) -> frozenset[str]:
        """Names of norm weights to which the file has added what the model adds."""
        if not self.config.norm_offset:
            return frozenset()
        family, parts = self._architecture.family, norm_parts(self.config)
        modules = [family.module(role) for role in self.config.model_norms()]
        for i in range(self.config.num_layers):
            modules += [family.module(role, i) for role in NORMS if role in family.modules]
        return frozenset(f"{module}.{part}" for module in modules for part in parts)

    def _config(self, tensors: dict[str, GGUFTensor], scaling: dict[str, Any] | None) -> dict[str, Any]:
        """What config.json of this model says."""
        meta, row = self.metadata, self._architecture
        arch, family = row.name, row.family
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CorruptCheckpoint(f"{self.path}: no matrix token_embd.weight")
        heads = self._uniform(f"{arch}.attention.head_count")
        hidden = meta.need(f"{arch}.embedding_length")
        theta = _short(meta.number(f"{arch}.rope.freq_base", 10000.0))
        plain: dict[str, Any] = {
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._uniform(f"{arch}.feed_forward_length"),
            "num_hidden_layers": meta.need(f"{arch}.block_count", high=len(tensors)),
            "num_attention_heads": heads,
            "num_key_value_heads": self._uniform(f"{arch}.attention.head_count_kv", heads),
            "head_dim": self._head_dim(hidden // heads),
            "hidden_act": row.activation,
            "rms_norm_eps": _short(meta.number(f"{arch}.{row.epsilon}", 1e-5)),
            "max_position_embeddings": meta.need(f"{arch}.context_length"),
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta, **self._rope(scaling)},
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": f"blk.0.{'attn_qkv' if 'attn_qkv' in row.fused else 'attn_q'}.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch_dtype": str(self.dtype).removeprefix("torch."),
        }
        plain |= row.more(meta, arch, plain)
        if not row.grouped and plain["num_key_value_heads"] != heads:
            raise UnsupportedModel(f"{self.path}: {arch}.attention.head_count_kv differs from the number of heads")
        left_out = set() if row.grouped else {"num_key_value_heads", "head_dim"}
        left_out |= set() if row.activation else {"hidden_act"}
        left_out |= {key for key in ("attention_bias", "mlp_bias") if key not in family.biases}
        if family.model.get("positions", "rotary") != "rotary":
            left_out |= {"rope_theta", "rope_parameters"}
        config = {"architectures": [family.architecture], "model_type": family.name} | {
            family.keys.get(key, (key,))[0]: value
            for key, value in plain.items()
            if key not in left_out and (value is not None or key in family.defaults)
        }
        for role in ("bos", "eos", "padding"):
            token = meta.integer(f"tokenizer.ggml.{role}_token_id")
            if token is not None and 0 <= token < embedding.shape[0]:  # 2^32 - 1 is how some say that there is none
                config[f"{role.removesuffix('ding')}_token_id"] = token
        return config

    def _head_dim(self, default: int) -> int:
        """Width of a head, which all that the file says of it must agree on."""
        meta, arch = self.metadata, self._architecture.name
        turned = meta.integer(f"{arch}.rope.dimension_count")
        head_dim = meta.integer(f"{arch}.attention.key_length", turned if arch == "llama" else default) or default
        keys = ("rope.dimension_count", "attention.key_length", "attention.value_length")
        for key in keys[1:] if self._architecture.partial else keys:
            if meta.integer(f"{arch}.{key}", head_dim) != head_dim:
                raise UnsupportedModel(f"{self.path}: {arch}.{key} differs from the head width {head_dim}")
        return head_dim

    def _uniform(self, key: str, default: int | None = None) -> int:
        """An integer that may be given once or, all the same, for each layer."""
        value = self.metadata.values.get(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            if not len(value) or value.min() != value.max():
                raise UnsupportedModel(f"{self.path}: {key} differs between layers")
            value = int(value[0])
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise CorruptCheckpoint(f"{self.path}: {key} is {shown(value)}, expected a positive integer")
        return value

    def _rope(self, scaling: dict[str, Any] | None) -> dict[str, Any]:
        """Rotary scaling as llama.cpp takes it: linear if no type is given, by the older key if no factor is."""
        meta, prefix = self.metadata, f"{self._architecture.name}.rope"
        kind = meta.text(f"{prefix}.scaling.type", "linear")
        factor = meta.number(f"{prefix}.scaling.factor", meta.number(f"{prefix}.scale_linear", 0.0))
        if kind == "none" or (kind == "linear" and factor in {0.0, 1.0}):
            return scaling or {}
        if kind == "linear" and scaling is None and "linear" in self._architecture.scalings:
            return {"rope_type": "linear", "factor": _short(factor)}
        twice = "" if scaling is None else f" by {factor} on top of {_ROPE_FREQS}"
        raise UnsupportedModel(
            f"{self.path}: rotary scaling {shown(kind)}{twice}", hint="supported in GGUF: linear, llama3"
        )

    def _rope_factors(self, tensor: GGUFTensor | None) -> dict[str, Any] | None:
        """LLaMA 3's scaling, recognized by the factor of each frequency that it leaves in the file."""
        if tensor is None:
            return None
        if tensor.kind != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
            raise UnsupportedModel(f"{self.path}: {_ROPE_FREQS} is {tensor.kind} {list(tensor.shape)}")
        factors = self._file.read(tensor.offset, tensor.nbytes).view(torch.float32).double()
        theta = self.metadata.number(f"{self._architecture.name}.rope.freq_base", 10000.0) or 0.0
        factor = _short(float(factors.max()))
        if factor == 1.0 and bool((factors == 1.0).all()):
            return None
        if theta > 0 and torch.allclose(factors, llama3_factors(theta, len(factors), factor), rtol=1e-3):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3}
        raise UnsupportedModel(f"{self.path}: {_ROPE_FREQS} holds factors that are not LLaMA 3's scaling")


def llama3_factors(theta: float, count: int, factor: float) -> torch.Tensor:
    """By what each rotary frequency is divided: float64 [count], 1 where fast, `factor` where slow."""
    low, high, context = (float(LLAMA3[key]) for key in LLAMA3)
    wavelength = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    smooth = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _save_dtype(tensors: dict[str, GGUFTensor]) -> torch.dtype:
    """float16 or float32 if most weights are in it, else bfloat16."""
    weights: Counter[str] = Counter()
    for tensor in tensors.values():
        weights[tensor.kind] += math.prod(tensor.shape)
    commonest = weights.most_common(1)[0][0] if weights else "BF16"
    return _FLOATS.get(commonest, torch.bfloat16)


def _note(tensors: dict[str, GGUFTensor], embed: str) -> str | None:
    weights: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and name != f"{embed}.weight":
            weights[tensor.kind] += math.prod(tensor.shape)
    kind = weights.most_common(1)[0][0] if weights else "F32"
    bits = re.search(r"\d+", kind)
    if kind in _FLOATS or bits is None:
        return None
    return f"stored as {kind} (GGUF): already {bits[0]}-bit"


def _short(value: float | None) -> float:
    """A number that went through float32, as it was written before: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(0.0 if value is None else value)))
