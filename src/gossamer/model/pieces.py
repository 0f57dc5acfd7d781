"""Where files of a family hold several linear layers as one tensor, or transposed: q, k and v in GPT-2's `c_attn`.

Everything else in this package sees single layers [out_features, in_features]; whoever reads or writes files splits and
joins by this table. Knows names and shapes; reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LayerConfig, ModelConfig
from .families import FAMILIES, Fused


@dataclass(frozen=True)
class Piece:
    """A weight or bias as a part of a stored tensor: row r is its row `first + r // run * step + r % run`."""

    name: str
    """Of the stored tensor."""
    shape: tuple[int, ...]
    """Of the stored tensor, not transposed: [out_features, in_features] or [out_features]."""
    transposed: bool = False
    first: int = 0
    run: int = 1
    step: int = 1

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As the file has it."""
        return self.shape[::-1] if self.transposed else self.shape

    def places(self, start: int, stop: int) -> Tensor:
        """Rows of the stored tensor that are rows start..stop of this one, in order."""
        rows = torch.arange(start, stop)
        return self.first + rows // self.run * self.step + rows % self.run


def pieces(config: ModelConfig) -> dict[str, Piece]:
    """Name of each tensor that files hold otherwise -> where it is."""
    family, found = FAMILIES[config.family], {}
    fused = {role: whole for whole in family.fused for role in whole.roles}
    for i, layer in enumerate(config.layers):
        shapes = layer.linear_shapes(config.hidden_size)
        for role, shape in shapes.items():
            whole = fused.get(role)
            module = family.module(role, i)
            if whole is None:
                if family.transposed:
                    found[f"{module}.weight"] = Piece(f"{module}.weight", shape, True, run=shape[0])
            elif _can_fuse(whole, layer):
                stored = f"{family.block.format(i=i)}.{whole.module}"
                rows = sum(shapes[r][0] for r in whole.roles)
                place = _place(whole, layer, role, {r: shapes[r][0] for r in whole.roles})
                found[f"{module}.weight"] = Piece(f"{stored}.weight", (rows, shape[1]), family.transposed, *place)
                if layer.has_bias(role):
                    found[f"{module}.bias"] = Piece(f"{stored}.bias", (rows,), False, *place)
    return found


def join(parts: Mapping[str, Tensor], places: Mapping[str, Piece]) -> Tensor:
    """The stored tensor that these parts make up, by name; they are all of it."""
    first = places[next(iter(parts))]
    whole = next(iter(parts.values())).new_empty(first.shape)
    for name, part in parts.items():
        whole[places[name].places(0, len(part))] = part
    return whole.T.contiguous() if first.transposed else whole


def _can_fuse(whole: Fused, layer: LayerConfig) -> bool:
    """False for a layer that has lost what makes its parts one: files then hold it in parts."""
    alike = len({layer.has_bias(role) for role in whole.roles}) == 1
    return alike and not (whole.by_head and layer.group > 1)


def _place(whole: Fused, layer: LayerConfig, role: str, rows: dict[str, int]) -> tuple[int, int, int]:
    """first, run and step of a role's rows."""
    at = whole.roles.index(role)
    if whole.by_head:
        return at * layer.head_dim, layer.head_dim, len(whole.roles) * layer.head_dim
    return sum(rows[r] for r in whole.roles[:at]), rows[role], rows[role]
