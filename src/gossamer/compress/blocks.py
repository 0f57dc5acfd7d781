"""Makes the units of one part of a run: embedding and head, then block after block, by any kind of method.

Knows how each kind of method is fed; what a unit is on disk is `units.py`, what a method decides is the method's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CompressionError, NumericalError
from ..formats import Codes, Format, LowRank
from ..model.decoder import Block, Rotation
from .blockview import BlockView
from .factorize.quantized import quantize_factors
from .gradients import gradient_unit, measure
from .method import BlockMethod, GridMethod, LayerMethod, Needs, Quantizer, WeightMethod
from .plan import ROUND_AT_ONCE
from .quantize.rtn import RTN
from .source import Source
from .units import Units, block_unit
from .walk import advance, slices, walk

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""
T = TypeVar("T")


@dataclass(frozen=True)
class Teacher:
    """The original, whose outputs blocks are compared with, and where the layers that are left were in it."""

    source: Source
    layers: Sequence[int]

    def blocks(self, i: int) -> range:
        """Its blocks in the place of block i: those that went after block i are part of what it has to do."""
        first = self.layers[i] if i else 0
        last = self.layers[i + 1] if i + 1 < len(self.layers) else self.source.config.num_layers
        return range(first, last)


def make_units(
    units: Units,
    method: WeightMethod,
    tokens: Tensor | None,
    progress: Progress,
    seed: int = 0,
    teacher: Teacher | None = None,
) -> None:
    """Every unit of embedding, head and blocks that is not done yet. `tokens` [sequences, time] if the method asks.

    Without a teacher, blocks are compared with those that the part was given.
    """
    _Maker(units, method, progress, seed, teacher).run(tokens)


class _Maker:
    def __init__(
        self, units: Units, method: WeightMethod, progress: Progress, seed: int, teacher: Teacher | None
    ) -> None:
        self.units, self.method, self.progress, self.seed, self.teacher = units, method, progress, seed, teacher
        self.source, self.config, self.family = units.source, units.source.config, units.source.family

    def run(self, tokens: Tensor | None) -> None:
        self._ends()
        if self.method.needs is Needs.NOTHING:
            self._blocks_alone()
            return
        assert tokens is not None
        if not self._todo():
            return
        if isinstance(self.method, BlockMethod):
            self._blocks_by_outputs(self.method, tokens)
        else:
            assert isinstance(self.method, Quantizer | LayerMethod)
            if self.method.needs is Needs.GRADIENT:
                measure(self.units, tokens, self.progress)
            self._blocks_by_inputs(self.method, tokens)

    def _todo(self) -> list[int]:
        return [i for i in range(self.config.num_layers) if not self.units.is_done(block_unit(i))]

    def _ends(self) -> None:
        """Embedding and untied head, if the method stores them: codes rounded to nearest, a slice of rows at a time."""
        for module in (self.family.embed, self.family.head):
            if module not in self.units.plan.stored or self.units.is_done(module):
                continue
            role = "embed" if module == self.family.embed else "head"
            tensors, note = self._stored_alone(None, role, module)
            self.units.write(module, tensors, {"layers": [note]})

    def _blocks_alone(self) -> None:
        """Every block by a method that needs no data."""
        count = self.config.num_layers
        for i in self._todo():
            self.progress("compressing blocks", i, count)
            tensors: dict[str, Tensor] = {}
            notes: list[dict[str, Any]] = []
            for role in self.config.layers[i].linear_shapes(self.config.hidden_size):
                module = self.family.module(role, i)
                if module not in self.units.plan.stored:
                    continue
                stored, note = self._stored_alone(i, role, module)
                tensors |= stored
                notes.append(note)
            self.units.write(block_unit(i), tensors, {"layers": notes})
        self.progress("compressing blocks", count, count)

    def _stored_alone(self, i: int | None, role: str, module: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named stored tensors of a weight that needs no statistics, and its note."""
        form, name = self.units.form(module), f"{module}.weight"
        shape = self.source.checkpoint.shape(name)
        if isinstance(self.method, LayerMethod):
            weight = self.source.checkpoint.tensor(name)
            _check_finite(name, weight)
            packed = _naming([name], partial(self.method.store, weight, form, None))
            error = float((form.unpack(packed) - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
        else:
            assert isinstance(self.method, GridMethod)
            method = self.method if isinstance(self.method, Quantizer) and i is not None else RTN(self.method.options)
            if isinstance(form, LowRank):
                packed, error = self._round_factors(name, form, method)
            else:
                codes, error = self._round_weight(name, form, method)
                packed = form.pack(codes)
        return _named_tensors(module, packed), _note(i, role, form, packed, shape, error)

    def _round_weight(self, name: str, form: Format, method: Quantizer) -> tuple[Codes, float]:
        """Codes of a weight that needs no statistics, and its relative squared error, a slice of rows at a time."""
        rows, columns = self.source.checkpoint.shape(name)
        step = max(1, ROUND_AT_ONCE // columns)
        parts, lost, total = [], 0.0, 0.0
        for start in range(0, rows, step):
            weight = self.source.checkpoint.tensor(name, rows=slice(start, min(start + step, rows)))
            _check_finite(name, weight)
            part = _naming([name], partial(method.quantize, weight, form, None)).with_zeros(form.zeros(weight))
            lost += float((part.dequantize() - weight).square_().sum())
            total += float(weight.square().sum())
            parts.append(part)
        return Codes.cat(parts), lost / total if total else 0.0

    def _round_factors(self, name: str, form: LowRank, method: Quantizer) -> tuple[dict[str, Tensor], float]:
        """Stored tensors of factors that need no statistics, and the relative squared error of their product."""
        u, v = self._factors(name)
        packed = _naming([name], partial(quantize_factors, method, form, u, v, None))
        weight = u @ v
        return packed, float((form.unpack(packed) - weight).square().sum() / weight.square().sum().clamp(min=1e-30))

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The two factors in float32 of a weight that an earlier part has factorized."""
        checkpoint = self.source.checkpoint
        given = checkpoint.format(name)
        assert isinstance(given, LowRank)
        return given.factors(checkpoint.stored(name))

    def _blocks_by_inputs(self, method: Quantizer | LayerMethod, tokens: Tensor) -> None:
        """Every block by a method that needs its inputs: x [sequences, length, hidden] goes from block to block."""
        count, todo = self.config.num_layers, self._todo()
        x, rotation = self.units.embed(tokens), self.source.rotation(tokens.shape[1])
        for i in range(max(todo) + 1):
            if i not in todo:
                self.progress("catching up with finished blocks", i, count)
                advance(self.units.finished_block(i), x, rotation)
                continue
            self.progress("compressing blocks", i, count)
            self._walk_block(method, i, x, rotation)
        self.progress("compressing blocks", count, count)

    def _walk_block(self, method: Quantizer | LayerMethod, i: int, x: Tensor, rotation: Rotation) -> None:
        block = self.source.block(i)
        gradients = self.units.open(gradient_unit(i)) if method.needs is Needs.GRADIENT else None
        tensors: dict[str, Tensor] = {}
        notes: list[dict[str, Any]] = []

        def put(role: str, form: Format, packed: dict[str, Tensor], before: Tensor, hessian: Tensor) -> None:
            """Record what is stored of a linear layer, and let the block compute with it, as a resumed run will."""
            value = form.unpack(packed)
            notes.append(_note(i, role, form, packed, tuple(before.shape), _output_error(before, value, hessian)))
            getattr(block, role).weight = nn.Parameter(value, requires_grad=False)
            tensors.update(_named_tensors(self.family.module(role, i), packed))

        def quantize(method: Quantizer, roles: list[str], form: Format, hessian: Tensor) -> None:
            """Linear layers of the same inputs and the same grid: rounded as one."""
            weights = [getattr(block, role).weight for role in roles]
            names = [self.family.module(role, i) for role in roles]
            gradient = None if gradients is None else _cat([gradients.read(role) for role in roles])
            codes = _naming(names, partial(method.quantize, _cat(weights), form, hessian, gradient))
            for role, part, before in zip(roles, codes.split([len(w) for w in weights]), weights, strict=True):
                put(role, form, form.pack(part.with_zeros(form.zeros(before))), before, hessian)

        def alone(role: str, form: Format, hessian: Tensor) -> dict[str, Tensor]:
            """Stored tensors of a layer that is not a matrix of codes, and so shares nothing with its neighbours."""
            module, weight = self.family.module(role, i), getattr(block, role).weight
            if not isinstance(method, Quantizer):
                return _naming([module], partial(method.store, weight, form, hessian))
            assert isinstance(form, LowRank)
            u, v = self._factors(f"{module}.weight")
            return _naming([module], partial(quantize_factors, method, form, u, v, hessian))

        def compress_point(roles: tuple[str, ...], hessian: Tensor | None) -> None:
            assert hessian is not None
            by_form: dict[Format, list[str]] = {}
            for role in roles:
                module = self.family.module(role, i)
                _check_finite(f"{module}.weight", getattr(block, role).weight)
                by_form.setdefault(self.units.form(module), []).append(role)
            for form, alike in by_form.items():
                if isinstance(method, Quantizer) and not isinstance(form, LowRank):
                    quantize(method, alike, form, hessian)
                    continue
                for role in alike:
                    put(role, form, alone(role, form, hessian), getattr(block, role).weight, hessian)

        walk(block, x, rotation, compress_point)
        self.units.write(block_unit(i), tensors, {"layers": notes})

    def _blocks_by_outputs(self, method: BlockMethod, tokens: Tensor) -> None:
        """Every block by a method that learns from the original's outputs, which go from block to block beside x."""
        count, todo = self.config.num_layers, self._todo()
        teacher = self.teacher or Teacher(self.source, range(count))
        x, target = self.units.embed(tokens), teacher.source.embed(tokens)
        rotation = self.source.rotation(tokens.shape[1])
        for i in range(max(todo) + 1):
            done = i not in todo
            self.progress("catching up with finished blocks" if done else "compressing blocks", i, count)
            given = target.clone() if method.teacher_inputs and not done else None
            for j in teacher.blocks(i):
                with torch.no_grad():
                    advance(teacher.source.block(j), target, rotation)
            if not done:
                self._learn_block(method, i, self.source.block(i), x, target, rotation, given)
            with torch.no_grad():
                advance(self.units.finished_block(i), x, rotation)
        self.progress("compressing blocks", count, count)

    def _learn_block(
        self,
        method: BlockMethod,
        i: int,
        block: Block,
        x: Tensor,
        target: Tensor,
        rotation: Rotation,
        teacher_x: Tensor | None,
    ) -> None:
        names = {role: self.family.module(role, i) for role in self.config.layers[i].linear_shapes(1)}
        for role, name in names.items():
            _check_finite(f"{name}.weight", getattr(block, role).weight)
        forms = {role: self.units.form(name) for role, name in names.items()}
        given = lambda role: self.source.checkpoint.stored(f"{names[role]}.weight")  # noqa: E731
        view = BlockView(block, x, target, rotation, forms, names, self.seed, teacher_x, given)
        with torch.enable_grad():
            _naming([f"block {i}"], partial(method.compress, view))
        missing = [names[role] for role in names if role not in view.decided and role not in view.stored]
        if missing:
            raise CompressionError(f"{method.name} left {', '.join(missing)} undecided")
        tensors = self.units.changed(i, block)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"{name} is not finite after {method.name}", hint="nothing of it is kept")
        packed = {
            role: view.stored[role] if role in view.stored else forms[role].pack(view.decided[role]) for role in names
        }
        for role, stored in packed.items():
            tensors |= _named_tensors(names[role], stored)
            getattr(block, role).weight = nn.Parameter(forms[role].unpack(stored), requires_grad=False)
        error = _block_error(block, x, target, rotation)
        shapes = self.config.layers[i].linear_shapes(self.config.hidden_size)
        notes = [_note(i, role, forms[role], stored, shapes[role], error) for role, stored in packed.items()]
        self.units.write(block_unit(i), tensors, {"layers": notes})


def _named_tensors(module: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{local}": tensor for local, tensor in stored.items()}


def _note(
    block: int | None, role: str, form: Format, packed: dict[str, Tensor], shape: tuple[int, ...], error: float
) -> dict[str, Any]:
    bits = 8 * sum(tensor.nbytes for tensor in packed.values()) / math.prod(shape)
    return {"block": block, "linear": role, "format": form.name, "bits_per_weight": bits, "relative_error": error}


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _naming(names: list[str], decide: Callable[[], T]) -> T:
    """What `decide` gives for weights with these names, which a numerical error of it then carries."""
    try:
        return decide()
    except NumericalError as e:
        raise NumericalError(f"{', '.join(names)}: {e.message}", hint=e.hint) from e


def _output_error(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's output over its squared output: tr(E H E^T) / tr(W H W^T)."""
    error = value - weight
    lost = float(((error @ hessian) * error).sum())
    total = float(((weight @ hessian) * weight).sum())
    return max(lost, 0.0) / total if total > 0 else 0.0


@torch.no_grad()
def _block_error(block: Block, x: Tensor, target: Tensor, rotation: Rotation) -> float:
    """Mean over the tokens of the squared error of a block's output over the squared output that is wanted."""
    total = 0.0
    for c in slices(x):
        wanted = target[c].square().sum(-1)
        lost = (block(x[c], rotation) - target[c]).square().sum(-1)
        total += float((lost / wanted.clamp(min=1e-30)).sum())
    return total / (x.shape[0] * x.shape[1])


def _check_finite(name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise NumericalError(f"{name} has {bad} weights that are NaN or infinite", hint="the checkpoint is damaged")
