"""What makes two measurements comparable: the protocol of a record as a key, and which keys are one protocol.

Every entry of a protocol counts, known to the report or not. An entry that a run finds out by itself may be unknown,
because it failed before that or an older Gossamer wrote its record: then it contradicts nothing. Knows no rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from .records import BenchRecord, EvalRecord

Key: TypeAlias = dict[str, Any]
"""Entries that must agree; empty if a run failed before its protocol was known."""
Reference: TypeAlias = tuple[str | None, str | None]
"""Fingerprint and name of a model."""

NO_REFERENCE: Reference = (None, None)
_FOUND_OUT = ("windows", "tokens_scored", "tokens_sha256", "kernels")
_SAID_ELSEWHERE = ("tokens", "samples", "reference_fingerprint")
"""What these ask for is compared by what came of it, or changes no number."""


def quality_key(record: EvalRecord) -> Key:
    """What makes this evaluation comparable with another, but for the engine."""
    if not record.protocol:
        return {}
    key = {name: value for name, value in record.protocol.items() if name not in _SAID_ELSEWHERE}
    return {**key, "reference": reference(record)}


def reference(record: EvalRecord) -> Reference:
    """What the evaluation compares with."""
    fingerprint, name = record.protocol.get("reference_fingerprint"), record.protocol.get("reference")
    return fingerprint, plain_name(name) if isinstance(name, str) and name else None


def speed_key(record: BenchRecord) -> Key:
    """What makes this bench comparable with another; the engine has a column of its own."""
    if not record.protocol:
        return {}
    machine = record.machine
    where = {"cpu": machine.cpu, "isa": machine.isa, "cores": machine.cores, "os": machine.os}
    threads = record.protocol.get("threads", machine.threads)
    key = {**record.protocol, **where, "threads": threads, "kernels": record.engine.kernels}
    if record.failed:
        key.pop("turns", None)  # how it was tried, not how it was measured
    return key


def same(keys: Sequence[Key]) -> list[list[int]]:
    """Positions of the keys of each protocol, the key that knows most first; protocols by first appearance.

    A key with unknown entries joins the only protocol that it does not contradict. Where there are several it stands
    for itself: a guess would call numbers comparable that may not be.
    """
    groups: list[list[int]] = []
    for position in sorted(range(len(keys)), key=lambda i: _unknown(keys[i])):
        equal = [group for group in groups if keys[group[0]] == keys[position]]
        fitting = equal or [group for group in groups if agree(keys[group[0]], keys[position])]
        if len(fitting) == 1:
            fitting[0].append(position)
        else:
            groups.append([position])
    return sorted(groups, key=min)


def agree(one: Key, other: Key) -> bool:
    """True if no known entry of one contradicts the other."""
    if not one or not other:
        return True
    return all(_entries_agree(name, one.get(name), other.get(name)) for name in one.keys() | other.keys())


def _entries_agree(name: str, one: Any, other: Any) -> bool:
    if name == "reference":
        return same_model(one, other)
    return bool(one == other) or (name in _FOUND_OUT and None in (one, other))


def same_model(one: Reference, other: Reference) -> bool:
    """True if both name one model, or both none: by fingerprint where both know it, else by name."""
    return one[0] == other[0] if one[0] and other[0] else one[1] == other[1]


def _unknown(key: Key) -> int:
    """How many entries are not known; an empty key knows nothing."""
    missing = sum(key.get(name) is None for name in _FOUND_OUT)
    return missing + (key.get("reference", NO_REFERENCE)[0] is None) if key else len(_FOUND_OUT) + 2


def order(key: Key) -> list[tuple[str, str, float]]:
    """What keys are sorted by: entry after entry, numbers as numbers."""
    plain = (int, float)
    return [
        (name, "", value) if isinstance(value, plain) else (name, json.dumps(value, sort_keys=True, default=str), 0)
        for name, value in sorted(key.items())
    ]


def plain_name(name: str) -> str:
    """A model's name without what only the typing of it added: `./small/` is `small`."""
    return name.rstrip("/").removeprefix("./") or name
