"""What a recipe will make of a model, before any work: formats, sizes, memory and disk.

Works on a `ModelConfig` alone, so it costs nothing and is right for models that would never fit here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import DoesNotFit, RecipeError, ShapeMismatch
from ..formats import Dense, Format, Kind
from ..model import FAMILIES, LINEARS, ModelConfig, tensor_names
from .method import GridOptions, Needs
from .recipe import Recipe
from .walk import TOKENS_AT_ONCE

BASE_BYTES = 300 << 20
"""Torch, its libraries and this package, before any weight."""
RUN_BYTES = 400 << 20
"""The same for a process that runs a model: the tokenizer and the temporaries of a step come on top."""
ROUND_AT_ONCE = 4 << 20
"""Weights rounded in one piece by a method that needs no statistics."""


@dataclass(frozen=True)
class Plan:
    """Formats by module name, and what making them takes."""

    formats: dict[str, Format]
    kinds: dict[str, Kind]
    shared_head: bool
    """The head is the embedding and both are packed: only Gossamer reads such a folder."""
    parameters: int
    input_bytes: int
    """All weights in the model's own float dtype."""
    output_bytes: int
    peak_bytes: int
    """Expected peak memory of the process, calibration by the model's own samples included."""
    sampling_bytes: int
    """What the model's own samples add to the bare process; 0 if they are not to be made."""

    @property
    def bits_per_weight(self) -> float:
        return self.output_bytes * 8 / self.parameters

    @property
    def disk_bytes(self) -> int:
        """Free disk needed: finished blocks and the assembled output lie side by side for a moment."""
        return 2 * self.output_bytes


def make_plan(config: ModelConfig, recipe: Recipe, dense: torch.dtype, sampling_bytes: int = 0) -> Plan:
    """The plan of a one-stage quantization recipe. Raises ShapeMismatch or RecipeError, naming layer and way out.

    `sampling_bytes`: memory that the engine takes to sample the calibration text, which this folder cannot know.
    """
    (method,) = recipe.methods()
    options = method.options
    family = FAMILIES[config.family]
    formats: dict[str, Format] = {}
    kinds: dict[str, Kind] = {}
    shapes = [layer.linear_shapes(config.hidden_size) for layer in config.layers]
    form = options.integer([columns for block in shapes for _, columns in block.values()])
    for i in range(config.num_layers):
        for role in LINEARS:
            formats[family.module(role, i)], kinds[family.module(role, i)] = form, "linear"
    embedding, head = _ends(config, options.embedding, options.head)
    grids = {family.embed: embedding} if config.tie_embeddings else {family.embed: embedding, family.head: head}
    for module, grid in grids.items():
        formats[module] = Dense(dense) if grid is None else grid.integer([config.hidden_size])
        kinds[module] = "embedding" if module == family.embed else "linear"
    sizes = _stored_bytes(config, formats, dense)
    return Plan(
        formats=formats,
        kinds=kinds,
        shared_head=config.tie_embeddings and embedding is not None,
        parameters=sum(_count(s) for s in tensor_names(config).values()),
        input_bytes=sum(_count(s) for s in tensor_names(config).values()) * dense.itemsize,
        output_bytes=sizes,
        peak_bytes=max(_peak(config, recipe, method.needs), RUN_BYTES + sampling_bytes if sampling_bytes else 0),
        sampling_bytes=sampling_bytes,
    )


def check_fit(plan: Plan, memory: int, disk: int, needs_statistics: bool) -> None:
    """Raises DoesNotFit with both numbers and the option that helps, before any work."""
    if plan.peak_bytes > memory:
        raise DoesNotFit(
            f"compressing needs about {_gb(plan.peak_bytes)} of memory, {_gb(memory)} are free",
            hint=_way_out(plan, needs_statistics),
        )
    if plan.disk_bytes > disk:
        raise DoesNotFit(
            f"the output needs about {_gb(plan.disk_bytes)} of disk while it is made, {_gb(disk)} are free",
            hint="choose --out on another disk, or a recipe with fewer bits",
        )


def free_disk(out: Path) -> int:
    """Bytes free where `out` will be."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _way_out(plan: Plan, needs_statistics: bool) -> str:
    if not needs_statistics:
        return "close other programs"
    if plan.peak_bytes == RUN_BYTES + plan.sampling_bytes:
        return "--calibration FILE takes a text, so that the model need not be loaded to write one"
    return "fewer --calibration-sequences, or a recipe with method rtn"


def _ends(
    config: ModelConfig, embedding: GridOptions | None, head: GridOptions | None
) -> tuple[GridOptions | None, GridOptions | None]:
    if not config.tie_embeddings:
        return embedding, head
    if embedding is not None and head is not None and embedding != head:
        raise RecipeError("this model's head is its embedding, but the recipe gives them different grids")
    shared = embedding or head
    return shared, shared


def _stored_bytes(config: ModelConfig, formats: dict[str, Format], dense: torch.dtype) -> int:
    total = 0
    for name, shape in tensor_names(config).items():
        form = formats.get(name.removesuffix(".weight"), Dense(dense))
        try:
            total += form.nbytes(shape)
        except ShapeMismatch as e:
            raise ShapeMismatch(f"{name}: {e.message}", hint=f"{e.hint}; or group_size: auto") from e
    return total


def _peak(config: ModelConfig, recipe: Recipe, needs: Needs) -> int:
    """Bytes; the same sum that a reader can do by hand, with the largest layer standing for all."""
    embedding = 3 * config.vocab_size * config.hidden_size if _packs_ends(recipe) else 0
    rounding = 10 * 4 * ROUND_AT_ONCE
    if needs is Needs.NOTHING:
        block = max(_block_parameters(config, i) for i in range(config.num_layers))
        return BASE_BYTES + rounding + max(2 * block, embedding)
    tokens, length = recipe.calibration.sequences * recipe.calibration.length, recipe.calibration.length
    peak = rounding + embedding if embedding else 0
    for i, layer in enumerate(config.layers):
        stream = 4 * tokens * config.hidden_size
        block = 4 * _block_parameters(config, i)
        wide = 4 * tokens * max(layer.ffn_width, layer.q_size)
        square = 2 * 4 * max(layer.ffn_width, layer.q_size, config.hidden_size) ** 2  # Hessian and its factor
        work = 4 * 4 * max(2 * layer.ffn_width * config.hidden_size, layer.q_size * config.hidden_size)
        scratch = 4 * max(TOKENS_AT_ONCE, length) * 4 * max(layer.ffn_width, config.hidden_size)  # none is split
        peak = max(peak, stream + block + max(wide + square + work // 2, work + square // 2) + scratch)
    return BASE_BYTES + peak


def _packs_ends(recipe: Recipe) -> bool:
    return any(m.options.embedding or m.options.head for m in recipe.methods())


def _block_parameters(config: ModelConfig, index: int) -> int:
    return sum(_count(s) for s in config.layers[index].linear_shapes(config.hidden_size).values())


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
