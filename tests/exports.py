"""Tiny artifacts of any format, random codes and all, and the way they are exported in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from format_codes import random_codes
from gossamer.checkpoint import open_checkpoint
from gossamer.export.base import Options
from gossamer.export.run import Proving, export
from gossamer.formats import Dense, Format, LowRank, Sparse, only_ours, quantization_config
from gossamer.formats.low_rank import dense_factors
from gossamer.model import OWN_PREFIX
from tiny_llama import make_folder

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 320, "num_hidden_layers": 2}
"""Every width is a multiple of 64, so that groups of any usual size fit."""


def make_artifact(
    folder: Path,
    form: Format | None = None,
    *,
    forms: dict[str, Format] | None = None,
    ends: Format | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **config: Any,
) -> Path:
    """A model whose linear layers are in `form`, or as `forms` says by role, and its embedding and head in `ends`."""
    make_folder(folder, **{**SHAPE, "torch_dtype": str(dtype).removeprefix("torch."), **config})
    tensors, formats, kinds = {}, {}, {}
    for i, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        role = module.rpartition(".")[2].removesuffix("_proj")
        inner = ".layers." in name
        stored = (forms or {}).get(role, form) if inner else ends
        if tensor.dim() == 1 or stored is None or isinstance(stored, Dense):
            tensors[name] = tensor.to(dtype)
            continue
        formats[module], kinds[module] = stored, "linear" if inner or role == "lm_head" else "embedding"
        tensors |= {f"{module}.{local}": t for local, t in packed(stored, tensor, i).items()}
    said = json.loads((folder / "config.json").read_text())
    if formats:
        said["quantization_config"] = quantization_config(formats, kinds, "lm_head")
        if only_ours(formats, kinds):
            said["model_type"] = OWN_PREFIX + said["model_type"]
    (folder / "config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def packed(form: Format, weight: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Stored tensors: random codes, the weight as sparse floats, or its first rows and ones as factors."""
    if isinstance(form, LowRank):
        return dense_factors(form, torch.ones(weight.shape[0], form.rank), weight[: form.rank])
    if isinstance(form, Sparse) and isinstance(form.inner, Dense):
        return form.compress(torch.where(weight.abs() < 0.1, 0.0, weight))
    return form.pack(random_codes(form, *weight.shape, seed=seed))


def run_export(
    model: Path | str, target: str, out: Path, *, proving: Proving | None = None, **options: Any
) -> dict[str, Any]:
    """Export without a word; the engine is not run unless `proving` says so."""
    return export(
        open_checkpoint(model), target, out, Options(**options), proving or Proving(engine=False), lambda *_: None
    )
