"""A checkpoint without some of its layers, heads and channels: rows and columns are left out as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...checkpoint.safetensors_io import row_range
from ...checkpoint.tokenizer import Tokenizer
from ...errors import CompressionError
from ...formats import Dense, Format
from ...model import FAMILIES, LINEARS, LayerConfig, ModelConfig, tensor_names
from ...model.families import norm_parts

SAYS_BIASES = {"llama"}
"""Families whose other readers know `attention_bias` and `mlp_bias`: a bias for all of q, k, v, o or gate, up, down."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor comes from: its name before, the rows and columns of it that are left, or a value of its own."""

    name: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    value: Tensor | None = None


class CutCheckpoint(Checkpoint):
    """What is left of another checkpoint by a decision.

    `layers` [kept]: which layers stay (none given: all). `I.heads` and `I.channels`: the query heads and channels of
    layer I that stay, in ascending order (none given: all); key-value heads stay with their query heads. `I.ROLE.bias`:
    the bias of a linear layer, where it is not the one that it had. With `plain`, a bias is added as zeros wherever
    that lets other tools read the model. Raises CompressionError if a layer's groups would differ in size.
    """

    def __init__(self, base: Checkpoint, decision: Mapping[str, Tensor], plain: bool = False) -> None:
        self.base = base
        self.name, self.path, self.dtype = base.name, base.path, base.dtype
        self.manifest, self.source_note = base.manifest, base.source_note
        self._decision = dict(decision)
        every = torch.arange(base.config.num_layers, dtype=torch.int32)
        self._layers: list[int] = decision.get("layers", every).tolist()
        shapes = [self._shape(i) for i in self._layers]
        if plain and base.config.family in SAYS_BIASES:
            biased = {role for layer in shapes for role in layer.biases}
            filled = frozenset(role for part in (LINEARS[:4], LINEARS[4:]) if biased & {*part} for role in part)
            shapes = [replace(layer, biases=filled) for layer in shapes]
        self.config = replace(base.config, layers=tuple(shapes))
        self.hf_config = shaped(base.hf_config, self.config, self._layers)
        self._shapes = dict(tensor_names(self.config))
        self._places = dict(self._find())

    def format(self, name: str) -> Format:
        self.shape(name)
        return Dense(self.dtype)

    def stored(self, name: str) -> dict[str, Tensor]:
        return {"weight": self.tensor(name, dtype=self.dtype)}

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.base.fingerprint()} cut {sorted(self.config.layers[0].biases)}".encode())
        for name, tensor in sorted(self._decision.items()):
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def tensor(self, name: str, rows: slice | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """What is left of the tensor, or these rows of it; only rows from the first to the last of them are read."""
        start, stop = row_range(rows or slice(None), self.shape(name)[0])
        place = self._places.get(name, _Place(name))
        if place.value is not None:
            return place.value[start:stop].to(dtype)
        if place.rows is None:
            found = self.base.tensor(place.name, slice(start, stop), dtype)
        elif start == stop:
            return torch.empty(0, *self.shape(name)[1:], dtype=dtype)
        else:
            kept = place.rows[start:stop]
            first, last = int(kept[0]), int(kept[-1])
            found = self.base.tensor(place.name, slice(first, last + 1), dtype)[kept - first]
        return found if place.columns is None else found[:, place.columns]

    def _shape(self, i: int) -> LayerConfig:
        layer = self.base.config.layers[i]
        heads = self._kept(i, "heads")
        sizes = torch.bincount(heads // layer.group, minlength=layer.num_kv_heads)
        if len(set(sizes[sizes > 0].tolist())) != 1:
            raise CompressionError(
                f"layer {i}: its key-value heads would be left with {sizes.tolist()} query heads",
                hint="each must keep as many as the others, or go as a whole",
            )
        given = frozenset(role for role in LINEARS if f"{i}.{role}.bias" in self._decision)
        return replace(
            layer,
            num_heads=len(heads),
            num_kv_heads=int((sizes > 0).sum()),
            ffn_width=len(self._kept(i, "channels")),
            biases=layer.biases | given,
        )

    def _kept(self, i: int, part: str) -> Tensor:
        layer = self.base.config.layers[i]
        whole = layer.num_heads if part == "heads" else layer.ffn_width
        return self._decision.get(f"{i}.{part}", torch.arange(whole)).long()

    def _find(self) -> Iterator[tuple[str, _Place]]:
        """Tensors of the blocks: name -> where it comes from."""
        family = FAMILIES[self.config.family]
        for new, old in enumerate(self._layers):
            was = self.base.config.layers[old]
            heads, channels = self._kept(old, "heads"), self._kept(old, "channels")
            queries = _spread(heads, was.head_dim)
            keys = _spread(torch.tensor(sorted(set((heads // was.group).tolist()))), was.head_dim)
            rows = {"q": queries, "k": keys, "v": keys, "gate": channels, "up": channels}
            columns = {"o": queries, "down": channels}
            for role in was.norm_sizes(self.config.hidden_size):
                for part in norm_parts(self.config):
                    yield f"{family.module(role, new)}.{part}", _Place(f"{family.module(role, old)}.{part}")
            for role in was.linear_shapes(self.config.hidden_size):
                before, name = family.module(role, old), family.module(role, new)
                yield f"{name}.weight", _Place(f"{before}.weight", rows.get(role), columns.get(role))
                value = self._decision.get(f"{old}.{role}.bias")
                if value is None and not was.has_bias(role):
                    value = torch.zeros(self.config.layers[new].linear_shapes(self.config.hidden_size)[role][0])
                yield f"{name}.bias", _Place(f"{before}.bias", rows.get(role), value=value)

    def _make_tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name, slice(start, stop), self.dtype)

    def _files(self) -> list[Path]:
        return self.base._files()

    def _contents(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        return ((name, iter((self.tensor(name, dtype=self.dtype),))) for name in self.names())


def shaped(hf: Mapping[str, Any], config: ModelConfig, layers: list[int]) -> dict[str, Any]:
    """The base's config.json with the shapes of `config`, whose layers are these of the base's.

    Plain where other tools can read it so; else with `gossamer_layers`, which makes the pipeline give the folder a
    `model_type` of our own.
    """
    first = config.layers[0]
    said = {key: value for key, value in hf.items() if key != "gossamer_layers"}
    said |= {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "intermediate_size": first.ffn_width,
    }
    if isinstance(said.get("layer_types"), list):
        said["layer_types"] = [said["layer_types"][i] for i in layers]
    biased = first.biases
    if config.family in SAYS_BIASES:
        said |= {"attention_bias": "q" in biased, "mlp_bias": "gate" in biased}
        plain = biased in _SAYABLE
    else:
        plain = not biased
    if len(set(config.layers)) > 1 or not plain or config.hidden_size % first.num_heads:
        said["gossamer_layers"] = [
            {
                "num_heads": layer.num_heads,
                "num_kv_heads": layer.num_kv_heads,
                "ffn_width": layer.ffn_width,
                "biases": [role for role in LINEARS if role in layer.biases],
            }
            for layer in config.layers
        ]
    return said


_SAYABLE = [frozenset(a + b) for a in ((), LINEARS[:4]) for b in ((), LINEARS[4:])]


def _spread(heads: Tensor, width: int) -> Tensor:
    """Rows [heads * width] of these heads."""
    return (heads.unsqueeze(1) * width + torch.arange(width)).flatten()
