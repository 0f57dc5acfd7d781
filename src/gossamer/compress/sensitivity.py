"""What each group of layers loses on each candidate grid, measured on the model, and the recipe that follows from it.

A quantizer with a `budget` leaves the grids of its layers open (the idea of ExLlamaV2's EXL2). Before the pipeline
runs, `settle` fills them in: the recipe that then runs, and that the artifact records, names every layer's grid, so
that a replay measures nothing and gives the same bytes.

The loss of a group (the layers of a block that share their input) is the KL divergence from the untouched model to the
one in which only this group is rounded. It is measured on one candidate, and goes on to the others in proportion to
the squared error of the group's output: for small errors the divergence is quadratic in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..checkpoint.atomic import write_file
from ..checkpoint.load import load_decoder
from ..errors import CompressionError, NumericalError, ShapeMismatch
from ..formats import Dense, Format
from ..model import FAMILIES, ModelConfig, tensor_names
from ..model.decoder import Block, Decoder, Rotation
from ..settings import cache_dir
from .allocate import Choice, allocate
from .blockview import POINTS
from .calibration import Calibration, token_hash
from .method import GridMethod, GridOptions, QuantizeOptions
from .quantize.rtn import RTN
from .recipe import Recipe, parse_recipe

Progress = Callable[[str, int, int], None]
SEQUENCES, LENGTH = 4, 128
"""Tokens of the calibration that are run for each measurement."""
PROBE_ERROR = 0.05
"""The divergence is measured on the coarsest candidate whose error is at most this share of the output: large enough to
stand above the noise of float32, small enough to be quadratic."""
SAMPLED_ROWS = 96
"""Of a weight, evenly spaced: they stand for all in the error of a candidate that is not itself measured."""
LOGITS_AT_ONCE = 128
MEASURE = 1
"""Counts changes of the measurement, so that an old cache is not taken for a new one."""


class Later(Protocol):
    """A calibration that is yet to be made."""

    @property
    def make(self) -> Callable[[], Calibration]: ...


@dataclass(frozen=True)
class Group:
    """Layers that take one grid: which, and what each candidate stores."""

    block: int | None
    """None: the embedding (and the head, if it is the same), or the head."""
    roles: tuple[str, ...]
    modules: tuple[str, ...]
    candidates: tuple[GridOptions, ...]
    forms: tuple[Format, ...]
    nbytes: tuple[int, ...]
    weights: int

    def since(self, first: int) -> Group:
        """The same without the candidates before `first`."""
        return replace(self, candidates=self.candidates[first:], forms=self.forms[first:], nbytes=self.nbytes[first:])


def open_budget(recipe: Recipe) -> GridMethod | None:
    """The quantizer whose layers a budget has yet to decide, or None."""
    method = recipe.quantizer()
    return method if method is not None and method.options.budget and not method.options.budget.settled else None


def settle(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | Later | None, progress: Progress
) -> tuple[Recipe, Calibration | Later | None]:
    """The recipe with every layer's grid decided, and its calibration; both as they came if no budget is open.

    Loads the whole model in float32. Raises CompressionError if the budget is below what the candidates can reach,
    ShapeMismatch, NumericalError, DoesNotFit.
    """
    method = open_budget(recipe)
    if method is None:
        return recipe, calibration
    config, dense, options = checkpoint.config, checkpoint.dtype, method.options
    groups = _worthwhile(config, dense, options)
    _spend(config, dense, options, groups, [[0.0] * len(group.forms) for group in groups])  # raises before any work
    if not isinstance(calibration, Calibration | None):
        calibration = calibration.make()
    if calibration is None:
        raise CompressionError("a budget needs calibration tokens", hint="see compress.calibration.calibrate")
    losses = _cached_losses(checkpoint, groups, calibration.tokens[:SEQUENCES, :LENGTH], progress)
    return _filled(recipe, groups, _spend(config, dense, options, groups, losses)), calibration


def presumed(config: ModelConfig, dense: torch.dtype, recipe: Recipe) -> Recipe:
    """The recipe as its budget would be spent if all layers were alike: for plans, before anything is measured."""
    method = open_budget(recipe)
    if method is None:
        return recipe
    groups = _worthwhile(config, dense, method.options)
    losses = [[group.weights * 4.0 ** (-8 * n / group.weights) for n in group.nbytes] for group in groups]
    return _filled(recipe, groups, _spend(config, dense, method.options, groups, losses))


def measuring_bytes(config: ModelConfig) -> int:
    """Memory that measuring takes: the model in float32, and for its tokens each block's inputs and the logits."""
    weights = sum(torch.Size(shape).numel() for shape in tensor_names(config).values())
    tokens = SEQUENCES * LENGTH
    widest = max(layer.ffn_width for layer in config.layers)
    stream = tokens * ((config.num_layers + 1) * config.hidden_size + 4 * widest)
    return 4 * (weights + stream + (tokens + 3 * LOGITS_AT_ONCE) * config.vocab_size)


