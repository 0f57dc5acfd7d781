"""OWL (Yin et al., arXiv 2310.05175): blocks with more outliers among their weights keep more of them.

A weight's score is Wanda's, |w_ij| * ||x_j||; it is an outlier if it is above a multiple of its layer's mean. The more
of a block's weights are outliers, the less of it is pruned, within a spread about the sparsity that the model has.
Before the pipeline runs, `settle_sparsity` measures that on the untouched model and writes each layer's share into the
recipe: a replay measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...errors import CompressionError
from ..calibration import Calibration
from ..grids import keys_of, linear_shapes
from ..recipe import Recipe, parse_recipe
from ..source import Source
from ..walk import walk
from .masks import OWLOptions

if TYPE_CHECKING:
    from ..sensitivity import Later

MOST = 0.99
"""No block loses more than this, whatever its spread."""


def settle_sparsity(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | Later | None,
    progress: Callable[[str, int, int], None],
) -> tuple[Recipe, Calibration | Later | None]:
    """The recipe with a share for every layer, and its calibration; both as they came if no share is left open.

    Raises RecipeError, NumericalError; CompressionError if a calibration is needed and none is given.
    """
    options = recipe.parts()[0].main.options
    if not isinstance(options, OWLOptions) or options.allocate != "owl":
        return recipe, calibration
    open_modules = [module for module, key in keys_of(checkpoint.config, options.layers).items() if key is None]
    if not open_modules:
        return recipe, calibration
    if not isinstance(calibration, Calibration | None):
        calibration = calibration.make()
    if calibration is None:
        raise CompressionError("allocate needs calibration tokens", hint="see compress.calibration.calibrate")
    shares = outlier_shares(Source(checkpoint), calibration.tokens, options.outlier, progress)
    found = spread(checkpoint, open_modules, shares, options)
    plain = recipe.canonical()
    plain["calibration"] = recipe.calibration.model_dump(mode="json")
    for stage in plain["stages"]:
        if stage.get("allocate") == "owl":
            stage["layers"] |= found
    return parse_recipe(plain, f"{recipe.name}, with its sparsity shared out"), calibration


@torch.no_grad()
def outlier_shares(
    source: Source, tokens: Tensor, times: float, progress: Callable[[str, int, int], None]
) -> list[float]:
    """Share of each block's weights whose score is above `times` the mean of their layer, over tokens [seq, time]."""
    x, rotation, count = source.embed(tokens), source.rotation(tokens.shape[1]), source.config.num_layers
    shares = []
    for i in range(count):
        progress("measuring outliers", i, count)
        block, outliers, weights = source.block(i), 0, 0

        def see(roles: Sequence[str], hessian: Tensor | None) -> None:
            nonlocal outliers, weights
            assert hessian is not None
            for role in roles:
                scores = getattr(block, role).weight.abs() * hessian.diagonal().sqrt()  # noqa: B023 (called in the loop)
                outliers += int((scores > times * scores.mean()).sum())
                weights += scores.numel()

        walk(block, x, rotation, see)
        shares.append(outliers / weights)
    progress("measuring outliers", count, count)
    return shares


def spread(
    checkpoint: Checkpoint, modules: Sequence[str], shares: Sequence[float], options: OWLOptions
) -> Mapping[str, float]:
    """Sparsity of each module by its block's share of outliers: `options.sparsity` in the mean over their weights."""
    family, shapes = Source(checkpoint).family, linear_shapes(checkpoint.config)
    block_of = {
        family.module(role, i): i
        for i, layer in enumerate(checkpoint.config.layers)
        for role in layer.linear_shapes(checkpoint.config.hidden_size)
    }
    low, width = min(shares), max(max(shares) - min(shares), 1e-12)
    offsets = {m: -2 * options.spread * (shares[block_of[m]] - low) / width for m in modules}
    sizes = {m: shapes[m][0] * shapes[m][1] for m in modules}
    mean = sum(offsets[m] * sizes[m] for m in modules) / sum(sizes.values())
    return {m: round(min(max(options.sparsity + offsets[m] - mean, 0.0), MOST), 5) for m in modules}
