"""What llama.cpp calls the tensors of each family, and what its GGUF files say differently from a config.json.

One table serves those who read such files and those who write them. Layers that read the same input lie in one tensor
in some families, their rows one after another. Norm weights of Gemma have the 1 added that its own files leave to the
model. Knows names and metadata; reads no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..model import FAMILIES, ModelConfig, tensor_names
from ..model.families import LINEARS, Family
from ..model.translate import ACTIVATIONS
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


_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_ATTENTION_CAP, _FINAL_CAP = "attn_logit_softcapping", "final_logit_softcapping"


def _nothing(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_keys(config: ModelConfig) -> dict[str, Any]:
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
    pairs: bool = False
    """In each head of q and k, the two rows of a rotary pair are side by side."""
    partial: bool = False
    """Some columns of a head may not be turned."""
    scalings: tuple[str, ...] = ()
    """How rotary frequencies may be scaled."""
    biases: tuple[str, ...] = ("q", "k", "v")
    """Roles of the layers that may have a bias."""
    all_biased: bool = False
    """And must."""
    head: Literal["any", "tied", "own"] = "any"
    """Whether the embedding is the head."""
    any_width: bool = True
    """The heads together may be wider or narrower than the model."""
    windows: bool = False
    """Layers may have a sliding window."""
    caps: Literal["none", "final", "both"] = "none"
    """Soft caps: none at all, perhaps one of the logits, always both."""
    scales: bool = False
    """A matrix may have a scale beside it, as NVFP4 needs."""
    also: tuple[str, ...] = ()
    """Other families whose models are written so."""
    more: Callable[[Metadata, str, Mapping[str, Any]], dict[str, Any]] = _nothing
    """What else config.json says."""
    says: Callable[[ModelConfig], dict[str, Any]] = _no_keys
    """What else the metadata says, by keys after the architecture's name: `more` the other way round."""


