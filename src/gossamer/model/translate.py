"""A config.json as a `ModelConfig`: every field is checked, since a config may be damaged or hostile.

Fields have LLaMA's names here; a family's row says what it calls them, and what it means by leaving one away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..errors import CorruptCheckpoint, UnsupportedModel, did_you_mean
from .config import Activation, LayerConfig, ModelConfig, Rope
from .families import FAMILIES, LINEARS, OWN_PREFIX, Family

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "relu": "relu",
}
"""What a config.json says -> the one of these functions that it is."""
LIMITS = {"vocab_size": 1 << 24, "hidden_size": 1 << 17, "num_hidden_layers": 1 << 12, "intermediate_size": 1 << 19}
"""No real model comes near these; a config beyond them is damaged or hostile."""


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json. Raises UnsupportedModel or CorruptCheckpoint, naming the field."""
    family = family_of(hf)
    fields = _Fields({**family.defaults, **hf}, family)
    _check_only(fields)
    hidden = fields.integer("hidden_size")
    if fields.integer("word_embed_proj_dim", hidden) != hidden:
        raise UnsupportedModel(
            "config.json: word_embed_proj_dim differs from hidden_size: projections behind the embedding are not "
            "supported"
        )
    max_positions = fields.integer("max_position_embeddings", 2048)
    rotary = family.model.get("positions", "rotary") == "rotary"
    rope, local = _ropes(fields, max_positions) if rotary else (Rope(), None)
    activation = fields.values.get(fields.key("hidden_act"), "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: {fields.key('hidden_act')} {activation!r:.80} is not supported",
            hint=did_you_mean(str(activation), ACTIVATIONS),
        )
    return ModelConfig(
        family=family.name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        layers=_layers(fields, hidden, max_positions, rope if rotary else None, local),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        activation=cast(Activation, ACTIVATIONS[activation]),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        max_positions=max_positions,
        parallel=fields.known_flag("use_parallel_residual"),
        embed_scale=math.sqrt(hidden) if family.scales_embedding else 1.0,
        query_scale=_query_scale(fields),
        attention_softcap=fields.known_number("attn_logit_softcapping"),
        final_softcap=fields.known_number("final_logit_softcapping"),
        **family.model,
    )


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises UnsupportedModel."""
    model_type = hf.get("model_type")
    name = model_type.removeprefix(OWN_PREFIX) if isinstance(model_type, str) else None
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: model_type {model_type!r:.80} is not supported", hint=did_you_mean(str(name), FAMILIES)
        )
    return FAMILIES[name]


@dataclass(frozen=True)
class _Fields:
    """Checked access to a config.json by LLaMA's names; errors name the field as the file does."""

    values: Mapping[str, Any]
    family: Family

    def key(self, name: str) -> str:
        names = self.family.keys.get(name, (name,))
        return next((key for key in names if self.values.get(key) is not None), names[0])

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        return _integer(self.values, self.key(name), default, LIMITS.get(name, 1 << 30), low)

    def number(self, name: str, default: float) -> float:
        return _number(self.values, self.key(name), default)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool | None):
            raise CorruptCheckpoint(f"config.json: {name} is {value!r:.80}, expected true or false")
        return bool(value)

    def known_flag(self, name: str) -> bool:
        """A flag that only some families have: others may say what they like."""
        return name in self.family.defaults and self.flag(name)

    def known_number(self, name: str) -> float | None:
        """The same of a number, which may be null."""
        if name not in self.family.defaults or self.values.get(name) is None:
            return None
        return _number(self.values, name, 1.0)


def _check_only(fields: _Fields) -> None:
    for key, wanted in fields.family.only.items():
        said = fields.values.get(key)
        if said is not None and said != wanted:
            raise UnsupportedModel(f"config.json: {key} {said!r:.80} is not supported, {wanted!r} is")


def _query_scale(fields: _Fields) -> float | None:
    scalar = fields.known_number("query_pre_attn_scalar")
    return None if scalar is None else 1 / math.sqrt(scalar)


def _layers(
    fields: _Fields, hidden: int, max_positions: int, rope: Rope | None, local: Rope | None
) -> tuple[LayerConfig, ...]:
    count, hf, family = fields.integer("num_hidden_layers"), fields.values, fields.family
    rows = hf.get("gossamer_layers")
    if rows is None:
        rows = [{}] * count
    if not isinstance(rows, list) or len(rows) != count or not all(isinstance(row, dict) for row in rows):
        raise CorruptCheckpoint(f"config.json: gossamer_layers must list {count} objects, one for each layer")
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden // heads)
    _check_head(head_dim, rope, local)
    kv_heads, width = fields.integer("num_key_value_heads", heads), _ffn_width(fields, hidden)
    biases, slides = _biases(fields), _slides(fields, count)
    window = fields.integer("sliding_window", max_positions)
    layers = []
    for i, row in enumerate(rows):
        sliding = slides[i] and window < max_positions
        layer = LayerConfig(
            num_heads=_integer(row, "num_heads", heads),
            num_kv_heads=_integer(row, "num_kv_heads", kv_heads),
            head_dim=head_dim,
            ffn_width=_integer(row, "ffn_width", width),
            biases=_row_biases(row, biases),
            window=window if sliding else None,
            rope=local if slides[i] else None,
            **family.layer,
        )
        if layer.num_heads % layer.num_kv_heads:
            raise CorruptCheckpoint(
                f"config.json: layer {i} has {layer.num_heads} query heads, not a multiple of "
                f"its {layer.num_kv_heads} key-value heads"
            )
        layers.append(layer)
    return tuple(layers)


