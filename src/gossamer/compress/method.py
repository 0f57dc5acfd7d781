"""The contracts of compression methods. A method sees weights and their statistics; the pipeline owns all the rest.

A recipe's stages fall into parts (`recipe.py`), each of which makes a model out of the one before:

    Transform*      a changed view of the checkpoint, of the same function
    one main stage  Reducer         makes the shape smaller: fewer heads, channels or layers
                    LayerMethod     decides what is stored of one linear layer
                    Quantizer       the same for codes on a grid
                    BlockMethod     decides one block, which it may train against the original's
                    BlockQuantizer  the same for codes on a grid
    Tuner*          trains the finished model

To add one: a file with a class like `quantize/rtn.py`, and a row in `registry.py`.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import RecipeError
from ..formats import Codebook, Codes, Format, Integer, LowRank, nearest_group_size
from ..model import ModelConfig
from .blockview import BlockView
from .grids import grid_formats
from .precision import Precision
from .tuning import TunedModel

if TYPE_CHECKING:
    from .units import Units

__all__ = [
    "BlockMethod",
    "BlockQuantizer",
    "BlockView",
    "Budget",
    "GridMethod",
    "GridOptions",
    "LayerMethod",
    "Method",
    "Needs",
    "Options",
    "QuantizeOptions",
    "Quantizer",
    "Reducer",
    "StageMethod",
    "Transform",
    "TunedModel",
    "Tuner",
    "WeightMethod",
]


class Needs(enum.Enum):
    """What a method must be given besides the weight."""

    NOTHING = "nothing"
    HESSIAN = "hessian"
    """H = X^T X [in, in] over the calibration inputs X [tokens, in] of the layer."""
    GRADIENT = "gradient"
    """A quantizer: the Hessian, and the mean over the calibration sequences of the loss's squared gradient [out, in].
    A reducer: the tokens, and room for gradients."""
    BLOCK = "block"
    """A block with its inputs, and the outputs that the original has in its place."""
    MODEL = "model"
    """The finished model and the original's logits."""
    TOKENS = "tokens"
    """The calibration tokens: what is measured by them is the method's own affair."""


class Options(BaseModel):
    """Options of a method, as a recipe writes them: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


FormatName: TypeAlias = Literal["int", "nf4", "fp4", "mxfp4", "nvfp4", "fp8"]
GRID_KEYS = ("format", "bits", "group_size", "symmetric", "double_quant")
FIXED: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "symmetric": True},
    "fp4": {"bits": 4, "symmetric": True},
    "mxfp4": {"bits": 4, "group_size": 32, "symmetric": True},
    "nvfp4": {"bits": 4, "group_size": 16, "symmetric": True},
    "fp8": {"bits": 8, "group_size": "channel", "symmetric": True},
}
"""What a codebook decides by itself: these keys may be left away, and may say nothing else."""
BITS = (2, 3, 4, 5, 6, 8)


class GridOptions(Options):
    """A grid: which numbers a code can stand for, how many bits it has, how many columns share a scale."""

    format: FormatName = Field(default="int", description="int: evenly spaced; the others: floating-point codebooks")
    bits: int = Field(default=4, ge=2, le=8, description="bits per weight: 2, 3, 4, 5, 6 or 8")
    group_size: int | Literal["channel", "auto"] = Field(
        default=64,
        description="columns that share a scale; `channel`: the whole row; `auto`: nearest to 64 that divides all",
    )
    symmetric: bool = Field(default=True, description="no zero point")
    double_quant: bool = Field(default=False, description="nf4 and fp4: store the scales in 8 bits, too")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """A codebook's own bits and groups, where they are not given; other values are refused."""
        fixed = FIXED.get(str(data.get("format")), {}) if isinstance(data, dict) else {}
        for key, value in fixed.items():
            if data.get(key, value) != value:
                raise ValueError(f"{data['format']} has {key} {value}, not {data[key]!r:.40}")
        return {**fixed, **data} if fixed else data

    @model_validator(mode="after")
    def _check(self) -> GridOptions:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}: 2, 3, 4, 5, 6 or 8")
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}: a positive number, channel or auto")
        if self.double_quant and self.format not in ("nf4", "fp4"):
            raise ValueError(f"double_quant is for nf4 and fp4, not for {self.format}")
        return self

    def format_for(self, columns: list[int]) -> Format:
        """The format for layers with these row lengths; `auto` is resolved here."""
        size: int | None
        if self.group_size == "channel":
            size = None
        elif self.group_size == "auto":
            size = nearest_group_size(64, columns)
        else:
            size = int(self.group_size)
        if self.format == "int":
            return Integer(self.bits, size, self.symmetric)
        return Codebook(self.format, size, self.double_quant)


