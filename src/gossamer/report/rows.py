"""Group records to rows: one per model, engine and protocol, holding the newest record of each kind.

A failed run stays a row. A model benched twice, in two engines or under two protocols, is two rows that share one
evaluation of the weights, unless that engine was evaluated itself. Only a record of the same protocol makes an older
one superfluous. Does not know how a row is shown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePath
from typing import TypeAlias, TypeVar

from ..errors import MeasureError
from .keys import NO_REFERENCE, Key, agree, order, plain_name, quality_key, reference, same, speed_key
from .records import BenchRecord, CompressRecord, EvalRecord, Record, read_records

EngineKey: TypeAlias = tuple[str, str | None, str | None]
_M = TypeVar("_M", EvalRecord, BenchRecord)


@dataclass(frozen=True)
class Row:
    """One model in one engine and protocol: what is known of it, and the newest record of each kind."""

    name: str
    names: frozenset[str]
    """All that records call it."""
    label: str
    """The name, with a piece of the fingerprint where two models share the name."""
    fingerprint: str | None
    base: str | None
    base_fingerprint: str | None
    recipe: str | None
    note: str | None
    parameters: int | None
    weight_bytes: int | None
    bits_per_weight: float | None
    format: str | None
    """How most of its weights are stored."""
    evaluation: EvalRecord | None
    bench: BenchRecord | None
    compression: CompressRecord | None
    baseline: bool = False
    """True if other rows are measured against this model."""
    superseded: int = 0
    """Older records of this model that the row does not show."""

    @property
    def model(self) -> tuple[str, str | None]:
        """Which model this is, whatever engine ran it: name and fingerprint."""
        return self.name, self.fingerprint

    @property
    def records(self) -> tuple[Record, ...]:
        """The records behind the row."""
        return tuple(r for r in (self.evaluation, self.bench, self.compression) if r is not None)

    @property
    def failures(self) -> tuple[Record, ...]:
        """The records that were tried and did not finish."""
        return tuple(r for r in self.records if r.failed)

    @property
    def failed(self) -> bool:
        """True if anything that was tried on this model failed."""
        return bool(self.failures)

    @property
    def engine(self) -> str | None:
        """What ran it: the engine of the bench, else of the evaluation."""
        record = self.bench or self.evaluation
        return record.engine.label if record else None

    @property
    def size_bytes(self) -> int | None:
        """Weight memory: as benched, else as stored."""
        benched = self.bench.results.wm_bytes if self.bench else None
        return self.weight_bytes if benched is None else benched

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Median decode speed."""
        spread = self.bench.results.decode_tokens_per_s if self.bench else None
        return spread.median if spread else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity on the protocol's corpus."""
        return self.evaluation.results.perplexity if self.evaluation else None

    @property
    def kld_mean(self) -> float | None:
        """Mean KL divergence to the reference, nats per token."""
        return self.evaluation.results.kld_mean if self.evaluation else None

    @property
    def top1_agreement(self) -> float | None:
        """Fraction of tokens on which the reference's most probable token is the same."""
        return self.evaluation.results.top1_agreement if self.evaluation else None


def load(paths: Iterable[str | Path]) -> list[Row]:
    """Rows of all records in these files and folders, the baseline first, then by size.

    Raises UsageError for a missing path, MeasureError for a malformed record or if there is none at all.
    """
    paths = list(paths)
    records = read_records(paths)
    if not records:
        names = ", ".join(map(str, paths)) or "no path"
        raise MeasureError(
            f"no result records in {names}", hint="`gossamer eval`, `bench` and `compress` write them as *.jsonl"
        )
    return group(records)


def group(records: Sequence[Record]) -> list[Row]:
    """Rows of these records, the baseline first, then by size, then by name."""
    rows = [row for model in _by_model(records) for row in _model_rows(model)]
    rows = _with_baseline(_with_labels(rows))
    return sorted(rows, key=_order)


