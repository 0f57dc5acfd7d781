"""What llama.cpp calls the tensors of each family, and what its GGUF files say differently from a config.json.

Layers that read the same input lie in one tensor in some families, their rows one after another. Norm weights of Gemma
have the 1 added that its own files leave to the model. Knows names and metadata; reads no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..model import FAMILIES
from ..model.families import Family
from .gguf_header import Metadata

ENDS = {
    "token_embd": "embed",
    "position_embd": "positions",
    "token_embd_norm": "embed_norm",
    "output_norm": "final_norm",
    "output": "head",
}
BLOCK = {
    "attn_norm": "attn_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "post_attention_norm": "attn_post_norm",
    "ffn_norm": "ffn_norm",
    "post_ffw_norm": "ffn_post_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
"""Name of a tensor -> role."""
_QKV = {"attn_qkv": ("q", "k", "v")}
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def _nothing(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """A value of general.architecture."""

    name: str
    family: Family
    activation: str | None = "silu"
    epsilon: str = _RMS
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of a tensor -> roles of the layers in it."""
    grouped: bool = True
    """Several query heads may share a key-value head."""
    scalings: bool = False
    """Rotary frequencies may be scaled."""
    more: Callable[[Metadata, str, Mapping[str, Any]], dict[str, Any]] = _nothing
    """What else config.json says."""


def _qwen(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _gemma(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    # As llama.cpp has it, which knows the largest model of each family by its number of layers.
    largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[arch]
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": meta.integer(f"{arch}.attention.sliding_window"),
        "attn_logit_softcapping": meta.number(f"{arch}.attn_logit_softcapping"),
        "final_logit_softcapping": meta.number(f"{arch}.final_logit_softcapping"),
    }


def _gemma3(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    local = meta.number(f"{arch}.rope.freq_base_swa", 10000.0)
    both = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return {**_gemma(meta, arch, config), "rope_parameters": both, "rope_local_base_freq": local}


def _phi3(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    window = meta.integer(f"{arch}.attention.sliding_window")
    return {"sliding_window": window or None, **_partial(meta, arch, config, "partial_rotary_factor")}


def _neox(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    parallel = meta.flag(f"{arch}.use_parallel_residual", True)
    return {"use_parallel_residual": parallel, **_partial(meta, arch, config, "rotary_pct")}


def _partial(meta: Metadata, arch: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    columns = meta.integer(f"{arch}.rope.dimension_count", config["head_dim"]) or config["head_dim"]
    share = columns / config["head_dim"]
    return {key: share, "rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": share}}


_ROWS = (
    Architecture("llama", FAMILIES["llama"], scalings=True),
    Architecture("qwen2", FAMILIES["qwen2"], scalings=True, more=_qwen),
    Architecture("qwen3", FAMILIES["qwen3"], scalings=True, more=_qwen),
    Architecture("gemma2", FAMILIES["gemma2"], "gelu_pytorch_tanh", more=_gemma),
    Architecture("gemma3", FAMILIES["gemma3_text"], "gelu_pytorch_tanh", scalings=True, more=_gemma3),
    Architecture("phi3", FAMILIES["phi3"], fused={**_QKV, "ffn_up": ("gate", "up")}, more=_phi3),
    Architecture("gpt2", FAMILIES["gpt2"], "gelu_new", _LAYER, _QKV, grouped=False),
    Architecture("gptneox", FAMILIES["gpt_neox"], "gelu", _LAYER, _QKV, grouped=False, more=_neox),
    Architecture("bloom", FAMILIES["bloom"], None, _LAYER, _QKV, grouped=False),
)
ARCHITECTURES = {row.name: row for row in _ROWS}
