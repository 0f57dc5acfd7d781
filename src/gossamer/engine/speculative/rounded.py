"""A checkpoint rounded to 4 bits while it is read: a draft for itself that no compression has to make first.

Round to nearest in groups of columns, scaled so that the entry of largest magnitude is exact. What a recipe makes of
the same model guesses better; this is there at once. Knows formats; knows no request.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ...checkpoint import Checkpoint
from ...checkpoint.tokenizer import Tokenizer
from ...formats import Format, Integer
from ...formats.integer import Codes

BITS = 4
GROUP_SIZES = (64, 32)
"""Columns of a group: the first that divides a row."""


class RoundedCheckpoint(Checkpoint):
    """Another checkpoint, its matrices as 4-bit integers where their rows can be cut into groups."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.name, self.path, self.config = f"{source.name}, rounded to {BITS} bits", source.path, source.config
        self.hf_config, self.dtype, self.source_note = source.hf_config, source.dtype, source.source_note
        self._shapes = {name: source.shape(name) for name in source.names()}

    def format(self, name: str) -> Format:
        shape = self.shape(name)
        size = next((g for g in GROUP_SIZES if len(shape) == 2 and shape[1] % g == 0), None)
        return self.source.format(name) if size is None else Integer(BITS, size)

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        form = self.format(name)
        if form == self.source.format(name) or not isinstance(form, Integer):
            return self.source.stored(name)
        assert form.group_size is not None
        return form.pack(rounded(self.source.tensor(name), form.group_size))

    def _make_tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        form = self.format(name)
        if form == self.source.format(name) or not isinstance(form, Integer):
            return self.source.tensor(name, slice(start, stop))
        return form.unpack(self.stored(name), slice(start, stop))

    def _files(self) -> list[Path]:
        return self.source._files()

    def _contents(self) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        return self.source._contents()


def rounded(weight: torch.Tensor, group_size: int) -> Codes:
    """4-bit codes of a float32 weight [out, in], `group_size` columns to a scale."""
    groups = weight.view(len(weight), -1, group_size)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)  # with its sign: it becomes code -8
    scale = (largest / -(1 << BITS - 1)).bfloat16()
    step = scale.float().unsqueeze(2)
    codes = torch.where(step == 0, torch.zeros_like(groups), groups / step).round_().clamp_(-8, 7)
    return Codes(codes.to(torch.int8).view_as(weight), scale)