def _check_head(head_dim: int, *ropes: Rope | None) -> None:
    for rope in ropes:
        if rope is not None and (rope.width(head_dim) % 2 or not 2 <= rope.width(head_dim) <= head_dim):
            raise CorruptCheckpoint(
                f"config.json: head_dim is {head_dim} with {rope.width(head_dim)} rotary columns, "
                "but rotary positions need an even number of them"
            )


def _ffn_width(fields: _Fields, hidden: int) -> int:
    times = fields.family.ffn_times
    return fields.integer("intermediate_size", None if times is None else times * hidden)


def _slides(fields: _Fields, count: int) -> list[bool]:
    """Whether each layer has the sliding window, if there is one."""
    known = fields.family.defaults
    if fields.values.get("sliding_window") is None:
        return [False] * count
    if "use_sliding_window" in known and not fields.flag("use_sliding_window"):
        return [False] * count
    first = fields.integer("max_window_layers", low=0) if "max_window_layers" in known else 0
    pattern = fields.integer("sliding_window_pattern") if "sliding_window_pattern" in known else None
    said = fields.values.get("layer_types")
    if said is None or ("max_window_layers" not in known and pattern is None):
        return [i >= first and (pattern is None or (i + 1) % pattern != 0) for i in range(count)]
    kinds = ("sliding_attention", "full_attention")
    if not isinstance(said, list) or len(said) != count or not all(kind in kinds for kind in said):
        raise CorruptCheckpoint(f"config.json: layer_types must say for each of {count} layers: {' or '.join(kinds)}")
    return [kind == kinds[0] for kind in said]


def _biases(fields: _Fields) -> frozenset[str]:
    found: set[str] = set()
    for key, roles in fields.family.biases.items():
        if not key or fields.flag(key):
            found |= set(roles)
    return frozenset(found - ({"gate"} if fields.family.layer.get("gated") is False else set()))


def _row_biases(row: Mapping[str, Any], default: frozenset[str]) -> frozenset[str]:
    roles = row.get("biases")
    if roles is None:
        return default
    if not isinstance(roles, list) or not all(isinstance(r, str) and r in LINEARS for r in roles):
        raise CorruptCheckpoint(f"config.json: biases is {roles!r}, expected a list of roles from {', '.join(LINEARS)}")
    return frozenset(roles)


def _ropes(fields: _Fields, max_positions: int) -> tuple[Rope, Rope | None]:
    """The model's rotary positions, and those of layers with a sliding window, where they have their own."""
    # transformers 5 writes rope_parameters, one for each kind of layer where they differ; older files have rope_theta
    # and rope_scaling.
    hf, local = fields.values, fields.family.local_theta
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CorruptCheckpoint("config.json: rope_parameters is not an object")
    if local is None:
        return _rope(fields, parameters, "rope_theta", max_positions), None
    each = [parameters.get(kind, {}) for kind in ("full_attention", "sliding_attention")]
    if not all(isinstance(p, dict) for p in each):
        raise CorruptCheckpoint("config.json: rope_parameters is not an object of objects")
    whole = parameters if "full_attention" not in parameters else each[0]
    return _rope(fields, whole, "rope_theta", max_positions), _rope(fields, each[1], local, max_positions)


def _rope(fields: _Fields, parameters: Mapping[str, Any], theta: str, max_positions: int) -> Rope:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModel(
            f"config.json: rope_type {kind!r:.80} is not supported", hint="known: default, linear, llama3"
        )
    share = _number(parameters, "partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if share > 1:
        raise CorruptCheckpoint(f"config.json: partial_rotary_factor is {share}, expected a number up to 1")
    return Rope(
        theta=_number(parameters, "rope_theta", fields.number(theta, 10000.0)),
        kind=kind,
        factor=_number(parameters, "factor", 1.0),
        low_freq_factor=_number(parameters, "low_freq_factor", 1.0),
        high_freq_factor=_number(parameters, "high_freq_factor", 4.0),
        original_max_positions=_integer(parameters, "original_max_position_embeddings", max_positions),
        share=share,
    )


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None, limit: int = 1 << 30, low: int = 1) -> int:
    value = hf.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= limit:
        raise CorruptCheckpoint(f"config.json: {key} is {value!r:.80}, expected an integer from {low} to {limit}")
    return value


def _number(hf: Mapping[str, Any], key: str, default: float) -> float:
    value = hf.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CorruptCheckpoint(f"config.json: {key} is {value!r:.80}, expected a positive number")
    return float(value)
