"""A checkpoint without some of its layers, heads and channels: rows and columns are left out as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...checkpoint.safetensors_io import row_range
from ...errors import CompressionError
from ...model import FAMILIES, LINEARS, LayerConfig, ModelConfig, tensor_names
from ...model.families import Family, norm_parts
from ..view import View

SAYS_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"}
"""Families whose other readers take a width of heads that is not hidden_size over their number."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor comes from: its name before, the rows and columns of it that are left, or a value of its own."""

    name: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    value: Tensor | None = None


class CutCheckpoint(View):
    """What is left of another checkpoint by a decision.

    `layers` [kept]: which layers stay (none given: all). `I.heads` and `I.channels`: the query heads and channels of
    layer I that stay, in ascending order (none given: all); key-value heads stay with their query heads. `I.ROLE.bias`:
    the bias of a linear layer, where it is not the one that it had. With `plain`, a bias is added as zeros wherever
    that lets other tools read the model. Raises CompressionError if a layer's groups would differ in size.
    """

    def __init__(self, base: Checkpoint, decision: Mapping[str, Tensor], plain: bool = False) -> None:
        super().__init__(base)
        self._decision = dict(decision)
        every = torch.arange(base.config.num_layers, dtype=torch.int32)
        self._layers: list[int] = decision.get("layers", every).tolist()
        shapes = [self._shape(i) for i in self._layers]
        if plain:
            shapes = _with_biases_alike(FAMILIES[base.config.family], shapes)
        self.config = replace(base.config, layers=tuple(shapes))
        self.hf_config = shaped(base.hf_config, self.config, self._layers)
        self._shapes = dict(tensor_names(self.config))
        self._places = dict(self._find())

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
        if self.base.config.positions == "alibi" and len(heads) < layer.num_heads:
            raise CompressionError(
                f"layer {i}: heads of a {self.base.config.family} model cannot go, since ALiBi's slopes count on all",
                hint="heads: keep",
            )
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
            for role in was.norm_sizes(1):
                for part in norm_parts(self.config):
                    yield f"{family.module(role, new)}.{part}", _Place(f"{family.module(role, old)}.{part}")
            for role, (height, _) in self.config.layers[new].linear_shapes(self.config.hidden_size).items():
                before, name = family.module(role, old), family.module(role, new)
                yield f"{name}.weight", _Place(f"{before}.weight", rows.get(role), columns.get(role))
                value = self._decision.get(f"{old}.{role}.bias")
                if value is None and not was.has_bias(role):
                    value = torch.zeros(height)
                yield f"{name}.bias", _Place(f"{before}.bias", rows.get(role), value=value)


def shaped(hf: Mapping[str, Any], config: ModelConfig, layers: list[int]) -> dict[str, Any]:
    """The base's config.json with the shapes of `config`, whose layers are these of the base's.

    Plain where other tools can read it so; else with `gossamer_layers`, which makes the pipeline give the folder a
    `model_type` of our own.
    """
    family, first = FAMILIES[config.family], config.layers[0]
    said = {key: value for key, value in hf.items() if key != "gossamer_layers"}

    def say(name: str, value: int) -> None:
        names = family.keys.get(name, (name,))
        said[next((key for key in names if hf.get(key) is not None), names[0])] = value

    say("num_hidden_layers", config.num_layers)
    sliding = [layer.window is not None or layer.rope is not None for layer in config.layers]
    if len(layers) < len(hf.get("layer_types") or layers) or len(set(sliding)) > 1:
        said["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    if not _sayable(config, family):
        return said | {"head_dim": first.head_dim, "gossamer_layers": [_row(layer) for layer in config.layers]}
    if family.name in SAYS_HEADS:
        said["head_dim"] = first.head_dim
        say("num_attention_heads", first.num_heads)
        say("num_key_value_heads", first.num_kv_heads)
    if family.ffn_times is None or "intermediate_size" in family.keys:
        say("intermediate_size", first.ffn_width)
    return said | {key: bool(first.biases & {*roles}) for key, roles in family.biases.items() if key}


def _sayable(config: ModelConfig, family: Family) -> bool:
    """True if other tools' config.json has words for these shapes."""
    rows, first, hidden = [_row(layer) for layer in config.layers], config.layers[0], config.hidden_size
    heads = first.q_size == hidden or (family.name in SAYS_HEADS and hidden % first.num_heads == 0)
    width = (
        family.ffn_times is None or "intermediate_size" in family.keys or first.ffn_width == family.ffn_times * hidden
    )
    biases = first.biases == _filled(family, first)
    return heads and width and biases and all(row == rows[0] for row in rows)


def _row(layer: LayerConfig) -> dict[str, Any]:
    return {
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "ffn_width": layer.ffn_width,
        "biases": [role for role in LINEARS if role in layer.biases],
    }


def _filled(family: Family, layer: LayerConfig) -> frozenset[str]:
    """The biases that the family's config.json says where it says the layer's, as far as it can."""
    parts = [roles for key, roles in family.biases.items() if not key or layer.biases & {*roles}]
    return frozenset(role for roles in parts for role in roles if layer.gated or role != "gate")


def _with_biases_alike(family: Family, layers: list[LayerConfig]) -> list[LayerConfig]:
    """The layers with the same biases, if other tools can be told of those that they need together."""
    both = replace(layers[0], biases=frozenset(role for layer in layers for role in layer.biases))
    filled = _filled(family, both)
    return [replace(layer, biases=filled) for layer in layers] if both.biases <= filled else layers


def _spread(heads: Tensor, width: int) -> Tensor:
    """Rows [heads * width] of these heads."""
    return (heads.unsqueeze(1) * width + torch.arange(width)).flatten()
