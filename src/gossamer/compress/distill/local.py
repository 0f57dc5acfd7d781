"""Local distillation: each block of a smaller model learns to give what the original has in its place.

One block at a time is trained, in float32, with every weight, norm and bias of it: no gradient passes from block to
block (Blakeney et al., arXiv 2012.03096). A block that others were removed behind learns their part too. Training may
begin at the least-squares `o` and `down` (He et al., arXiv 1707.06168), which make up for lost heads and
channels at once: they see each token once, where training needs many steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import NumericalError
from ...formats import Dense, Format
from ...model import ModelConfig
from ..blockview import BlockView
from ..blockwise import batches_of, cosine, parted
from ..floatweight import FloatWeight
from ..grids import linear_shapes
from ..method import BlockMethod, Options, StageMethod
from ..tune import WARM_UP
from ..walk import TOKENS_AT_ONCE
from .losses import cosine_distance, relative_error
from .whole import not_float

DAMPINGS = (0.03, 0.3, 3.0)
"""Tried for least squares: a weight solved from few tokens fits them too well without any."""


class LocalOptions(Options):
    tokens: int = Field(
        default=65_536, ge=0, description="that each block is trained on, one that comes again counted again"
    )
    batch_size: int = Field(default=1, ge=1, le=1024, description="calibration sequences in a step")
    seconds: float | None = Field(
        default=None, gt=0, description="ends a block's training early; the result then depends on the machine's speed"
    )
    inputs: Literal["student", "teacher", "mixed"] = Field(
        default="student",
        description="what a block is given: the stream of the smaller model, whose errors it can then make up for; the "
        "original's, so that no block waits for others (`--ray`); or, for each sequence that trains, one of both",
    )
    cosine: float = Field(
        default=0.0, ge=0, description="weight of 1 - cos(output, target), added to the relative squared error"
    )
    least_squares: bool = Field(
        default=True,
        description="begin with the `o` and then the `down` of least error, where they are dense and no norm is behind "
        "them",
    )
    learning_rate: float = Field(default=4e-3, ge=0, description="of weights, relative to their mean size in a layer")
    norm_rate: float = Field(default=5e-4, ge=0, description="of norm weights and biases")
    check_every: int = Field(default=16, ge=1, description="steps between two looks at the sequences kept back")
    patience: int = Field(default=4, ge=1, description="looks in a row without a gain that end a block's training")


class RecoverLocal(StageMethod, BlockMethod):
    """Trains each block, in whatever float form its weights have, on the outputs of the original's."""

    family = "distill"
    name = "recover-local"
    Options = LocalOptions
    options: LocalOptions

    @property
    def teacher_inputs(self) -> bool:
        return self.options.inputs == "mixed"

    @property
    def independent(self) -> bool:
        return self.options.inputs == "teacher"

    def formats(self, config: ModelConfig, before: Mapping[str, Format]) -> dict[str, Format]:
        """As they were. Raises RecipeError for a weight that is not stored in float."""
        formats = {module: before[module] for module in linear_shapes(config)}
        for module, form in formats.items():
            if form.in_float is None:
                raise not_float(self.name, module, form)
        return formats

    def compress(self, view: BlockView) -> None:
        """Train a block and store it. Raises NumericalError if its inputs or targets are not finite."""
        student = Student(view)
        training, judging = parted(len(view.x))
        if self.options.least_squares:
            student.solve("o", training, judging)
            student.solve("down", training, judging)
        student.begin()
        self._train(student, training, judging)
        student.finish()

    def peak_bytes(self, config: ModelConfig, index: int, sequences: int, length: int) -> int:
        """Memory of Adam over every weight of block `index`, the best so far, and the activations of a step."""
        layer = config.layers[index]
        weights = sum(rows * columns for rows, columns in layer.linear_shapes(config.hidden_size).values())
        square = 3 * 4 * (max(layer.ffn_width, layer.q_size) + 1) ** 2 if self.options.least_squares else 0
        step = min(self.options.batch_size, sequences) * length
        return super().peak_bytes(config, index, sequences, step) + 4 * weights + square

    def _train(self, student: Student, training: Tensor, judging: Tensor) -> None:
        """Leaves the parameters at their best by the sequences kept back, the start being one of the contestants."""
        o = self.options
        steps = o.tokens // (min(o.batch_size, len(training)) * student.view.x.shape[1])
        optimizer = torch.optim.Adam(student.groups(o), lr=0.0, betas=(0.9, 0.95), fused=True)
        best, error, waited, began = student.copy(), student.error(judging), 0, time.monotonic()
        for step, batch in enumerate(batches_of(len(training), o.batch_size, steps, student.view.generator)):
            done = step / steps
            if o.seconds is not None:
                done = max(done, (time.monotonic() - began) / o.seconds)
            if done >= 1 or waited >= o.patience:
                break
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * cosine(done) * min(1.0, (step + 1) / WARM_UP)
            student.loss(training[batch], o).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % o.check_every == 0:
                found = student.error(judging)
                waited = 0 if found < error else waited + 1  # NaN is not
                if not waited:
                    best, error = student.copy(), found
        if not student.error(judging) <= error:
            student.take(best)