def _qwen(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _query_scalar(arch: str, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """As llama.cpp has it, which knows the largest model of each family by its number of layers."""
    return hidden // heads if layers == {"gemma2": 46, "gemma3": 62}.get(arch) else head_dim


def _gemma(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    size = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim"))
    return {
        "query_pre_attn_scalar": _query_scalar(arch, *size),
        "sliding_window": meta.integer(f"{arch}.{_WINDOW}"),
        "attn_logit_softcapping": meta.number(f"{arch}.{_ATTENTION_CAP}"),
        "final_logit_softcapping": meta.number(f"{arch}.{_FINAL_CAP}"),
        **_sliding_layers(meta, f"{arch}.{_PATTERN}"),
    }


def _sliding_layers(meta: Metadata, key: str) -> dict[str, Any]:
    """Which layers have the window: every one but each n-th, or a list of them."""
    if isinstance(meta.values.get(key), np.ndarray):
        slides = meta.values[key].astype(bool)
        return {"layer_types": ["sliding_attention" if one else "full_attention" for one in slides]}
    pattern = meta.integer(key)
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def _gemma3(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    local = meta.number(f"{arch}.rope.freq_base_swa", 10000.0)
    both = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return {**_gemma(meta, arch, config), "rope_parameters": both, "rope_local_base_freq": local}


def _gemma_says(config: ModelConfig) -> dict[str, Any]:
    # llama.cpp gives Gemma 2 a window whatever the file says; one as long as the context hides nothing.
    caps = {_ATTENTION_CAP: config.attention_softcap, _FINAL_CAP: config.final_softcap}
    values: dict[str, Any] = {key: cap for key, cap in caps.items() if cap is not None}
    slides = _slides(config)
    if any(slides) or config.family == "gemma2":
        values[_WINDOW] = next((layer.window for layer in config.layers if layer.window), config.max_positions)
    usual = FAMILIES[config.family].defaults["sliding_window_pattern"]
    if any(slides) and slides != [(i + 1) % usual != 0 for i in range(config.num_layers)]:
        values[_PATTERN] = slides
    local = next((layer.rope for layer in config.layers if layer.rope is not None), None)
    return values if local is None else {**values, "rope.freq_base_swa": local.theta}


def _slides(config: ModelConfig) -> list[bool]:
    """Which layers have the window, be it as long as the context."""
    return [layer.window is not None or layer.rope is not None for layer in config.layers]


def _phi3(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    window = meta.integer(f"{arch}.{_WINDOW}")
    return {"sliding_window": window or None, **_partial(meta, arch, config, "partial_rotary_factor")}


def _phi3_says(config: ModelConfig) -> dict[str, Any]:
    return {_WINDOW: 0}


def _neox(meta: Metadata, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    parallel = meta.flag(f"{arch}.use_parallel_residual", True)
    return {"use_parallel_residual": parallel, **_partial(meta, arch, config, "rotary_pct")}


def _neox_says(config: ModelConfig) -> dict[str, Any]:
    return {"use_parallel_residual": config.parallel}


def _partial(meta: Metadata, arch: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    columns = meta.integer(f"{arch}.rope.dimension_count", config["head_dim"]) or config["head_dim"]
    share = columns / config["head_dim"]
    return {key: share, "rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": share}}


_LINEAR = ("linear",)
_PLAIN = tuple(role for role in LINEARS if role != "gate")
_LLAMA = Architecture(
    "llama",
    FAMILIES["llama"],
    pairs=True,
    scalings=("linear", "llama3"),
    biases=LINEARS,
    scales=True,
    also=("mistral",),
)
_GEMMA2 = Architecture(
    "gemma2",
    FAMILIES["gemma2"],
    "gelu_pytorch_tanh",
    scalings=_LINEAR,
    head="tied",
    windows=True,
    caps="both",
    more=_gemma,
    says=_gemma_says,
)
_GPT2 = Architecture(
    "gpt2", FAMILIES["gpt2"], "gelu_new", _LAYER, _QKV, grouped=False, biases=_PLAIN, all_biased=True, any_width=False
)
_ROWS = (
    _LLAMA,
    Architecture("qwen2", FAMILIES["qwen2"], scalings=_LINEAR, any_width=False, more=_qwen),
    Architecture("qwen3", FAMILIES["qwen3"], scalings=_LINEAR, scales=True, more=_qwen),
    _GEMMA2,
    replace(_GEMMA2, name="gemma3", family=FAMILIES["gemma3_text"], head="any", caps="final", more=_gemma3),
    Architecture(
        "phi3",
        FAMILIES["phi3"],
        fused={**_QKV, "ffn_up": ("gate", "up")},
        partial=True,
        any_width=False,
        more=_phi3,
        says=_phi3_says,
    ),
    _GPT2,
    replace(
        _GPT2,
        name="gptneox",
        family=FAMILIES["gpt_neox"],
        activation="gelu",
        partial=True,
        scalings=_LINEAR,
        head="own",
        more=_neox,
        says=_neox_says,
    ),
    replace(_GPT2, name="bloom", family=FAMILIES["bloom"], activation=None),
)
ARCHITECTURES = {row.name: row for row in _ROWS}
WRITTEN = {family: row for row in _ROWS for family in (row.family.name, *row.also)}
"""Family of a model -> the architecture that its files are written as."""
DECI = replace(_LLAMA, name="deci")
"""Where layers differ in shape; it is not read."""


def tensors_of(row: Architecture, config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Name of each tensor of a file -> names of the tensors that lie in it, in order."""
    family, names = FAMILIES[config.family], tensor_names(config)
    places: dict[str, tuple[str, ...]]
    places = {stem: (family.ends[role],) for stem, role in ENDS.items() if role in family.ends}
    if row.head == "own" and config.tie_embeddings:
        places["output"] = (family.embed,)
    together = {role for roles in row.fused.values() for role in roles}
    alone = {stem: (role,) for stem, role in BLOCK.items() if role in family.modules and role not in together}
    for i in range(config.num_layers):
        for stem, roles in {**alone, **row.fused}.items():
            places[f"blk.{i}.{stem}"] = tuple(family.module(role, i) for role in roles)
    found = {}
    for stem, modules in places.items():
        for part in ("weight", "bias"):
            if f"{modules[0]}.{part}" in names:
                found[f"{stem}.{part}"] = tuple(f"{module}.{part}" for module in modules)
    return found


def misread(row: Architecture, config: ModelConfig) -> Iterator[str]:
    """Why llama.cpp would read a model of this config wrongly, or not at all; windows are the caller's to look at."""
    first, what = config.layers[0], f"architecture {row.name}"
    activation = config.activation if row.activation is None else ACTIVATIONS[row.activation]
    if config.activation != activation:
        yield f"the activation {config.activation} is not {row.name}'s, which is {activation}"
    if not row.any_width and first.q_size != config.hidden_size:
        yield f"{what} has heads as wide as the model ({config.hidden_size}), not {first.q_size} in all"
    if not row.grouped and first.group > 1:
        yield f"{what} has a key-value head for each query head, not for {first.group}"
    if row.head == "tied" and not config.tie_embeddings:
        yield f"the head of {what} is its embedding, and this model has another"
    yield from _biases_misread(row, config, what)
    yield from _positions_misread(row, config, what)
    yield from _scores_misread(row, config, what)


def _biases_misread(row: Architecture, config: ModelConfig, what: str) -> Iterator[str]:
    for i, layer in enumerate(config.layers):
        more, missing = layer.biases - set(row.biases), set(row.biases) - layer.biases
        if more:
            yield f"{what} has no bias at {' '.join(sorted(more))}, and layer {i} has"
        if missing and row.all_biased:
            yield f"{what} has a bias at {' '.join(sorted(missing))}, and layer {i} has none"
        for roles in row.fused.values():
            if len({role in layer.biases for role in roles}) > 1:
                yield f"{what} holds {' '.join(roles)} as one, and in layer {i} only some have a bias"


def _positions_misread(row: Architecture, config: ModelConfig, what: str) -> Iterator[str]:
    if config.positions != "rotary":
        return
    if config.rope.share != 1 and not row.partial:
        yield f"{what} turns all columns of a head, not {config.rope.share:g} of them"
    if config.rope.kind not in ("default", *row.scalings):
        yield f"{what} knows no rotary scaling {config.rope.kind}"
    local = {layer.rope.kind for layer in config.layers if layer.rope is not None} - {"default"}
    if local:
        yield f"{what} knows no rotary scaling of layers with a sliding window"


def _scores_misread(row: Architecture, config: ModelConfig, what: str) -> Iterator[str]:
    caps = (config.attention_softcap, config.final_softcap)
    if row.caps == "both" and None in caps:
        yield f"{what} always caps scores and logits, and this model has no cap on one of them"
    if (row.caps != "both" and caps[0] is not None) or (row.caps == "none" and caps[1] is not None):
        yield f"{what} has no soft cap"
    if config.query_scale is not None:
        first = config.layers[0]
        scalar = _query_scalar(row.name, config.num_layers, config.hidden_size, first.num_heads, first.head_dim)
        if not math.isclose(config.query_scale, scalar**-0.5, rel_tol=1e-6):
            yield f"{what} divides scores by the root of {scalar}, this model by that of {config.query_scale**-2:g}"
