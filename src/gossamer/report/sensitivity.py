"""The error that compression left in each layer, as a grid of linears by blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .records import CompressRecord, Layer
from .rows import Row, finite
from .text import clean, divergence

_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
_UNITS = {"output": "relative output error", "weight": "relative weight error", None: "relative error"}


@dataclass(frozen=True)
class HeatMap:
    """One recipe: `error[linear][block]`, None where the layer was not compressed or has no finite error."""

    label: str
    unit: str
    blocks: tuple[int, ...]
    linears: tuple[str, ...]
    error: tuple[tuple[float | None, ...], ...]
    text: tuple[tuple[str, ...], ...]
    worst: str
    """The most sensitive layers as a sentence."""


def heat_maps(rows: Sequence[Row]) -> list[HeatMap]:
    """A map for every model whose compression recorded its layers."""
    found: dict[int, HeatMap] = {}
    for row in rows:
        record = row.compression
        if record is not None and not record.failed and id(record) not in found:
            heat = _heat_map(clean(row.label), record)
            if heat is not None:
                found[id(record)] = heat
    return list(found.values())


def _heat_map(label: str, record: CompressRecord) -> HeatMap | None:
    unit = _UNITS[record.results.error_kind]
    # A later stage of the recipe says what is left of an earlier one: the last entry of a layer counts.
    cells = {(layer.linear, layer.block): layer for layer in record.results.layers if layer.block is not None}
    if not any(finite(layer.relative_error) is not None for layer in cells.values()):
        return None
    blocks = tuple(sorted({block for _, block in cells if block is not None}))
    linears = tuple(sorted({linear for linear, _ in cells}, key=_rank))
    grid = [[cells.get((linear, block)) for block in blocks] for linear in linears]
    return HeatMap(
        label,
        unit,
        blocks,
        tuple(clean(linear) for linear in linears),
        tuple(tuple(finite(layer.relative_error) if layer else None for layer in line) for line in grid),
        tuple(tuple(_text(layer, unit) if layer else "" for layer in line) for line in grid),
        _worst(list(cells.values())),
    )


def _rank(linear: str) -> tuple[int, str]:
    return (_ORDER.index(linear) if linear in _ORDER else len(_ORDER), linear)


def _text(layer: Layer, unit: str) -> str:
    """What is said of a cell when pointed at."""
    error = "not recorded" if layer.relative_error is None else divergence(layer.relative_error)
    bits = f", {layer.bits_per_weight:.2f} bits" if layer.bits_per_weight is not None else ""
    stored = f"{layer.format or 'format not recorded'}{bits}"
    return clean(f"block {layer.block} {layer.linear}\n{unit} {error}\n{stored}", "\n")


def _worst(layers: list[Layer]) -> str:
    """`block 0 down (0.121), block 29 down (0.094)`: the three largest errors."""
    known = [(error, layer) for layer in layers if (error := finite(layer.relative_error)) is not None]
    known.sort(key=lambda pair: -pair[0])
    return ", ".join(f"block {layer.block} {clean(layer.linear)} ({divergence(error)})" for error, layer in known[:3])
