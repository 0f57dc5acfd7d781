"""Which grid each module has: roles and patterns of `layers`, the embedding and the head. Knows configs and options."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..errors import RecipeError, did_you_mean
from ..formats import Format
from ..model import FAMILIES, LINEARS, ModelConfig

if TYPE_CHECKING:
    from .method import GridOptions, QuantizeOptions


def grid_formats(config: ModelConfig, options: QuantizeOptions) -> dict[str, Format]:
    """Module name -> format of all linear layers, and of embedding and head if they are packed. Raises RecipeError."""
    family = FAMILIES[config.family]
    formats = linear_formats(config, options)
    embedding, head = _ends(config, options.embedding, options.head)
    grids = {family.embed: embedding} if config.tie_embeddings else {family.embed: embedding, family.head: head}
    return formats | {m: grid.format_for([config.hidden_size]) for m, grid in grids.items() if grid is not None}


def linear_formats(config: ModelConfig, options: QuantizeOptions) -> dict[str, Format]:
    """Module name -> format of every linear layer of the blocks; `auto` sizes divide all layers of the same grid."""
    by_key: dict[str | None, list[str]] = {}
    for module, key in keys_of(config, options.layers).items():
        by_key.setdefault(key, []).append(module)
    shapes = linear_shapes(config)
    formats: dict[str, Format] = {}
    for key, modules in by_key.items():
        grid: GridOptions = options if key is None else options.layers[key]
        formats |= dict.fromkeys(modules, options.layer_format(grid, [shapes[module][1] for module in modules]))
    return {module: formats[module] for module in shapes}


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name -> [out, in] of every linear layer of the blocks, in the model's order."""
    family = FAMILIES[config.family]
    return {
        family.module(role, i): shape
        for i, layer in enumerate(config.layers)
        for role, shape in layer.linear_shapes(config.hidden_size).items()
    }


def keys_of(config: ModelConfig, layers: Mapping[str, object]) -> dict[str, str | None]:
    """Module name of every linear layer of the blocks -> the key of `layers` that means it, or None.

    A key is a role or a pattern for module names; the longest counts. Raises RecipeError for one that means no layer.
    """
    family = FAMILIES[config.family]
    roles = {
        family.module(role, i): role
        for i, layer in enumerate(config.layers)
        for role in layer.linear_shapes(config.hidden_size)
    }
    chosen = {module: _own_key(module, role, layers) for module, role in roles.items()}
    _check_named([key for key in layers if key not in chosen.values()], roles)
    return chosen


def _own_key(module: str, role: str, layers: Mapping[str, object]) -> str | None:
    """The key of `layers` that says most exactly that it means this module: the longest, then the first by name."""
    matching = [key for key in layers if key in (role, module) or fnmatchcase(module, key)]
    return min(matching, key=lambda key: (key != module, -len(key), key), default=None)


def _check_named(unused: list[str], roles: Mapping[str, str]) -> None:
    """Raises RecipeError for a key of `layers` that means no layer; one that others overrule everywhere is fine."""
    for key in unused:
        if not any(key == role or fnmatchcase(module, key) for module, role in roles.items()):
            raise RecipeError(
                f"layers: {key!r:.80} is neither a role nor a pattern for a module of this model",
                hint=did_you_mean(key, [*LINEARS, *roles])
                or f"roles are {', '.join(LINEARS)}; a module is {next(iter(roles))}",
            )


def _ends(
    config: ModelConfig, embedding: GridOptions | None, head: GridOptions | None
) -> tuple[GridOptions | None, GridOptions | None]:
    if not config.tie_embeddings:
        return embedding, head
    if embedding is not None and head is not None and embedding != head:
        raise RecipeError("this model's head is its embedding, but the recipe gives them different grids")
    shared = embedding or head
    return shared, shared
