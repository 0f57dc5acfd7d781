"""What MLC-LLM calls the parameters and settings of each family, and what its models leave out. Knows no layout.

Gemma is not here: MLC-LLM computes no soft caps of scores, and one kind of layer where Gemma has two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..model import FAMILIES, ModelConfig, tensor_names

_QKV, _GATED = ("q", "k", "v"), ("gate", "up")
_PLAIN = ("q", "k", "v", "o", "up", "down")


@dataclass(frozen=True)
class MLCFamily:
    """A family as MLC-LLM's model of it."""

    fused: Mapping[str, tuple[str, ...]]
    """Module of a block -> roles of the layers in it, their rows one after another."""
    settings: Callable[[ModelConfig], dict[str, Any]]
    """What `model_config` says of it."""
    activation: str = "silu"
    biases: tuple[tuple[str, ...], ...] = ((),)
    """Sets of roles that have a bias, of which a model must have one."""
    own_head: bool = False
    """The head is a parameter of its own, be it the embedding or not."""
    square: bool = False
    """The heads together are as wide as the model."""
    grouped: bool = True
    """Query heads may share a key-value head."""
    partial: bool = False
    """Some columns of a head may not be turned."""
    scalings: tuple[str, ...] = ()
    """How rotary frequencies may be scaled."""
    block: str | None = None
    """What a block is called, where that is not what Hugging Face calls it."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Role -> module, where that is another one."""
    wide: tuple[str, ...] = ()
    """Roles whose biases are float32 in every layout."""


def _llama(config: ModelConfig) -> dict[str, Any]:
    first = config.layers[0]
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": first.ffn_width,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "position_embedding_base": config.rope.theta,
    }


def _mistral(config: ModelConfig) -> dict[str, Any]:
    return {**_llama(config), "sliding_window_size": -1}


def _qwen2(config: ModelConfig) -> dict[str, Any]:
    said = _llama(config)
    return {**said, "hidden_act": config.activation, "rope_theta": said.pop("position_embedding_base")}


def _qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**_qwen2(config), "attention_bias": bool(config.layers[0].biases)}


def _phi3(config: ModelConfig) -> dict[str, Any]:
    more = {"max_position_embeddings": config.max_positions, "partial_rotary_factor": config.rope.share}
    return {**_llama(config), "model_type": "phi3", **more}


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    first = config.layers[0]
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": first.num_heads,
        "n_inner": first.ffn_width,
        "head_dim": first.head_dim,
        "layer_norm_epsilon": config.norm_eps,
    }


def _neox(config: ModelConfig) -> dict[str, Any]:
    said = _llama(config)
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        del said[key]
    more = {"layer_norm_eps": config.norm_eps, "rotary_pct": config.rope.share, "ffn_out_dtype": "float32"}
    return {**said, **more, "use_parallel_residual": config.parallel}


_LLAMA = MLCFamily({"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATED}, _llama, scalings=("llama3",))
_QWEN2 = MLCFamily(
    {"self_attn.c_attn": _QKV, "mlp.gate_up_proj": _GATED}, _qwen2, biases=(("q", "k", "v"),), square=True
)
_GPT2 = MLCFamily(
    {"attn.c_attn": _QKV},
    _gpt2,
    activation="gelu_pytorch_tanh",
    biases=(_PLAIN,),
    own_head=True,
    square=True,
    grouped=False,
)
MLC_FAMILIES = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, settings=_mistral, own_head=True, scalings=()),
    "qwen2": _QWEN2,
    "qwen3": replace(_QWEN2, settings=_qwen3, biases=((), ("q", "k", "v", "o")), square=False),
    "phi3": MLCFamily(
        {"mixer.qkv_proj": _QKV, "mlp.gate_up_proj": _GATED},
        _phi3,
        square=True,
        partial=True,
        block="transformer.h.{i}",
        renamed={
            "o": "mixer.out_proj",
            "attn_norm": "ln",
            "embed": "transformer.embd",
            "final_norm": "transformer.norm",
        },
    ),
    "gpt2": _GPT2,
    "gpt_neox": replace(
        _GPT2,
        fused={"attention.query_key_value": _QKV},
        settings=_neox,
        activation="gelu",
        partial=True,
        wide=("up", "down"),
    ),
}
"""Family of a model -> what it is to MLC-LLM."""


def parameters(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Name of each parameter of MLC-LLM's model in float -> names of the tensors that lie in it, in order."""
    row, family = MLC_FAMILIES[config.family], FAMILIES[config.family]
    together = {role for roles in row.fused.values() for role in roles}
    alone = {row.renamed.get(role, name): (role,) for role, name in family.modules.items() if role not in together}
    places: dict[str, tuple[str, ...]] = {row.renamed.get(role, name): (name,) for role, name in family.ends.items()}
    if config.tie_embeddings and row.own_head:
        places[family.head] = (family.embed,)
    for i in range(config.num_layers):
        for module, roles in {**alone, **row.fused}.items():
            places[f"{(row.block or family.block).format(i=i)}.{module}"] = tuple(family.module(r, i) for r in roles)
    names, found = tensor_names(config), {}
    for module, modules in places.items():
        for part in ("weight", "bias"):
            if f"{modules[0]}.{part}" in names:
                found[f"{module}.{part}"] = tuple(f"{name}.{part}" for name in modules)
    return found


def misread(config: ModelConfig) -> Iterator[str]:
    """Why MLC-LLM would read a model of this config wrongly, or not at all."""
    row, first = MLC_FAMILIES[config.family], config.layers[0]
    if config.activation != row.activation:
        yield f"the activation {config.activation} is not {row.activation}, which it computes"
    if any(layer.window for layer in config.layers):
        yield "sliding windows are not written"
    if first.biases not in [frozenset(roles) for roles in row.biases]:
        wanted = " or ".join(" ".join(roles) or "none" for roles in row.biases)
        yield f"it knows biases at {wanted}, and not at {' '.join(sorted(first.biases)) or 'none'}"
    if row.square and first.q_size != config.hidden_size:
        yield f"its heads are as wide as the model ({config.hidden_size}), not {first.q_size} in all"
    if not row.grouped and first.group > 1:
        yield "its query heads share no key-value head"
    if config.positions == "rotary" and config.rope.share != 1 and not row.partial:
        yield "it turns all columns of a head"
    if config.positions == "rotary" and config.rope.kind not in ("default", *row.scalings):
        yield f"it knows no rotary scaling {config.rope.kind}"
