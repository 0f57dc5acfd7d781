"""A checkpoint as an ordinary Hugging Face folder, complete or absent. Knows no method: nothing is changed on the way.

Quantized tensors of a folder are copied as they are stored; GGML blocks, which the folder cannot say, become floats.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .. import __version__
from ..errors import OutputExists
from ..model import ModelConfig
from ..model.pieces import Piece, join, pieces
from .atomic import Lock, atomic_folder, write_file
from .base import Checkpoint, row_blocks
from .files import has, inside, read_json
from .hf import HFCheckpoint, read_blocks
from .manifest import Manifest, base_of, hash_files, write_manifest
from .safetensors_io import Entry, write_safetensors

Progress: TypeAlias = Callable[[str, int, int], None]
"""progress(label, done, total)."""
SHARD_BYTES = 5 * 10**9


def save_folder(
    checkpoint: Checkpoint, out: str | Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
) -> Path:
    """Write config, weights, tokenizer and gossamer.json; transformers loads the result. Same bytes for the same input.

    Raises OutputExists, OutputLocked, DoesNotFit.
    """
    out = Path(out)
    if out.exists():
        raise OutputExists(f"{out} exists already", hint="choose another --out, or remove it first")
    with Lock(out), atomic_folder(out) as folder:
        write_config(folder, checkpoint.hf_config)
        write_companions(folder, checkpoint)
        tensors = list({e.name: e for name in checkpoint.names() for e in entries(checkpoint, name)}.values())
        if not isinstance(checkpoint, HFCheckpoint):
            tensors = fused(checkpoint.config, tensors)
        write_weights(folder, tensors if progress is None else told(tensors, progress), shard_bytes)
        write_manifest(folder, _manifest(checkpoint, hash_files(folder)))
    return out


def told(tensors: Sequence[Entry], progress: Progress) -> list[Entry]:
    """The same tensors, each of which calls `progress("writing", done, total)` when it has been written."""
    written = count(1)  # a file has an order of its own

    def chunks(entry: Entry) -> Iterator[torch.Tensor]:
        yield from entry.chunks()
        progress("writing", next(written), len(tensors))

    return [entry._replace(chunks=partial(chunks, entry)) for entry in tensors]


def entries(checkpoint: Checkpoint, name: str) -> list[Entry]:
    """One tensor of the model as it goes into a folder: as stored if it came from one, else in the float dtype."""
    if isinstance(checkpoint, HFCheckpoint):
        return [
            Entry(full, info.dtype, info.shape, lambda source=source, full=full: read_blocks(source, full))  # type: ignore[misc]
            for full, source, info in checkpoint.stored_sources(name)
        ]
    return [Entry(name, checkpoint.dtype, checkpoint.shape(name), lambda: dense_blocks(checkpoint, name))]


def fused(config: ModelConfig, tensors: Sequence[Entry]) -> list[Entry]:
    """The same float tensors as the family's files hold them: those that are one there are joined when written."""
    places, found = pieces(config), dict[str, list[Entry]]()
    for entry in tensors:
        found.setdefault(places[entry.name].name if entry.name in places else entry.name, []).append(entry)
    whole = []
    for name, parts in found.items():
        piece = places.get(parts[0].name)
        if piece is None:
            whole += parts
        else:
            joined = partial(_joined, parts, places)
            whole.append(Entry(name, parts[0].dtype, piece.stored_shape, joined))
    return whole


def _joined(parts: Sequence[Entry], places: Mapping[str, Piece]) -> Iterator[torch.Tensor]:
    yield join({part.name: torch.cat(list(part.chunks())) for part in parts}, places)


def dense_blocks(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """The dequantized tensor in the checkpoint's float dtype, in row blocks of bounded size."""
    shape = checkpoint.shape(name)
    columns = shape[1] if len(shape) > 1 else 1
    for start, stop in row_blocks(0, shape[0], columns):
        yield checkpoint.tensor(name, slice(start, stop), checkpoint.dtype)


def write_config(folder: Path, hf_config: dict[str, Any]) -> None:
    """config.json, without code to run."""
    write_file(folder / "config.json", _json({key: v for key, v in hf_config.items() if key != "auto_map"}))


def write_companions(folder: Path, checkpoint: Checkpoint) -> None:
    """Tokenizer files and generation_config.json."""
    tokenizer = checkpoint.tokenizer()
    tokenizer.save(folder)
    generation: dict[str, Any] = {}
    if isinstance(checkpoint, HFCheckpoint) and has(checkpoint.path, "generation_config.json"):
        generation = read_json(inside(checkpoint.path, "generation_config.json"))
    generation["eos_token_id"] = sorted(tokenizer.eos_ids)
    if tokenizer.bos_id is not None:
        generation["bos_token_id"] = tokenizer.bos_id
    if tokenizer.pad_id is not None:
        generation["pad_token_id"] = tokenizer.pad_id
    write_file(folder / "generation_config.json", _json(generation))


def write_weights(folder: Path, tensors: Sequence[Entry], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """model.safetensors, or shards of at most `shard_bytes` (or one tensor) and their index; file name -> sha256."""
    shards: list[list[Entry]] = [[]]
    for entry in tensors:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        return {"model.safetensors": write_safetensors(folder / "model.safetensors", shards[0])}
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        hashes[name] = write_safetensors(folder / name, shard)
        weight_map |= {entry.name: name for entry in shard}
    index = {"metadata": {"total_size": sum(e.nbytes for e in tensors)}, "weight_map": weight_map}
    write_file(folder / "model.safetensors.index.json", _json(index))
    return hashes


def versions() -> dict[str, str]:
    """What the bytes of an artifact may depend on."""
    return {"gossamer": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _manifest(checkpoint: Checkpoint, files: dict[str, str]) -> Manifest:
    if checkpoint.manifest is not None:  # a copy of an artifact is still made from what the artifact was made from
        return Manifest.model_validate({**checkpoint.manifest, "files": files})
    base = base_of(checkpoint.name, checkpoint.fingerprint(), checkpoint.source_note, None)
    return Manifest(base=base, versions=versions(), files=files)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