class Student:
    """A block in training: its float parameters, and its outputs and errors with them."""

    def __init__(self, view: BlockView) -> None:
        self.view = view
        self.weights = {role: FloatWeight(view.name(role), view.form(role), view.given(role)) for role in view.roles}
        self.parameters: dict[str, nn.Parameter] = {}
        """Norm weights and biases by their names in the block."""

    def begin(self) -> None:
        """Make everything trainable."""
        for weight in self.weights.values():
            weight.begin()
        linear = {f"{role}.weight" for role in self.weights}
        for name, parameter in self.view.block.named_parameters():
            if name not in linear:
                self.parameters[name] = nn.Parameter(parameter.detach().clone())

    def groups(self, options: LocalOptions) -> list[dict[str, object]]:
        """Parameter groups for Adam, each with its learning `rate`."""
        groups: list[dict[str, object]] = [{"params": list(self.parameters.values()), "rate": options.norm_rate}]
        for p in self._floats():
            groups.append({"params": [p], "rate": options.learning_rate * float(p.detach().square().mean().sqrt())})
        return groups

    def loss(self, batch: Tensor, options: LocalOptions) -> Tensor:
        """Mean over the tokens of some sequences [n]."""
        target = self.view.target[batch]
        y = self._outputs(self._inputs(batch, options.inputs))
        loss = relative_error(y, target).mean()
        return loss + options.cosine * cosine_distance(y, target).mean() if options.cosine else loss

    @torch.no_grad()
    def error(self, rows: Tensor) -> float:
        """Mean relative error over the tokens of some sequences, on the inputs that the block is given."""
        values, total = self._values(), 0.0
        for batch in torch.split(rows, max(1, TOKENS_AT_ONCE // self.view.x.shape[1])):
            y = self._outputs(self.view.x[batch], values)
            total += float(relative_error(y, self.view.target[batch]).sum().double())
        return total / (len(rows) * self.view.x.shape[1])

    def copy(self) -> list[Tensor]:
        """All parameters as they stand."""
        return [p.detach().clone() for p in (*self.parameters.values(), *self._floats())]

    @torch.no_grad()
    def take(self, values: list[Tensor]) -> None:
        """Put the values of `copy` back."""
        for p, value in zip((*self.parameters.values(), *self._floats()), values, strict=True):
            p.copy_(value)

    @torch.no_grad()
    def solve(self, role: Literal["o", "down"], training: Tensor, judging: Tensor) -> None:
        """The dense `o` or `down` of least relative error, with its bias if it has one.

        Of several dampings, the one that serves sequences best which it was not solved for; or none of them.
        """
        if not isinstance(self.view.form(role), Dense) or self.view.block.layer.post_norms:
            return
        system, bias = LeastSquares(self.view, role, training), getattr(self.view.block, role).bias
        best, least = (self.weights[role](), None if bias is None else bias.clone()), self.error(judging)
        for damping in DAMPINGS:
            found = system.solve(damping)
            self._put(role, *found)
            error = self.error(judging)
            if error < least:
                best, least = found, error
        self._put(role, *best)

    @torch.no_grad()
    def finish(self) -> None:
        """Decide the block as it stands."""
        for name, parameter in self.parameters.items():
            self.view.block.get_parameter(name).copy_(parameter)
        for role, weight in self.weights.items():
            self.view.store(role, weight.stored())

    def _put(self, role: str, weight: Tensor, bias: Tensor | None) -> None:
        self.weights[role].put(weight)
        self.view.block.get_parameter(f"{role}.weight").copy_(self.weights[role]())
        if bias is not None:
            self.view.block.get_parameter(f"{role}.bias").copy_(bias)

    def _floats(self) -> list[nn.Parameter]:
        return [p for weight in self.weights.values() for p in weight.floats.values()]

    def _values(self) -> dict[str, Tensor]:
        return {**self.parameters, **{f"{role}.weight": weight() for role, weight in self.weights.items()}}

    def _outputs(self, x: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        values = self._values() if values is None else values
        return cast(Tensor, functional_call(self.view.block, dict(values), (x, self.view.rotation)))

    def _inputs(self, batch: Tensor, kind: str) -> Tensor:
        if kind != "mixed":
            return self.view.x[batch]
        assert self.view.teacher_x is not None
        mine = torch.rand(len(batch), 1, 1, generator=self.view.generator) < 0.5
        return torch.where(mine, self.view.x[batch], self.view.teacher_x[batch])


class LeastSquares:
    """`o` or `down` W [out, in] of least sum over tokens of |y - t|^2 / |t|^2, with y = .. + W a + b a block's output.

    With E = t - y at the weight that is there, and rows of E and a divided by |t|: W + E^T a (a^T a + damping)^-1. A
    bias is the weight of an input that is always 1. What a new `o` changes in the feed-forward network is left out.
    """

    def __init__(self, view: BlockView, role: Literal["o", "down"], rows: Tensor) -> None:
        linear = getattr(view.block, role)
        self._name, self._role, self._view = view.name(role), role, view
        self._weight, self._bias = linear.weight.clone(), None if linear.bias is None else linear.bias.clone()
        columns = self._weight.shape[1] + (self._bias is not None)
        self._square, self._slope = torch.zeros(columns, columns), torch.zeros(columns, self._weight.shape[0])
        for batch in torch.split(rows, max(1, TOKENS_AT_ONCE // view.x.shape[1])):
            target = view.target[batch]
            scale = target.square().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
            a, y = self._pass(view.x[batch])
            if self._bias is not None:
                a = torch.cat((a, torch.ones_like(scale)), -1)
            a = (a * scale).flatten(0, 1)
            self._square.addmm_(a.T, a)
            self._slope.addmm_(a.T, ((target - y) * scale).flatten(0, 1))

    def solve(self, damping: float) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; a damping, in mean squares of an input, keeps the weight near the one that was there."""
        square, columns = self._square.clone(), self._weight.shape[1]
        diagonal = square.diagonal()[:columns]
        diagonal.add_(damping * diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(square)
        if failed or not torch.isfinite(factor).all():
            raise NumericalError(f"{self._name}: its inputs are not finite", hint="the model is damaged")
        change = torch.cholesky_solve(self._slope, factor).T
        return self._weight + change[:, :columns], None if self._bias is None else self._bias + change[:, columns]

    def _pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the linear layer, and outputs of the block."""
        block = self._view.block
        mixed = block.mix(block.attn_norm(x), self._view.rotation)
        attended = block.attended(mixed)
        gated = block.gated(block.ffn_input(x, attended))
        return mixed if self._role == "o" else gated, x + attended + block.fed(gated)
