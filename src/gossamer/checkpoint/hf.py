"""A Hugging Face folder: config.json and safetensors, whole or in shards, dense or in compressed-tensors form.

Nothing in the folder is run: `auto_map` is dropped, pickles are refused. Nothing but headers is read until a tensor is
asked for, and then only its rows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CorruptCheckpoint, ModelNotFound, ShapeMismatch, UnsupportedModel
from ..formats import (
    Codebook,
    Dense,
    Format,
    Integer,
    Kind,
    KMeans,
    Layout,
    LowRank,
    Sparse,
    layout_from_quantization_config,
)
from ..formats import outliers as outlier_tensors
from ..formats.low_rank import SIDES, local_name
from ..model.families import FAMILIES, OWN_PREFIX
from ..model.pieces import Piece, pieces
from . import pickle_io
from .base import Checkpoint, check_tensors, expected_shapes, parse_config, row_blocks
from .files import has, inside, read_json
from .manifest import FILE_NAME, Manifest, read_manifest, verify_files
from .safetensors_io import MAX_VALUES, SafetensorsFile, TensorInfo, TensorSource

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

MAX_INDEX = 100 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FLOATS = tuple(DTYPES.values())
_HARMLESS = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    r"|(^|\.)(h|layers)\.\d+\.(attn|attention)\.(bias|masked_bias)$"  # a mask that older files carry
)


class HFCheckpoint(Checkpoint):
    """A model folder. Raises ModelNotFound, UnsafeCheckpoint, CorruptCheckpoint, UnsupportedModel."""

    def __init__(self, folder: Path, name: str, *, allow_pickle: bool = False) -> None:
        self.name, self.path = name, folder
        if not has(folder, "config.json"):
            raise ModelNotFound(f"{folder}: no config.json, so not a model folder")
        self.hf_config = normalized(read_json(inside(folder, "config.json")), folder / "config.json")
        manifest = read_manifest(folder)
        if manifest is not None:
            verify_files(folder, manifest)
            self.manifest = _dumped(manifest, folder)
        self._sources = _open_weights(folder, allow_pickle)
        self.dtype = self._float_dtype()
        self._configure(self.hf_config)
        if self.config.tie_embeddings and self._has_another_head():
            # As transformers does: the config says that they are one, the file says otherwise and is believed.
            self._configure({**self.hf_config, "tie_word_embeddings": False})
        self.source_note = self._note(manifest)

    _pieces: dict[str, Piece]
    """Names of tensors that files hold as a part of others, or transposed."""

    def _configure(self, hf_config: dict[str, Any]) -> None:
        """Take this config, and find every tensor that it asks for."""
        self.hf_config = hf_config
        self.config = parse_config(hf_config, len(self._sources), self.path / "config.json")
        self._shapes = expected_shapes(self.config)
        self._pieces = {}
        self._stored_names: dict[str, dict[str, str]] = {}
        self._formats: dict[str, Format] = {}
        self._resolve(self._layout())

    @property
    def _is_own(self) -> bool:
        """True for a folder that says by its model_type that its linear layers are single ones."""
        return str(self.hf_config.get("model_type")).startswith(OWN_PREFIX)

    def _has_another_head(self) -> bool:
        """True if the file holds a head that is not the embedding, though the config ties them."""
        family = FAMILIES[self.config.family]
        embed, head = f"{family.embed}.weight", f"{family.head}.weight"
        if head not in self._sources:
            return False
        info, shape = self._sources[head].info(head), self._shapes[embed]
        if info.shape != shape or info.dtype not in _FLOATS:
            return True
        blocks = (slice(start, stop) for start, stop in row_blocks(0, shape[0], shape[1]))
        return any(
            not torch.equal(self._sources[head].read(head, rows).float(), self.tensor(embed, rows)) for rows in blocks
        )

    def format(self, name: str) -> Format:
        self.shape(name)
        return self._formats[name]

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        shape = self.shape(name)
        if name in self._pieces:
            return {"weight": self._read(name, 0, shape[0])}
        return {local: self._sources[full].read(full) for local, full in self._stored_names[name].items()}

    def stored_sources(self, name: str) -> list[tuple[str, TensorSource, TensorInfo]]:
        """Name in the files (such as `lm_head.weight_packed`), file and place of every tensor that stores this one.

        Several names of a family that holds layers in one tensor have the same.
        """
        self.shape(name)
        found = [(full, self._sources[full]) for full in self._stored_names[name].values()]
        return [(full, source, source.info(full)) for full, source in found]

    def _make_tokenizer(self) -> Tokenizer:
        from .tokenizer import tokenizer_from_folder

        return tokenizer_from_folder(self.path, self.hf_config)

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        form, stored = self._formats[name], self._stored_names[name]
        if name in self._pieces:
            return self._read_piece(self._pieces[name], stored["weight"], start, stop)
        if isinstance(form, Dense):
            full = stored["weight"]
            return self._sources[full].read(full, slice(start, stop))

        def read(local: str, rows: slice) -> torch.Tensor:
            return self._sources[stored[local]].read(stored[local], rows)

        return form.read(self._shapes[name], start, stop, read)

    def _read_piece(self, piece: Piece, full: str, start: int, stop: int) -> torch.Tensor:
        """These rows of a part of a stored tensor."""
        rows = piece.places(start, stop)
        if piece.transposed:
            return self._sources[full].read(full)[:, rows].T.contiguous()
        first = int(rows.min()) if len(rows) else 0
        last = int(rows.max()) + 1 if len(rows) else 0
        return self._sources[full].read(full, slice(first, last))[rows - first]

    def _files(self) -> list[Path]:
        return [self.path / "config.json", *{source.path for source in self._sources.values()}]

    def _contents(self) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        for name in sorted({full for stored in self._stored_names.values() for full in stored.values()}):
            source = self._sources[name]
            info = source.info(name)
            yield f"{name} {info.dtype} {list(info.shape)}", read_blocks(source, name)

    def _float_dtype(self) -> torch.dtype:
        said = self.hf_config.get("dtype") or self.hf_config.get("torch_dtype")
        if said is not None:
            dtype = DTYPES.get(said) if isinstance(said, str) else None
            if dtype is None:
                raise UnsupportedModel(f"{self.path}/config.json: dtype {said!r}", hint="known: " + ", ".join(DTYPES))
            return dtype
        stored = Counter(source.info(name).dtype for name, source in self._sources.items())
        return next((dtype for dtype, _ in stored.most_common() if dtype in _FLOATS), torch.float32)

    def _layout(self) -> Layout:
        quantization = self.hf_config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise CorruptCheckpoint(f"{self.path}/config.json: quantization_config is not an object")
        return layout_from_quantization_config(quantization, self.dtype)

    def _resolve(self, layout: Layout) -> None:
        """Find the files' tensors that store each of the model's; refuse what is missing, mis-shaped or left over."""
        found: dict[str, tuple[int, ...]] = {}
        whole = pieces(self.config)
        for name, shape in self._shapes.items():
            form = self._chosen(layout, name, shape)
            locals_ = self._locals(form, name, shape, whole.get(name))
            if locals_ is None:
                continue
            self._formats[name], self._stored_names[name] = form, locals_
            found[name] = self._check_packed(form, name, shape)
            if isinstance(form, Dense):
                full = locals_["weight"]
                info = self._sources[full].info(full)
                self._formats[name], found[name] = Dense(self._dense_dtype(full, info.dtype)), info.shape
                if name in self._pieces:
                    found[name] = self._piece_shape(name, full, info)
        check_tensors(self._shapes, found, self.path)
        used = {full for stored in self._stored_names.values() for full in stored.values()}
        for name, source in self._sources.items():
            if name not in used and not self._is_harmless(name):
                stray = f"tensor {name!r} {list(source.info(name).shape)} is not one of this model's"
                raise CorruptCheckpoint(f"{self.path}: {stray}")

    def _chosen(self, layout: Layout, name: str, shape: tuple[int, ...]) -> Format:
        if len(shape) != 2 or not name.endswith(".weight"):
            return Dense(self.dtype)
        module = name.removesuffix(".weight")
        ends = FAMILIES[self.config.family].ends
        kind: Kind = "embedding" if module in (ends["embed"], ends.get("positions")) else "linear"
        try:
            form = layout(module, kind)
        except (re.error, TypeError, ValueError, RecursionError) as error:
            raise CorruptCheckpoint(f"{self.path}/config.json: quantization_config: {error}") from error
        return self._as_found(form, module, "weight")

    def _as_found(self, form: Format, module: str, weight: str) -> Format:
        """The format with what config.json does not say: the dtype of the scales, the number of outliers."""
        if isinstance(form, LowRank):
            return replace(form, inner=self._as_found(form.inner, module, "weight_u"))
        if isinstance(form, Sparse):
            inner, numbers = self._as_found(form.inner, module, weight), f"{module}.{form.numbers}"
            found = numbers in self._sources
            return form.found(inner, math.prod(self._sources[numbers].info(numbers).shape)) if found else form
        scale, outliers = f"{module}.{weight}_scale", f"{module}.{outlier_tensors.VALUES}"
        if isinstance(form, Integer | Codebook) and scale in self._sources:
            form = replace(form, scale_dtype=self._sources[scale].info(scale).dtype)
        if isinstance(form, Integer | KMeans) and form.outliers and outliers in self._sources:
            form = replace(form, kept=math.prod(self._sources[outliers].info(outliers).shape))
        return form

    def _piece_shape(self, name: str, full: str, info: TensorInfo) -> tuple[int, ...]:
        """The shape of a tensor that is a part of a stored one, whose own shape is checked."""
        wanted = self._pieces[name].stored_shape
        if info.shape != wanted:
            raise CorruptCheckpoint(
                f"{self.path}: tensor {full!r} has shape {list(info.shape)}, the config expects {list(wanted)}"
            )
        return self._shapes[name]

    def _in_file(self, name: str) -> str | None:
        """The files' name of a tensor: some leave the family's prefix away."""
        short = name.removeprefix(FAMILIES[self.config.family].prefix)
        return next((full for full in (name, short) if full in self._sources), None)

    def _dense_name(self, name: str, piece: Piece | None) -> str | None:
        """The files' name of the tensor that holds this one, alone or among others. Notes which is a piece."""
        own = self._in_file(name)
        if piece is None or (own is not None and self._is_own):
            return own
        full = self._in_file(piece.name)
        if full is None:
            return own
        self._pieces[name] = piece
        return full

    def _locals(self, form: Format, name: str, shape: tuple[int, ...], piece: Piece | None) -> dict[str, str] | None:
        """Local name -> file's name, or None if a tensor is missing."""
        if isinstance(form, Dense):
            full = self._dense_name(name, piece)
            return None if full is None else {"weight": full}
        try:
            expected = form.stored(shape)
        except ShapeMismatch as error:
            raise CorruptCheckpoint(f"{self.path}: tensor {name!r} {list(shape)}: {error.message}") from error
        names = {local: f"{name.removesuffix('.weight')}.{local}" for local in expected}
        for local, full in names.items():
            if full not in self._sources:
                raise CorruptCheckpoint(f"{self.path}: {name!r} is {form.name}, but tensor {full!r} is missing")
            info, (dtype, stored_shape) = self._sources[full].info(full), expected[local]
            if info.shape != stored_shape or info.dtype != dtype:
                raise CorruptCheckpoint(
                    f"{self.path}: tensor {full!r} is {info.dtype} {list(info.shape)}, "
                    f"{form.name} of a weight {list(shape)} needs {dtype} {list(stored_shape)}"
                )
        return names

    def _check_packed(self, form: Format, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the stored tensors of a weight say it has."""
        coded = form.inner if isinstance(form, LowRank) else form.grid
        if isinstance(coded, Integer | Codebook) and not coded.fixed_scales and coded.scale_dtype not in _FLOATS:
            raise CorruptCheckpoint(f"{self.path}: the scales of {name!r} are {coded.scale_dtype}")
        if isinstance(form, LowRank):
            return self._check_factors(form, name, shape)
        full = self._stored_names[name].get("weight_shape")
        if full is None:
            return shape
        said: list[int] = self._sources[full].read(full).tolist()
        return tuple(said)

    def _check_factors(self, form: LowRank, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that two factors have as one, if each says the shape that it must have."""
        for side in SIDES:
            full = self._stored_names[name].get(local_name(side, "weight_shape"))
            said = form.shape(side, shape) if full is None else tuple(self._sources[full].read(full).tolist())
            if said != form.shape(side, shape):
                raise CorruptCheckpoint(
                    f"{self.path}: {full!r} says {list(said)}, {form.name} of a weight {list(shape)} needs "
                    f"{list(form.shape(side, shape))}"
                )
        return shape

    def _dense_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if dtype not in _FLOATS:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} is stored as {dtype}, which config.json does not explain",
                hint="known without a quantization_config: " + ", ".join(DTYPES),
            )
        return dtype

    def _is_harmless(self, name: str) -> bool:
        tied_copy = self.config.tie_embeddings and name == f"{FAMILIES[self.config.family].head}.weight"
        return tied_copy or _HARMLESS.search(name) is not None

    def _note(self, manifest: Manifest | None) -> str | None:
        if manifest is not None:
            note = manifest.base.note
            return f"{DERIVED}{note}" if manifest.recipe and note else note
        packed = Counter(f for f in self._formats.values() if isinstance(f.grid, Integer | Codebook | KMeans))
        packed = packed or Counter(f for f in self._formats.values() if isinstance(f, Sparse))
        if not packed:
            return None
        form = packed.most_common(1)[0][0]
        grid = form.grid
        already = f"{grid.bits}-bit" if isinstance(grid, Integer | Codebook | KMeans) else "sparse"
        return f"stored as {form.name}: already {already}"


