"""MLC-LLM's parameters of each family: their names and rows as its loaders make them out of Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exports import run_export
from gguf_families import make_model, make_rounded
from gossamer.checkpoint import open_checkpoint
from gossamer.errors import ExportError, ProofFailed
from gossamer.export import mlc

NAMES = {
    "qwen2": ("self_attn.c_attn.weight", "self_attn.c_attn.bias", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight"),
    "qwen3": ("self_attn.c_attn.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.down_proj.weight"),
    "qwen3-biases": ("self_attn.c_attn.bias", "self_attn.o_proj.bias"),
    "phi3": ("mixer.qkv_proj.weight", "mixer.out_proj.weight", "ln.weight", "post_attention_layernorm.weight"),
    "phi3-half": ("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
    "gpt2": ("attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "mlp.c_fc.bias", "ln_1.bias"),
    "gpt_neox": ("attention.query_key_value.weight", "attention.query_key_value.bias", "attention.dense.weight"),
    "gpt_neox-sequential": ("mlp.dense_h_to_4h.weight", "post_attention_layernorm.bias"),
}
"""Family -> names of a block that its loader in MLC-LLM has (python/mlc_llm/model/*/*_loader.py)."""
_QWEN = {"model.embed_tokens.weight", "model.norm.weight"}
_PHI3 = {"transformer.embd.weight", "transformer.norm.weight"}
_GPT2 = {f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
_NEOX = {f"gpt_neox.{name}" for name in ("embed_in.weight", "final_layer_norm.weight", "final_layer_norm.bias")}
ENDS = {
    "qwen2": _QWEN | {"lm_head.weight"},
    "qwen3": _QWEN,
    "qwen3-biases": _QWEN | {"lm_head.weight"},
    "phi3": _PHI3 | {"lm_head.weight"},
    "phi3-half": _PHI3,
    "gpt2": _GPT2 | {"lm_head.weight"},
    "gpt_neox": _NEOX | {"embed_out.weight"},
    "gpt_neox-sequential": _NEOX | {"embed_out.weight"},
}
"""Those outside of blocks. GPT-2 and GPT-NeoX have a head there even if it is the embedding."""
SETTINGS = {
    "qwen2": {"hidden_act": "silu", "num_key_value_heads": 2, "rope_theta": 10000.0},
    "qwen3": {"attention_bias": False, "head_dim": 24, "tie_word_embeddings": True},
    "phi3-half": {"model_type": "phi3", "partial_rotary_factor": 0.5, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 256, "layer_norm_epsilon": 1e-5},
    "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True, "layer_norm_eps": 1e-5},
}


def records(folder: Path) -> dict[str, dict[str, Any]]:
    index = json.loads((folder / "tensor-cache.json").read_text())
    return {record["name"]: record for shard in index["records"] for record in shard["records"]}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_names_of_its_loader(tmp_path, name) -> None:
    make_model(tmp_path / "m", name)
    assert run_export(tmp_path / "m", "mlc", tmp_path / "out")["weights"]["max_abs_error"] == 0.0
    found = set(records(tmp_path / "out"))
    block = "transformer.h.1." if name.startswith(("phi3", "gpt2")) else "model.layers.1."
    block = "gpt_neox.layers.1." if name.startswith("gpt_neox") else block
    assert {block + local for local in NAMES[name]} <= found
    assert {n for n in found if ".layers." not in n and ".h." not in n} == ENDS[name]
    said = json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text())
    assert said["model_type"] == name.split("-")[0]
    assert said["model_config"].items() >= SETTINGS.get(name, {}).items()


def test_rows_of_gpt_neox_are_those_that_its_loader_makes(tmp_path) -> None:
    """The rule of gpt_neox_loader.py: three thirds of each head, then all first, all second, all third ones."""
    oracle = make_model(tmp_path / "m", "gpt_neox")
    run_export(tmp_path / "m", "mlc", tmp_path / "out")
    reader = mlc.MLCReader(tmp_path / "out", open_checkpoint(tmp_path / "m"))
    for part in ("weight", "bias"):
        theirs = oracle.state_dict()[f"gpt_neox.layers.2.attention.query_key_value.{part}"]
        thirds = theirs.reshape(4, 3 * 16, -1).split(16, dim=1)
        expected = torch.cat(thirds).reshape(theirs.shape)
        assert torch.equal(reader._array(f"gpt_neox.layers.2.attention.query_key_value.{part}"), expected)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_codes_of_each_family_stay_what_they_are(tmp_path, name) -> None:
    model = make_rounded(tmp_path / "m", name, bits=4, group_size=32)
    record = run_export(model, "mlc", tmp_path / "out", layout="q4f32_1")
    assert not [name for name in record["rounded"] if ".layers." in name or ".h." in name]
    assert any(name.endswith("q_weight") for name in records(tmp_path / "out"))


def test_biases_that_are_wide_stay_wide(tmp_path) -> None:
    make_model(tmp_path / "m", "gpt_neox")
    record = run_export(tmp_path / "m", "mlc", tmp_path / "out", layout="q0f16")
    found = records(tmp_path / "out")
    assert found["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"]["dtype"] == "float32"
    assert found["gpt_neox.layers.0.attention.dense.bias"]["dtype"] == "float16"
    assert "gpt_neox.layers.0.mlp.dense_h_to_4h.bias" not in record["rounded"]


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("gemma2", {}, "gemma2 .* no soft caps"),
        ("bloom", {}, "no BLOOM"),
        ("phi3", {"sliding_window": 16}, "sliding windows"),
        ("qwen2-scaled", {}, "no rotary scaling linear"),
        ("qwen2", {"head_dim": 8}, "as wide as the model"),
        ("gpt2", {"activation_function": "relu"}, "the activation relu"),
        ("gpt_neox", {"attention_bias": False}, "biases at q k v o up down, and not at down up"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_mlc_would_misread_is_refused(tmp_path, name, config, why) -> None:
    make_model(tmp_path / "m", name, **config)
    with pytest.raises(ExportError, match=why):
        run_export(tmp_path / "m", "mlc", tmp_path / "out")


def test_rows_in_a_wrong_place_are_caught(tmp_path, monkeypatch) -> None:
    make_model(tmp_path / "m", "phi3")
    right = mlc.MLCExport._floats
    monkeypatch.setattr(mlc.MLCExport, "_floats", lambda s, names, dtype: right(s, names[::-1], dtype))
    with pytest.raises(ProofFailed, match="q_proj"):
        run_export(tmp_path / "m", "mlc", tmp_path / "out")
