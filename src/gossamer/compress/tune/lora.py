"""Low-rank adapters over a model in float (LoRA: Hu et al., arXiv 2106.09685), merged into its weights in the end.

A layer's weight W gets an addition B A of rank r, trained beside it: A [r, in] begins random, B [out, r] at zero.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from ...errors import RecipeError
from ...formats import Dense, Format
from ...model import ModelConfig
from ..distill.whole import RecoverOptions, not_float, within_budget
from ..tuning import TunedModel
from . import ModelTuner, distill, groups_of
from .qlora import Adapter


class LoRAOptions(RecoverOptions):
    rank: int = Field(default=16, ge=1, le=4096, description="of the adapters")
    learning_rate: float = Field(default=1e-3, ge=0, description="of the adapters")


class LoRA(ModelTuner):
    """Trains an adapter for every linear layer of the blocks, and norms; the output has no adapters."""

    name = "lora"
    Options = LoRAOptions
    options: LoRAOptions

    def tune(self, model: TunedModel) -> None:
        """Train the adapters and merge them. Raises NumericalError if a weight is not finite in the end."""
        o = self.options
        for layer in model.linears().values():
            layer.extra = Adapter(layer.weight(), o.rank, model.generator)
        model.trainable(scales=False, norms=o.norms)
        groups = groups_of(model, a=o.learning_rate, b=o.learning_rate, weight=o.norm_rate)
        distill(model, groups, within_budget(o, len(model.tokens), model.tokens.shape[1]))
        for layer in model.linears().values():
            assert isinstance(layer.extra, Adapter)
            assert layer.stored_floats is not None
            layer.stored_floats.put(layer.weight() + layer.extra.b.detach() @ layer.extra.a.detach())
            layer.extra = None

    def check(self, linears: Mapping[str, Format]) -> None:
        """Adapters are merged into whole matrices in float."""
        for module, form in linears.items():
            if form.in_float is None:
                raise not_float(self.name, module, form)
            if not isinstance(form, Dense):
                raise RecipeError(
                    f"{self.name} merges into whole matrices, but {module} is {form.name}",
                    hint="distill trains what is stored of it",
                )

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        """That of every tuner, and of Adam over the adapters."""
        shapes = (s for layer in config.layers for s in layer.linear_shapes(config.hidden_size).values())
        return super().peak_bytes(config, sequences, length) + 16 * self.options.rank * sum(map(sum, shapes))
