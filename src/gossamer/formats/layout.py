"""Which format each module of a model folder is in, as compressed-tensors' `quantization_config` says it.

Both directions: the resolver for reading a folder, and the config for writing one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import regex
import torch

from ..errors import CorruptCheckpoint, UnsupportedModel
from .base import Format
from .dense import Dense
from .integer import Integer

Kind = Literal["linear", "embedding"]
Layout = Callable[[str, Kind], Format]
"""Module name and kind -> format of its weight."""


def layout_from_quantization_config(config: Mapping[str, Any] | None, dense: torch.dtype) -> Layout:
    """Resolver for a quantization_config (None: all dense). Raises UnsupportedModel or CorruptCheckpoint."""
    if config is None:
        return lambda module, kind: Dense(dense)
    method = config.get("quant_method")
    if method != "compressed-tensors":
        raise UnsupportedModel(
            f"config.json: quant_method {method!r} is not supported", hint="supported: compressed-tensors"
        )
    groups = config.get("config_groups")
    ignore = config.get("ignore") or []
    if not isinstance(groups, dict) or not isinstance(ignore, list):
        raise CorruptCheckpoint("config.json: quantization_config needs config_groups (object) and ignore (list)")
    rules = [(_targets(name, g), _integer(name, g, config)) for name, g in groups.items()]

    def resolve(module: str, kind: Kind) -> Format:
        if not _matches(ignore, module, kind):
            for targets, form in rules:
                if _matches(targets, module, kind):
                    return form
        return Dense(dense)

    return resolve


def quantization_config(formats: Mapping[str, Format], kinds: Mapping[str, Kind], head: str) -> dict[str, Any] | None:
    """The quantization_config that says which module is in which format; None if all are dense.

    `head` is named even where it is tied and so has no format of its own: readers would take it for one more Linear.
    """
    packed: dict[Integer, list[str]] = {}
    for module, form in formats.items():
        if isinstance(form, Integer):
            packed.setdefault(form, []).append(module)
    if not packed:
        return None
    linears = [m for m in formats if kinds[m] == "linear"] + [head] * (head not in formats)
    ignore = [m for m in linears if not isinstance(formats.get(m), Integer)]
    groups = {}
    # The commonest format targets the class, as other tools write it; the rest name their modules, which win over it.
    by_count = sorted(packed.items(), key=lambda item: -len(item[1]))
    for n, (form, modules) in enumerate(by_count):
        whole_class = n == 0 and all(kinds[m] == "linear" for m in modules) and len(packed) == 1
        groups[f"group_{n}"] = {
            "targets": ["Linear"] if whole_class else modules,
            "weights": {
                "num_bits": form.bits,
                "type": "int",
                "symmetric": form.symmetric,
                "strategy": "channel" if form.group_size is None else "group",
                "group_size": form.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.20.0",
        "config_groups": groups,
        "ignore": ignore,
    }


def _targets(name: str, group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise CorruptCheckpoint(f"config.json: quantization_config.config_groups.{name}.targets is not a list of names")
    return targets


def _integer(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Integer:
    where = f"config.json: quantization_config.config_groups.{name}"
    weights = group.get("weights")
    form = group.get("format") or config.get("format")
    if form != "pack-quantized" or not isinstance(weights, dict) or weights.get("type", "int") != "int":
        raise UnsupportedModel(f"{where}: format {form!r} is not supported", hint="supported: pack-quantized integers")
    if group.get("input_activations") is not None:
        raise UnsupportedModel(f"{where}: quantized activations are not supported yet")
    if weights.get("actorder") == "group":
        raise UnsupportedModel(f"{where}: actorder 'group' (columns in another order) is not supported yet")
    bits, strategy, group_size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    if not isinstance(bits, int) or not 2 <= bits <= 8 or strategy not in {"group", "channel"}:
        raise UnsupportedModel(f"{where}: num_bits {bits!r} with strategy {strategy!r} is not supported")
    if strategy == "group" and (not isinstance(group_size, int) or group_size < 1):
        raise CorruptCheckpoint(f"{where}: group_size is {group_size!r}")
    return Integer(bits, group_size if strategy == "group" else None, bool(weights.get("symmetric", True)))


def _matches(targets: list[str], module: str, kind: Kind) -> bool:
    class_name = "Linear" if kind == "linear" else "Embedding"
    return any(
        _pattern_matches(t.removeprefix("re:"), module) if t.startswith("re:") else t in {module, class_name}
        for t in targets
    )


def _pattern_matches(pattern: str, module: str) -> bool:
    """A stranger's regular expression, tried for at most a moment: some take longer than the age of the universe."""
    try:
        return regex.match(pattern, module, timeout=0.5) is not None
    except (regex.error, TimeoutError) as e:
        raise CorruptCheckpoint(
            f"config.json: quantization_config target 're:{pattern:.80}' is no usable pattern"
        ) from e
