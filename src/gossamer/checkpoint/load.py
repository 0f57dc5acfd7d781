"""Fill a Decoder from a checkpoint, one tensor at a time, so that loading takes little more than the model itself.

Two ways of holding the weights: expanded to one float dtype (the oracle), or `packed`, as small as they are stored.
Knows formats and the decoder; knows no request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..formats import Codebook, Dense, Format, Integer, KMeans, LowRank, Sparse, TensorTrain
from ..formats.linear import DenseEmbedding, DenseLinear, PackedEmbedding, stored_linear
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.families import FAMILIES, NORMS
from .base import Checkpoint
from .memory import require_memory

Progress = Callable[[str, int, int], None]
_FLOAT_ROLES = (*NORMS, "positions", "embed_norm", "final_norm")
"""Whose tensors are float32 in every model."""


def load_decoder(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, progress: Progress | None = None, packed: bool = False
) -> Decoder:
    """The checkpoint's Decoder, with its weights expanded to `dtype`, or `packed` as they are stored.

    Packed: quantized weights stay packed and bfloat16 ones stay bfloat16. Blocks that no kernel multiplies (those of a
    GGUF file) become the float dtype that the checkpoint would be saved in. All others, and every norm, are float32,
    which is also the dtype of activations. Raises DoesNotFit before anything is allocated.
    """
    dtype = torch.float32 if packed else dtype
    require_memory(
        resident_bytes(checkpoint, dtype, packed),
        f"{checkpoint.name}: its weights",
        "compress it further, or free memory" if packed else "keep the weights as they are stored (--weights stored)",
    )
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    held = set(checkpoint.names())  # a part of a model may lack the embedding or the head
    places = [place for place in _places(checkpoint.config) if f"{place.name}.weight" in held]
    for done, place in enumerate(places):
        if progress is not None:
            progress("loading", done, len(places))
        _fill(decoder, place, checkpoint, dtype, packed)
    if checkpoint.config.tie_embeddings:
        _tie(decoder)
    if progress is not None:
        progress("loading", len(places), len(places))
    return decoder.eval()


def resident_bytes(checkpoint: Checkpoint, dtype: torch.dtype, packed: bool) -> int:
    """Bytes that the weights take once loaded."""
    total = 0
    table = f"{FAMILIES[checkpoint.config.family].ends.get('positions')}.weight"
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if packed and len(shape) == 2 and name != table and _stays_packed(checkpoint, name):
            form = checkpoint.format(name)
            total += (_held(form) if is_packed(form) else Dense(torch.bfloat16)).nbytes(shape)
        else:
            total += torch.Size(shape).numel() * dtype.itemsize
    return total


@dataclass(frozen=True)
class _Place:
    """Where a module of the checkpoint goes: `role` of block `block`, or of the model."""

    role: str
    block: int | None
    name: str
    """Module name in the checkpoint."""
    bias: bool = False

    def parent(self, decoder: Decoder) -> nn.Module:
        if self.block is not None:
            return decoder.blocks[self.block]
        return decoder.entrance if self.role in ("positions", "embed_norm") else decoder


def _places(config: ModelConfig) -> Iterator[_Place]:
    family, shifts = FAMILIES[config.family], config.norm == "layer"
    yield _Place("embed", None, family.module("embed"))
    if config.positions == "learned":
        yield _Place("positions", None, family.module("positions"))
    for i, layer in enumerate(config.layers):
        for role in layer.linear_shapes(config.hidden_size):
            yield _Place(role, i, family.module(role, i), layer.has_bias(role))
        for role in layer.norm_sizes(config.hidden_size):
            yield _Place(role, i, family.module(role, i), shifts)
    for role in config.model_norms():
        yield _Place(role, None, family.module(role), shifts)
    if not config.tie_embeddings:
        yield _Place("head", None, family.module("head"))


def _fill(decoder: Decoder, place: _Place, checkpoint: Checkpoint, dtype: torch.dtype, packed: bool) -> None:
    """Put one module's tensors in their place."""
    name = f"{place.name}.weight"
    bias = checkpoint.tensor(f"{place.name}.bias", dtype=dtype) if place.bias else None
    parent = place.parent(decoder)
    if packed and place.role not in _FLOAT_ROLES and _stays_packed(checkpoint, name):
        setattr(parent, place.role, _stored_module(checkpoint, name, bias, place.role == "embed"))
        return
    module = getattr(parent, place.role)
    module.weight = nn.Parameter(checkpoint.tensor(name, dtype=dtype), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)


def is_packed(form: Format) -> bool:
    """True if a layer multiplies by what is stored: for all formats of a folder but dense ones."""
    return isinstance(form, Integer | Codebook | KMeans | LowRank | Sparse | TensorTrain)


def _held(form: Format) -> Format:
    """How a layer holds a packed weight: as it is stored, but for factors in float16, which no kernel multiplies."""
    half = isinstance(form, LowRank) and form.inner == Dense(torch.float16)
    return form.holding(Dense(torch.float32)) if half else form


def _stays_packed(checkpoint: Checkpoint, name: str) -> bool:
    form = checkpoint.format(name)
    held = form.dtype if isinstance(form, Dense) else checkpoint.dtype
    return is_packed(form) or held is torch.bfloat16


def _stored_module(checkpoint: Checkpoint, name: str, bias: Tensor | None, embedding: bool) -> nn.Module:
    form = checkpoint.format(name)
    if is_packed(form):
        linear = stored_linear(form, checkpoint.stored(name), bias)
        return PackedEmbedding(linear) if embedding else linear
    weight = checkpoint.tensor(name, dtype=torch.bfloat16)
    return DenseEmbedding(weight) if embedding else DenseLinear(weight, bias)


def _tie(decoder: Decoder) -> None:
    """Let the head multiply by the embedding's own tensors."""
    model: nn.Module = decoder  # whose modules may be of any kind
    embed: nn.Module = decoder.embed
    if isinstance(embed, PackedEmbedding):
        model.head = embed.table
    elif isinstance(embed, DenseEmbedding):
        model.head = DenseLinear(embed.weight)
    else:
        decoder.head.weight = decoder.embed.weight
