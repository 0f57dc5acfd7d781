"""A Reducer to recover from: feed-forward channels of least |activation| * |weight|, and whole layers, are cut out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gossamer.checkpoint import Checkpoint
from gossamer.compress.method import Needs, Options, Reducer
from gossamer.compress.units import Units
from gossamer.compress.walk import advance, slices
from gossamer.formats import Dense, Format
from gossamer.model import FAMILIES, ModelConfig, config_from_hf, tensor_names
from gossamer.model.decoder import Block, Rotation


class CutOptions(Options):
    channels: int | None = Field(default=None, ge=1, description="feed-forward channels that each layer keeps")
    layers: list[int] = Field(default_factory=list, description="layers that go")


class Cut(Reducer):
    """Keeps the channels whose activation's norm times their column's in `down` is largest."""

    name = "test-cut"
    needs = Needs.BLOCK
    Options = CutOptions
    options: CutOptions

    def expect(self, config: ModelConfig) -> ModelConfig:
        layers = [
            replace(layer, ffn_width=self.options.channels or layer.ffn_width)
            for i, layer in enumerate(config.layers)
            if i not in self.options.layers
        ]
        return replace(config, layers=tuple(layers))

    def decide(
        self, units: Units, tokens: Tensor | None, progress: Callable[[str, int, int], None]
    ) -> dict[str, Tensor]:
        assert tokens is not None
        source = units.source
        x, rotation = source.embed(tokens), source.rotation(tokens.shape[1])
        found = {"layers": torch.tensor([i for i in range(source.config.num_layers) if i not in self.options.layers])}
        for i in range(source.config.num_layers):
            progress("measuring channels", i, source.config.num_layers)
            block = source.block(i)
            if self.options.channels is not None:
                score = norms(block, x, rotation) * block.down.weight.norm(dim=0)
                found[f"channels.{i}"] = score.topk(self.options.channels).indices.sort().values
            advance(block, x, rotation)
        return found

    def apply(self, checkpoint: Checkpoint, decision: Mapping[str, Tensor]) -> Checkpoint:
        return _Cut(checkpoint, decision, self.options.channels)

    def layers_kept(self, decision: Mapping[str, Tensor], count: int) -> list[int]:
        kept: list[int] = decision["layers"].tolist()
        return kept

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        return 4 * sequences * length * config.hidden_size


def norms(block: Block, x: Tensor, rotation: Rotation) -> Tensor:
    """Root of the summed squares [ffn_width] of what `down` reads."""
    total = torch.zeros(block.layer.ffn_width)
    for c in slices(x):
        h = x[c] + block.o(block.mix(block.attn_norm(x[c]), rotation))
        total += block.gated(block.ffn_norm(h)).square().sum((0, 1))
    return total.sqrt()


class _Cut(Checkpoint):
    def __init__(self, base: Checkpoint, decision: Mapping[str, Tensor], channels: int | None) -> None:
        for field in ("name", "path", "dtype", "manifest", "source_note"):
            setattr(self, field, getattr(base, field))
        self._base, self._kept = base, decision["layers"].tolist()
        self._channels = {i: decision[f"channels.{old}"] for i, old in enumerate(self._kept) if channels}
        self.hf_config = {**base.hf_config, "num_hidden_layers": len(self._kept)}
        if channels is not None:
            self.hf_config["intermediate_size"] = channels
        self.config = config_from_hf(self.hf_config)
        self._shapes = dict(tensor_names(self.config))
        family = FAMILIES[self.config.family]
        self._blocks = [
            (family.block.format(i=i) + ".", family.block.format(i=old) + ".") for i, old in enumerate(self._kept)
        ]

    def format(self, name: str) -> Format:
        return Dense(torch.float32)

    def stored(self, name: str) -> dict[str, Tensor]:
        return {"weight": self.tensor(name)}

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        for i, (here, there) in enumerate(self._blocks):
            if not name.startswith(here):
                continue
            value, role = self._base.tensor(there + name.removeprefix(here)), name.split(".")[-2]
            if i in self._channels and role in ("gate_proj", "up_proj"):
                value = value[self._channels[i]]
            if i in self._channels and role == "down_proj":
                value = value[:, self._channels[i]]
            return value[start:stop]
        return self._base.tensor(name, slice(start, stop))

    def _make_tokenizer(self) -> Any:
        return self._base.tokenizer()

    def _files(self) -> list[Path]:
        return self._base._files()

    def _contents(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        raise AssertionError("the fingerprint of a view is never asked for")
