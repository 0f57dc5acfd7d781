"""Makes the units of one part of a run: embedding and head, then block after block, by any kind of method.

Knows how each kind of method is fed, and in which order; one block is made in `oneblock.py`, what a unit is on disk is
`units.py`, what a method decides is the method's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format, LowRank
from ..model.decoder import Rotation
from .elsewhere import Elsewhere
from .factorize.quantized import quantize_factors
from .gradients import gradient_unit, measure
from .method import BlockMethod, GridMethod, LayerMethod, Needs, Quantizer, WeightMethod
from .oneblock import OneBlock, check_finite, layer_note, named_tensors, naming
from .precision import in_precision
from .source import Source
from .units import Units, block_unit
from .walk import TOKENS_PER_COLUMN, advance, hessian, slices, walk

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""
TIED_SHARE = 0.3
"""Of the mean of that Hessian's diagonal: so much is added to the diagonal for the rows of a tied embedding."""


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

    @torch.no_grad()
    def advance(self, i: int, x: Tensor, rotation: Rotation) -> None:
        """Carry its stream x [sequences, time, hidden] through them, in place."""
        for j in self.blocks(i):
            advance(self.source.block(j), x, rotation)


def make_units(
    units: Units,
    method: WeightMethod,
    tokens: Tensor | None,
    progress: Progress,
    seed: int = 0,
    teacher: Teacher | None = None,
    elsewhere: Elsewhere | None = None,
) -> None:
    """Every unit of embedding, head and blocks that is not done yet. `tokens` [sequences, time] if the method asks.

    Without a teacher, blocks are compared with those that the part was given. `elsewhere` makes blocks that do not wait
    for each other.
    """
    teacher = teacher or Teacher(units.source, range(units.source.config.num_layers))
    _Maker(units, method, progress, seed, teacher, elsewhere).run(tokens)


