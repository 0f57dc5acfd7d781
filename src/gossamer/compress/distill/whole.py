"""Response distillation: the whole model learns the original's next-token distributions, every float weight of it.

The loss is a divergence at a temperature: forward KL (Hinton et al., arXiv 1503.02531), reverse KL (arXiv 2306.08543)
or Jensen-Shannon's (arXiv 2306.13649), on calibration text and, if asked, on what the model in training writes itself
(generalized knowledge distillation, the same paper). States behind chosen blocks may be compared as well. Of the
original, hidden states are kept, not logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...errors import CompressionError, RecipeError
from ...formats import Format
from ...model import ModelConfig
from ..method import block_weights
from ..tune import ModelTuner, Objective, TuneOptions, distill, groups_of
from ..tuning import TunedModel
from .losses import forward_kl, jensen_shannon, relative_error, reverse_kl


class RecoverOptions(TuneOptions):
    """Options of what recovers a model in float end to end: a budget of tokens, and an end where nothing is gained."""

    tokens: int | None = Field(
        default=65_536,
        ge=0,
        description="that are trained on, one that comes again counted again; null: as `steps` say",
    )
    steps: int = Field(default=100_000, ge=0, le=1_000_000, description="optimizer steps at most")
    batch_size: int = Field(default=1, ge=1, le=1024, description="calibration sequences in a step")
    positions: int | None = Field(
        default=None, ge=1, description="of each sequence, whose predictions are compared, drawn anew; null: all"
    )
    patience: int | None = Field(
        default=4, ge=1, description="looks in a row at the sequences kept back without a gain that end the training"
    )


def within_budget(options: RecoverOptions, sequences: int, length: int) -> RecoverOptions:
    """The same options with no more steps than the tokens allow, of this many sequences to train on."""
    if options.tokens is None:
        return options
    steps = options.tokens // (min(options.batch_size, sequences) * length)
    return options.model_copy(update={"steps": min(steps, options.steps)})


class DistillOptions(RecoverOptions):
    loss: Literal["forward", "reverse", "jensen-shannon"] = Field(
        default="forward", description="KL(original, model), KL(model, original), or between both and their mean"
    )
    beta: float = Field(default=0.5, gt=0, lt=1, description="jensen-shannon: the original's share of the mean")
    temperature: float = Field(default=1.0, gt=0, le=100, description="of both distributions")
    learning_rate: float = Field(default=1e-3, ge=0, description="of weights, relative to their mean size in a layer")

    on_policy: float = Field(
        default=0.0, ge=0, le=1, description="share of the sequences that the model in training writes itself (GKD)"
    )
    refresh: int = Field(default=32, ge=1, le=100_000, description="on_policy: steps between two times of writing")

    features: float = Field(
        default=0.0, ge=0, description="weight of the relative error of hidden states behind the blocks of `layers`"
    )
    layers: list[list[int]] = Field(
        default_factory=list,
        description="pairs: a block's number, and that of the original's that it is compared with",
    )

    @model_validator(mode="after")
    def _pairs(self) -> DistillOptions:
        for pair in self.layers:
            if len(pair) != 2 or min(pair) < 0:
                raise ValueError(f"layers has {pair}: each is a pair of block numbers, [3, 4] say")
        if bool(self.layers) != bool(self.features):
            raise ValueError("features and layers: one without the other means nothing")
        if len({mine for mine, _ in self.layers}) < len(self.layers):
            raise ValueError("layers names a block twice: each is compared once")
        return self

    @model_validator(mode="after")
    def _used(self) -> DistillOptions:
        if self.beta != 0.5 and self.loss != "jensen-shannon":
            raise ValueError(f"beta is for jensen-shannon, not for {self.loss}")
        return self

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """[..] of logits [.., vocabulary]."""
        if self.loss == "forward":
            return forward_kl(teacher, student, self.temperature)
        if self.loss == "reverse":
            return reverse_kl(teacher, student, self.temperature)
        return jensen_shannon(teacher, student, self.temperature, self.beta)


class Distill(ModelTuner):
    """Trains every weight of the blocks that is stored in float, with norms and biases."""

    name = "distill"
    latent = True
    Options = DistillOptions
    options: DistillOptions

    def tune(self, model: TunedModel) -> None:
        """Train everything. Raises NumericalError if a weight is not finite in the end."""
        o = self.options
        watch(model, o)
        model.trainable(scales=False, floats=True, norms=o.norms, biases=o.norms)
        rates = {"floats": o.learning_rate, "weight": o.norm_rate, "bias": o.norm_rate, "projection": PROJECTION_RATE}
        groups = groups_of(model, **rates)

        distill(model, groups, within_budget(o, len(model.tokens), model.tokens.shape[1]), Response(o))

    def check(self, linears: Mapping[str, Format]) -> None:
        """Whatever stores floats can be trained: matrices, factors, what a mask leaves."""
        for module, form in linears.items():
            if form.in_float is None:
                raise not_float(self.name, module, form)

    @property
    def samples(self) -> bool:
        return self.options.on_policy > 0

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        """That of every tuner of weights, of the best so far, and of the model that an engine reads to write text."""
        ends = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
        states = 4 * sequences * length * config.hidden_size * len(self.options.layers)
        written = 6 * (block_weights(config) + ends) if self.samples else 0
        return super().peak_bytes(config, sequences, length) + 8 * block_weights(config) + states + written


class Response(Objective):
    """The options' divergence, on calibration text and on what the model in training has written lately.

    What it writes is what it will be run on, with its own mistakes in it (GKD: arXiv 2306.13649).
    """

    def __init__(self, options: DistillOptions) -> None:
        self._options = options
        self._written: Tensor | None = None
        """[sequences, time]"""

    def loss(self, model: TunedModel, step: int, tokens: Tensor, positions: Tensor) -> Tensor:
        if self._options.on_policy:
            tokens = self._mixed(model, step, tokens)
        o = self._options
        states: dict[int, Tensor] = {mine: torch.empty(0) for mine, _ in o.layers}
        hidden = model.hidden(tokens, states)[:, positions]
        loss = o.divergence(model.teacher_logits(tokens, positions), model.logits(hidden)).mean()
        if o.layers:
            loss = loss + o.features * self._feature_error(model, states, tokens)
        return loss

    def _feature_error(self, model: TunedModel, states: Mapping[int, Tensor], tokens: Tensor) -> Tensor:
        """Mean relative error over all pairs of layers and all tokens."""
        pairs = zip(self._options.layers, model.teacher_states(tokens), strict=True)
        errors = [
            relative_error(model.get_submodule(f"to_{mine}")(states[mine]), wanted) for (mine, _), wanted in pairs
        ]
        return torch.stack(errors).mean()

    def extra(self) -> dict[str, Tensor]:
        return {} if self._written is None else {"written": self._written}

    def restore(self, model: TunedModel, extra: Mapping[str, Tensor]) -> None:
        self._written = extra.get("written")
        if self._written is not None:
            model.remember(self._written)

    def _mixed(self, model: TunedModel, step: int, tokens: Tensor) -> Tensor:
        """Tokens [sequences, time], some of them the model's own; which ones follows from the step alone."""
        o, draw = self._options, torch.Generator().manual_seed(step)
        if step % o.refresh == 0:
            count = math.ceil(o.refresh * len(tokens) * o.on_policy)
            self._written = model.sampled(count, tokens.shape[1], FIRST_SEED + step)
            model.remember(self._written)
        assert self._written is not None
        own = torch.rand(len(tokens), 1, generator=draw) < o.on_policy
        rows = torch.randint(len(self._written), (len(tokens),), generator=draw)
        return torch.where(own, self._written[rows], tokens)


