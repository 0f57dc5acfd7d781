"""One tiny random model of every family, made by transformers and saved as it saves: folders to open, and oracles."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tiny_llama import make_tokenizer

_WIDE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_LLAMA = _WIDE | {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
_LAYERS = ["full_attention", "sliding_attention", "full_attention"]
_WINDOW = {"use_sliding_window": True, "sliding_window": 16}
_GEMMA = _LLAMA | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 24}
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
_NEOX = _WIDE | {"intermediate_size": 96, "max_position_embeddings": 128}
_OPT = _WIDE | {"ffn_dim": 96, "max_position_embeddings": 128}
_BLOOM = {"vocab_size": 300, "hidden_size": 64, "n_layer": 3, "n_head": 4, "seq_length": 128}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 16},
    "qwen2": _LLAMA,
    "qwen2-window": _LLAMA | _WINDOW | {"layer_types": _LAYERS, "tie_word_embeddings": True},
    "qwen2-last-layers": _LLAMA | _WINDOW | {"max_window_layers": 2},
    "qwen3": _LLAMA | {"head_dim": 24, "tie_word_embeddings": True},
    "qwen3-biases": _LLAMA | {"head_dim": 16, "attention_bias": True},
    "gemma2": _GEMMA,
    "gemma2-untied": _GEMMA | {"attn_logit_softcapping": None, "tie_word_embeddings": False},
    "gemma3_text": _GEMMA | {"layer_types": _LAYERS, "rope_parameters": _TWO_ROPES},
    "gemma3_text-untied": _GEMMA | {"final_logit_softcapping": 20.0, "tie_word_embeddings": False},
    "phi3": _LLAMA,
    "phi3-partial": _LLAMA | {"partial_rotary_factor": 0.5, "sliding_window": 16, "tie_word_embeddings": True},
    "gpt2": _GPT2,
    "gpt2-untied": _GPT2 | {"n_inner": 96, "tie_word_embeddings": False},
    "gpt_neox": _NEOX,
    "gpt_neox-sequential": _NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True},
    "gpt_neox-linear": _NEOX | {"attention_bias": False, "rope_parameters": _LINEAR | {"partial_rotary_factor": 0.5}},
    "opt": _OPT,
    "opt-untied": _OPT | {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"},
    "bloom": _BLOOM,
    "bloom-12-heads": _BLOOM | {"hidden_size": 96, "n_head": 12, "tie_word_embeddings": False},
}
"""Name, which begins with the model_type -> its config.json."""


def make_oracle(variant: str, seed: int = 0) -> Any:
    """A transformers model in float32 with random weights, norms and biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(variant.split("-")[0], **(_ENDS | VARIANTS[variant]))
    config._attn_implementation = "eager"  # softcaps exist nowhere else
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, tensor in model.named_parameters():
        norm = "norm" in name or ".ln_" in name
        if name.endswith("bias") or norm:  # transformers begins with 0 and 1, which hide mistakes
            tensor.data.normal_(1.0 if norm and name.endswith("weight") else 0.0, 0.3)
        else:
            tensor.data.normal_(0.0, 0.15)
    return model


def make_family(folder: Path, variant: str, seed: int = 0) -> Any:
    """Save a tiny model with its tokenizer; returns the oracle."""
    model = make_oracle(variant, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    make_tokenizer(300).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|end|>"}'
    )
    return model
