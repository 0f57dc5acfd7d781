"""Model families as data: how a Hugging Face config and its tensor names map to `ModelConfig` and to roles.

A family is one row of `FAMILIES`, not a class. Roles are `q k v o gate up down` (linear layers of a block),
`attn_norm ffn_norm` (its norms), and `embed`, `final_norm`, `head` for the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from ..errors import CorruptCheckpoint, UnsupportedModel, did_you_mean
from .config import Activation, LayerConfig, ModelConfig, Rope

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attn_norm", "ffn_norm")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
OWN_PREFIX = "gossamer_"
"""Before the model_type of a folder that other tools would read wrongly: they refuse a name that they do not know."""
LIMITS = {"vocab_size": 1 << 24, "hidden_size": 1 << 17, "num_hidden_layers": 1 << 12, "intermediate_size": 1 << 19}
"""No real model comes near these; a config beyond them is damaged or hostile."""


@dataclass(frozen=True)
class Family:
    """Names of a family's modules; `{i}` is the block's number."""

    name: str
    architecture: str
    block: str
    modules: Mapping[str, str]
    embed: str
    final_norm: str
    head: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json without these keys means, where that is not what it means for every family."""

    def module(self, role: str, block: int | None = None) -> str:
        """Module name of a role, such as `model.layers.3.self_attn.q_proj`."""
        if block is None:
            return {"embed": self.embed, "final_norm": self.final_norm, "head": self.head}[role]
        return f"{self.block.format(i=block)}.{self.modules[role]}"


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
    embed="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
)
_MISTRAL = replace(
    _LLAMA, defaults={"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8}
)
FAMILIES: dict[str, Family] = {"llama": _LLAMA, "mistral": _MISTRAL}
"""`model_type` of a config.json -> family."""


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json. Raises UnsupportedModel or CorruptCheckpoint, naming the field."""
    model_type = hf.get("model_type")
    if isinstance(model_type, str):
        model_type = model_type.removeprefix(OWN_PREFIX)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: model_type {model_type!r} is not supported", hint=did_you_mean(str(model_type), FAMILIES)
        )
    said, hf = hf, {**FAMILIES[model_type].defaults, **hf}
    hidden = _integer(hf, "hidden_size")
    heads = _integer(hf, "num_attention_heads")
    head_dim = _integer(hf, "head_dim", hidden // heads)
    if head_dim % 2:
        raise CorruptCheckpoint(f"config.json: head_dim is {head_dim}, but rotary positions need an even one")
    base = LayerConfig(
        num_heads=heads,
        num_kv_heads=_integer(hf, "num_key_value_heads", heads),
        head_dim=head_dim,
        ffn_width=_integer(hf, "intermediate_size"),
        biases=frozenset(
            (LINEARS[:4] if hf.get("attention_bias") else ()) + (LINEARS[4:] if hf.get("mlp_bias") else ())
        ),
    )
    max_positions = _integer(hf, "max_position_embeddings", 2048)
    window = _integer(hf, "sliding_window", max_positions)
    if window < max_positions:
        given = "" if "sliding_window" in said else f", which a {model_type} config without the key means,"
        raise UnsupportedModel(
            f"config.json: sliding_window {window}{given} is not supported yet for {max_positions} positions",
            hint='if the model attends to everything, say "sliding_window": null',
        )
    activation = hf.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: hidden_act {activation!r} is not supported", hint=did_you_mean(str(activation), ACTIVATIONS)
        )
    return ModelConfig(
        family=model_type,
        vocab_size=_integer(hf, "vocab_size"),
        hidden_size=hidden,
        layers=_layers(hf, base),
        norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        rope=_rope(hf, max_positions),
        activation=cast(Activation, activation),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_positions=max_positions,
    )


def tensor_names(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config holds, by its Hugging Face name, with its shape."""
    family = FAMILIES[config.family]
    names: dict[str, tuple[int, ...]] = {f"{family.embed}.weight": (config.vocab_size, config.hidden_size)}
    for i, layer in enumerate(config.layers):
        for role, shape in layer.linear_shapes(config.hidden_size).items():
            names[f"{family.module(role, i)}.weight"] = shape
            if layer.has_bias(role):
                names[f"{family.module(role, i)}.bias"] = shape[:1]
        for role in NORMS:
            names[f"{family.module(role, i)}.weight"] = (config.hidden_size,)
    names[f"{family.final_norm}.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        names[f"{family.head}.weight"] = (config.vocab_size, config.hidden_size)
    return names


def _layers(hf: Mapping[str, Any], base: LayerConfig) -> tuple[LayerConfig, ...]:
    count = _integer(hf, "num_hidden_layers")
    ragged = hf.get("gossamer_layers")
    if ragged is None:
        ragged = [{}] * count
    if not isinstance(ragged, list) or len(ragged) != count or not all(isinstance(r, dict) for r in ragged):
        raise CorruptCheckpoint(f"config.json: gossamer_layers must list {count} objects, one for each layer")
    layers = tuple(
        LayerConfig(
            num_heads=_integer(row, "num_heads", base.num_heads),
            num_kv_heads=_integer(row, "num_kv_heads", base.num_kv_heads),
            head_dim=base.head_dim,
            ffn_width=_integer(row, "ffn_width", base.ffn_width),
            biases=_biases(row, base.biases),
        )
        for row in ragged
    )
    for i, layer in enumerate(layers):
        if layer.num_heads % layer.num_kv_heads:
            raise CorruptCheckpoint(
                f"config.json: layer {i} has {layer.num_heads} query heads, not a multiple of "
                f"its {layer.num_kv_heads} key-value heads"
            )
    return layers


def _biases(row: Mapping[str, Any], default: frozenset[str]) -> frozenset[str]:
    roles = row.get("biases")
    if roles is None:
        return default
    if not isinstance(roles, list) or not all(isinstance(r, str) and r in LINEARS for r in roles):
        raise CorruptCheckpoint(f"config.json: biases is {roles!r}, expected a list of roles from {', '.join(LINEARS)}")
    return frozenset(roles)


def _rope(hf: Mapping[str, Any], max_positions: int) -> Rope:
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CorruptCheckpoint("config.json: rope_parameters is not an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in {"default", "linear", "llama3"}:
        raise UnsupportedModel(
            f"config.json: rope_type {kind!r} is not supported", hint="known: default, linear, llama3"
        )
    theta = _number(parameters if "rope_theta" in parameters else hf, "rope_theta", 10000.0)
    return Rope(
        theta=theta,
        kind=kind,
        factor=_number(parameters, "factor", 1.0),
        low_freq_factor=_number(parameters, "low_freq_factor", 1.0),
        high_freq_factor=_number(parameters, "high_freq_factor", 4.0),
        original_max_positions=_integer(parameters, "original_max_position_embeddings", max_positions),
    )


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    if value is None:
        value = default
    limit = LIMITS.get(key, 1 << 30)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected an integer from 1 to {limit}")
    return value


def _number(hf: Mapping[str, Any], key: str, default: float) -> float:
    value = hf.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected a positive number")
    return float(value)
