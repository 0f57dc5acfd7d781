"""What every checkpoint offers, whatever its container: named float tensors, read row by row. Knows no file format.

Names are always the Hugging Face ones of the family (`model.layers.0.self_attn.q_proj.weight`); how a weight is stored
is its `format`.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CorruptCheckpoint, GossamerError, UnknownName
from ..formats import Dense, Format
from ..model import ModelConfig, config_from_hf, tensor_names
from .files import byte_view
from .manifest import cached_hash
from .safetensors_io import row_range

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

BLOCK_ELEMENTS = 1 << 22
"""Weights that are dequantized at a time: what bounds the memory beside the result."""
_VOLATILE = {"transformers_version", "_name_or_path", "auto_map", "torch_dtype", "dtype"}


class Checkpoint(abc.ABC):
    """An opened model: its config, its tensors (nothing but headers is in memory), its tokenizer."""

    name: str
    """As it was asked for: folder, file, hub id or alias."""
    path: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    """What config.json says, or would say; with both `rope_theta` and `rope_parameters`, never `auto_map`."""
    dtype: torch.dtype
    """In which float tensors are saved: bfloat16, float16 or float32."""
    manifest: dict[str, Any] | None = None
    """gossamer.json, if there is one."""
    source_note: str | None = None
    """What a table must say of it, such as "stored as Q4_1 (GGUF): already 4-bit"."""
    _shapes: dict[str, tuple[int, ...]]
    _tokenizer: Tokenizer | None = None

    def names(self) -> tuple[str, ...]:
        """Every tensor of the model; `lm_head.weight` only if it is not the embedding."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """[out_features, in_features] of a matrix, [features] of a norm or bias."""
        if name not in self._shapes:
            raise UnknownName("tensor", name, self._shapes)
        return self._shapes[name]

    @abc.abstractmethod
    def format(self, name: str) -> Format:
        """How this tensor is stored."""

    @abc.abstractmethod
    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """Local name (`weight`, `weight_packed`, ...) -> tensor, in the order of rows of the Hugging Face layout."""

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, made when it is first asked for. Raises TokenizerError."""
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        return self._tokenizer

    @abc.abstractmethod
    def _make_tokenizer(self) -> Tokenizer:
        """The tokenizer that the files describe. Raises TokenizerError."""

    @abc.abstractmethod
    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """These rows, dequantized, in whatever float dtype is at hand: [stop - start, ...]."""

    @abc.abstractmethod
    def _files(self) -> list[Path]:
        """The files whose change changes the fingerprint."""

    @abc.abstractmethod
    def _contents(self) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """Every stored tensor in an order of its own, as a description and its bytes in chunks."""

    def tensor(self, name: str, rows: slice | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dequantized tensor, or these rows (step 1) of it; only those rows are read from disk."""
        shape = self.shape(name)
        start, stop = row_range(rows or slice(None), shape[0])
        if self.format(name) == Dense(dtype):
            return self._read(name, start, stop)  # as it is stored: a block at a time would be copied once more
        out = torch.empty(stop - start, *shape[1:], dtype=dtype)
        for first, last in row_blocks(start, stop, math.prod(shape[1:])):
            out[first - start : last - start] = self._read(name, first, last)
        return out

    def nbytes(self, name: str) -> int:
        """Bytes that this tensor takes as stored, scales and zero points counted."""
        return self.format(name).nbytes(self.shape(name))

    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(self.nbytes(name) for name in self._shapes)

    def parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    def bits_per_weight(self) -> float:
        """Stored bits over weights, all tensors counted."""
        return self.weight_bytes() * 8 / self.parameters()

    def fingerprint(self) -> str:
        """sha256 of config and tensors, remembered for as long as the files stay as they are."""
        return cached_hash("fingerprint-1", self._files(), self._hash)

    def _hash(self) -> str:
        digest = hashlib.sha256()
        config = {key: value for key, value in self.hf_config.items() if key not in _VOLATILE}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for description, chunks in self._contents():
            digest.update(f"\n{description}\n".encode())
            for chunk in chunks:
                digest.update(byte_view(chunk))
        return digest.hexdigest()


def row_blocks(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Consecutive row ranges of a matrix, each of about BLOCK_ELEMENTS weights and a multiple of 32 rows."""
    step = max(32, BLOCK_ELEMENTS // max(columns, 1) // 32 * 32)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def parse_config(hf_config: dict[str, Any], tensors: int, where: Path) -> ModelConfig:
    """ModelConfig of a config that a file claims to have. Raises UnsupportedModel, CorruptCheckpoint."""
    layers = hf_config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors:  # before anything is made for each of them
        raise CorruptCheckpoint(f"{where}: num_hidden_layers is {layers}, but there are only {tensors} tensors")
    try:
        return config_from_hf(hf_config)
    except GossamerError as error:
        message = error.message.removeprefix("config.json: ")
        raise type(error)(f"{where}: {message}", hint=error.hint) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"{where}: a config that makes no sense: {error}") from error


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that this config asks for."""
    return dict(tensor_names(config))


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raises CorruptCheckpoint naming the first tensor that is missing, of another shape, or not of this model."""
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CorruptCheckpoint(f"{where}: tensor {missing[0]!r} {list(expected[missing[0]])} is missing{more}")
    for name, shape in found.items():
        if name not in expected:
            raise CorruptCheckpoint(f"{where}: tensor {name!r} {list(shape)} is not one of this model's")
        if shape != expected[name]:
            raise CorruptCheckpoint(
                f"{where}: tensor {name!r} has shape {list(shape)}, the config expects {list(expected[name])}"
            )