def groups_of(config: ModelConfig, options: QuantizeOptions) -> list[Group]:
    """What the budget decides, block by block, the embedding first if it is among it. Raises ShapeMismatch."""
    budget = options.budget
    assert budget is not None
    family, found = FAMILIES[config.family], []
    shape = (config.vocab_size, config.hidden_size)
    for role in ("embed",) if config.tie_embeddings else ("embed", "head"):
        if budget.embedding:
            found.append(_group(None, (role,), [family.module(role)], [shape], budget.embedding, options))
    for i, layer in enumerate(config.layers):
        shapes = layer.linear_shapes(config.hidden_size)
        for point in POINTS:
            roles = tuple(role for role in point if role in shapes)
            if roles:
                modules = [family.module(role, i) for role in roles]
                grids = budget.grids(options)
                found.append(_group(i, roles, modules, [shapes[role] for role in roles], grids, options))
    return found


def _group(
    block: int | None,
    roles: tuple[str, ...],
    modules: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    candidates: Sequence[GridOptions],
    options: QuantizeOptions,
) -> Group:
    columns = [n for _, n in shapes]  # what `auto` divides: each layer has a grid of its own in the end
    if block is None:
        forms = [grid.format_for(columns) for grid in candidates]
    else:
        forms = [options.layer_format(grid, columns) for grid in candidates]
    try:
        nbytes = tuple(sum(form.nbytes(shape) for shape in shapes) for form in forms)
    except ShapeMismatch as e:
        raise ShapeMismatch(f"{modules[0]}: {e.message}", hint=f"{e.hint}; or group_size: auto") from e
    weights = sum(rows * n for rows, n in shapes)
    return Group(block, roles, tuple(modules), tuple(candidates), tuple(forms), nbytes, weights)


def _worthwhile(config: ModelConfig, dense: torch.dtype, options: QuantizeOptions) -> list[Group]:
    """`groups_of`; unless the recipe names candidates, no layer gets fewer bits than all of them can have.

    Losses are measured one group at a time and do not add up where many layers are coarse: with 2 bits to choose, a
    budget that leaves 3 for every layer lost more than 3 bits everywhere.
    """
    groups = groups_of(config, options)
    if options.budget is None or options.budget.candidates:
        return groups
    room, _, _ = _room(config, dense, options, groups)
    layers = [group for group in groups if group.block is not None]
    room -= sum(min(group.nbytes) for group in groups if group.block is None)
    alike = [n for n in range(len(layers[0].forms)) if sum(group.nbytes[n] for group in layers) <= room]
    least = max(alike, default=0)
    return [group if group.block is None else group.since(least) for group in groups]


def _room(
    config: ModelConfig, dense: torch.dtype, options: QuantizeOptions, groups: Sequence[Group]
) -> tuple[int, int, int]:
    """Bytes that the budget leaves for the groups, bytes of what no group holds, and weights of the whole model."""
    assert options.budget is not None
    held = {module for group in groups for module in group.modules}
    fixed = weights = 0
    for name, shape in tensor_names(config).items():
        module = name.removesuffix(".weight")
        weights += torch.Size(shape).numel()
        if module not in held:
            fixed += _fixed_form(config, module, options, dense).nbytes(shape)
    return int(options.budget.bits * weights / 8) - fixed, fixed, weights


