"""Which rows were measured under one protocol, and which were not.

Rows of different protocols get different marks: letters for quality, numbers for speed and memory. Rows that share
one protocol get none. What makes two protocols one is said in `keys.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .keys import NO_REFERENCE, Key, Reference, agree, quality_key, reference, same, speed_key
from .records import BenchRecord, EvalRecord, Machine
from .rows import Row
from .sources import source_sentence
from .text import clean

_R = TypeVar("_R", EvalRecord, BenchRecord)
_SPOKEN_QUALITY = {"corpus", "corpus_sha256", "context", "stride", "scored", "windows", "tokens_scored"}
_SPOKEN_QUALITY |= {"tokens", "tokens_sha256", "samples"}
_SPOKEN_SPEED = {"prompt_tokens", "output_tokens", "batch", "repetitions", "warmup"}
_SPOKEN = {*_SPOKEN_QUALITY, *_SPOKEN_SPEED, "reference", "reference_fingerprint", "threads"}
"""Protocol keys that the sentences below say in words."""


@dataclass(frozen=True)
class Protocol:
    """One distinct way of measuring: its mark (empty if it is the only one) and its sentence."""

    mark: str
    sentence: str
    facts: tuple[tuple[str, str], ...]
    """Every key of the protocol with its whole value."""
    rows: tuple[int, ...]
    """Positions of the rows that it measured."""


@dataclass(frozen=True)
class Protocols:
    """All protocols behind a list of rows."""

    quality: tuple[Protocol, ...]
    speed: tuple[Protocol, ...]
    quality_differences: tuple[str, ...]
    """Protocol keys that are not the same in all rows."""
    speed_differences: tuple[str, ...]

    def marks(self, position: int) -> tuple[str, str]:
        """Quality and speed mark of the row at this position, empty where there is nothing to tell apart."""
        quality = next((p.mark for p in self.quality if position in p.rows), "")
        speed = next((p.mark for p in self.speed if position in p.rows), "")
        return quality, speed

    def mark(self, position: int) -> str:
        """Both marks as one text: `a 1`, `a`, `1` or nothing."""
        return " ".join(mark for mark in self.marks(position) if mark)


def protocols(rows: Sequence[Row]) -> Protocols:
    """The distinct protocols of these rows."""
    quality = {i: _quality_key(row, row.evaluation, rows) for i, row in enumerate(rows) if row.evaluation}
    speed = {i: speed_key(row.bench) for i, row in enumerate(rows) if row.bench}
    evaluations = {i: row.evaluation for i, row in enumerate(rows) if row.evaluation}
    benches = {i: row.bench for i, row in enumerate(rows) if row.bench}
    qualities, quality_differences = _distinct(quality, evaluations, _quality_sentence, _letter)
    speeds, speed_differences = _distinct(speed, benches, _speed_sentence, str)
    return Protocols(qualities, speeds, quality_differences, speed_differences)


def notes(rows: Sequence[Row]) -> list[str]:
    """What must stand under every table: differing protocols, the protocols, sources, failures, what is not shown."""
    found = protocols(rows)
    lines = []
    for name, kinds, differences in (
        ("Quality", found.quality, found.quality_differences),
        ("Speed and memory", found.speed, found.speed_differences),
    ):
        if len(kinds) > 1:
            lines.append(f"{name}: not one protocol (differs in {', '.join(differences)}); "
                         "compare only rows with the same mark.")  # fmt: skip
        lines += [f"{name}{f' [{kind.mark}]' if kind.mark else ''}: {kind.sentence}." for kind in kinds]
    lines += source_notes(rows)
    lines += [f"Failed: {text}" for text in failure_notes(rows)]
    hidden = sum(row.superseded for row in rows)
    if hidden:
        lines.append(f"{hidden} older {'record is' if hidden == 1 else 'records are'} not shown: the newest counts.")
    return lines


def source_notes(rows: Sequence[Row]) -> list[str]:
    """What a source says of itself, such as that it is already 4-bit; said once, not again of all made from it."""
    found: dict[str, None] = {}
    said = {row.note for row in rows if row.baseline and row.note}
    for row in rows:
        if row.note and (row.baseline or not any(row.note.endswith(note) for note in said)):
            lead = "Baseline " if row.baseline and "baseline" not in row.note else ""
            sentence = source_sentence(row.note, row.bits_per_weight, row.format)
            found[f"{lead}{clean(row.label)}: {clean(sentence).rstrip('.')}."] = None
    return list(found)


def failure_notes(rows: Sequence[Row]) -> list[str]:
    """`name: eval failed: why`, once per failed run."""
    found: dict[str, None] = {}
    for row in rows:
        for record in row.failures:
            where = f" in {clean(record.engine.label)}" if record.kind == "bench" else ""
            why = clean(record.error or "no reason recorded", keep="\n").strip()
            found[f"{clean(row.label)}: {record.kind}{where}: {' '.join(why.split())}"] = None
    return list(found)


def machine_sentence(machine: Machine) -> str:
    """`EPYC 7B13 (avx2), 2 cores, 8.3 GB, Linux 6.1, torch 2.13.0`."""
    parts = [
        f"{machine.cpu or 'unknown processor'}{f' ({machine.isa})' if machine.isa else ''}",
        _count(machine.cores, "core"),
        f"{machine.memory_bytes / 1e9:.1f} GB" if machine.memory_bytes is not None else None,
        machine.os,
        f"torch {machine.torch}" if machine.torch else None,
    ]
    return clean(", ".join(part for part in parts if part))


def _quality_key(row: Row, record: EvalRecord, rows: Sequence[Row]) -> Key:
    """What makes this evaluation comparable with another; empty if the record does not say."""
    key = quality_key(record)
    if not key:
        return {}
    # A baseline is evaluated without a reference: it is its own, so it shares the protocol of those compared with it.
    if row.baseline and key["reference"] == NO_REFERENCE:
        key["reference"] = _own_reference(row, rows)
    return {**key, "engine": record.engine.label}


def _own_reference(row: Row, rows: Sequence[Row]) -> Reference:
    """The fingerprint and name by which other rows refer to this baseline."""
    found = (reference(other.evaluation) for other in rows if other.evaluation)
    return next((r for r in found if (r[0] == row.fingerprint if r[0] else r[1] in row.names)), NO_REFERENCE)


def _distinct(
    keys: dict[int, Key],
    records: dict[int, _R],
    sentence: Callable[[_R], str],
    mark: Callable[[int], str],
) -> tuple[tuple[Protocol, ...], tuple[str, ...]]:
    """The protocols and what they differ in. Rows without a key (failed before it was known) have none."""
    positions = [position for position, key in keys.items() if key]
    groups = [[positions[i] for i in group] for group in same([keys[position] for position in positions])]
    found = []
    for i, rows in enumerate(groups, start=1):
        # The one that says most: a baseline's own record does not name the reference that the others are held to.
        fullest = max((records[p] for p in rows), key=lambda record: len(sentence(record)))
        facts = tuple((clean(name), clean(_value(value))) for name, value in fullest.protocol.items())
        found.append(Protocol(mark(i) if len(groups) > 1 else "", sentence(fullest), facts, tuple(sorted(rows))))
    return tuple(found), _differences([keys[rows[0]] for rows in groups])


def _differences(keys: list[Key]) -> tuple[str, ...]:
    """Entries that are not the same in all of these."""
    names = dict.fromkeys(name for key in keys for name in key)
    alone = {
        name: [{name: key.get(name, NO_REFERENCE if name == "reference" else None)} for key in keys] for name in names
    }
    return tuple(clean(name) for name, entries in alone.items() if not all(agree(entries[0], e) for e in entries))


def _letter(number: int) -> str:
    """1 -> a, 26 -> z, 27 -> aa."""
    text = ""
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


def _quality_sentence(record: EvalRecord) -> str:
    p = record.protocol
    digest = p.get("corpus_sha256")
    name, fingerprint, ids = p.get("reference"), p.get("reference_fingerprint"), p.get("tokens_sha256")
    return _sentence(
        f"{p.get('corpus', 'unnamed text')}{f' (sha256 {_short(digest)})' if digest else ''}",
        f"context {_of(p, 'context')}, stride {_of(p, 'stride')}",
        f"{_of(p, 'tokens_scored')} tokens scored in {_of(p, 'windows')} windows, the last {_of(p, 'scored')} of each"
        f"{f' (token ids {_short(ids)})' if ids else ''}",
        f"reference {name or 'model'}{f' ({_short(fingerprint)})' if fingerprint else ''}"
        if name or fingerprint
        else None,
        _count(p.get("threads"), "thread"),
        record.engine.label,
        _extras(p),
    )


def _speed_sentence(record: BenchRecord) -> str:
    p = record.protocol
    warmup = f" after {_of(p, 'warmup')} warm-up" if "warmup" in p else ""
    return _sentence(
        f"prompt {_of(p, 'prompt_tokens')} tokens, output {_of(p, 'output_tokens')} tokens, batch {_of(p, 'batch')}",
        f"median of {_of(p, 'repetitions')} repetitions{warmup}",
        _count(p.get("threads", record.machine.threads), "thread"),
        machine_sentence(record.machine),
        f"{record.engine.kernels} kernels" if record.engine.kernels else None,
        _extras(p),
    )


def _sentence(*parts: str | None) -> str:
    return clean("; ".join(part for part in parts if part))


def _extras(protocol: dict[str, Any]) -> str | None:
    """Keys that the sentence does not know are said as they are."""
    return ", ".join(f"{name} {_value(value)}" for name, value in protocol.items() if name not in _SPOKEN) or None


def _of(protocol: dict[str, Any], name: str) -> str:
    return _value(protocol[name]) if name in protocol else "?"


def _value(value: object) -> str:
    """Integers with thousands separators, text as it is, `none`, anything else as bounded JSON."""
    if value is None:
        return "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, default=str)[:80]


def _count(value: object, noun: str) -> str | None:
    return None if value is None else f"{_value(value)} {noun}{'' if value == 1 else 's'}"


def _short(digest: object) -> str:
    return str(digest).removeprefix("sha256:")[:8]