class _Maker:
    def __init__(
        self,
        units: Units,
        method: WeightMethod,
        progress: Progress,
        seed: int,
        teacher: Teacher,
        elsewhere: Elsewhere | None,
    ) -> None:
        self.units, self.method, self.progress, self.teacher = units, method, progress, teacher
        self.source, self.config, self.family = units.source, units.source.config, units.source.family
        self.one, self.elsewhere = OneBlock(units.source, units.plan, method, seed), elsewhere

    def run(self, tokens: Tensor | None) -> None:
        self._ends(tokens)
        if self.method.needs is Needs.NOTHING:
            self._blocks_alone()
            return
        assert tokens is not None
        if not self._todo():
            return
        if isinstance(self.method, BlockMethod) and self.method.independent:
            self._blocks_by_original(tokens)
        elif isinstance(self.method, BlockMethod):
            self._blocks_by_outputs(self.method, tokens)
        else:
            assert isinstance(self.method, Quantizer | LayerMethod)
            if self.method.needs is Needs.GRADIENT:
                measure(self.units, tokens, self.progress)
            self._blocks_by_inputs(self.method, tokens)

    def _todo(self) -> list[int]:
        return [i for i in range(self.config.num_layers) if not self.units.is_done(block_unit(i))]

    def _ends(self, tokens: Tensor | None) -> None:
        """Embedding and untied head, if the method stores them."""
        read = self.family.embed if self.config.tie_embeddings else self.family.head
        for module in (self.family.embed, self.family.head):
            if module in self.units.plan.stored and not self.units.is_done(module):
                role = "embed" if module == self.family.embed else "head"
                inputs = self._head_hessian(tokens) if module == read else None
                self.units.write(module, *self.one.end(role, module, inputs))

    @torch.no_grad()
    def _head_hessian(self, tokens: Tensor | None) -> Tensor | None:
        """Sum of X^T X [hidden, hidden] over what the head reads in the float model, on as many tokens as that takes.

        A tied head is the embedding, too, whose rows count as they are: some of the identity stands for that. None if
        the method does not ask for it.
        """
        if tokens is None or not isinstance(self.method, GridMethod) or self.method.ends is None:
            return None
        enough = -(-TOKENS_PER_COLUMN * self.config.hidden_size // tokens.shape[1])
        x, count = self.source.embed(tokens[:enough]), self.config.num_layers
        rotation = self.source.rotation(tokens.shape[1])
        for i in range(count):
            self.progress("reading what the head is given", i, count)
            advance(self.source.block(i), x, rotation)
        norm = self.source.norm("final_norm")
        found = hessian(norm(x[c]) for c in slices(x))
        if self.config.tie_embeddings:
            found.diagonal().add_(TIED_SHARE * found.diagonal().mean())
        return found

    def _blocks_alone(self) -> None:
        """Every block by a method that needs no data."""
        if self.elsewhere is not None:
            self._take(self.elsewhere.make((i, None) for i in self._todo()))
            return
        count = self.config.num_layers
        for i in self._todo():
            self.progress("compressing blocks", i, count)
            self.units.write(block_unit(i), *self.one.alone(i))
        self.progress("compressing blocks", count, count)

    def _take(self, made: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Blocks that others make, as they come."""
        count = self.config.num_layers
        self.progress("compressing blocks", count - len(self._todo()), count)
        for unit, file, notes in made:
            self.units.take(unit, file, notes)
            self.progress("compressing blocks", count - len(self._todo()), count)

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
            notes.append(layer_note(i, role, form, packed, tuple(before.shape), _output_error(before, value, hessian)))
            getattr(block, role).weight = nn.Parameter(value, requires_grad=False)
            tensors.update(named_tensors(self.family.module(role, i), packed))

        def quantize(method: Quantizer, roles: list[str], form: Format, hessian: Tensor) -> None:
            """Linear layers of the same inputs and the same grid: rounded as one."""
            weights = [getattr(block, role).weight for role in roles]
            names = [self.family.module(role, i) for role in roles]
            gradient = None if gradients is None else _cat([gradients.read(role) for role in roles])
            codes = naming(names, partial(method.quantize, _cat(weights), form, hessian, gradient))
            for role, part, before in zip(roles, codes.split([len(w) for w in weights]), weights, strict=True):
                put(role, form, form.pack(part.with_zeros(form.zeros(before))), before, hessian)

        def alone(role: str, form: Format, hessian: Tensor) -> dict[str, Tensor]:
            """Stored tensors of a layer that is not a matrix of codes, and so shares nothing with its neighbours."""
            module, weight = self.family.module(role, i), getattr(block, role).weight
            if not isinstance(method, Quantizer):
                return naming([module], partial(method.store, weight, form, hessian))
            assert isinstance(form, LowRank)
            u, v = self.one.factors(f"{module}.weight")
            return naming([module], partial(quantize_factors, method, form, u, v, hessian))

        def compress_point(roles: tuple[str, ...], hessian: Tensor | None) -> None:
            assert hessian is not None
            by_form: dict[Format, list[str]] = {}
            for role in roles:
                module = self.family.module(role, i)
                check_finite(f"{module}.weight", getattr(block, role).weight)
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
        x, target = self.units.embed(tokens), self.teacher.source.embed(tokens)
        rotation = self.source.rotation(tokens.shape[1])
        for i in range(max(todo) + 1):
            done = i not in todo
            self.progress("catching up with finished blocks" if done else "compressing blocks", i, count)
            given = target.clone() if method.teacher_inputs and not done else None
            with in_precision(method.precision):
                self.teacher.advance(i, target, rotation)
            if not done:
                self.units.write(block_unit(i), *self.one.learned(i, x, target, rotation, given))
            with torch.no_grad(), in_precision(method.precision):
                advance(self.units.finished_block(i), x, rotation)
        self.progress("compressing blocks", count, count)

    def _blocks_by_original(self, tokens: Tensor) -> None:
        """Every block by a method that learns it on the original's stream alone."""
        if self.elsewhere is not None:
            self._take(self.elsewhere.make(self._original_streams(tokens)))
            return
        count, rotation = self.config.num_layers, self.source.rotation(tokens.shape[1])
        for i, (x, target) in self._original_streams(tokens):
            self.progress("compressing blocks", i, count)
            self.units.write(block_unit(i), *self.one.learned(i, x, target, rotation))
        self.progress("compressing blocks", count, count)

    def _original_streams(self, tokens: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Each block that is not done, with what the original is given in its place, and what it gives.

        They are good until the next ones are asked for.
        """
        todo, rotation = self._todo(), self.source.rotation(tokens.shape[1])
        target = self.teacher.source.embed(tokens)
        for i in range(max(todo) + 1):
            x = target.clone()
            self.teacher.advance(i, target, rotation)
            if i in todo:
                yield i, (x, target)


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _output_error(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's output over its squared output: tr(E H E^T) / tr(W H W^T)."""
    error = value - weight
    lost = float(((error @ hessian) * error).sum())
    total = float(((weight @ hessian) * weight).sum())
    return max(lost, 0.0) / total if total > 0 else 0.0
