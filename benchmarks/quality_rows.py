"""The rows of the quality benchmark: what is made, by whom, and which rows may be compared. Only data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gossamer.cli.compress import recipes_folder
from gossamer.compress.recipe import load_recipe
from gossamer.compress.registry import method_class
from gossamer.errors import GossamerError

FLOAT, OURS, LLAMA = "float", "gossamer", "llama.cpp"
LEARNED = frozenset({"omniquant", "signround", "efficientqat", "auto-round"})
"""Methods that learn the rounding or the range of weights block by block."""
GROUP_SIZE = 64
"""Of every grid that a peer is given: what fits rows of 576 weights and costs the fewest bits."""
BESIDE = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Row:
    """One model file. Rows of one `grid` store the same kind of codes and differ in how these were chosen."""

    key: str
    maker: str
    method: str
    bits: float | None
    """Of a weight between embedding and head, scales not counted; None: float, or not the same everywhere."""
    grid: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the maker is told."""
    act_order: bool | None = None
    on_source_grid: bool = False
    """True if codes lie on a grid that holds the one on which the source file's weights lie already."""
    reason: str | None = None
    """Why it cannot be made."""


def peer_grid(bits: int) -> dict[str, Any]:
    """Symmetric groups, embedding and head in float: what every torch peer is asked for."""
    return {"bits": bits, "group_size": GROUP_SIZE, "symmetric": True}


def grid_key(grid: Mapping[str, Any]) -> str:
    """Options that say what codes stand for, without those that are at their defaults."""
    return json.dumps({key: value for key, value in sorted(grid.items()) if value not in (None, {}, False, "int")})


def _torch_peer(maker: str, method: str, bits: int, act_order: bool | None = None) -> Row:
    options = {"method": method, **peer_grid(bits)}
    return Row(f"{maker}/{method}-{bits}", maker, method, bits, grid_key(peer_grid(bits)), options, act_order)


def _llama(kind: str, bits: float, *flags: str, matrix: bool = True) -> Row:
    key = "-".join([kind.lower(), *(flag.lstrip("-") for flag in flags), *([] if matrix else ["plain"])])
    return Row(f"{LLAMA}/{key}", LLAMA, "blocks", bits, "", {"kind": kind, "flags": flags, "matrix": matrix})


CONTROLS = (
    Row("float/folder", FLOAT, "none", None, options={"model": "bf16"}),
    Row("float/gguf", FLOAT, "none", None, options={"model": "bf16.gguf"}),
)
"""The float model itself, by both roads that files are read: neither may diverge from the other."""

PEERS = (
    *(_torch_peer("llmcompressor", method, bits) for bits in (4, 3) for method in ("rtn", "gptq")),
    _torch_peer("llmcompressor", "awq", 4),
    *(_torch_peer("gptqmodel", "gptq", bits) for bits in (4, 3)),
    *(_torch_peer("auto-round", "auto-round", bits) for bits in (4, 3, 2)),
    _llama("Q8_0", 8),
    _llama("Q4_0", 4),
    _llama("Q4_0", 4, "--pure"),
    _llama("Q4_0", 4, "--pure", matrix=False),
    _llama("Q4_K_M", 4),
    _llama("Q3_K_M", 3),
    _llama("Q2_K", 2),
)

QUICK = ("float/*", "gossamer/int4-rtn", "llmcompressor/rtn-4", "llama.cpp/q4_0-pure-plain")
"""A row of each road: does it work?"""


def our_rows(extra: Sequence[str] = ()) -> list[Row]:
    """A row for every shipped recipe that quantizes and does not prune, for those beside the benchmarks that complete
    an order, and for `extra` ones.
    """
    shipped = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
    beside = sorted(str(path) for path in BESIDE.glob("quality-*.yaml"))
    rows: list[Row] = []
    for name in dict.fromkeys([*shipped, *beside, *extra]):
        row = recipe_row(name)
        if row.reason is None and name not in extra and not _only_quantizes(row):
            continue  # what prunes or factorizes has tables of its own
        if row.reason is not None or all(row.options["stages"] != known.options.get("stages") for known in rows):
            rows.append(row)  # what a shipped recipe does is not made a second time
    return rows


def _only_quantizes(row: Row) -> bool:
    """Whether its recipe has a quantizer and leaves every weight in its place."""
    families = {method_class(stage["method"]).family for stage in row.options["stages"]}
    return "quantize" in families and not families & {"prune", "factorize"}


def recipe_row(name: str) -> Row:
    """The row of a recipe by name or file; a recipe that cannot be read is a row that says why.

    A recipe whose quantizer reads only some of its text trains on the rest of it: the row has `trained_tokens`.
    """
    key = f"{OURS}/{Path(name).name.removesuffix('.yaml')}"
    try:
        recipe = load_recipe(name, recipes_folder())
        stages = recipe.canonical()["stages"]
        calibrated = recipe.needs_calibration()
    except GossamerError as error:
        return Row(key, OURS, "unknown", None, reason=f"{type(error).__name__}: {error.message}")
    where = next((i for i, stage in enumerate(stages) if "bits" in stage and "group_size" in stage), None)
    options = {"recipe": name, "calibrated": calibrated, "stages": stages}
    if where is not None and stages[where].get("sequences") is not None:
        options["trained_tokens"] = recipe.calibration.sequences * recipe.calibration.length
    if where is None:
        return Row(key, OURS, "+".join(stage["method"] for stage in stages), None, options=options)
    return Row(
        key,
        OURS,
        stages[where]["method"],
        None if stages[where].get("budget") else stages[where]["bits"],
        grid_key(_grid_of(stages, where)),
        options,
        stages[where].get("act_order"),
        any(_holds_source_grid(grid) for grid in _grids(stages[where])),
    )


_GRID_OPTIONS = ("bits", "group_size", "symmetric", "format", "double_quant", "embedding", "head", "layers", "budget")


def _grid_of(stages: Sequence[Mapping[str, Any]], where: int) -> dict[str, Any]:
    """The grid of the stage that quantizes; whatever else the recipe does keeps its row apart from plain ones."""
    around = [dict(stage) for i, stage in enumerate(stages) if i != where]
    return {"around": around or None, **{key: stages[where].get(key) for key in _GRID_OPTIONS}}


def _grids(stage: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The stage's own grid, those of layers, embedding and head that have one, and those that a budget may choose."""
    yield stage
    budget = stage.get("budget") or {}
    yield from (*budget.get("candidates", ()), *budget.get("embedding", ()))
    yield from (stage.get("layers") or {}).values()
    yield from (grid for grid in (stage.get("embedding"), stage.get("head")) if grid)


def _holds_source_grid(grid: Mapping[str, Any]) -> bool:
    """4-bit codes with zero points in groups of less than 64 columns: the source has such, in groups of 32."""
    size = grid.get("group_size")
    integer = grid.get("format", "int") == "int" and grid.get("bits") == 4
    return integer and not grid.get("symmetric", True) and isinstance(size, int) and size < GROUP_SIZE


def chosen(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """Rows whose keys match one of the patterns (`llama.cpp/*`). Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(row.key, pattern) for row in rows):
            raise ValueError(f"no row is named {pattern!r}; there are {', '.join(row.key for row in rows)}")
    return [row for row in rows if any(fnmatchcase(row.key, pattern) for pattern in patterns)]
