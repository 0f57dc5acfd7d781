"""Model families as data: how a family's config.json differs from LLaMA's, and what its tensors are called.

A family is one row of `FAMILIES`, not a class. Roles are `q k v o gate up down` (linear layers of a block),
`attn_norm ffn_norm`, and in some families `attn_post_norm ffn_post_norm q_norm k_norm` (its norms), and `embed`,
`positions`, `embed_norm`, `final_norm`, `head` for the model. Where files hold several linear layers as one, or
transposed, the names here are those of the single layers; `pieces.py` says where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .config import ModelConfig

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attn_norm", "ffn_norm", "attn_post_norm", "ffn_post_norm", "q_norm", "k_norm")
OWN_PREFIX = "gossamer_"
"""Before the model_type of a folder that other tools would read wrongly: they refuse a name that they do not know."""


@dataclass(frozen=True)
class Fused:
    """Linear layers that files hold as one module."""

    module: str
    roles: tuple[str, ...]
    by_head: bool = False
    """Its rows are those of the first head of each role, then those of the second, and so on."""


@dataclass(frozen=True)
class Family:
    """A row of the table; `{i}` in names is the block's number."""

    name: str
    architecture: str
    block: str
    modules: Mapping[str, str]
    """Role -> module of a block."""
    ends: Mapping[str, str]
    """Role -> module outside of the blocks."""
    prefix: str = "model."
    """What names begin with; some files leave it away."""
    fused: tuple[Fused, ...] = ()
    transposed: bool = False
    """Linear layers of blocks lie in files as [in_features, out_features]."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What config.json calls what LLaMA calls so, the first that is there."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json without these keys means, where that is not what it means for every family."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys that may say nothing else than this."""
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Key -> linear layers that have a bias if it is true; those of no key always have one."""
    local_theta: str | None = None
    """The key with theta of the layers that have a sliding window, where they have rotary positions of their own."""
    scales_embedding: bool = False
    """Embedded tokens are multiplied by sqrt(hidden_size)."""
    ffn_times: int | None = None
    """Width of the feed-forward network over hidden_size, where config.json does not give it."""
    layer: Mapping[str, Any] = field(default_factory=dict)
    """What is always so: fields of LayerConfig."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """And of ModelConfig."""

    def module(self, role: str, block: int | None = None) -> str:
        """Module name of a role, such as `model.layers.3.self_attn.q_proj`."""
        if block is None:
            return self.ends[role]
        return f"{self.block.format(i=block)}.{self.modules[role]}"

    @property
    def embed(self) -> str:
        return self.ends["embed"]

    @property
    def head(self) -> str:
        return self.ends["head"]

    @property
    def final_norm(self) -> str:
        return self.ends["final_norm"]


_ATTENTION, _FFN = LINEARS[:4], LINEARS[4:]
_LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    block="model.layers.{i}",
    modules={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    ends={"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
    biases={"attention_bias": _ATTENTION, "mlp_bias": _FFN},
)
_MISTRAL = replace(
    _LLAMA,
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8},
)
_QWEN2 = replace(
    _LLAMA,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
    biases={"": ("q", "k", "v")},
)
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_QWEN3 = replace(
    _QWEN2,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    modules={**_LLAMA.modules, **_QK_NORMS},
    defaults={**_QWEN2.defaults, "head_dim": 128},
    biases={"attention_bias": _ATTENTION},
    layer={"qk_norm": True},
)
_GEMMA2 = replace(
    _LLAMA,
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    modules={
        **_LLAMA.modules,
        "attn_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
    keys={"hidden_act": ("hidden_activation",)},
    defaults={
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    only={"use_bidirectional_attention": False},
    biases={"attention_bias": _ATTENTION},
    scales_embedding=True,
    layer={"post_norms": True},
    model={"norm_offset": 1.0},
)
_GEMMA3 = replace(
    _GEMMA2,
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    modules={**_GEMMA2.modules, **_QK_NORMS},
    defaults={
        **_GEMMA2.defaults,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
    },
    local_theta="rope_local_base_freq",
    layer={"post_norms": True, "qk_norm": True},
)
_PHI3 = replace(
    _LLAMA,
    name="phi3",
    architecture="Phi3ForCausalLM",
    fused=(Fused("self_attn.qkv_proj", ("q", "k", "v")), Fused("mlp.gate_up_proj", ("gate", "up"))),
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    biases={},
)
_GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    block="transformer.h.{i}",
    modules={
        "q": "attn.q_proj",
        "k": "attn.k_proj",
        "v": "attn.v_proj",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "attn_norm": "ln_1",
        "ffn_norm": "ln_2",
    },
    ends={
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    prefix="transformer.",
    fused=(Fused("attn.c_attn", ("q", "k", "v")),),
    transposed=True,
    keys={
        "hidden_size": ("n_embd",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "intermediate_size": ("n_inner",),
        "max_position_embeddings": ("n_positions",),
        "hidden_act": ("activation_function",),
        "rms_norm_eps": ("layer_norm_epsilon",),
    },
    defaults={
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    biases={"": LINEARS},
    ffn_times=4,
    layer={"gated": False},
    model={"norm": "layer", "positions": "learned"},
)
_NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    block="gpt_neox.layers.{i}",
    modules={
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    ends={"embed": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
    prefix="gpt_neox.",
    fused=(Fused("attention.query_key_value", ("q", "k", "v"), by_head=True),),
    keys={
        "rms_norm_eps": ("layer_norm_eps",),
        "rope_theta": ("rotary_emb_base",),
        "partial_rotary_factor": ("rotary_pct",),
    },
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "attention_bias": True,
    },
    biases={"attention_bias": _ATTENTION, "": _FFN},
    layer={"gated": False},
    model={"norm": "layer"},
)
_OPT = Family(
    name="opt",
    architecture="OPTForCausalLM",
    block="model.decoder.layers.{i}",
    modules={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
        "attn_norm": "self_attn_layer_norm",
        "ffn_norm": "final_layer_norm",
    },
    ends={
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "final_norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    },
    keys={"intermediate_size": ("ffn_dim",), "hidden_act": ("activation_function",)},
    defaults={"activation_function": "relu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "enable_bias": True},
    only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
    biases={"enable_bias": LINEARS},
    layer={"gated": False},
    model={"norm": "layer", "positions": "learned", "position_offset": 2},
)
_BLOOM = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    block="transformer.h.{i}",
    modules={
        "q": "self_attention.q_proj",
        "k": "self_attention.k_proj",
        "v": "self_attention.v_proj",
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    ends={
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    prefix="transformer.",
    fused=(Fused("self_attention.query_key_value", ("q", "k", "v"), by_head=True),),
    keys={
        "hidden_size": ("n_embed", "hidden_size"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "max_position_embeddings": ("seq_length",),
        "rms_norm_eps": ("layer_norm_epsilon",),
    },
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "seq_length": 2048,
        "tie_word_embeddings": True,
    },
    biases={"": LINEARS},
    ffn_times=4,
    only={"apply_residual_connection_post_layernorm": False, "hidden_act": "gelu_pytorch_tanh"},
    layer={"gated": False},
    model={"norm": "layer", "positions": "alibi", "embed_norm": True},
)
_ROWS = (
    *(_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA2, _GEMMA3, _PHI3),
    *(_GPT2, _NEOX, _OPT, _BLOOM),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}
"""`model_type` of a config.json -> family."""


def tensor_names(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config holds, by its Hugging Face name, with its shape."""
    family, hidden = FAMILIES[config.family], config.hidden_size
    names: dict[str, tuple[int, ...]] = {f"{family.embed}.weight": (config.vocab_size, hidden)}
    if config.positions == "learned":
        names[f"{family.ends['positions']}.weight"] = (config.max_positions + config.position_offset, hidden)
    for i, layer in enumerate(config.layers):
        for role, shape in layer.linear_shapes(hidden).items():
            names[f"{family.module(role, i)}.weight"] = shape
            if layer.has_bias(role):
                names[f"{family.module(role, i)}.bias"] = shape[:1]
        for role, size in layer.norm_sizes(hidden).items():
            for part in norm_parts(config):
                names[f"{family.module(role, i)}.{part}"] = (size,)
    for role in config.model_norms():
        for part in norm_parts(config):
            names[f"{family.module(role)}.{part}"] = (hidden,)
    if not config.tie_embeddings:
        names[f"{family.head}.weight"] = (config.vocab_size, hidden)
    return names


def norm_parts(config: ModelConfig) -> tuple[str, ...]:
    """Local names of a norm's tensors."""
    return ("weight", "bias") if config.norm == "layer" else ("weight",)
