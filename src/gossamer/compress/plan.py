"""What a recipe will make of a model, before any work: formats, sizes, memory and disk.

Works on a `ModelConfig` alone, so it costs nothing and is right for models that would never fit here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from ..errors import DoesNotFit, RecipeError, ShapeMismatch, did_you_mean
from ..formats import Dense, Format, Kind
from ..model import FAMILIES, LINEARS, ModelConfig, tensor_names
from .method import BlockQuantizer, GridOptions, Needs, QuantizeOptions
from .recipe import CalibrationSpec, Recipe
from .sensitivity import measuring_bytes, open_budget, presumed
from .walk import POSITIONS_AT_ONCE, TOKENS_AT_ONCE

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
    scratch_bytes: int
    """Disk for what is not part of the output: gradients, and the checkpoints of a stage that trains."""
    peak_bytes: int
    """Expected peak memory of the process, calibration by the model's own samples included."""
    phases: Mapping[str, int]
    """Expected peak memory of each part of the work; the largest is `peak_bytes`."""
    sampling_bytes: int
    """What the model's own samples add to the bare process; 0 if they are not to be made."""

    @property
    def bits_per_weight(self) -> float:
        return self.output_bytes * 8 / self.parameters

    @property
    def disk_bytes(self) -> int:
        """Free disk needed: finished blocks and the assembled output lie side by side for a moment."""
        return 2 * self.output_bytes + self.scratch_bytes


def make_plan(config: ModelConfig, recipe: Recipe, dense: torch.dtype, sampling_bytes: int = 0) -> Plan:
    """The plan of a recipe for a model of this config, which its transforms have changed already.

    `sampling_bytes`: memory that the engine takes to sample the calibration text, which this folder cannot know.
    Raises ShapeMismatch or RecipeError, naming layer and way out.
    """
    measured = open_budget(recipe) is not None
    recipe = presumed(config, dense, recipe)
    options = recipe.quantizer().options
    family = FAMILIES[config.family]
    formats: dict[str, Format] = _linear_formats(config, options)
    kinds: dict[str, Kind] = dict.fromkeys(formats, "linear")
    embedding, head = _ends(config, options.embedding, options.head)
    grids = {family.embed: embedding} if config.tie_embeddings else {family.embed: embedding, family.head: head}
    for module, grid in grids.items():
        formats[module] = Dense(dense) if grid is None else grid.format_for([config.hidden_size])
        kinds[module] = "embedding" if module == family.embed else "linear"
    sizes = _stored_bytes(config, formats, dense)
    phases = {"quantizing": _peak(config, recipe)}
    if recipe.quantizer().needs is Needs.GRADIENT:
        phases["gradients"] = _gradient_peak(config, recipe.calibration)
    for tuner in recipe.tuners():
        text = recipe.calibration
        phases[tuner.name] = _tuned_bytes(config, sizes, text, _packs_ends(options)) + tuner.peak_bytes(
            config, text.sequences, text.length
        )
    if sampling_bytes:
        phases["sampling"] = RUN_BYTES + sampling_bytes
    if measured:
        phases["measuring sensitivity"] = RUN_BYTES + measuring_bytes(config)
    return Plan(
        formats=formats,
        kinds=kinds,
        shared_head=config.tie_embeddings and embedding is not None,
        parameters=sum(math.prod(s) for s in tensor_names(config).values()),
        input_bytes=sum(math.prod(s) for s in tensor_names(config).values()) * dense.itemsize,
        output_bytes=sizes,
        scratch_bytes=_scratch(config, recipe, sizes),
        peak_bytes=max(phases.values()),
        phases=phases,
        sampling_bytes=sampling_bytes,
    )


def _linear_formats(config: ModelConfig, options: QuantizeOptions) -> dict[str, Format]:
    """Module name -> format of every linear layer of the blocks; `auto` sizes divide all layers of the same grid."""
    family = FAMILIES[config.family]
    roles = {family.module(role, i): (role, i) for i in range(config.num_layers) for role in LINEARS}
    chosen = {module: _own_grid(module, role, options.layers) for module, (role, _) in roles.items()}
    unused = [key for key in options.layers if key not in chosen.values()]
    _check_named(unused, roles)
    by_key: dict[str | None, list[str]] = {}
    for module, key in chosen.items():
        by_key.setdefault(key, []).append(module)
    formats: dict[str, Format] = {}
    for key, modules in by_key.items():
        grid: GridOptions = options if key is None else options.layers[key]
        shapes = [
            config.layers[i].linear_shapes(config.hidden_size)[role] for role, i in map(roles.__getitem__, modules)
        ]
        formats |= dict.fromkeys(modules, options.layer_format(grid, [columns for _, columns in shapes]))
    return {module: formats[module] for module in roles}


def _own_grid(module: str, role: str, layers: Mapping[str, GridOptions]) -> str | None:
    """The key of `layers` that says most exactly that it means this module: the longest, then the first by name."""
    matching = [key for key in layers if key in (role, module) or fnmatchcase(module, key)]
    return min(matching, key=lambda key: (key != module, -len(key), key), default=None)