def _spend(
    config: ModelConfig,
    dense: torch.dtype,
    options: QuantizeOptions,
    groups: Sequence[Group],
    losses: Sequence[Sequence[float]],
) -> list[int]:
    """The candidate of each group. The budget is of the whole model: what no group holds is paid for first."""
    assert options.budget is not None
    room, fixed, weights = _room(config, dense, options, groups)
    choices = [
        [Choice(n, loss) for n, loss in zip(g.nbytes, ls, strict=True)] for g, ls in zip(groups, losses, strict=True)
    ]
    smallest = sum(min(group.nbytes) for group in groups)
    if smallest > room:
        least = fixed + smallest
        raise CompressionError(
            f"a budget of {options.budget.bits:g} bits per weight over the whole model cannot be met: the smallest "
            f"candidates make {least * 8 / weights:.2f}, {fixed * 8 / weights:.2f} of it for what the budget does not "
            "decide (norms; embedding and head, if they are not named)",
            hint="raise it, give candidates of fewer bits, or `embedding` candidates within the budget",
        )
    return allocate(choices, room)


def _fixed_form(config: ModelConfig, module: str, options: QuantizeOptions, dense: torch.dtype) -> Format:
    """How a weight that the budget does not decide is stored."""
    family = FAMILIES[config.family]
    shared = options.embedding or options.head
    grid = None
    if module == family.embed:
        grid = shared if config.tie_embeddings else options.embedding
    elif module == family.head:
        grid = options.head
    return Dense(dense) if grid is None else grid.format_for([config.hidden_size])


def _filled(recipe: Recipe, groups: Sequence[Group], picks: Sequence[int]) -> Recipe:
    """The recipe whose stage says what was picked, and that nothing is left to measure."""
    plain = recipe.canonical()
    plain["calibration"] = recipe.calibration.model_dump(mode="json")
    for stage in plain["stages"]:
        if not stage.get("budget"):
            continue
        stage["budget"]["settled"] = True
        for group, pick in zip(groups, picks, strict=True):
            grid = group.candidates[pick].model_dump(mode="json")
            if group.block is None:
                stage["embedding" if group.roles == ("embed",) else "head"] = grid
            else:
                stage["layers"] |= dict.fromkeys(group.modules, grid)
    return parse_recipe(plain, f"{recipe.name}, with its budget spent")


# What is measured.


def _cached_losses(
    checkpoint: Checkpoint, groups: Sequence[Group], tokens: Tensor, progress: Progress
) -> list[list[float]]:
    """Losses by group and candidate; measured once for a model, tokens and candidates."""
    asked = [[group.modules, [form.name for form in group.forms]] for group in groups]
    return remembered(
        [MEASURE, checkpoint.fingerprint(), token_hash(tokens), torch.__version__, asked],
        [len(group.forms) for group in groups],
        lambda: measure(load_decoder(checkpoint, progress=progress), groups, tokens, progress),
    )


def remembered(asked: object, sizes: Sequence[int], measure: Callable[[], list[list[float]]]) -> list[list[float]]:
    """Losses by group and candidate, `sizes` of them in each group, from the cache or measured now and kept there."""
    path = cache_dir("sensitivity") / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.json"
    try:
        losses = json.loads(path.read_text())
        if [len(row) for row in losses] == list(sizes):
            return [[float(loss) for loss in row] for row in losses]
    except (OSError, ValueError, TypeError):  # absent or damaged: measured again
        pass
    losses = measure()
    write_file(path, json.dumps(losses).encode())
    return losses


@torch.inference_mode()
def measure(
    decoder: Decoder, groups: Sequence[Group], tokens: Tensor, progress: Progress = lambda *_: None
) -> list[list[float]]:
    """KL divergence, nats per token of `tokens` [sequences, time], that each candidate of each group costs by itself.

    The decoder's weights are changed for a moment and put back. Raises NumericalError if its logits are not finite.
    """
    stream, rotation = stream_of(decoder, tokens)
    judge = Judge(decoder, stream[-1])
    losses = []
    for done, group in enumerate(groups):
        progress("measuring sensitivity", done, len(groups))
        if group.block is None:
            losses.append([_end_loss(decoder, group.roles[0], form, tokens, judge) for form in group.forms])
        else:
            losses.append(_group_losses(decoder, group, stream[group.block], rotation, judge))
    progress("measuring sensitivity", len(groups), len(groups))
    return losses


def stream_of(decoder: Decoder, tokens: Tensor) -> tuple[list[Tensor], Rotation]:
    """The inputs of every block and the outputs of the last [sequences, time, hidden]; their rotary factors."""
    rotation = decoder.rotation(torch.arange(tokens.shape[1]).expand(tokens.shape))
    stream = [decoder.entrance(decoder.embed(tokens), rotation.positions)]
    for block in decoder.blocks:
        stream.append(block(stream[-1], rotation))
    return stream, rotation