BUDGET_BITS = (2, 3, 4, 5, 6, 8)


class Budget(Options):
    """An average over the whole model in place of one grid for all layers: `sensitivity.settle` spends it."""

    bits: float = Field(gt=1, le=16, description="stored bits per weight of the whole model, whatever is packed or not")
    candidates: list[GridOptions] = Field(
        default_factory=list,
        description="grids to choose from for each layer; none: the stage's, from as many bits as all layers can have "
        "up to 8",
    )
    embedding: list[GridOptions] = Field(
        default_factory=list, description="grids to choose from for the embedding; none: as the stage says"
    )
    settled: bool = Field(
        default=False, description="`layers` and `embedding` say how it was spent: measure nothing again"
    )

    def grids(self, stage: GridOptions) -> list[GridOptions]:
        """What each linear layer may be stored as."""
        if self.candidates:
            return self.candidates
        return [GridOptions.model_validate({**_grid(stage), "bits": bits}) for bits in BUDGET_BITS]


def _grid(options: GridOptions) -> dict[str, Any]:
    return {key: getattr(options, key) for key in GRID_KEYS}


class QuantizeOptions(GridOptions):
    """Options that every weight quantizer takes. The embedding and the head stay in float unless named."""

    clip: Literal["none", "mse"] = Field(
        default="none", description="mse: shrink each group's range to the least squared error"
    )
    layers: dict[str, GridOptions] = Field(
        default_factory=dict,
        description="a role (`down`) or a glob of module names (`*.down_proj`) -> its own grid, which takes the keys "
        "that it does not give from the stage; of several that match, the longest text wins",
    )
    embedding: GridOptions | None = Field(default=None, description="grid of the embedding; null: float")
    head: GridOptions | None = Field(default=None, description="grid of the head; a tied head is the embedding")
    budget: Budget | None = Field(
        default=None,
        description="average bits of the whole model (`4.5`, or a mapping): a grid for each layer by measurement",
    )
    sequences: int | None = Field(
        default=None, ge=1, description="calibration sequences that it reads: training behind it wants more; null: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_budget(cls, data: Any) -> Any:
        """`budget: 4.5` says only the bits."""
        bits = data.get("budget") if isinstance(data, dict) else None
        if isinstance(bits, bool) or not isinstance(bits, int | float):
            return data
        return {**data, "budget": {"bits": float(bits)}}

    @model_validator(mode="after")
    def _one_who_decides(self) -> Self:
        """A budget that is yet to be spent stands for `layers`, and for `embedding` if it has candidates for it."""
        if self.budget is None or self.budget.settled:
            return self
        if self.layers:
            raise ValueError("budget and layers: both say what grid a layer has")
        if self.budget.embedding and (self.embedding or self.head):
            raise ValueError("budget.embedding and embedding or head: both say what grid the embedding has")
        if not self.budget.candidates and self.format != "int":
            raise ValueError(f"budget needs candidates: {self.format} has one number of bits")
        return self

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """Give a layer's own grid the keys of the stage that it does not have, if both are of one format."""
        layers = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(layers, dict):
            return data
        stage = {key: cls.model_fields[key].default for key in GRID_KEYS}
        stage |= FIXED.get(str(data.get("format")), {})
        stage |= {key: data[key] for key in GRID_KEYS if key in data}
        filled = {
            key: {**stage, **grid}
            if isinstance(grid, dict) and grid.get("format", stage["format"]) == stage["format"]
            else grid
            for key, grid in layers.items()
        }
        return {**data, "layers": filled}

    def layer_format(self, grid: GridOptions, columns: list[int]) -> Format:
        """The format of linear layers on this grid: the stage's own or one of `layers`.

        A method that stores something else than a grid (k-means, kept outliers) overrides this.
        """
        return grid.format_for(columns)


class Method(abc.ABC):
    """What all methods have: a name, what they need, and their options."""

    family: ClassVar[Literal["transform", "prune", "factorize", "distill", "quantize", "tune"]]
    """What it does to a model; `recipe.py` says which may follow which."""
    name: ClassVar[str]
    needs: ClassVar[Needs]
    options: Options

    @abc.abstractmethod
    def __init__(self, options: Any) -> None:
        """A method with checked options."""

    @property
    def sequences(self) -> int | None:
        """How many of the calibration's sequences, the first ones, it is given; None: all."""
        return getattr(self.options, "sequences", None)

    @classmethod
    @abc.abstractmethod
    def options_class(cls) -> type[Options]:
        """The class that a stage of a recipe is checked by."""


class WeightMethod(Method):
    """A method that decides how weights are stored, and what is stored of them."""

    @abc.abstractmethod
    def formats(self, config: ModelConfig, before: Mapping[str, Format]) -> dict[str, Format]:
        """Module name -> format of every linear layer of the blocks, and of what else it stores.

        `before`: how all linear layers, embedding and head are stored in the model that it is given.
        """


class GridMethod(WeightMethod):
    """A method that decides the codes of all linear layers on the grids that its options say."""

    family = "quantize"
    Options: ClassVar[type[QuantizeOptions]]
    options: QuantizeOptions

    def __init__(self, options: QuantizeOptions) -> None:
        self.options = options

    @classmethod
    def options_class(cls) -> type[QuantizeOptions]:
        return cls.Options

    def formats(self, config: ModelConfig, before: Mapping[str, Format]) -> dict[str, Format]:
        """The grids of the options, inside of whatever form the weights have. Raises RecipeError."""
        return {module: before[module].holding(grid) for module, grid in grid_formats(config, self.options).items()}

    @property
    def ends(self) -> Quantizer | None:
        """What rounds a packed head by the Hessian of its inputs; None: embedding and head go to the nearest codes."""
        return None


class Quantizer(GridMethod):
    """A method that turns one linear layer's weight into codes."""

    @abc.abstractmethod
    def quantize(self, weight: Tensor, form: Format, hessian: Tensor | None, gradient: Tensor | None = None) -> Codes:
        """Codes of a float32 weight [out, in] that `form` can store.

        `hessian` [in, in] and `gradient` [out, in] (mean squared gradient) are given if the method needs them. Layers
        that share their inputs and their format come as one weight, their rows one after another.
        """


class BlockMethod(WeightMethod):
    """A method that sees a whole block, with its inputs and the outputs that the original has in its place."""

    needs = Needs.BLOCK

    @property
    def teacher_inputs(self) -> bool:
        """True if it asks for `view.teacher_x`: another stream beside x and target, which the plan adds."""
        return False

    @property
    def independent(self) -> bool:
        """True if `view.x` is to be what the original's own blocks are given, too: then no block waits for others."""
        return False

    @property
    def precision(self) -> Precision:
        """In what both streams are multiplied on their way through the blocks."""
        return "float32"

    @abc.abstractmethod
    def compress(self, view: BlockView) -> None:
        """Decide every linear layer of `view.block`; see BlockView for what else it may change."""

    def peak_bytes(self, config: ModelConfig, index: int, sequences: int, length: int) -> int:
        """Memory that `compress` takes for block `index` besides block, x and target; the plan adds it.

        Here for a method that learns every weight with Adam on a few sequences at a time: override it otherwise.
        """
        layer = config.layers[index]
        weights = sum(rows * columns for rows, columns in layer.linear_shapes(config.hidden_size).values())
        activations = 12 * max(2048, length) * (layer.ffn_width + layer.q_size + config.hidden_size)
        return 4 * (5 * weights + activations)


class BlockQuantizer(BlockMethod, GridMethod):
    """A block method that decides codes on a grid (`view.put`): it may fold scales through the block and learn."""


class StageMethod(Method):
    """A method whose options are its own."""

    Options: ClassVar[type[BaseModel]]

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def options_class(cls) -> type[Any]:
        return cls.Options


class LayerMethod(StageMethod, WeightMethod):
    """A method that decides what is stored of one linear layer, in a form of its own."""

    @abc.abstractmethod
    def store(self, weight: Tensor, form: Format, hessian: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors, as `form` says them, of a float32 weight [out, in].

        `hessian` [in, in] is given if the method needs it and the layer is one of a block.
        """

    def peak_bytes(self, shape: tuple[int, ...]) -> int:
        """Memory that `store` takes for a weight of this shape besides it and its Hessian; here none worth counting."""
        return 0


class Reducer(StageMethod):
    """A stage that makes the model's shape smaller: what goes is decided by measurement, then cut out of a view."""

    family = "prune"
    keeps_stream: ClassVar[bool] = True
    """The residual stream means what it meant before, so that the original's is still what blocks are compared with."""

    @abc.abstractmethod
    def expect(self, config: ModelConfig) -> ModelConfig:
        """A config as large as what will come of this one, before anything is measured: for plans."""

    @abc.abstractmethod
    def decide(
        self, units: Units, tokens: Tensor | None, progress: Callable[[str, int, int], None]
    ) -> dict[str, Tensor]:
        """What to keep of `units.source`; names and tensors are the method's own.

        tokens [sequences, time] are given if the method needs anything. What takes long may be written to units on
        the way.
        """

    @abc.abstractmethod
    def apply(self, checkpoint: Checkpoint, decision: Mapping[str, Tensor]) -> Checkpoint:
        """A view of the checkpoint without what goes; loads no more than asked."""

    def layers_kept(self, decision: Mapping[str, Tensor], count: int) -> list[int]:
        """Which of `count` layers are still there."""
        return list(range(count))

    @abc.abstractmethod
    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        """Memory that `decide` takes."""


class Transform(StageMethod):
    """A stage before others: another checkpoint of the same function, read lazily through the given one."""

    family = "transform"
    needs = Needs.NOTHING
    keeps_stream: ClassVar[bool] = True
    """The residual stream means what it meant before."""

    @abc.abstractmethod
    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """A view of the checkpoint with other weights, and another config where it must be; loads no more than asked.

        Its tensors must be the same whenever they are read.
        """

    def expect(self, config: ModelConfig) -> ModelConfig:
        """A config as large as that of `apply` may be, where there is no checkpoint yet: for plans."""
        return config


class Tuner(StageMethod):
    """A stage after the main one: trains over the finished model against the original's logits."""

    family = "tune"
    needs = Needs.MODEL
    latent: ClassVar[bool] = False
    """True: the weights themselves are trained, by a straight-through estimator, and rounded again at the end."""

    def check(self, linears: Mapping[str, Format]) -> None:
        """Raises RecipeError unless it can train linear layers of these formats: here codes of whole matrices."""
        for module, form in linears.items():
            if isinstance(form, LowRank):
                raise RecipeError(
                    f"{self.name} trains codes of whole matrices, but {module} is two factors",
                    hint=f"leave {self.name} away, or do not factorize",
                )
            if form.in_float is not None:
                raise RecipeError(
                    f"{self.name} trains what scales codes, but {module} is {form.name}",
                    hint="distill and lora train weights that are stored in float",
                )

    @property
    def samples(self) -> bool:
        """True if it asks for text that the model in training writes: `model.sampled`."""
        return False

    @abc.abstractmethod
    def tune(self, model: TunedModel) -> None:
        """Train what `model.trainable(...)` gives; what the model holds at the return is what is stored.

        May call `model.save` now and then, and begins with `model.restore`, so that a killed run goes on from there.
        """

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        """Memory that `tune` takes besides the model's codes and scales: what it trains, its optimizer, a batch.

        Here for Adam over all scales in groups of 64 (or over all weights, if `latent`) and one sequence at a time.
        """
        weights = block_weights(config)
        trained = 16 * weights if self.latent else 16 * weights // 32
        logits = 6 * 4 * length * config.vocab_size
        widest = max(layer.ffn_width + layer.q_size for layer in config.layers) + config.hidden_size
        stream = 4 * length * (12 * widest + config.num_layers * config.hidden_size)
        return trained + logits + stream


def block_weights(config: ModelConfig) -> int:
    """How many weights the linear layers of all blocks have."""
    shapes = (shape for layer in config.layers for shape in layer.linear_shapes(config.hidden_size).values())
    return sum(rows * columns for rows, columns in shapes)
