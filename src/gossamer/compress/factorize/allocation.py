"""A rank for each layer by what the model loses, and the recipe that follows from it: `allocate: kld`.

One decomposition of a layer gives the error of its outputs at every rank. The divergence of the model is measured at
one of them, with this layer alone factorized, and goes on to the others in proportion to that error. The parameters
that `ratio` leaves then go to where they save the most divergence. As for bits (`sensitivity.py`), this happens before
the pipeline runs: the artifact's recipe names every layer's rank, so that a replay measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...checkpoint import Checkpoint
from ...checkpoint.load import load_decoder
from ...errors import CompressionError
from ...formats.low_rank import worthwhile_rank
from ...model import ModelConfig
from ...model.decoder import Decoder, Rotation
from ..allocate import Choice, allocate
from ..calibration import Calibration, token_hash
from ..grids import linear_shapes
from ..recipe import Recipe, parse_recipe
from ..sensitivity import LENGTH, MEASURE, SEQUENCES, Judge, choose_probe, remembered, stream_of
from ..source import Source
from ..walk import walk
from .rank import FactorizeOptions, Factorizer

if TYPE_CHECKING:
    from ..sensitivity import Later

Progress = Callable[[str, int, int], None]
Ranks = tuple[int | None, ...]
"""What a layer may be stored as, by rising size; None: whole."""


def open_allocation(recipe: Recipe) -> Factorizer | None:
    """The stage whose ranks are yet to be decided by measurement, or None."""
    for method in recipe.methods():
        if isinstance(method, Factorizer) and method.options.allocate and not method.options.settled:
            return method
    return None


def settle_ranks(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | Later | None, progress: Progress
) -> tuple[Recipe, Calibration | Later | None]:
    """The recipe with every layer's rank decided, and its calibration; both as they came if nothing is open.

    Loads the whole model in float32. Raises CompressionError if the ratio leaves less than `min_rank` takes,
    NumericalError, DoesNotFit.
    """
    method = open_allocation(recipe)
    if method is None:
        return recipe, calibration
    shapes = linear_shapes(checkpoint.config)
    candidates = candidates_of(checkpoint.config, method.options)
    _spend(shapes, method.options, candidates, [[0.0] * len(ranks) for ranks in candidates.values()])  # raises early
    if not isinstance(calibration, Calibration | None):
        calibration = calibration.make()
    if calibration is None:
        raise CompressionError("allocate needs calibration tokens", hint="see compress.calibration.calibrate")
    tokens = calibration.tokens
    chosen_by = method.options.model_dump(mode="json", exclude={"ratio", "layers", "settled"})
    measured_on = [MEASURE, checkpoint.fingerprint(), token_hash(tokens), torch.__version__]
    asked = [method.name, chosen_by, *measured_on, list(candidates.items())]
    sizes = [len(ranks) for ranks in candidates.values()]
    losses = remembered(asked, sizes, lambda: measure_ranks(checkpoint, method, candidates, tokens, progress))
    picks = _spend(shapes, method.options, candidates, losses)
    return _filled(recipe, candidates, picks), calibration


def candidates_of(config: ModelConfig, options: FactorizeOptions) -> dict[str, Ranks]:
    """Module name of every linear layer -> the ranks that it may have; whole is always among them."""
    return {
        module: (*range(options.min_rank, worthwhile_rank(shape), options.multiple), None)
        for module, shape in linear_shapes(config).items()
    }


def _spend(
    shapes: dict[str, tuple[int, int]],
    options: FactorizeOptions,
    candidates: dict[str, Ranks],
    losses: Sequence[Sequence[float]],
) -> list[int]:
    """The candidate of each layer: least total loss within `ratio` of all parameters."""
    assert options.ratio is not None
    choices = [
        [Choice(_parameters(shapes[module], rank), loss) for rank, loss in zip(ranks, lost, strict=True)]
        for (module, ranks), lost in zip(candidates.items(), losses, strict=True)
    ]
    whole = sum(out * columns for out, columns in shapes.values())
    least = sum(group[0].nbytes for group in choices)
    if least > options.ratio * whole:
        raise CompressionError(
            f"ratio {options.ratio:g} leaves {int(options.ratio * whole)} parameters, ranks of {options.min_rank} take "
            f"{least}",
            hint=f"a ratio of at least {least / whole:.2f}, or a smaller min_rank",
        )
    return allocate(choices, int(options.ratio * whole))


def _parameters(shape: tuple[int, int], rank: int | None) -> int:
    return shape[0] * shape[1] if rank is None else rank * sum(shape)


def _filled(recipe: Recipe, candidates: dict[str, Ranks], picks: Sequence[int]) -> Recipe:
    """The recipe whose stage says what was picked, and that nothing is left to measure."""
    plain = recipe.canonical()
    plain["calibration"] = recipe.calibration.model_dump(mode="json")
    chosen = {module: ranks[pick] for (module, ranks), pick in zip(candidates.items(), picks, strict=True)}
    for stage in plain["stages"]:
        if stage.get("allocate"):
            stage["settled"] = True
            stage["layers"] = {m: {"ratio": 1.0} if rank is None else {"rank": rank} for m, rank in chosen.items()}
    return parse_recipe(plain, f"{recipe.name}, with its ranks allocated")


@torch.inference_mode()
def measure_ranks(
    checkpoint: Checkpoint, method: Factorizer, candidates: dict[str, Ranks], tokens: Tensor, progress: Progress
) -> list[list[float]]:
    """KL divergence, nats per token, that each rank of each layer costs by itself.

    Inputs of layers are those of all `tokens` [sequences, time] in the untouched model; divergence is of a few of them.
    """
    source, decoder = Source(checkpoint), load_decoder(checkpoint, progress=progress)
    stream, seen = stream_of(decoder, tokens[:SEQUENCES, :LENGTH])
    judge = Judge(decoder, stream[-1])
    x, rotation = source.embed(tokens), source.rotation(tokens.shape[1])
    losses: dict[str, list[float]] = {}
    for i in range(source.config.num_layers):

        def point(roles: tuple[str, ...], hessian: Tensor | None, i: int = i) -> None:
            assert hessian is not None
            for role in roles:
                progress("measuring ranks", len(losses), len(candidates))
                module = source.family.module(role, i)
                layer = _Layer(decoder, i, role, stream[i], seen)
                losses[module] = _losses(method, layer, candidates[module], hessian, judge)

        walk(source.block(i), x, rotation, point)
    progress("measuring ranks", len(candidates), len(candidates))
    return [losses[module] for module in candidates]


class _Layer:
    """A linear layer of the untouched model, and what the model makes of its block's inputs with another weight."""

    def __init__(self, decoder: Decoder, block: int, role: str, x: Tensor, rotation: Rotation) -> None:
        self.blocks: list[Any] = list(decoder.blocks)[block:]
        self.linear = getattr(self.blocks[0], role)
        self.x, self.rotation = x, rotation

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.linear.weight
        return weight

    def states(self, weight: Tensor) -> Tensor:
        """Final states [sequences, time, hidden] with this weight in the layer's place."""
        with _held(self.linear, weight):
            x = self.x
            for block in self.blocks:
                x = block(x, self.rotation)
        return x


