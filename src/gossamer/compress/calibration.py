"""Calibration text: where a recipe's statistics come from. Seeded, cached by hash, and recorded in the artifact.

By default the model writes it itself: sequences sampled at temperature 1 from its start token. They need no download
and no licence, and they match what the model knows. Knows no engine: whoever calls hands over a `generate` function.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.textprint import line_hashes, text_sha256
from ..errors import CompressionError, ModelNotFound, UsageError
from ..settings import cache_dir, offline
from .recipe import CalibrationSpec

Generate = Callable[[int, int, int], Tensor]
"""(sequences, length, seed) -> tokens [sequences, length], sampled at temperature 1 from the model's start token."""

SAMPLER = 3
"""Counts changes of the sampling rule, so that an old cache is not taken for a new one."""
MAX_TEXT = 1 << 30


@dataclass(frozen=True)
class Calibration:
    """Tokens int64 [sequences, length] and the record that goes into the manifest."""

    tokens: Tensor
    record: dict[str, Any]


def calibrate(spec: CalibrationSpec, checkpoint: Checkpoint, generate: Generate | None) -> Calibration:
    """The tokens [sequences, length] that a recipe asks for.

    Raises UsageError (the source cannot be read), ModelNotFound (the hub), CompressionError (sequences longer than the
    model's context, a text that is too short).
    """
    _check_length(spec, checkpoint)
    if spec.source == "self":
        tokens = _from_model(spec, checkpoint, generate)
        return Calibration(tokens, _record(spec, "self", tokens, []))
    text = _hub_text(spec.source.removeprefix("hub:")) if spec.source.startswith("hub:") else _file_text(spec.source)
    tokens = _from_text(spec, checkpoint, text)
    return Calibration(tokens, _record(spec, "text", tokens, line_hashes(text), text_sha256=text_sha256(text)))


def cached_samples(spec: CalibrationSpec, checkpoint: Checkpoint) -> bool:
    """True if the model's own samples are in the cache, so that `calibrate` need not run the model.

    False for a source that is not `self`. Writes nothing.
    """
    return spec.source == "self" and _cached(_samples_path(spec, checkpoint), spec) is not None


def replayed(spec: CalibrationSpec, record: dict[str, Any], tokens: Tensor) -> Calibration:
    """The recorded tokens [sequences, length] of an artifact. Raises CompressionError if their hash is another."""
    found = token_hash(tokens)
    if found != record.get("sha256"):
        raise CompressionError(f"the artifact's calibration tokens have sha256 {found[:12]}..., not the recorded one")
    return Calibration(tokens, dict(record))


def token_hash(tokens: Tensor) -> str:
    """sha256 of tokens [sequences, length] as little-endian int32."""
    return _sha(tokens.to(torch.int32).contiguous().numpy().astype("<i4").tobytes())


def _record(spec: CalibrationSpec, kind: str, tokens: Tensor, lines: list[str], **details: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "sha256": token_hash(tokens),
        "sequences": tokens.shape[0],
        "length": tokens.shape[1],
        "seed": spec.seed,
        "line_hashes": lines,
        "details": {"source": spec.public_source, **details},
    }


def _check_length(spec: CalibrationSpec, checkpoint: Checkpoint) -> None:
    limit = checkpoint.config.max_positions
    if spec.length > limit:
        raise CompressionError(
            f"calibration sequences of {spec.length} tokens are longer than the {limit} positions of {checkpoint.name}",
            hint=f"--calibration-length {limit}, or less",
        )


def _from_model(spec: CalibrationSpec, checkpoint: Checkpoint, generate: Generate | None) -> Tensor:
    path = _samples_path(spec, checkpoint)
    cached = _cached(path, spec)
    if cached is not None:
        return cached
    if generate is None:
        raise UsageError("calibration by the model's own samples needs an engine", hint="or name a text file")
    tokens = generate(spec.sequences, spec.length, spec.seed)
    import numpy as np

    from ..checkpoint.atomic import write_file

    path.parent.mkdir(exist_ok=True)
    write_file(path, np.ascontiguousarray(tokens.to(torch.int32).numpy()).tobytes())
    return tokens


