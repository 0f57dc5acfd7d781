"""Which format each module of a model folder is in, as the `quantization_config` of its config.json says it.

Both directions: the resolver for reading a folder, and the config for writing one. What compressed-tensors can say is
said as it says it; a folder with anything else is described in our own words (own_layout.py).
No other tool reads those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import regex
import torch

from ..errors import CorruptCheckpoint, UnsupportedModel
from .base import Format
from .codebook import GROUP_SIZES, Codebook, CodebookKind
from .dense import Dense
from .integer import Integer
from .own_layout import OWN_METHOD, own_config, own_formats

Kind = Literal["linear", "embedding"]
Layout = Callable[[str, Kind], Format]
"""Module name and kind -> format of its weight."""
_FLOATS: dict[CodebookKind, tuple[str, int, str, str | None]] = {
    "mxfp4": ("mxfp4-pack-quantized", 4, "group", "torch.uint8"),
    "nvfp4": ("nvfp4-pack-quantized", 4, "tensor_group", "torch.float8_e4m3fn"),
    "fp8": ("float-quantized", 8, "channel", None),
}
"""Codebooks that compressed-tensors knows: its name of the stored form, bits, strategy and dtype of the scales."""
_CLASSES = {"linear": ("Linear", "Module"), "embedding": ("Embedding", "Module")}
"""Names of a module's torch classes that a target may give."""


def layout_from_quantization_config(config: Mapping[str, Any] | None, dense: torch.dtype) -> Layout:
    """Resolver for a quantization_config (None: all dense). Raises UnsupportedModel or CorruptCheckpoint.

    As in compressed-tensors, a group that names a module wins over one with a pattern for it, that over one for its
    class, and of two patterns the first in the alphabet; the order of the groups counts only for equal targets.
    """
    if config is None:
        return lambda module, kind: Dense(dense)
    method = config.get("quant_method")
    if method == OWN_METHOD:
        own = own_formats(config)
        return lambda module, kind: own.get(module, Dense(dense))
    if method != "compressed-tensors":
        raise UnsupportedModel(
            f"config.json: quant_method {method!r:.80} is not supported",
            hint="supported: compressed-tensors",
        )
    _refuse_transforms(config)
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise CorruptCheckpoint("config.json: quantization_config.config_groups is not an object")
    ignored = _matcher(_targets("ignore", [] if config.get("ignore") is None else config["ignore"]))
    rules: dict[str, Format] = {}
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise CorruptCheckpoint(f"config.json: quantization_config.config_groups.{name} is not an object")
        form = _format(name, group, config)
        rules |= dict.fromkeys(_targets(f"config_groups.{name}.targets", group.get("targets")), form)
    targeted = _matcher(rules)

    def resolve(module: str, kind: Kind) -> Format:
        target = targeted(module, kind) if ignored(module, kind) is None else None
        return Dense(dense) if target is None else rules[target]

    return resolve


def quantization_config(formats: Mapping[str, Format], kinds: Mapping[str, Kind], head: str) -> dict[str, Any] | None:
    """The quantization_config that says which module is in which format; None if all are dense.

    `head` is named even where it is tied and so has no format of its own: readers would take it for one more Linear.
    """
    packed: dict[Format, list[str]] = {}
    for module, form in formats.items():
        if not isinstance(form, Dense):
            packed.setdefault(form, []).append(module)
    if not packed:
        return None
    by_count = dict(sorted(packed.items(), key=lambda item: -len(item[1])))
    if any(_weights(form) is None for form in packed):
        return own_config(by_count)
    linears = [m for m in formats if kinds[m] == "linear"] + [head] * (head not in formats)
    ignore = [m for m in linears if isinstance(formats.get(m, Dense()), Dense)]
    groups = {}
    # The commonest format targets the class, as other tools write it; the rest name their modules, which win over it.
    for n, (form, modules) in enumerate(by_count.items()):
        whole_class = n == 0 and all(kinds[m] == "linear" for m in modules) and len(packed) == 1
        groups[f"group_{n}"] = {
            "targets": ["Linear"] if whole_class else modules,
            "weights": _weights(form),
            "input_activations": None,
            "output_activations": None,
            "format": _stored_as(form),
        }
    stored_as = {_stored_as(form) for form in packed}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as.pop() if len(stored_as) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": "0.20.0",
        "config_groups": groups,
        "ignore": ignore,
    }


def only_ours(formats: Mapping[str, Format], kinds: Mapping[str, Kind]) -> bool:
    """True if no other tool would read these formats rightly: one is our own, or the embedding is packed.

    transformers and vLLM have no packed embedding and would read noise.
    """
    return any(
        _weights(form) is None or kinds[module] == "embedding"
        for module, form in formats.items()
        if not isinstance(form, Dense)
    )


