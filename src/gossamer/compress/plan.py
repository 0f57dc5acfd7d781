"""What a recipe will make of a model, before any work: formats, sizes, memory and disk.

Works on a `ModelConfig` alone, so it costs nothing and is right for models that would never fit here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import DoesNotFit, RecipeError, ShapeMismatch
from ..formats import Dense, Format, Kind, LowRank
from ..model import FAMILIES, ModelConfig, tensor_names
from .factorize.allocation import open_allocation
from .grids import linear_shapes
from .method import BlockMethod, GridMethod, LayerMethod, Method, Needs, Quantizer, Reducer, WeightMethod
from .recipe import CalibrationSpec, Part, Recipe
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
    stored: frozenset[str]
    """Modules that the last part packs: all others are as they were."""
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
    """The plan of a recipe for a model of this config, which its first transforms have changed already.

    `sampling_bytes`: memory that the engine takes to sample the calibration text, which this folder cannot know.
    Raises ShapeMismatch or RecipeError, naming layer and way out.
    """
    ranks = open_allocation(recipe)
    measured = ranks is not None or open_budget(recipe) is not None
    recipe = presumed(config, dense, recipe)
    input_bytes = dense.itemsize * sum(math.prod(s) for s in tensor_names(config).values())
    text, phases, scratch = recipe.calibration, dict[str, int](), 0
    made: Plan | None = None
    for part in recipe.parts():
        if made is not None:
            for transform in part.transforms:
                config = transform.expect(config)
            scratch += made.output_bytes  # it lies on disk until the end
        if isinstance(part.main, Reducer):
            read = _read(text, part.main)
            phases[part.main.name] = BASE_BYTES + part.main.peak_bytes(config, read.sequences, read.length)
            if part.main.needs is Needs.GRADIENT:
                phases["gradients"] = _gradient_peak(config, read)
            config = part.main.expect(config)
        made = plan_part(config, {} if made is None else made.formats, part, text, dense)
        phases |= {name: max(peak, phases.get(name, 0)) for name, peak in made.phases.items()}
        scratch += made.scratch_bytes
    assert made is not None
    if sampling_bytes:
        phases["sampling"] = RUN_BYTES + sampling_bytes
    if measured:
        walked = 0 if ranks is None else _peak(config, ranks, text, False)
        phases["measuring sensitivity"] = RUN_BYTES + measuring_bytes(config) + walked
    return replace(
        made,
        input_bytes=input_bytes,
        scratch_bytes=scratch,
        peak_bytes=max(phases.values()),
        phases=phases,
        sampling_bytes=sampling_bytes,
    )


def dense_formats(config: ModelConfig, dense: torch.dtype) -> dict[str, Format]:
    """Module name -> format of linear layers, embedding and head of a model that nothing has compressed."""
    family = FAMILIES[config.family]
    ends = [family.embed] if config.tie_embeddings else [family.embed, family.head]
    return dict.fromkeys([*linear_shapes(config), *ends], Dense(dense))


def plan_part(
    config: ModelConfig, before: Mapping[str, Format], part: Part, text: CalibrationSpec, dense: torch.dtype
) -> Plan:
    """The plan of one part for a model of this config, which its transforms and reducer have changed already.

    `before`: formats of the model that it is given, where they are not dense.
    """
    family = FAMILIES[config.family]
    before = {module: before.get(module, form) for module, form in dense_formats(config, dense).items()}
    stored = part.main.formats(config, before) if isinstance(part.main, WeightMethod) else {}
    formats = {**before, **stored}
    _check_factors(formats, part)
    for tuner in part.tuners:
        tuner.check({module: formats[module] for module in linear_shapes(config)})
    kinds: dict[str, Kind] = {m: "embedding" if m == family.embed else "linear" for m in formats}
    sizes = _stored_bytes(config, formats, dense)
    ends = [m for m in (family.embed, family.head) if m in stored]
    read = _read(text, part.main)
    phases = {}
    if isinstance(part.main, WeightMethod):
        phase = "quantizing" if isinstance(part.main, GridMethod) else part.main.name
        phases[phase] = _peak(config, part.main, read, bool(ends))
    if part.main.needs is Needs.GRADIENT and isinstance(part.main, Quantizer):
        phases["gradients"] = _gradient_peak(config, read)
    for tuner in part.tuners:
        phases[tuner.name] = _tuned_bytes(config, sizes, text, bool(ends)) + tuner.peak_bytes(
            config, text.sequences, text.length
        )
    parameters = sum(math.prod(s) for s in tensor_names(config).values())
    return Plan(
        formats=formats,
        kinds=kinds,
        stored=frozenset(stored),
        shared_head=config.tie_embeddings and not isinstance(formats[family.embed], Dense),
        parameters=parameters,
        input_bytes=parameters * dense.itemsize,
        output_bytes=sizes,
        scratch_bytes=_scratch(config, part, text, sizes),
        peak_bytes=max(phases.values(), default=0),
        phases=phases,
        sampling_bytes=0,
    )


def _check_factors(formats: Mapping[str, Format], part: Part) -> None:
    """Raises RecipeError if a stage needs whole matrices where factors are."""
    factored = next((module for module, form in formats.items() if isinstance(form, LowRank)), None)
    if factored is None:
        return
    whole = isinstance(part.main, GridMethod) and not isinstance(part.main, Quantizer)
    if whole or part.main.needs is Needs.GRADIENT:
        raise RecipeError(
            f"{part.main.name} works on whole matrices, but {factored} is two factors",
            hint="quantize factors by gptq, hqq or rtn",
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


def _stored_bytes(config: ModelConfig, formats: dict[str, Format], dense: torch.dtype) -> int:
    total = 0
    for name, shape in tensor_names(config).items():
        form = formats.get(name.removesuffix(".weight"), Dense(dense))
        try:
            total += form.nbytes(shape)
        except ShapeMismatch as e:
            hint = e.hint if isinstance(form, LowRank) else f"{e.hint}; or group_size: auto"
            raise ShapeMismatch(f"{name}: {e.message}", hint=hint) from e
    return total


def _peak(config: ModelConfig, method: WeightMethod, text: CalibrationSpec, packs_ends: bool) -> int:
    """Bytes; the same sum that a reader can do by hand, with the largest layer standing for all."""
    embedding = 3 * config.vocab_size * config.hidden_size if packs_ends else 0
    if packs_ends and isinstance(method, LayerMethod):  # which is given it whole
        embedding = method.peak_bytes((config.vocab_size, config.hidden_size))
    rounding = 10 * 4 * ROUND_AT_ONCE
    if method.needs is Needs.NOTHING:
        block = max(_block_parameters(config, i) for i in range(config.num_layers))
        own = max(map(method.peak_bytes, linear_shapes(config).values())) if isinstance(method, LayerMethod) else 0
        return BASE_BYTES + rounding + max(2 * block + own, embedding)
    peak = rounding + embedding if embedding else 0
    for i in range(config.num_layers):
        if isinstance(method, BlockMethod):
            learned = method.peak_bytes(config, i, text.sequences, text.length)
            streams = (2 + method.teacher_inputs) * 4 * text.sequences * text.length * config.hidden_size
            peak = max(peak, streams + 4 * _block_parameters(config, i) + max(learned, _step_bytes(config, i, text)))
        else:
            shapes = config.layers[i].linear_shapes(config.hidden_size).values()
            own = max(map(method.peak_bytes, shapes)) if isinstance(method, LayerMethod) else 0
            peak = max(peak, _walk_peak(config, i, text, method.needs is Needs.GRADIENT, own))
    return BASE_BYTES + peak


def _walk_peak(config: ModelConfig, i: int, text: CalibrationSpec, gradient: bool, own: int) -> int:
    """A block whose layers are compressed on their inputs, one point after another; `own` is the method's."""
    layer = config.layers[i]
    tokens = text.sequences * text.length
    stream = 4 * tokens * config.hidden_size
    block = 4 * _block_parameters(config, i)
    wide = 4 * tokens * max(layer.ffn_width, layer.q_size)
    square = 2 * 4 * max(layer.ffn_width, layer.q_size, config.hidden_size) ** 2  # Hessian and its factor
    weights = max(2 * layer.ffn_width * config.hidden_size, layer.q_size * config.hidden_size)
    work = (5 if gradient else 4) * 4 * weights + own
    return stream + block + max(wide + square + work // 2, work + square // 2) + _step_bytes(config, i, text)


def _step_bytes(config: ModelConfig, i: int, text: CalibrationSpec) -> int:
    """Temporaries of a step through a block; a sequence is never split."""
    return 4 * max(TOKENS_AT_ONCE, text.length) * 4 * max(config.layers[i].ffn_width, config.hidden_size)


def _read(text: CalibrationSpec, method: Method) -> CalibrationSpec:
    """As much of the text as a method is given."""
    return text.model_copy(update={"sequences": min(text.sequences, method.sequences or text.sequences)})


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


def _scratch(config: ModelConfig, part: Part, text: CalibrationSpec, stored: int) -> int:
    """Bytes on disk beside the finished units: at most two checkpoints of a training are there at a time."""
    weights = sum(_block_parameters(config, i) for i in range(config.num_layers))
    stream = 4 * text.sequences * text.length * config.hidden_size
    gradients = 4 * weights + (config.num_layers + 2) * stream if part.main.needs is Needs.GRADIENT else 0
    training = sum(stored + 2 * (16 * weights if t.latent else 12 * weights // 32) + stream for t in part.tuners)
    return gradients + training


def _block_parameters(config: ModelConfig, index: int) -> int:
    return sum(math.prod(s) for s in config.layers[index].linear_shapes(config.hidden_size).values())


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
