"""Which format each module is in, said in our own words: for folders that compressed-tensors cannot describe.

    {"quant_method": "gossamer", "version": 1,
     "config_groups": {"group_0": {"targets": [module names], "format": {"type": "nf4", "group_size": 64, ...}}}}
Modules that no group names are dense. Factors say the format of both: {"type": "low-rank", "rank": 96, "inner": {...}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CorruptCheckpoint, GossamerError, UnsupportedModel, did_you_mean
from .base import Format
from .codebook import KINDS, Codebook
from .dense import FLOAT_NAMES, Dense
from .integer import Integer
from .kmeans import KMeans
from .low_rank import LowRank
from .sparse import Sparse
from .tensor_train import TensorTrain

OWN_METHOD = "gossamer"
"""quant_method of a folder that no other tool reads."""
VERSION = 1


def own_config(groups: Mapping[Format, list[str]]) -> dict[str, Any]:
    """The quantization_config that says which modules are in which format."""
    said = {
        f"group_{n}": {"targets": modules, "format": _said(form)} for n, (form, modules) in enumerate(groups.items())
    }
    return {"quant_method": OWN_METHOD, "version": VERSION, "config_groups": said}


def own_formats(config: Mapping[str, Any]) -> dict[str, Format]:
    """Module name -> format, of a quantization_config of ours. Raises UnsupportedModel or CorruptCheckpoint."""
    if config.get("version") != VERSION:
        raise UnsupportedModel(
            f"config.json: quantization_config is version {config.get('version')!r:.20}, this Gossamer reads {VERSION}",
            hint="a newer Gossamer may have written it",
        )
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise CorruptCheckpoint("config.json: quantization_config.config_groups is not an object")
    formats: dict[str, Format] = {}
    for name, group in groups.items():
        where = f"config.json: quantization_config.config_groups.{name}"
        targets, said = (group.get("targets"), group.get("format")) if isinstance(group, dict) else (None, None)
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or not isinstance(said, dict):
            raise CorruptCheckpoint(f"{where} has no list of targets and no format")
        formats |= dict.fromkeys(targets, _format(where, said))
    return formats


def _said(form: Format) -> dict[str, Any]:
    if isinstance(form, Integer):
        share = form.outlier_share if form.outliers else None
        said = {"bits": form.bits, "group_size": form.group_size, "symmetric": form.symmetric, "outlier_share": share}
        return {"type": "int", **said}
    if isinstance(form, Codebook):
        return {"type": form.kind, "group_size": form.group_size, "double_quant": form.double_quant}
    if isinstance(form, LowRank):
        return {"type": "low-rank", "rank": form.rank, "inner": _said(form.inner)}
    if isinstance(form, Sparse):
        return {"type": "sparse", "sparsity": form.sparsity, "inner": _said(form.inner)}
    if isinstance(form, TensorTrain):
        return {"type": "tensor-train", "modes": list(form.modes), "ranks": list(form.ranks), "dtype": form.dtype_name}
    if isinstance(form, Dense):
        return {"type": "float", "dtype": form.name}
    assert isinstance(form, KMeans)
    return {"type": "kmeans", "bits": form.bits, "outlier_share": form.outlier_share}


_SIZE = (int, type(None))
_SHARE = (float, int, type(None))
_KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "int": {"bits": (int,), "group_size": _SIZE, "symmetric": (bool,), "outlier_share": _SHARE},
    "kmeans": {"bits": (int,), "outlier_share": (float, int)},
    "float": {"dtype": (str,)},
    "low-rank": {"rank": (int,), "inner": (dict,)},
    "sparse": {"sparsity": (float, int), "inner": (dict,)},
    "tensor-train": {"modes": (list,), "ranks": (list,), "dtype": (str,)},
    **{kind: {"group_size": _SIZE, "double_quant": (bool,)} for kind in KINDS},
}
"""Type of a format -> the keys that say which it is, and their types; all must be there, and no others."""


def _format(where: str, said: dict[str, Any]) -> Format:
    kind = said.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        hint = did_you_mean(str(kind), _KEYS)
        raise UnsupportedModel(f"{where}.format.type {kind!r:.80} is not supported", hint=hint)
    values = {key: value for key, value in said.items() if key != "type"}
    for key in sorted(_KEYS[kind].keys() | values.keys()):
        if key not in values or type(values[key]) not in _KEYS[kind].get(key, ()):
            raise CorruptCheckpoint(f"{where}.format: {key} is {values.get(key, 'missing')!r:.80}")
    if kind == "low-rank":
        if values["inner"].get("type") == kind:  # before it is followed down, however deep it goes
            raise CorruptCheckpoint(f"{where}.format: factors of factors are no format")
        values["inner"] = _format(f"{where}.format.inner", values["inner"])
    size = values.get("group_size")
    if size is not None and size < 1:
        raise CorruptCheckpoint(f"{where}.format: group_size is {size}")
    if kind == "sparse":
        if values["inner"].get("type") not in ("float", "int"):  # the one format in another: nothing nests deeper
            raise UnsupportedModel(f"{where}.format.inner.type {values['inner'].get('type')!r:.80} is not supported")
        values["inner"] = _format(f"{where}.format.inner", values["inner"])
    try:
        return _made(kind, values)
    except GossamerError as error:
        raise CorruptCheckpoint(f"{where}.format: {error.message}") from error


def _made(kind: str, values: dict[str, Any]) -> Format:
    if kind == "low-rank":
        return LowRank(values["rank"], values["inner"])
    if kind == "float":
        return Dense(_dtype(values["dtype"]))
    if kind == "tensor-train":
        return TensorTrain(_counts(values["modes"]), _counts(values["ranks"]), _dtype(values["dtype"]))
    if kind == "kmeans":
        return KMeans(values["bits"], values["outlier_share"])
    if kind == "sparse":
        return Sparse(values["inner"], values["sparsity"])
    if kind in KINDS:
        return Codebook(kind, values["group_size"], values["double_quant"])
    share = values["outlier_share"]
    return Integer(
        values["bits"],
        values["group_size"],
        values["symmetric"],
        outliers=share is not None,
        outlier_share=share or 0.0,
    )


def _dtype(name: str) -> torch.dtype:
    found = next((dtype for dtype, known in FLOAT_NAMES.items() if known == name), None)
    if found is None:
        raise CorruptCheckpoint(f"dtype is {name!r:.80}, not {', '.join(FLOAT_NAMES.values())}")
    return found


def _counts(values: list[Any]) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise CorruptCheckpoint(f"{values!r:.80} is not a list of numbers")
    return tuple(values)
