"""One rank's part of a checkpoint, as a checkpoint: smaller shapes, cut out of the stored tensors while they are read.

Any backend loads it unchanged. Rows are read alone; where columns are cut, rows are read whole and cut at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...checkpoint.hf import HFCheckpoint
from ...checkpoint.load import is_packed
from ...checkpoint.tokenizer import Tokenizer
from ...errors import EngineError
from ...formats import Dense, Format, Integer, KMeans
from ...formats.cut import Spans, cut, read_rows
from ...formats.outliers import VALUES, Read
from ...model.families import tensor_names
from ...parallel import Plan, Share, make_plan


class ShardedCheckpoint(Checkpoint):
    """What a rank holds of another checkpoint."""

    def __init__(self, source: Checkpoint, share: Share) -> None:
        self.source, self.share = source, share
        self.name, self.path, self.config = f"{source.name} (rank {share.rank})", source.path, share.rank_config
        self.hf_config, self.dtype, self.source_note = source.hf_config, source.dtype, source.source_note
        self._cuts = share.cuts()
        shapes = tensor_names(self.config)
        self._shapes = {name: shapes[name] for name in self._cuts}
        self._kept: dict[str, int] = {}

    def format(self, name: str) -> Format:
        self.shape(name)
        form = self.source.format(self._cuts[name].source)
        if isinstance(form, Integer | KMeans) and form.outliers and self._is_cut(name):
            if name not in self._kept:
                self._kept[name] = len(self.stored(name)[VALUES])
            form = replace(form, kept=self._kept[name])
        return form

    def stored(self, name: str) -> dict[str, Tensor]:
        self.shape(name)
        own = self._cuts[name]
        form, shape = self.source.format(own.source), self.source.shape(own.source)
        if not self._is_cut(name):
            return self.source.stored(own.source)
        if isinstance(form, Dense):
            return {"weight": self.tensor(name, dtype=form.dtype)}
        if not is_packed(form):
            raise EngineError(f"{own.source}: a part of {form.name} has no stored form")
        assert len(shape) == 2
        start, stop = _hull(own.rows, shape[0])
        tensors, first = read_rows(form, shape, start, stop, self._reader(own.source))
        rows = tuple((a - first, b - first) for a, b in own.rows or ((0, shape[0]),))
        return cut(form, tensors, (stop - first, shape[1]), rows, own.columns)

    def _is_cut(self, name: str) -> bool:
        own = self._cuts[name]
        return own.rows is not None or own.columns is not None or own.zero

    def _reader(self, name: str) -> Read:
        """Rows of the stored tensors of a weight."""
        form, shape = self.source.format(name), self.source.shape(name)
        if isinstance(self.source, HFCheckpoint):
            places = dict(zip(form.stored(shape), self.source.stored_sources(name), strict=True))
            return lambda local, rows: places[local][1].read(places[local][0], rows)
        tensors = self.source.stored(name)
        return lambda local, rows: tensors[local][rows]

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        own, form = self._cuts[name], self.source.format(self._cuts[name].source)
        dtype = form.dtype if isinstance(form, Dense) else torch.float32
        if own.zero:
            return torch.zeros(stop - start, *self.shape(name)[1:], dtype=dtype)
        spans = ((start, stop),) if own.rows is None else _within(own.rows, start, stop)
        rows = torch.cat([self.source.tensor(own.source, slice(a, b), dtype) for a, b in spans])
        if own.columns is None:
            return rows
        return torch.cat([rows[:, a:b] for a, b in own.columns], 1)

    def _make_tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def _files(self) -> list[Path]:
        return self.source._files()

    def _contents(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        return self.source._contents()


def plan_checkpoint(checkpoint: Checkpoint, tp: int, pp: int) -> Plan:
    """Cut a checkpoint in tp * pp parts. Raises EngineError naming what cannot be cut."""
    forms: Mapping[str, Format] = {
        name: _cuttable(checkpoint.format(name)) for name in checkpoint.names() if len(checkpoint.shape(name)) == 2
    }
    return make_plan(checkpoint.config, forms, tp, pp)


def _cuttable(form: Format) -> Format:
    """The format that a cut meets: what no layer multiplies by is expanded when it is loaded, and cut as floats."""
    return form if is_packed(form) else Dense(torch.float32)


def _hull(spans: Spans | None, size: int) -> tuple[int, int]:
    return (0, size) if spans is None else (min(a for a, _ in spans), max(b for _, b in spans))


def _within(spans: Spans, start: int, stop: int) -> Spans:
    """Rows start..stop of what these ranges make up, as ranges of the source."""
    found, at = [], 0
    for first, last in spans:
        a, b = max(start, at), min(stop, at + last - first)
        if a < b:
            found.append((first + a - at, first + b - at))
        at += last - first
    return tuple(found)