def _check_named(unused: list[str], roles: Mapping[str, tuple[str, int]]) -> None:
    """Raises RecipeError for a key of `layers` that means no layer; one that others overrule everywhere is fine."""
    for key in unused:
        if not any(key == role or fnmatchcase(module, key) for module, (role, _) in roles.items()):
            raise RecipeError(
                f"layers: {key!r:.80} is neither a role nor a pattern for a module of this model",
                hint=did_you_mean(key, [*LINEARS, *roles])
                or f"roles are {', '.join(LINEARS)}; a module is {next(iter(roles))}",
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


def _peak(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes; the same sum that a reader can do by hand, with the largest layer standing for all."""
    method = recipe.quantizer()
    embedding = 3 * config.vocab_size * config.hidden_size if _packs_ends(method.options) else 0
    rounding = 10 * 4 * ROUND_AT_ONCE
    if method.needs is Needs.NOTHING:
        block = max(_block_parameters(config, i) for i in range(config.num_layers))
        return BASE_BYTES + rounding + max(2 * block, embedding)
    text = recipe.calibration
    peak = rounding + embedding if embedding else 0
    for i in range(config.num_layers):
        if isinstance(method, BlockQuantizer):
            learned = method.peak_bytes(config, i, text.sequences, text.length)
            streams = 2 * 4 * text.sequences * text.length * config.hidden_size
            peak = max(peak, streams + 4 * _block_parameters(config, i) + max(learned, _step_bytes(config, i, text)))
        else:
            peak = max(peak, _walk_peak(config, i, text, method.needs is Needs.GRADIENT))
    return BASE_BYTES + peak


def _walk_peak(config: ModelConfig, i: int, text: CalibrationSpec, gradient: bool) -> int:
    """A block whose layers are compressed on their inputs, one point after another."""
    layer = config.layers[i]
    tokens = text.sequences * text.length
    stream = 4 * tokens * config.hidden_size
    block = 4 * _block_parameters(config, i)
    wide = 4 * tokens * max(layer.ffn_width, layer.q_size)
    square = 2 * 4 * max(layer.ffn_width, layer.q_size, config.hidden_size) ** 2  # Hessian and its factor
    weights = max(2 * layer.ffn_width * config.hidden_size, layer.q_size * config.hidden_size)
    work = (5 if gradient else 4) * 4 * weights
    return stream + block + max(wide + square + work // 2, work + square // 2) + _step_bytes(config, i, text)


def _step_bytes(config: ModelConfig, i: int, text: CalibrationSpec) -> int:
    """Temporaries of a step through a block; a sequence is never split."""
    return 4 * max(TOKENS_AT_ONCE, text.length) * 4 * max(config.layers[i].ffn_width, config.hidden_size)


def _gradient_peak(config: ModelConfig, text: CalibrationSpec) -> int:
    """The loss and its slope, or a block with its gradient and squares, beside the streams."""
    streams = 2 * 4 * text.sequences * text.length * config.hidden_size
    from_loss = 4 * config.vocab_size * (config.hidden_size + 4 * POSITIONS_AT_ONCE)
    blocks = [
        3 * 4 * _block_parameters(config, i)
        + max(_step_bytes(config, i, text), 4 * text.length * 12 * (layer.ffn_width + layer.q_size))
        for i, layer in enumerate(config.layers)
    ]
    return BASE_BYTES + streams + max(from_loss, *blocks)


def _tuned_bytes(config: ModelConfig, stored: int, text: CalibrationSpec, packs_ends: bool) -> int:
    """A model in training before anything is trained: codes of a byte, scales, the ends, one block in float, the file.

    The head is in float32, and so is the original's; one that is computed from codes is there three times over in a
    backward pass. The original's hidden states are kept for all tokens.
    """
    blocks = [_block_parameters(config, i) for i in range(config.num_layers)]
    ends = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    hidden = 4 * text.sequences * text.length * config.hidden_size
    floats = 4 * (sum(blocks) // 32 + 3 * max(blocks) + (5 if packs_ends else 2) * ends) + hidden
    return BASE_BYTES + sum(blocks) + floats + stored


def _scratch(config: ModelConfig, recipe: Recipe, stored: int) -> int:
    """Bytes on disk beside the finished units: at most two checkpoints of a training are there at a time."""
    weights = sum(_block_parameters(config, i) for i in range(config.num_layers))
    stream = 4 * recipe.calibration.sequences * recipe.calibration.length * config.hidden_size
    gradients = 4 * weights + (config.num_layers + 2) * stream if recipe.quantizer().needs is Needs.GRADIENT else 0
    training = sum(stored + 2 * (12 * weights if t.latent else 12 * weights // 32) + stream for t in recipe.tuners())
    return gradients + training


def _packs_ends(options: QuantizeOptions) -> bool:
    return options.embedding is not None or options.head is not None


def _block_parameters(config: ModelConfig, index: int) -> int:
    return sum(math.prod(s) for s in config.layers[index].linear_shapes(config.hidden_size).values())


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