def watch(model: TunedModel, options: DistillOptions) -> None:
    """Have both models' states that the options compare, through a learned projection where widths differ."""
    for mine, _ in options.layers:
        if mine >= model.config.num_layers:
            raise CompressionError(
                f"layers: the model has no block {mine}, its last one is {model.config.num_layers - 1}"
            )
    width = model.watch_teacher([original for _, original in options.layers])
    for mine, _ in options.layers:
        same = width == model.config.hidden_size
        model.add_module(f"to_{mine}", nn.Identity() if same else Projection(model, width))


class Projection(nn.Module):
    """States [.., hidden] in the width of the original's (FitNets: Romero et al., arXiv 1412.6550)."""

    def __init__(self, model: TunedModel, width: int) -> None:
        super().__init__()
        start = torch.randn(width, model.config.hidden_size, generator=model.generator)
        self.projection = nn.Parameter(start / math.sqrt(model.config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.projection.T


PROJECTION_RATE = 1e-3
FIRST_SEED = 1 << 32
"""Of what a model in training writes: no calibration that is made in passing has it."""


def not_float(method: str, module: str, form: Format) -> RecipeError:
    """The error of a method that trains floats where codes are."""
    return RecipeError(
        f"{method} trains float weights, but {module} is {form.name}",
        hint=f"put {method} before what quantizes, or take scales, qat or qlora",
    )