def references_of(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows of the model that this one is measured against, those in the same engine first; none for a baseline."""
    targets = [] if row.baseline else [other for other in _targets(row, rows) if other.model != row.model]
    return sorted(targets, key=lambda other: other.engine != row.engine)


def reference_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The first of them, or None."""
    return next(iter(references_of(row, rows)), None)


def finite(value: float | None) -> float | None:
    """The value, or None where there is no number to compare."""
    return value if value is not None and math.isfinite(value) else None


def _by_model(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Records of one model each, newest first. A model is its fingerprint, whatever it was called.

    A record without fingerprint (a run that failed early) joins the only model of its name, if it is the only one.
    """
    known: dict[str, set[str]] = {}
    for record in records:
        if record.model.fingerprint:
            known.setdefault(plain_name(record.model.name), set()).add(record.model.fingerprint)
    groups: dict[tuple[str, str], list[tuple[int, Record]]] = {}
    for position, record in enumerate(records):
        name = plain_name(record.model.name)
        of_name = known.get(name, set())
        fingerprint = record.model.fingerprint or (next(iter(of_name)) if len(of_name) == 1 else "")
        groups.setdefault((fingerprint, "" if fingerprint else name), []).append((position, record))
    for members in groups.values():
        # Of two records of the same instant the one that was read last is the newer.
        members.sort(key=lambda member: (member[1].created, member[0]), reverse=True)
        yield [record for _, record in members]


def _model_rows(newest_first: list[Record]) -> Iterator[Row]:
    """A row for each engine and protocol that the model was benched in, and for each further evaluation."""
    benches = _newest([r for r in newest_first if isinstance(r, BenchRecord)], speed_key)
    evals = _without_lesser(_newest([r for r in newest_first if isinstance(r, EvalRecord)], quality_key))
    compression = next((r for r in newest_first if isinstance(r, CompressRecord)), None)
    shown = {id(r) for r in (*benches, *evals, compression)}
    hidden = sum(id(r) not in shown for r in newest_first)
    for bench, evaluation in _pairs(benches, evals):
        yield _row(newest_first, evaluation, bench, compression, hidden)
        hidden = 0  # counted once per model


def _newest(newest_first: list[_M], key: Callable[[_M], Key]) -> list[_M]:
    """The newest record for each engine and protocol, in the order of protocols.

    A version is not another engine, a backend is.
    """
    engines: dict[EngineKey, list[_M]] = {}
    for record in newest_first:
        engines.setdefault(_engine(record), []).append(record)
    found = [members[min(group)] for members in engines.values() for group in same([key(r) for r in members])]
    return sorted(found, key=lambda record: order(key(record)))


def _engine(record: EvalRecord | BenchRecord) -> EngineKey:
    return record.engine.name, record.engine.backend, record.engine.dtype


def _without_lesser(evals: list[EvalRecord]) -> list[EvalRecord]:
    """Without those that name no reference where another, otherwise the same, does: it says all that they say."""

    def says_more(other: EvalRecord, record: EvalRecord) -> bool:
        if other.failed or reference(other) == NO_REFERENCE or _engine(other) != _engine(record):
            return False
        later = other.created >= record.created  # a failure may be news
        asked = {**quality_key(record), "reference": NO_REFERENCE}
        return (later or not record.failed) and agree({**quality_key(other), "reference": NO_REFERENCE}, asked)

    return [r for r in evals if reference(r) != NO_REFERENCE or not any(says_more(other, r) for other in evals)]


def _pairs(benches: list[BenchRecord], evals: list[EvalRecord]) -> list[tuple[BenchRecord | None, EvalRecord | None]]:
    """What stands in one row: each bench beside the evaluation that is nearest to it.

    An evaluation that is nearest to none has a row of its own, beside a bench of the same engine if there is one.
    """
    pairs: list[tuple[BenchRecord | None, EvalRecord | None]] = [(bench, _nearest(bench, evals)) for bench in benches]
    shown = {id(evaluation) for _, evaluation in pairs}
    for evaluation in evals:
        if id(evaluation) not in shown:
            own = [bench for bench in benches if _engine(bench) == _engine(evaluation)]
            pairs.append((_nearest(evaluation, own), evaluation))
    return pairs or [(None, None)]


def _nearest(record: EvalRecord | BenchRecord, others: list[_M]) -> _M | None:
    """The newest measurement in the same engine; if possible one that succeeded, and of weights held the same way."""

    def nearness(other: _M) -> tuple[bool, bool, bool, datetime]:
        weights = record.protocol.get("weights") == other.protocol.get("weights")
        return _engine(other) == _engine(record), not other.failed, weights, other.created

    return max(others, key=nearness, default=None)


def _row(
    newest_first: list[Record],
    evaluation: EvalRecord | None,
    bench: BenchRecord | None,
    compression: CompressRecord | None,
    superseded: int,
) -> Row:
    """A row; each fact about the model comes from the newest record that states it."""
    models = [record.model for record in newest_first]
    names = [plain_name(model.name) for model in models]
    name = min(names, key=len)  # a folder has many paths: the shortest is the one that people say
    return Row(
        name=name,
        names=frozenset(names),
        label=name,
        fingerprint=next((m.fingerprint for m in models if m.fingerprint), None),
        base=next((m.base for m in models if m.base), None),
        base_fingerprint=next((m.base_fingerprint for m in models if m.base_fingerprint), None),
        recipe=next((m.recipe for m in models if m.recipe), None),
        note=next((m.note for m in models if m.note), None),
        parameters=next((m.parameters for m in models if m.parameters is not None), None),
        weight_bytes=next((m.weight_bytes for m in models if m.weight_bytes is not None), None),
        bits_per_weight=next((m.bits_per_weight for m in models if m.bits_per_weight is not None), None),
        format=next((m.format for m in models if m.format), None),
        evaluation=evaluation,
        bench=bench,
        compression=compression,
        superseded=superseded,
    )


def _with_labels(rows: list[Row]) -> list[Row]:
    """Short labels: the folder that all models share is left out; a name of two models says which one it is."""
    fingerprints: dict[str, set[str | None]] = {}
    for row in rows:
        fingerprints.setdefault(row.name, set()).add(row.fingerprint)
    shared = _shared_folder(list(fingerprints))

    def label(row: Row) -> str:
        short = row.name[shared:]
        if len(fingerprints[row.name]) == 1:
            return short
        return f"{short} @{(row.fingerprint or 'unknown').removeprefix('sha256:')[:7]}"

    return [replace(row, label=label(row)) for row in rows]


def _shared_folder(names: list[str]) -> int:
    """Length of the folder, slash included, that several names all begin with."""
    if len(names) < 2 or len({name.startswith("/") for name in names}) > 1:
        return 0
    folder = os.path.commonpath([os.path.dirname(name) for name in names])
    # A name with doubled slashes is not what commonpath makes of it.
    return len(folder) + 1 if folder and all(name.startswith(f"{folder}/") for name in names) else 0


def _targets(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows that this row's records name as its reference, else as its base: by fingerprint where it is known."""
    fingerprint, name = reference(row.evaluation) if row.evaluation else NO_REFERENCE
    others = [other for other in rows if other.model != row.model]
    return (
        [other for other in rows if fingerprint and other.fingerprint == fingerprint]
        or [other for other in rows if name and name in other.names]
        or [other for other in others if row.base_fingerprint and other.fingerprint == row.base_fingerprint]
        or [other for other in others if row.base and not row.base_fingerprint and _is_called(other, row.base)]
    )


def _is_called(row: Row, base: str) -> bool:
    """True if a manifest that speaks of `base` may mean this model: it keeps only the last part of a local path."""
    return any(base in (name, PurePath(name).name) for name in row.names)


def _with_baseline(rows: list[Row]) -> list[Row]:
    """Marks the models that others refer to; where none does, those that no recipe made."""
    referred = {target.model for row in rows for target in _targets(row, rows)}
    if not referred:
        referred = {row.model for row in rows if row.recipe is None and row.base is None}
    return [replace(row, baseline=row.model in referred) for row in rows]


def _order(row: Row) -> tuple[bool, float, str, str]:
    size = row.size_bytes
    return (not row.baseline, math.inf if size is None else size, row.label, row.engine or "")