def _losses(method: Factorizer, layer: _Layer, ranks: Ranks, hessian: Tensor, judge: Judge) -> list[float]:
    """Loss of each rank of a layer; none if it stays whole."""
    weight = layer.weight.double()
    basis = method.basis(weight, hessian)[0]
    outputs = basis.T @ weight
    # What a direction of the basis carries of the squared output: a rank loses those that come after it.
    carried = ((outputs @ hessian.double()) * outputs).sum(1).clamp(min=0)
    tails = carried.sum() - carried.cumsum(0)
    errors = [0.0 if rank is None else max(float(tails[rank - 1]), 0.0) for rank in ranks]
    factored, total = errors[:-1], float(carried.sum())
    if not factored or total == 0:
        return [0.0] * len(ranks)
    at = choose_probe([error / total for error in factored])
    if errors[at] == 0:
        return [0.0] * len(ranks)
    rank = ranks[at]
    value = (basis[:, :rank] @ outputs[:rank]).float()
    loss = judge.divergence(layer.states(value))
    return [loss * error / errors[at] for error in errors]


@contextmanager
def _held(linear: nn.Module, weight: Tensor) -> Iterator[None]:
    """A layer with another weight, for as long as this lasts."""
    before = linear.weight
    try:
        linear.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        linear.weight = before
