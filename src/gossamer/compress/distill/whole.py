"""Response distillation: the whole model learns the original's next-token distributions, every float weight of it.

The loss is a divergence at a temperature: forward KL (Hinton et al., arXiv 1503.02531), reverse KL (arXiv 2306.08543)
or Jensen-Shannon's (arXiv 2306.13649). The original's last hidden states are computed once and kept, not its logits.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from ...errors import CompressionError
from ..tune import ModelTuner, TuneOptions, distill, groups_of, logits_of
from ..tuning import TunedModel
from .losses import forward_kl, jensen_shannon, reverse_kl


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
        """Train everything. Raises CompressionError if no weight is stored in float, NumericalError."""
        o = self.options
        require_floats(model, self.name)
        model.trainable(scales=False, floats=True, norms=o.norms, biases=o.norms)
        groups = groups_of(model, floats=o.learning_rate, weight=o.norm_rate, bias=o.norm_rate)

        def objective(model: TunedModel, tokens: Tensor, positions: Tensor) -> Tensor:
            return o.divergence(*logits_of(model, tokens, positions)).mean()

        distill(model, groups, within_budget(o, len(model.tokens), model.tokens.shape[1]), objective)


def require_floats(model: TunedModel, method: str) -> None:
    """Raises CompressionError naming a linear layer that is stored as codes."""
    for name, layer in model.linears().items():
        if layer.stored_floats is None:
            assert layer.form is not None
            raise CompressionError(
                f"{method} trains float weights, but {name} is {layer.form.name}",
                hint=f"put {method} before what quantizes, or take scales, qat or qlora",
            )
