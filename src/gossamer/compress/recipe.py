"""A recipe: a versioned YAML list of stages, checked whole before any work.

version: 1
name: int4-gptq
description: 4-bit GPTQ, groups of 64
calibration: {source: self, sequences: 32, length: 512, seed: 0}
stages:
  - method: gptq
    bits: 4
    group_size: 64
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import RecipeError, UnknownName, did_you_mean
from .method import Needs, QuantizeOptions, Quantizer
from .registry import METHODS, method_class

MAX_BYTES = 1 << 20


class CalibrationSpec(BaseModel):
    """Which text the statistics are taken from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    source: str = Field("self", description="self: sampled from the model; a text file; hub:ORG/DATASET/FILE")
    sequences: int = Field(32, ge=1, le=100_000)
    length: int = Field(512, ge=8, le=131_072, description="tokens of each sequence")
    seed: int = Field(0, ge=0)


class Recipe(BaseModel):
    """A checked recipe. `stages` holds each stage's method name and typed options."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)
    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    calibration: CalibrationSpec = Field(default_factory=lambda: CalibrationSpec.model_validate({}))
    stages: tuple[dict[str, Any], ...] = Field(min_length=1)

    def methods(self) -> list[Quantizer]:
        """One method per stage, options validated. Raises RecipeError naming the stage and key."""
        return [_method(i, stage) for i, stage in enumerate(self.stages)]

    def needs_calibration(self) -> bool:
        return any(m.needs is not Needs.NOTHING for m in self.methods())

    def canonical(self) -> dict[str, Any]:
        """The recipe with every default written out: equal dictionaries make equal artifacts."""
        stages = [{"method": m.name, **m.options.model_dump(mode="json")} for m in self.methods()]
        plain = self.model_dump(mode="json")
        return {**plain, "stages": stages}


def load_recipe(name: str | Path, shipped: Path) -> Recipe:
    """A recipe by file, by shipped name, or from an artifact's folder. Raises RecipeError or UnknownName."""
    path = Path(name)
    if path.is_dir():
        from ..checkpoint.manifest import read_manifest

        manifest = read_manifest(path)
        if manifest is None:
            raise RecipeError(f"{path} is a folder without gossamer.json: it records no recipe")
        return parse_recipe(manifest.recipe, str(path / "gossamer.json"))
    if not path.suffix and not path.exists():
        known = [p.stem for p in sorted(shipped.glob("*.yaml"))]
        if str(name) not in known:
            raise UnknownName("recipe", str(name), known)
        path = shipped / f"{name}.yaml"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path} has over {MAX_BYTES} bytes: not a recipe")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RecipeError(f"cannot read recipe {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        raise RecipeError(f"{path} is not YAML: {e}") from e
    return parse_recipe(data, str(path))


def parse_recipe(data: Any, where: str) -> Recipe:
    """Check a parsed recipe: keys, types, bounds, methods and their order."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: a recipe is a mapping, not {type(data).__name__}")
    if data.get("version") != 1:
        raise RecipeError(f"{where}: version is {data.get('version')!r}, this Gossamer reads version 1")
    try:
        recipe = Recipe.model_validate({**data, "stages": tuple(data.get("stages") or ())})
    except ValidationError as e:
        raise _readable(e, where, Recipe) from e
    try:
        methods = recipe.methods()
    except RecipeError as e:
        raise RecipeError(f"{where}: {e.message}", hint=e.hint) from e
    if len(methods) > 1:
        raise RecipeError(
            f"{where}: stages 1 ({methods[0].name}) and 2 ({methods[1].name}) both quantize the same weights",
            hint="keep one quantization stage",
        )
    return recipe


def _method(index: int, stage: Mapping[str, Any]) -> Quantizer:
    where = f"stage {index + 1}"
    options = dict(stage)
    name = options.pop("method", None)
    if not isinstance(name, str):
        raise RecipeError(f"{where} names no method", hint="known: " + ", ".join(sorted(METHODS)))
    try:
        cls = method_class(name)
    except UnknownName as e:
        raise RecipeError(f"{where}: {e.message}", hint=e.hint) from e
    try:
        checked = cls.Options.model_validate(options)
    except ValidationError as e:
        raise _readable(e, f"{where} ({name})", cls.Options) from e
    _check_bits(where, checked)
    return cls(checked)


def _check_bits(where: str, options: QuantizeOptions) -> None:
    for label, grid in (("", options), ("embedding.", options.embedding), ("head.", options.head)):
        if grid is not None and grid.bits not in (2, 3, 4, 8):
            raise RecipeError(f"{where}: {label}bits is {grid.bits}", hint="2, 3, 4 or 8")
        if grid is not None and isinstance(grid.group_size, int) and grid.group_size < 1:
            raise RecipeError(
                f"{where}: {label}group_size is {grid.group_size}", hint="a positive number, channel or auto"
            )


def _readable(error: ValidationError, where: str, model: type[BaseModel]) -> RecipeError:
    first = error.errors()[0]
    key = ".".join(str(k) for k in first["loc"])
    if first["type"] == "extra_forbidden":
        parent: Any = model
        for part in first["loc"][:-1]:
            parent = _field_model(parent, str(part)) or parent
        return RecipeError(
            f"{where}: unknown key {key!r}", hint=did_you_mean(str(first["loc"][-1]), parent.model_fields)
        )
    return RecipeError(f"{where}: {key}: {first['msg'].lower()} (got {first['input']!r:.80})")


def _field_model(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    if field is None:
        return None
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
