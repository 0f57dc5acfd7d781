"""Tuners: one file per method, and the training that they share.

The whole compressed model is trained so that its next-token distribution approaches the original's: the loss is the KL
divergence from the original, on the calibration tokens, which by default the original has written itself (LLM-QAT,
arXiv 2305.17888). Knows a TunedModel and parameters; knows no method's choice of what to train.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ...formats import Codebook, Format, Integer
from ...model import ModelConfig
from ..blockwise import batches_of, cosine, parted
from ..method import Options, Tuner, block_weights
from ..precision import PRECISION, Precision, in_precision
from ..tunedlinear import TunedLinear
from ..tuning import TunedModel

WARM_UP = 3
"""Steps in which learning rates rise: Adam's first ones know little of the gradient's size."""


class TuneOptions(Options):
    """Options of every tuner."""

    steps: int = Field(default=32, ge=0, le=1_000_000, description="optimizer steps")
    batch_size: int = Field(default=2, ge=1, le=1024, description="calibration sequences in a step")
    positions: int | None = Field(
        default=256,
        ge=1,
        description="positions of each sequence whose predictions are compared, drawn anew; null: all",
    )
    seconds: float | None = Field(
        default=None, gt=0, description="ends the training early; the result then depends on the machine's speed"
    )
    save_every: int = Field(default=16, ge=1, description="steps after which a killed run goes on")
    recompute: bool = Field(
        default=True, description="compute blocks again in the backward pass: a third slower, one block in memory"
    )
    precision: Precision = PRECISION
    patience: int | None = Field(
        default=None, ge=1, description="looks in a row at the sequences kept back without a gain that end the training"
    )
    check_every: int = Field(default=16, ge=1, description="steps between two such looks, if there is a patience")
    norms: bool = Field(default=True, description="train norm weights too")
    norm_rate: float = Field(default=5e-4, ge=0, description="learning rate of norm weights")


class ModelTuner(Tuner):
    """A tuner with options of this module."""

    options: TuneOptions

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        """Memory of what is trained, of Adam, and of a step with all its sequences."""
        tokens = min(self.options.batch_size, sequences) * length
        peak = super().peak_bytes(config, sequences, tokens)
        return peak if self.options.recompute else peak + self._kept_bytes(config, tokens)

    def _kept_bytes(self, config: ModelConfig, tokens: int) -> int:
        """What a forward pass keeps of all blocks: activations, float weights and what rounding them needs."""
        widths = sum(5 * layer.ffn_width + 6 * layer.q_size + 6 * config.hidden_size for layer in config.layers)
        return 4 * tokens * widths + (9 if self.latent else 4) * block_weights(config)


def groups_of(model: TunedModel, **rates: float) -> list[dict[str, Any]]:
    """Parameter groups of all that is trainable, with a learning `rate` by the last part of its name.

    Rates of `scale`, `levels` and `floats` (of a weight that is stored in float) are relative to the mean size of the
    layer's own, those of `latent` (the weights behind the codes) count in mean steps of its grid, so that one number
    serves all layers; all others are taken as they are.
    """
    layers, groups = dict(model.named_modules()), []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path, _, kind = name.rpartition(".")
        kind = "floats" if path.endswith("stored_floats.floats") else kind
        rate = rates[kind]
        if kind in ("scale", "levels", "floats"):
            rate *= float(parameter.detach().abs().mean())
        elif kind == "latent":
            rate *= step_of(cast(TunedLinear, layers[path]).form)
        groups.append({"params": [parameter], "rate": rate})
    return groups


def step_of(form: Format | None) -> float:
    """Mean distance between neighbours of a grid, in scales."""
    if form is None or isinstance(form, Integer):
        return 1.0
    return 2 * form.reach / (2**form.bits - 1) if isinstance(form, Codebook) else 1.0


@dataclass(frozen=True)
class Tuned:
    """Mean KL divergence from the original on the judging sequences, and the steps that were taken."""

    before: float
    after: float
    steps: int


class Objective:
    """The loss of a step: here the KL divergence from the original."""

    def loss(self, model: TunedModel, step: int, tokens: Tensor, positions: Tensor) -> Tensor:
        """A number with a gradient, for calibration tokens [sequences, time] and some of their positions."""
        return kl_divergence(*logits_of(model, tokens, positions)).mean()

    def extra(self) -> dict[str, Tensor]:
        """What `restore` needs besides the number of the step."""
        return {}

    def restore(self, model: TunedModel, extra: Mapping[str, Tensor]) -> None:
        """Go on where a training was saved."""


def distill(
    model: TunedModel, groups: Sequence[dict[str, Any]], options: TuneOptions, objective: Objective | None = None
) -> Tuned:
    """Train parameter groups, each with its learning `rate`; a killed training goes on where it was saved.

    The parameters are left at the better of start and end by sequences that were not trained on (unless there are
    fewer than eight), or at the best that was seen if the options have a patience: a training that diverges changes
    nothing.
    """
    with in_precision(options.precision):
        return _distill(model, groups, options, objective or Objective())


def _distill(model: TunedModel, groups: Sequence[dict[str, Any]], options: TuneOptions, objective: Objective) -> Tuned:
    groups = [group for group in groups if group["params"] and group["rate"]]
    model.recompute = options.recompute
    training, judging = (model.tokens[rows] for rows in parted(len(model.tokens)))
    plan = list(_steps(model, training, options))
    before = divergence(model, judging)
    if not groups or not plan:
        return Tuned(before, before, 0)
    best = _Best(model, judging, [p for group in groups for p in group["params"]], before)
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-12, fused=True)
    first, extra = model.restore(optimizer)
    best.restore(extra)
    objective.restore(model, extra)
    taken = _train(model, optimizer, plan, first, options, best, objective)
    best.look()
    best.take()
    return Tuned(before, best.value, taken)


class _Best:
    """The parameters of least divergence on the judging sequences so far; the start is one of the contestants."""

    def __init__(self, model: TunedModel, judging: Tensor, parameters: list[nn.Parameter], value: float) -> None:
        self._model, self._judging, self._parameters = model, judging, parameters
        self._kept = self._copy()
        self.value = self._before = value
        self.waited = 0

    def look(self) -> None:
        """Judge the parameters as they stand."""
        value = divergence(self._model, self._judging)
        self.waited += 1
        if value < self.value:  # NaN is not
            self._kept, self.value, self.waited = self._copy(), value, 0

    @torch.no_grad()
    def take(self) -> None:
        """Leave the parameters at their best."""
        for p, kept in zip(self._parameters, self._kept, strict=True):
            p.copy_(kept)

    def extra(self) -> dict[str, Tensor]:
        """What a training that goes on gives to `restore`; the start need not be saved, since it begins there again."""
        state = {"best.value": torch.tensor(self.value, dtype=torch.float64), "best.waited": torch.tensor(self.waited)}
        kept = self._kept if self.value < self._before else []
        return state | {f"best.{i}": tensor for i, tensor in enumerate(kept)}

    def restore(self, extra: Mapping[str, Tensor]) -> None:
        """Know again what was best when a training was saved."""
        if extra:
            self.value, self.waited = float(extra["best.value"]), int(extra["best.waited"])
            self._kept = [extra.get(f"best.{i}", kept) for i, kept in enumerate(self._kept)]

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._parameters]


def _train(
    model: TunedModel,
    optimizer: torch.optim.Optimizer,
    plan: Sequence[tuple[Tensor, Tensor]],
    first: int,
    options: TuneOptions,
    best: _Best,
    objective: Objective,
) -> int:
    """Take the planned steps from `first` on; returns how many are taken in all."""
    began = time.monotonic()
    for step in range(first, len(plan)):
        done = step / len(plan)
        if options.seconds is not None:
            done = max(done, (time.monotonic() - began) / options.seconds)
        if done >= 1 or (options.patience is not None and best.waited >= options.patience):
            return step
        model.progress("tuning", step, len(plan))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * cosine(done) * min(1.0, (step + 1) / WARM_UP)
        with torch.enable_grad():
            objective.loss(model, step, *plan[step]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if options.patience is not None and (step + 1) % options.check_every == 0:
            best.look()
        if (step + 1) % options.save_every == 0 and step + 1 < len(plan):
            model.save(step + 1, optimizer, best.extra() | objective.extra())
    model.progress("tuning", len(plan), len(plan))
    return len(plan)


@torch.no_grad()
def divergence(model: TunedModel, tokens: Tensor) -> float:
    """Mean KL divergence of the model from the original over all positions of tokens [sequences, time]."""
    everywhere = torch.arange(tokens.shape[1])
    found = [kl_divergence(*logits_of(model, row.unsqueeze(0), everywhere)).mean() for row in tokens]
    return float(torch.stack(found).mean())


def kl_divergence(original: Tensor, model: Tensor) -> Tensor:
    """sum p (log p - log q) over the last axis of logits [.., vocabulary]; p the original's probabilities."""
    p, q = F.log_softmax(original, -1), F.log_softmax(model, -1)
    return (p.exp() * (p - q)).sum(-1)


def logits_of(model: TunedModel, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [sequences, positions, vocabulary] of the original and of the model."""
    with torch.no_grad():
        original = model.teacher_logits(tokens, positions)
    return original, model.logits(model.hidden(tokens)[:, positions])


def _steps(model: TunedModel, tokens: Tensor, options: TuneOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [batch, time] and positions of every step, drawn by the model's generator."""
    time_ = tokens.shape[1]
    count = min(options.positions or time_, time_)
    for batch in batches_of(len(tokens), options.batch_size, options.steps, model.generator):
        yield tokens[batch], torch.randperm(time_, generator=model.generator)[:count].sort().values