def _dumped(manifest: Manifest, folder: Path) -> dict[str, Any]:
    try:
        return manifest.model_dump(mode="json")
    except ValueError as error:  # pydantic writes what is nested some 250 deep, and reads what is deeper
        raise CorruptCheckpoint(f"{folder / FILE_NAME}: values nested too deep to be written again") from error


DERIVED = "made from a baseline "
"""Begins the note of a model that a recipe made; what follows is said of what it was made from."""


def normalized(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """A config.json without code to run, and with its positions said in both ways: `rope_theta`, `rope_parameters`.

    Positions that differ between layers are left as they are said.
    """
    result = {key: value for key, value in config.items() if key not in {"auto_map", "custom_pipelines"}}
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(result.get(key), dict | None):
            raise CorruptCheckpoint(f"{where}: {key} is not an object")
    parameters = dict(result.get("rope_parameters") or result.get("rope_scaling") or {})
    family = str(result.get("model_type")).removeprefix(OWN_PREFIX)
    if family in FAMILIES and FAMILIES[family].local_theta is not None:
        return result
    theta = parameters.get("rope_theta", result.get("rope_theta"))
    if theta is None:
        return result
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    result["rope_theta"] = theta
    result["rope_parameters"] = {**parameters, "rope_theta": theta}
    return result


def read_blocks(source: TensorSource, name: str) -> Iterator[torch.Tensor]:
    """A stored tensor in consecutive row blocks of bounded size."""
    shape = source.info(name).shape
    if len(shape) < 2:
        yield source.read(name)
        return
    columns = source.info(name).nbytes // 4 // max(shape[0], 1)
    for start, stop in row_blocks(0, shape[0], columns):
        yield source.read(name, slice(start, stop))


def _open_weights(folder: Path, allow_pickle: bool) -> dict[str, TensorSource]:
    """Stored tensor name -> the file that holds it."""
    if has(folder, "model.safetensors"):
        return _by_name([SafetensorsFile(inside(folder, "model.safetensors"))])
    if has(folder, "model.safetensors.index.json"):
        return _open_index(folder, "model.safetensors.index.json", (".safetensors",))
    pickles = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in pickles:
        if has(folder, name):
            if not allow_pickle:
                raise pickle_io.refuse(folder / name)
            if name.endswith(".json"):
                return _open_index(folder, name, pickle_io.SUFFIXES)
            return _by_name([pickle_io.PickleFile(inside(folder, name))])
    others = sorted(path for path in folder.iterdir() if path.suffix in pickle_io.SUFFIXES)
    if others and not allow_pickle:
        raise pickle_io.refuse(others[0])
    raise CorruptCheckpoint(
        f"{folder}: no weights", hint="expected model.safetensors, or model.safetensors.index.json and its shards"
    )


def _open_index(folder: Path, index: str, suffixes: tuple[str, ...]) -> dict[str, TensorSource]:
    where = inside(folder, index)
    weight_map = read_json(where, MAX_INDEX, most=MAX_VALUES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(f"{where}: weight_map is not an object of file names")
    shards: dict[str, TensorSource] = {}
    sources: dict[str, TensorSource] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in shards:
            path = inside(folder, shard)
            if not path.name.endswith(suffixes):
                raise CorruptCheckpoint(f"{where}: tensor {name!r} is in {shard!r}, not a {' or '.join(suffixes)} file")
            if not path.is_file():
                raise CorruptCheckpoint(f"{where}: shard {shard!r} is missing from the folder")
            is_safe = path.suffix == ".safetensors"
            shards[shard] = SafetensorsFile(path) if is_safe else pickle_io.PickleFile(path)
        shards[shard].info(name)
        sources[name] = shards[shard]
    return sources


def _by_name(files: list[TensorSource]) -> dict[str, TensorSource]:
    return {name: file for file in files for name in file.names()}