class Judge:
    """Divergence from the untouched model, of whose final states [sequences, time, hidden] it is made."""

    def __init__(self, decoder: Decoder, states: Tensor) -> None:
        self.decoder = decoder
        self.truth = list(self._log_probabilities(states))

    def divergence(self, states: Tensor) -> float:
        """Mean KL divergence over all positions, of final states [sequences, time, hidden]."""
        total, count = 0.0, 0
        for truth, logp in zip(self.truth, self._log_probabilities(states), strict=True):
            total += float((truth.exp() * (truth - logp)).sum(dtype=torch.float64))
            count += len(logp)
        return max(total / count, 0.0)

    def _log_probabilities(self, states: Tensor) -> Iterator[Tensor]:
        for rows in torch.split(states.flatten(0, 1), LOGITS_AT_ONCE):
            logp = self.decoder.logits(rows).log_softmax(-1)
            if not torch.isfinite(logp).all():
                raise NumericalError("the model's logits are not finite", hint="the checkpoint is damaged")
            yield logp


def _group_losses(decoder: Decoder, group: Group, x: Tensor, rotation: Rotation, judge: Judge) -> list[float]:
    """Loss of each candidate of a group whose block reads x [sequences, time, hidden]."""
    assert group.block is not None
    block: Any = decoder.blocks[group.block]
    linears = [getattr(block, role) for role in group.roles]
    read = _inputs(block, group.roles[0], x, rotation).flatten(0, 1)
    errors = [sum(_output_error(linear.weight, form, read) for linear in linears) for form in group.forms]
    output = sum(float((read @ linear.weight.T).square().sum()) for linear in linears)
    probe = choose_probe([error / output if output else 0.0 for error in errors])
    if errors[probe] == 0:
        return [0.0] * len(errors)
    with _rounded(linears, group.forms[probe]):
        states = x
        for later in list(decoder.blocks)[group.block :]:
            states = later(states, rotation)
    loss = judge.divergence(states)
    return [loss * error / errors[probe] for error in errors]


def choose_probe(errors: Sequence[float]) -> int:
    """The candidate to measure on: the coarsest within PROBE_ERROR, else the finest."""
    within = [i for i, error in enumerate(errors) if error <= PROBE_ERROR]
    return max(within, key=lambda i: errors[i]) if within else min(range(len(errors)), key=lambda i: errors[i])


def _output_error(weight: Tensor, form: Format, read: Tensor) -> float:
    """Squared error of the output [tokens, out] that rounding causes, estimated on some rows of the weight."""
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), SAMPLED_ROWS)).long()
    part = weight[rows]
    return float((read @ (rounded(part, form) - part).T).square().sum()) * len(weight) / len(rows)


def _end_loss(decoder: Decoder, role: str, form: Format, tokens: Tensor, judge: Judge) -> float:
    """Loss of the embedding (and of the head, if it is the same) or of the head in this format."""
    tied = decoder.config.tie_embeddings
    with _rounded([decoder.embed, decoder.head] if tied else [getattr(decoder, role)], form):
        return judge.divergence(decoder.hidden(tokens))


@contextmanager
def _rounded(modules: Sequence[nn.Module], form: Format) -> Iterator[None]:
    """These modules with their weights rounded to nearest, for as long as this lasts."""
    before = [module.weight for module in modules]
    values: dict[int, nn.Parameter] = {}
    for module in modules:
        weight: Any = module.weight
        if id(weight) not in values:
            values[id(weight)] = nn.Parameter(rounded(weight.detach(), form), requires_grad=False)
    try:
        for module, weight in zip(modules, before, strict=True):
            module.weight = values[id(weight)]
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            module.weight = weight


def rounded(weight: Tensor, form: Format) -> Tensor:
    """A weight [out, in] rounded to nearest on a grid of least squared error."""
    options = QuantizeOptions.model_validate({"clip": "mse"})
    return RTN(options).quantize(weight, form, None).dequantize()


def _inputs(block: Block, role: str, x: Tensor, rotation: Rotation) -> Tensor:
    """What linear layer `role` reads [sequences, time, in] when the block reads x [sequences, time, hidden]."""
    normed: Tensor = block.attn_norm(x)
    if role in POINTS[0]:
        return normed
    mixed = block.mix(normed, rotation)
    if role in POINTS[1]:
        return mixed
    normed = block.ffn_input(x, block.attended(mixed))
    return normed if role in POINTS[2] else block.gated(normed)
