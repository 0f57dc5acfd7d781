"""Folders whose weights are two factors, or whose embedding is a tensor train: random ones, made of dense folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.compress.factorize.quantized import quantize_factors
from gossamer.compress.method import QuantizeOptions
from gossamer.compress.quantize.rtn import RTN
from gossamer.formats import Dense, Format, LowRank, TensorTrain, quantization_config
from gossamer.formats.low_rank import dense_factors
from gossamer.model import OWN_PREFIX


def factors(shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=g) * 0.2, torch.randn(rank, shape[1], generator=g) * 0.2


def stored(form: LowRank, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    u, v = factors(shape, form.rank, seed)
    if isinstance(form.inner, Dense):
        return dense_factors(form, u, v)
    return quantize_factors(RTN(QuantizeOptions()), form, u, v, None)


def write(source: Path, folder: Path, forms: dict[str, Format]) -> dict[str, dict[str, Tensor]]:
    """A copy of a dense folder in which these modules are in these formats; what stores them."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors, written = dict(load_file(source / "model.safetensors")), {}
    for i, (module, form) in enumerate(forms.items()):
        weight = tensors.pop(f"{module}.weight")
        if isinstance(form, LowRank):
            written[module] = stored(form, tuple(weight.shape), i)
        else:
            assert isinstance(form, TensorTrain)
            written[module] = form.decompose(weight)
        tensors |= {f"{module}.{local}": tensor for local, tensor in written[module].items()}
    config = json.loads((source / "config.json").read_text())
    kinds = {m: "embedding" if m.endswith("embed_tokens") else "linear" for m in forms}
    config["quantization_config"] = quantization_config(forms, kinds, "lm_head")
    config["model_type"] = OWN_PREFIX + config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return written


def linears(source: Path) -> list[str]:
    names = [n.removesuffix(".weight") for n in load_file(source / "model.safetensors")]
    return [n for n in names if n.endswith("_proj")]
