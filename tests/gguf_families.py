"""Tiny models of every family that llama.cpp knows, saying only what it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import tiny_families
from gossamer.checkpoint import open_checkpoint
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import parse_recipe

_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
_FULL = ["full_attention"] * 3
_CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
_SCALAR = {"query_pre_attn_scalar": 16}
"""llama.cpp takes it from the width of a head."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-scaled": ("llama", {"rope_parameters": _LINEAR, "attention_bias": True}),
    "mistral": ("llama", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-scaled": ("qwen2", {"rope_parameters": _LINEAR}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", _SCALAR | _CAPS),
    "gemma2-scaled": (
        "gemma2",
        _SCALAR | {"rope_parameters": _LINEAR, "layer_types": [*_FULL[:2], "sliding_attention"]},
    ),
    "gemma2-full": ("gemma2", _SCALAR | {"layer_types": _FULL}),
    "gemma3_text": ("gemma3", _SCALAR),
    "gemma3_text-full": ("gemma3", _SCALAR | {"layer_types": _FULL}),
    "gemma3_text-untied": ("gemma3", _SCALAR),
    "phi3": ("phi3", {}),
    "phi3-half": ("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {}),
    "gpt_neox": ("gptneox", {}),
    "gpt_neox-sequential": ("gptneox", {}),
    "gpt_neox-scaled": ("gptneox", {"rope_parameters": _LINEAR | {"partial_rotary_factor": 0.5}}),
    "bloom": ("bloom", {}),
    "bloom-12-heads": ("bloom", {}),
}
"""Name, which begins with the model_type -> architecture of its file, and what its config.json says besides."""


def make_model(folder: Path, name: str, **config: Any) -> Any:
    """Save a tiny model with its tokenizer; returns transformers' own."""
    said = tiny_families.VARIANTS.get(name, tiny_families.VARIANTS[name.split("-")[0]])
    said = said | FAMILIES.get(name, ("", {}))[1] | config
    with mock.patch.dict(tiny_families.VARIANTS, {name: said}):
        return tiny_families.make_family(folder, name)


def make_rounded(folder: Path, name: str, config: dict[str, Any] | None = None, **stage: Any) -> Path:
    """A tiny model in bfloat16 whose layers are rounded to nearest as the stage says."""
    source = folder.with_name(f"{folder.name}-float")
    make_model(source, name, **(config or {})).bfloat16().save_pretrained(source)
    recipe = {"version": 1, "name": "rounded", "stages": [{"method": "rtn", **stage}]}
    compress(open_checkpoint(source), parse_recipe(recipe, "test"), folder)
    return folder
