"""What is stored of one block that a method makes by itself: from its weights, or from its inputs and outputs.

Knows a source, formats and a method, and so can be told to any process; knows no unit, no journal and no order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CompressionError, NumericalError
from ..formats import Codes, Format, LowRank
from ..model.decoder import Block, Rotation
from .blockview import BlockView
from .factorize.quantized import quantize_factors
from .method import BlockMethod, GridMethod, LayerMethod, Quantizer, WeightMethod
from .plan import ROUND_AT_ONCE, Plan
from .quantize.rtn import RTN
from .source import Source
from .walk import ENOUGH_SEQUENCES, slices

Made: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]
"""Named stored tensors of a unit, and its notes."""
T = TypeVar("T")


class OneBlock:
    """Makes blocks, and ends, one at a time."""

    def __init__(self, source: Source, plan: Plan, method: WeightMethod, seed: int) -> None:
        self.source, self.plan, self.method, self.seed = source, plan, method, seed
        self.config, self.family = source.config, source.family

    def form(self, module: str) -> Format:
        return self.plan.formats[module]

    def end(self, role: str, module: str, hessian: Tensor | None = None) -> Made:
        """The embedding or an untied head: codes rounded to nearest, or by a Hessian, a slice of rows at a time."""
        tensors, note = self._stored_alone(None, role, module, hessian)
        return tensors, {"layers": [note]}

    def alone(self, i: int) -> Made:
        """Block i by a method that needs no data."""
        tensors: dict[str, Tensor] = {}
        notes: list[dict[str, Any]] = []
        for role in self.config.layers[i].linear_shapes(self.config.hidden_size):
            module = self.family.module(role, i)
            if module not in self.plan.stored:
                continue
            stored, note = self._stored_alone(i, role, module)
            tensors |= stored
            notes.append(note)
        return tensors, {"layers": notes}

    def learned(self, i: int, x: Tensor, target: Tensor, rotation: Rotation, teacher_x: Tensor | None = None) -> Made:
        """Block i by a BlockMethod; streams as a BlockView has them."""
        method, block = self.method, self.source.block(i)
        assert isinstance(method, BlockMethod)
        names = {role: self.family.module(role, i) for role in self.config.layers[i].linear_shapes(1)}
        for role, name in names.items():
            check_finite(f"{name}.weight", getattr(block, role).weight)
        forms = {role: self.form(name) for role, name in names.items()}
        given = lambda role: self.source.checkpoint.stored(f"{names[role]}.weight")  # noqa: E731
        view = BlockView(block, x, target, rotation, forms, names, self.seed, teacher_x, given)
        with torch.enable_grad():
            naming([f"block {i}"], partial(method.compress, view))
        missing = [names[role] for role in names if role not in view.decided and role not in view.stored]
        if missing:
            raise CompressionError(f"{method.name} left {', '.join(missing)} undecided")
        tensors = self.source.changed(i, block)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"{name} is not finite after {method.name}", hint="nothing of it is kept")
        packed = {
            role: view.stored[role] if role in view.stored else forms[role].pack(view.decided[role]) for role in names
        }
        for role, stored in packed.items():
            tensors |= named_tensors(names[role], stored)
            getattr(block, role).weight = nn.Parameter(forms[role].unpack(stored), requires_grad=False)
        error = _block_error(block, x[:ENOUGH_SEQUENCES], target[:ENOUGH_SEQUENCES], rotation)
        shapes = self.config.layers[i].linear_shapes(self.config.hidden_size)
        notes = [layer_note(i, role, forms[role], stored, shapes[role], error) for role, stored in packed.items()]
        return tensors, {"layers": notes}

    def _stored_alone(
        self, i: int | None, role: str, module: str, hessian: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named stored tensors of a weight by itself, and its note."""
        form, name = self.form(module), f"{module}.weight"
        shape = self.source.checkpoint.shape(name)
        if isinstance(self.method, LayerMethod):
            weight = self.source.checkpoint.tensor(name)
            check_finite(name, weight)
            packed = naming([name], partial(self.method.store, weight, form, None))
            error = float((form.unpack(packed) - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
        else:
            assert isinstance(self.method, GridMethod)
            method = self.method if isinstance(self.method, Quantizer) and i is not None else RTN(self.method.options)
            if hessian is not None:
                assert self.method.ends is not None
                method = self.method.ends
            if isinstance(form, LowRank):
                packed, error = self._round_factors(name, form, method)
            else:
                codes, error = self._round_weight(name, form, method, hessian)
                packed = form.pack(codes)
        return named_tensors(module, packed), layer_note(i, role, form, packed, shape, error)

    def _round_weight(self, name: str, form: Format, method: Quantizer, hessian: Tensor | None) -> tuple[Codes, float]:
        """Codes of a weight by itself, and its relative squared error, a slice of rows at a time."""
        rows, columns = self.source.checkpoint.shape(name)
        step = max(1, ROUND_AT_ONCE // columns)
        parts, lost, total = [], 0.0, 0.0
        for start in range(0, rows, step):
            weight = self.source.checkpoint.tensor(name, rows=slice(start, min(start + step, rows)))
            check_finite(name, weight)
            part = naming([name], partial(method.quantize, weight, form, hessian)).with_zeros(form.zeros(weight))
            lost += float((part.dequantize() - weight).square_().sum())
            total += float(weight.square().sum())
            parts.append(part)
        return Codes.cat(parts), lost / total if total else 0.0

    def _round_factors(self, name: str, form: LowRank, method: Quantizer) -> tuple[dict[str, Tensor], float]:
        """Stored tensors of factors that need no statistics, and the relative squared error of their product."""
        u, v = self.factors(name)
        packed = naming([name], partial(quantize_factors, method, form, u, v, None))
        weight = u @ v
        return packed, float((form.unpack(packed) - weight).square().sum() / weight.square().sum().clamp(min=1e-30))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The two factors in float32 of a weight that an earlier part has factorized."""
        checkpoint = self.source.checkpoint
        given = checkpoint.format(name)
        assert isinstance(given, LowRank)
        return given.factors(checkpoint.stored(name))


def named_tensors(module: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{local}": tensor for local, tensor in stored.items()}


def layer_note(
    block: int | None, role: str, form: Format, packed: dict[str, Tensor], shape: tuple[int, ...], error: float
) -> dict[str, Any]:
    bits = 8 * sum(tensor.nbytes for tensor in packed.values()) / math.prod(shape)
    return {"block": block, "linear": role, "format": form.name, "bits_per_weight": bits, "relative_error": error}


def naming(names: list[str], decide: Callable[[], T]) -> T:
    """What `decide` gives for weights with these names, which a numerical error of it then carries."""
    try:
        return decide()
    except NumericalError as e:
        raise NumericalError(f"{', '.join(names)}: {e.message}", hint=e.hint) from e


def check_finite(name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise NumericalError(f"{name} has {bad} weights that are NaN or infinite", hint="the checkpoint is damaged")


@torch.no_grad()
def _block_error(block: Block, x: Tensor, target: Tensor, rotation: Rotation) -> float:
    """Mean over the tokens of the squared error of a block's output over the squared output that is wanted."""
    total = 0.0
    for c in slices(x):
        wanted = target[c].square().sum(-1)
        lost = (block(x[c], rotation) - target[c]).square().sum(-1)
        total += float((lost / wanted.clamp(min=1e-30)).sum())
    return total / (x.shape[0] * x.shape[1])
