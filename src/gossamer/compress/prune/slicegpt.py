"""SliceGPT (Ashkboos et al., arXiv 2401.15024): a narrower residual stream, in the directions that it varies in most.

An RMS norm without weights commutes with a rotation (see `quantize/rotate.py`), so the stream may be turned to the
principal axes of what the norms give over the calibration, and its last axes left out of all matrices at once. The
paper has axes for each layer, which takes a matrix on every shortcut; here all layers share them, and the result is an
ordinary model. A tied head is untied, since the final norm's weights go into it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from ...checkpoint import Checkpoint
from ...errors import CompressionError, NumericalError
from ...model import FAMILIES, ModelConfig, tensor_names
from ..method import Needs, Options, Reducer
from ..quantize.rotate import RotatedCheckpoint, RotateOptions, Rotation, places, require_rotatable
from ..source import Source
from ..walk import slices
from .cut import shaped
from .structure import watching_bytes

if TYPE_CHECKING:
    from ..units import Units


class SliceGPTOptions(Options):
    ratio: float = Field(
        0.2, gt=0, lt=1, description="share of the stream's width, and so of the blocks' weights, that goes"
    )
    multiple: int = Field(32, ge=1, le=4096, description="the width that is left is a multiple of it")


class SliceGPT(Reducer):
    """The residual stream without its directions of least variance."""

    name = "slicegpt"
    needs = Needs.TOKENS
    keeps_stream = False
    Options = SliceGPTOptions
    options: SliceGPTOptions

    def expect(self, config: ModelConfig) -> ModelConfig:
        require_rotatable(config, self.name)
        return narrowed(config, self._width(config))

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        return watching_bytes(config, sequences, length) + 5 * 8 * config.hidden_size**2

    def apply(self, checkpoint: Checkpoint, decision: Mapping[str, Tensor]) -> Checkpoint:
        return SlicedCheckpoint(checkpoint, decision["axes"])

    def decide(
        self, units: Units, tokens: Tensor | None, progress: Callable[[str, int, int], None]
    ) -> dict[str, Tensor]:
        assert tokens is not None
        width = self._width(units.source.config)
        variances, axes = torch.linalg.eigh(covariance(units.source, tokens, progress))  # the largest come last
        return {"axes": axes[:, -width:].float().contiguous(), "variances": variances}

    def _width(self, config: ModelConfig) -> int:
        """Of the stream that is left. Raises CompressionError if that is nothing or all of it."""
        step, whole = self.options.multiple, config.hidden_size
        width = round((1 - self.options.ratio) * whole / step) * step
        if not 0 < width < whole:
            raise CompressionError(
                f"slicegpt: a ratio of {self.options.ratio:g} leaves {width} of {whole} channels, in steps of {step}",
                hint="another ratio, or a smaller multiple",
            )
        return width


@torch.no_grad()
def covariance(source: Source, tokens: Tensor, progress: Callable[[str, int, int], None]) -> Tensor:
    """Sum of N^T N [hidden, hidden], float64, over all inputs of norms, each divided by its root mean square."""
    x, rotation = source.embed(tokens), source.rotation(tokens.shape[1])
    total = torch.zeros(2 * (source.config.hidden_size,), dtype=torch.float64)

    def add(part: Tensor) -> None:
        rows = part.flatten(0, 1)
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + source.config.norm_eps)
        total.add_((rows.T @ rows).double())

    for i in range(source.config.num_layers):
        progress("measuring the residual stream", i, source.config.num_layers)
        block = source.block(i)
        for c in slices(x):
            add(x[c])
            x[c] += block.attended(block.mix(block.attn_norm(x[c]), rotation))
            add(x[c])
            x[c] += block.fed(block.gated(block.ffn_norm(x[c])))
    for c in slices(x):
        add(x[c])
    if not torch.isfinite(total).all():
        raise NumericalError("activations are not finite", hint="the checkpoint is damaged")
    return total


def narrowed(config: ModelConfig, width: int) -> ModelConfig:
    """The config with a stream of this width; the norms' epsilon is of the mean over fewer channels."""
    eps = config.norm_eps * config.hidden_size / width
    return replace(config, hidden_size=width, norm_eps=eps, tie_embeddings=False)


class SlicedCheckpoint(RotatedCheckpoint):
    """Another checkpoint in some axes [hidden, width] of its residual stream, computed in float64 when it is read."""

    def __init__(self, base: Checkpoint, axes: Tensor) -> None:
        super().__init__(base, RotateOptions.model_validate({"values": False}))
        whole, width = axes.shape
        self.config, self._tied = narrowed(base.config, width), False
        self._stream = _Axes(axes.double())
        # What is left out is no part of the mean square, which is over the channels that are left.
        self._gain = math.sqrt(whole / width)
        said = {"hidden_size": width, "rms_norm_eps": self.config.norm_eps, "tie_word_embeddings": False}
        self.hf_config = shaped(base.hf_config, self.config, list(range(base.config.num_layers))) | said
        self._shapes = dict(tensor_names(self.config))
        self._places = dict(places(FAMILIES[self.config.family], self.config))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.base.fingerprint()} {SliceGPT.name} ".encode())
        digest.update(self._stream.matrix().numpy().tobytes())
        return digest.hexdigest()

    def _norm(self, name: str, role: str) -> Tensor:
        return torch.full(self.shape(name), self._gain)


class _Axes(Rotation):
    """Coordinates along some axes [size, width] alone."""

    def __init__(self, axes: Tensor) -> None:
        self.size, self._axes = len(axes), axes

    def turn(self, x: Tensor) -> Tensor:
        return x @ self._axes

    def matrix(self) -> Tensor:
        return self._axes
