"""Tiny models to prune, in which some parts do nothing, and what tests of pruning ask of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.method import Reducer
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import Recipe, parse_recipe
from gossamer.compress.source import Source
from gossamer.model import FAMILIES
from gossamer.model.decoder import Decoder
from tiny_llama import make_folder

SHAPE = {
    "hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16,
}  # fmt: skip
DEAD = {0: ([1], range(32)), 1: ([], range(1, 96, 3)), 2: ([0], range(64, 96))}
"""Layer -> key-value heads and channels that do nothing, where some are planted."""
GROUP, CHANNEL = 6 * 16 * 96, 3 * 96
"""Weights of a key-value head with its two query heads, and of a channel."""


def make_model(folder: Path, dead: dict[int, Any] | None = None, layers: tuple[int, ...] = (), **changes: Any) -> Path:
    """A tiny model with norms and biases that are not plain; these heads, channels or whole layers add nothing."""
    make_folder(folder, **{**SHAPE, **changes})
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 + 0.2)
    shape = {**SHAPE, **changes}
    width = shape["head_dim"] * shape["num_attention_heads"] // shape["num_key_value_heads"]
    for i, (groups, channels) in (dead or {}).items():
        for group in groups:
            tensors[name("o", i)][:, group * width : (group + 1) * width] = 0
        tensors[name("down", i)][:, list(channels)] = 0
    for i in layers:
        for role in ("o", "down"):
            tensors[name(role, i)].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def name(role: str, i: int, kind: str = "weight") -> str:
    return f"{FAMILIES['llama'].module(role, i)}.{kind}"


def tokens(sequences: int = 4, length: int = 24) -> Tensor:
    return torch.randint(0, 300, (sequences, length), generator=torch.Generator().manual_seed(0))


def calibration() -> Calibration:
    text = tokens()
    record = {"kind": "self", "sha256": token_hash(text), "sequences": 4, "length": 24, "seed": 0}
    return Calibration(text, {**record, "line_hashes": [], "details": {"source": "self"}})


def recipe(*stages: dict[str, Any]) -> Recipe:
    return parse_recipe({"version": 1, "name": "r", "stages": list(stages)}, "test")


def prune(model: Path, out: Path, *stages: dict[str, Any]) -> Checkpoint:
    """The model that a recipe of these stages makes."""
    compress(open_checkpoint(model), recipe(*stages), out, calibration())
    return open_checkpoint(out)


def decide(model: Path, method: type[Reducer], **options: Any) -> dict[str, Tensor]:
    """What a reducer decides that only asks for the source."""
    reducer = method(method.options_class().model_validate(options))
    units: Any = SimpleNamespace(source=Source(open_checkpoint(model)))
    return reducer.decide(units, tokens(), lambda *_: None)


def logits(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Tensor:
    decoder: Decoder = load_decoder(checkpoint, dtype)
    return decoder(torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(2)))


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest error of any logit, over their spread."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.std())


def inputs(checkpoint: Checkpoint) -> dict[tuple[int, str], Tensor]:
    """What o and down of each layer read for the calibration, float64 [tokens, in]."""
    decoder = load_decoder(checkpoint, torch.float64)
    seen: dict[tuple[int, str], Tensor] = {}
    for i, block in enumerate(decoder.blocks):
        for role in ("o", "down"):

            def note(module: Any, args: tuple[Tensor], key: tuple[int, str] = (i, role)) -> None:
                seen[key] = args[0].flatten(0, 1)

            getattr(block, role).register_forward_pre_hook(note)
    decoder(tokens())
    return seen


def block_weights(checkpoint: Checkpoint) -> int:
    """Weights of the blocks' linear layers."""
    shapes = [checkpoint.shape(n) for n in checkpoint.names() if ".layers." in n and n.endswith("weight")]
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
