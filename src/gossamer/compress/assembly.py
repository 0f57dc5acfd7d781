"""Puts the finished units of a run together: an ordinary model folder, complete or absent.

Knows units, the recipe that it records, and the folder's layout; computes nothing.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.atomic import atomic_folder, write_file
from ..checkpoint.manifest import Calibration as CalibrationRecord
from ..checkpoint.manifest import Manifest, base_of, hash_files, write_manifest
from ..checkpoint.safetensors_io import Entry, SafetensorsFile, whole, write_safetensors
from ..checkpoint.save import dense_blocks, entries, fused, told, write_companions, write_config, write_weights
from ..formats import Dense, only_ours, quantization_config
from ..model import OWN_PREFIX, tensor_names
from ..model.pieces import pieces
from .calibration import Calibration
from .recipe import Recipe
from .tuning import FILE_PREFIX
from .units import Units

CALIBRATION_FILE = "calibration.safetensors"
Progress = Callable[[str, int, int], None]


def assemble(
    out: Path,
    replaced: Path,
    units: Units,
    recipe: Recipe,
    base: Checkpoint,
    calibration: Calibration | None,
    results: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write the output beside its place; one that is overwritten keeps its name until the new one is whole.

    `base` is the checkpoint that the run began with, before any transform. Raises DoesNotFit.
    """
    with atomic_folder(out, replaced=replaced) as folder:
        config, tensors = _hf_config(units), list(_entries(units))
        own = config["model_type"].startswith(OWN_PREFIX)  # which says that linear layers are single tensors
        write_config(folder, config)
        write_companions(folder, base)
        write_weights(folder, told(tensors if own else fused(units.source.config, tensors), progress))
        for name, content in _files(units):
            write_file(folder / name, content)
        if calibration is not None:
            tokens = calibration.tokens.to(torch.int32).contiguous()
            write_safetensors(folder / CALIBRATION_FILE, [whole("tokens", tokens)])
        manifest = Manifest(
            base=base_of(base.name, base.fingerprint(), base.source_note, base.manifest),
            recipe=recipe.canonical(),
            seed=recipe.calibration.seed if calibration else None,
            calibration=None if calibration is None else CalibrationRecord(**calibration.record),
            versions=versions(),
            files=hash_files(folder),
            results=dict(results),
        )
        write_manifest(folder, manifest)


def write_student(folder: Path, units: Units, base: Checkpoint, trained: Mapping[str, Tensor]) -> None:
    """A model in training as a folder that an engine can open; `trained`: its tensors that are not those of units."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_config(folder, _hf_config(units))
    write_companions(folder, base)
    found = [whole(e.name, trained[e.name]) if e.name in trained else e for e in _entries(units)]
    write_weights(folder, found)


def versions() -> dict[str, str]:
    """What the bytes of an artifact depend on besides model, recipe and tokens."""
    packages = {name: version(name) for name in ("torch", "compressed-tensors", "safetensors", "tokenizers")}
    threads = str(torch.get_num_threads())
    return {"gossamer": __version__, "python": platform.python_version(), "threads": threads, **packages}


def _hf_config(units: Units) -> dict[str, Any]:
    source, plan, family = units.source, units.plan, units.source.family
    config = dict(source.checkpoint.hf_config)
    config["quantization_config"] = quantization_config(plan.formats, plan.kinds, family.head)
    # Others would read noise, or stop amid loading: a name they refuse is safer.
    unlike = only_ours(plan.formats, plan.kinds) or (_packs(units) and pieces(source.config))
    if unlike or config.get("gossamer_layers"):
        config["model_type"] = OWN_PREFIX + source.config.family
        config["architectures"] = [f"Gossamer{family.architecture}"]
    else:  # the base may have been such a folder
        config["model_type"], config["architectures"] = source.config.family, [family.architecture]
    return config


def _entries(units: Units) -> Iterator[Entry]:
    """Every stored tensor of the output, in the model's order, read when written."""
    files, checkpoint = units.where(), units.source.checkpoint
    for name, shape in tensor_names(units.source.config).items():
        module = name.removesuffix(".weight")
        form = units.plan.formats.get(module, Dense()) if name.endswith(".weight") else Dense()
        if not isinstance(form, Dense):
            locals_ = units.locals(files, module)
            if not locals_:  # no stage of this part has touched it: as it is stored in what the part was given
                yield from entries(checkpoint, name)
            for local in locals_:
                full = f"{module}.{local}"
                info = files[full].info(full)
                yield Entry(full, info.dtype, info.shape, _chunks(files[full], full))
        elif name in files:
            info = files[name].info(name)
            yield Entry(name, info.dtype, info.shape, _chunks(files[name], name))
        else:
            yield Entry(name, checkpoint.dtype, shape, partial(dense_blocks, checkpoint, name))


def _packs(units: Units) -> bool:
    """False if all weights are dense."""
    return any(not isinstance(form, Dense) for form in units.plan.formats.values())


def _files(units: Units) -> Iterator[tuple[str, bytes]]:
    """What tuners add to the folder."""
    for name, file in units.where().items():
        if name.startswith(FILE_PREFIX):
            yield name.removeprefix(FILE_PREFIX), file.read(name).numpy().tobytes()


def _chunks(file: SafetensorsFile, name: str) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter((file.read(name),))
