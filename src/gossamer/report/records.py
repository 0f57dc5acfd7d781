"""Read result records: JSON lines, one `eval`, `bench` or `compress` record each.

Every line is bounded and validated; unknown extra keys are tolerated, an unknown schema or kind is not.
Does not know how records belong together: see `rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import MeasureError, UsageError

SCHEMA = 1
UNTABLED = ("load", "soak")
"""Kinds of record that have no row in these tables; they may stand in the same file."""
MAX_LINE_BYTES = 16 * 2**20
"""A record of a thousand layers is a hundred kilobytes; a longer line is not a record."""


def _timestamp(value: object) -> datetime:
    """ISO-8601 to an aware time; a time without a zone is UTC. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("not an ISO-8601 time")
    time = datetime.fromisoformat(value)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


Count: TypeAlias = Annotated[int, Field(ge=0)]
Time: TypeAlias = Annotated[datetime, BeforeValidator(_timestamp)]


class _Part(BaseModel):
    """Frozen, strict about types, deaf to keys it does not know."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Model(_Part):
    """What was measured. `fingerprint` may be missing where a run failed before it was known."""

    name: str = Field(min_length=1)
    path: str | None = None
    fingerprint: str | None = None
    base: str | None = None
    base_fingerprint: str | None = None
    recipe: str | None = None
    note: str | None = None
    parameters: Count | None = None
    weight_bytes: Count | None = None
    bits_per_weight: float | None = None
    format: str | None = None


class Engine(_Part):
    """What ran it."""

    name: str = "unknown"
    backend: str | None = None
    version: str | None = None
    dtype: str | None = None
    kernels: str | None = None
    """Their instruction set; not part of the label, for it belongs to how a speed was measured."""

    @property
    def label(self) -> str:
        """`gossamer 0.1.0 (reference, float32)`."""
        detail = ", ".join(part for part in (self.backend, self.dtype) if part)
        return " ".join(part for part in (self.name, self.version, f"({detail})" if detail else None) if part)


class Machine(_Part):
    """Where it ran."""

    cpu: str | None = None
    isa: str | None = None
    cores: int | None = None
    threads: int | None = None
    memory_bytes: int | None = None
    os: str | None = None
    python: str | None = None
    torch: str | None = None


class Sample(_Part):
    """One greedy continuation."""

    prompt: str
    output: str


class Spread(_Part):
    """A repeated measurement: its median, and how far it went."""

    median: float
    min: float | None = None
    max: float | None = None


class Layer(_Part):
    """One compressed linear layer; `block` is None outside the transformer blocks."""

    block: Count | None = None
    linear: str
    format: str | None = None
    bits_per_weight: float | None = None
    relative_error: float | None = None


class EvalResults(_Part):
    """Quality. KL divergence in nats per token; `top1_agreement` a fraction.

    `activation_kld` is what rounding activations adds: from the same weights with exact ones.
    """

    perplexity: float | None = None
    nll: float | None = None
    kld_mean: float | None = None
    kld_p99: float | None = None
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    activation_kld: float | None = None
    samples: tuple[Sample, ...] = Field(default=(), strict=False)


class BenchResults(_Part):
    """Memory in bytes, speed in tokens per second, time to first token in seconds."""

    wm_bytes: Count | None = None
    rm_weights_bytes: Count | None = None
    rm_kv_bytes_per_token: float | None = None
    rm_peak_bytes: Count | None = None
    rm_reserved_bytes: Count | None = None
    """For keys and values, set aside beforehand; how much of it was used is in the peak."""
    prefill_tokens_per_s: Spread | None = None
    decode_tokens_per_s: Spread | None = None
    ttft_s: Spread | None = None


class CompressResults(_Part):
    """What a compression cost and the error it left in each layer."""

    seconds: float | None = None
    peak_rss_bytes: Count | None = None
    error_kind: Literal["output", "weight"] | None = None
    layers: tuple[Layer, ...] = Field(default=(), strict=False)


class _Common(_Part):
    status: Literal["ok", "failed"]
    error: str | None = None
    created: Time
    model: Model
    engine: Engine = Engine()
    machine: Machine = Machine()
    protocol: dict[str, Any] = Field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """True if the run was tried and did not finish."""
        return self.status == "failed"


class EvalRecord(_Common):
    """How good a model is."""

    kind: Literal["eval"]
    results: EvalResults = EvalResults()


class BenchRecord(_Common):
    """How fast and how large a model is in one engine."""

    kind: Literal["bench"]
    results: BenchResults = BenchResults()


class CompressRecord(_Common):
    """How a model was made."""

    kind: Literal["compress"]
    results: CompressResults = CompressResults()


Record: TypeAlias = EvalRecord | BenchRecord | CompressRecord
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def read_records(paths: Iterable[str | Path]) -> list[Record]:
    """Every record of these files, and of the `*.jsonl` below these folders but for hidden ones, in reading order.

    Raises UsageError for a path that does not exist, MeasureError naming file and line for a bad record.
    """
    records: list[Record] = []
    for file in _files(paths):
        records.extend(_read(file))
    return records


def _files(paths: Iterable[str | Path]) -> list[Path]:
    """The files named, each once, folders replaced by the `*.jsonl` below them.

    Hidden files and folders are skipped: unfinished work of other commands, which holds JSON lines of its own.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.setdefault(path.resolve(), path)
            continue
        for file in sorted(path.rglob("*.jsonl")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden:
                found.setdefault(file.resolve(), file)
    return list(found.values())


def _read(file: Path) -> Iterator[Record]:
    """The records of one file; never holds more than one line."""
    try:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise MeasureError(f"{file}:{number}: longer than {MAX_LINE_BYTES} bytes: not a result record")
                if line.strip() and (record := _parse(line, f"{file}:{number}")) is not None:
                    yield record
    except OSError as error:
        raise MeasureError(f"{file}: cannot be read: {error.strerror or error}") from error


def _parse(line: bytes, where: str) -> Record | None:
    """One validated record, or None for one that has no row. `where` is `file:line`, for the message."""
    try:
        value = pydantic_core.from_json(line)
    except ValueError as error:
        raise MeasureError(
            f"{where}: not a JSON record: {error}",
            hint="a run that was killed may have left half a line; delete it and measure again",
        ) from error
    if not isinstance(value, dict):
        raise MeasureError(f"{where}: a record is a JSON object, this is a {type(value).__name__}")
    return None if value.get("kind") in UNTABLED else as_record(value, where)


def as_record(value: Mapping[str, Any], where: str) -> Record:
    """A record from the JSON object that holds it. Raises MeasureError, `where` in front of what is wrong."""
    schema = value.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        said = "no schema version" if schema is None else f"schema version {schema!r:.40}"
        raise MeasureError(f"{where}: {said}; this Gossamer reads version {SCHEMA}", hint="measure again, or upgrade")
    try:
        return _RECORD.validate_python(value)
    except ValidationError as error:
        raise MeasureError(f"{where}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    """The first failure as `field: what is wrong`, without pydantic's prose around it."""
    first = error.errors(include_url=False, include_context=False)[0]
    # The discriminator puts the kind in front of every location; users know the field by the rest.
    location = [str(part) for part in first["loc"] if part not in ("eval", "bench", "compress")]
    return f"{'.'.join(location) or 'kind'}: {first['msg']} (got {first['input']!r:.60})"