def _weights(form: Format) -> dict[str, Any] | None:
    """What compressed-tensors calls this format's `weights`, or None where it has no words for it."""
    if isinstance(form, Integer) and not form.outliers:
        return {
            "num_bits": form.bits,
            "type": "int",
            "symmetric": form.symmetric,
            "strategy": "channel" if form.group_size is None else "group",
            "group_size": form.group_size,
            "dynamic": False,
        }
    if isinstance(form, Codebook) and form.kind in _FLOATS:
        _, bits, strategy, scale_dtype = _FLOATS[form.kind]
        weights = {
            "num_bits": bits,
            "type": "float",
            "symmetric": True,
            "strategy": strategy,
            "group_size": form.group_size,
            "dynamic": False,
        }
        return weights | ({"scale_dtype": scale_dtype} if scale_dtype else {})
    return None


def _stored_as(form: Format) -> str:
    """compressed-tensors' name for how this format is stored."""
    return _FLOATS[form.kind][0] if isinstance(form, Codebook) else "pack-quantized"


def _refuse_transforms(config: Mapping[str, Any]) -> None:
    """Whatever else the config says must be done to a weight before it is what the model multiplies by."""
    transform, sparsity = config.get("transform_config"), config.get("sparsity_config")
    if transform not in (None, {}, {"config_groups": {}}):
        raise UnsupportedModel(
            "config.json: quantization_config.transform_config: rotations while the model runs are not supported",
            hint="take a version of the model whose rotations are merged into its weights, or that has none",
        )
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"  # zeros are stored like other weights
    if sparsity not in (None, {}) and not dense:
        raise UnsupportedModel(
            "config.json: quantization_config.sparsity_config: weights stored without their zeros are not supported",
            hint="take a version of the model whose sparsity_config is empty or of format 'dense'",
        )


def _targets(where: str, targets: Any) -> list[str]:
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise CorruptCheckpoint(f"config.json: quantization_config.{where} is not a list of names")
    return targets


def _format(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Format:
    where = f"config.json: quantization_config.config_groups.{name}"
    weights = group.get("weights")
    form = group.get("format") or config.get("format")
    floats: dict[Any, CodebookKind] = {stored: kind for kind, (stored, *_) in _FLOATS.items()}
    if not isinstance(weights, dict) or not isinstance(form, str) or form not in (*floats, "pack-quantized"):
        raise UnsupportedModel(
            f"{where}: format {form!r:.80} is not supported", hint=f"supported: pack-quantized, {', '.join(floats)}"
        )
    if group.get("input_activations") is not None or group.get("output_activations") is not None:
        raise UnsupportedModel(f"{where}: quantized activations are not supported yet")
    return _codebook(where, floats[form], weights) if form in floats else _integer(where, weights)


def _codebook(where: str, kind: CodebookKind, weights: Mapping[str, Any]) -> Codebook:
    """compressed-tensors' floats of 4 and 8 bits. Raises UnsupportedModel for other scales than are usual."""
    stored, bits, strategy, _ = _FLOATS[kind]
    size = GROUP_SIZES[kind]
    wanted = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "group_size": size}
    defaults = {"type": "int", "symmetric": True}
    for key, value in wanted.items():
        found = weights.get(key, defaults.get(key))
        if found != value:
            raise UnsupportedModel(f"{where}.weights: {stored} with {key} {found!r:.80} is not supported, {value!r} is")
    return Codebook(kind, size)


def _integer(where: str, weights: Mapping[str, Any]) -> Integer:
    if weights.get("type", "int") != "int":
        raise UnsupportedModel(f"{where}: pack-quantized {weights['type']!r:.80} is not supported, int is")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise UnsupportedModel(f"{where}: actorder 'group' (columns in another order) is not supported yet")
    bits, strategy, group_size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    symmetric = weights.get("symmetric", True)
    if not isinstance(strategy, str | None) or not isinstance(symmetric, bool):
        found = f"strategy {strategy!r:.80} and symmetric {symmetric!r:.80}"
        raise CorruptCheckpoint(f"{where}.weights: {found} are not a name and a boolean")
    if not isinstance(bits, int) or not 2 <= bits <= 8 or strategy not in {"group", "channel"}:
        raise UnsupportedModel(f"{where}: num_bits {bits!r:.80} with strategy {strategy!r:.80} is not supported")
    if strategy == "group" and (type(group_size) is not int or group_size < 1):
        raise CorruptCheckpoint(f"{where}: group_size is {group_size!r:.80}")
    return Integer(bits, group_size if strategy == "group" else None, symmetric)


def _matcher(targets: Iterable[str]) -> Callable[[str, Kind], str | None]:
    """Module name and kind -> the target that says most exactly that it means this module, or None."""
    known = frozenset(targets)
    patterns = sorted(target for target in known if target.startswith("re:"))

    def match(module: str, kind: Kind) -> str | None:
        if module in known:
            return module
        for pattern in patterns:
            if _pattern_matches(pattern.removeprefix("re:"), module):
                return pattern
        return next((name for name in _CLASSES[kind] if name in known), None)

    return match


def _pattern_matches(pattern: str, module: str) -> bool:
    """A stranger's regular expression, tried for at most a moment: some take longer than the age of the universe."""
    try:
        return regex.match(pattern, module, timeout=0.5) is not None
    except (regex.error, TimeoutError) as e:
        raise CorruptCheckpoint(
            f"config.json: quantization_config target 're:{pattern:.80}' is no usable pattern"
        ) from e