def _samples_path(spec: CalibrationSpec, checkpoint: Checkpoint) -> Path:
    key = json.dumps([SAMPLER, checkpoint.fingerprint(), spec.sequences, spec.length, spec.seed])
    return cache_dir() / "calibration" / f"{_sha(key.encode())}.int32"


def _cached(path: Path, spec: CalibrationSpec) -> Tensor | None:
    if not path.exists() or path.stat().st_size != 4 * spec.sequences * spec.length:
        return None
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.int32).view(spec.sequences, spec.length).long()


def _from_text(spec: CalibrationSpec, checkpoint: Checkpoint, text: str) -> Tensor:
    """`sequences` windows at seeded, distinct places of a text."""
    ids = torch.tensor(checkpoint.tokenizer().encode(text, special=False), dtype=torch.int64)
    windows = len(ids) // spec.length
    if windows < spec.sequences:
        raise CompressionError(
            f"{spec.source} has {len(ids)} tokens: {windows} sequences of {spec.length}, not {spec.sequences}",
            hint=f"take a longer text, or --calibration-sequences {max(windows, 1)}",
        )
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(spec.seed))[: spec.sequences]
    return torch.stack([ids[w * spec.length : (w + 1) * spec.length] for w in order.sort().values.tolist()])


def _file_text(source: str) -> str:
    path = Path(source)
    if not path.is_file():
        raise UsageError(
            f"calibration source {source!r} is not a file", hint="self, a text file, or hub:ORG/DATASET/PATH/FILE"
        )
    return _read_text(path)


def _hub_text(name: str) -> str:
    """A text, JSON-lines (gzipped or not) or parquet file of a hub data set, its `text` fields joined."""
    parts = name.split("/", 2)
    if len(parts) != 3:
        raise UsageError(f"hub data set {name!r} names no file", hint="hub:ORG/DATASET/PATH/FILE")
    if offline():
        raise ModelNotFound(f"hub:{name} needs the hub, but HF_HUB_OFFLINE is set", hint="unset it, or use a text file")
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2], repo_type="dataset")
    except Exception as e:
        raise ModelNotFound(f"hub:{name} could not be fetched: {e}", hint="check the name, or use a text file") from e
    return _read_text(Path(path))


def _read_text(path: Path) -> str:
    """The text of a file: parquet, JSON lines or plain, the last two gzipped or not. Raises UsageError naming it."""
    if path.suffix == ".parquet":
        return _parquet_text(path)
    raw = _read_bytes(path)
    try:
        text = raw.decode("utf-8")
        if ".json" in path.name:
            # JSON allows every other line separator of Unicode inside its strings.
            text = "\n".join(str(json.loads(line)["text"]) for line in text.split("\n") if line.strip())
            text.encode("utf-8")  # an escape may stand for half a character, which is no text
    except (UnicodeError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UsageError(f"{path} is not UTF-8 text (or JSON lines with a `text` field): {e!s:.200}") from e
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            raw: bytes = f.read(MAX_TEXT + 1)
    except (OSError, EOFError, zlib.error) as e:  # the last two, and BadGzipFile, are what gzip says of damage
        raise UsageError(f"calibration text {path} cannot be read: {e}", hint="fetch or pack it again") from e
    if len(raw) > MAX_TEXT:
        raise UsageError(f"{path} has over {MAX_TEXT >> 30} GiB of text", hint="take a part of it")
    return raw


def _parquet_text(path: Path) -> str:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as e:
        raise UsageError(f"{path.name} is parquet", hint="pip install pyarrow, or name a text file") from e
    try:
        column = parquet.read_table(path, columns=["text"])["text"]
    except (OSError, ValueError, KeyError, NotImplementedError) as e:  # each error of pyarrow is one of these too
        raise UsageError(
            f"{path} is not parquet with a `text` column: {e!s:.200}", hint="name a text file or JSON lines"
        ) from e
    return "\n".join(str(t) for t in column.to_pylist())


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
