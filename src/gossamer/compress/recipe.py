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

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint import Checkpoint
from ..errors import RecipeError, UnknownName, did_you_mean
from .factorize.rank import Factorizer
from .method import BlockMethod, GridMethod, LayerMethod, Method, Needs, Reducer, Transform, Tuner, WeightMethod
from .prune.masks import OWLOptions
from .registry import METHODS, method_class

MAX_BYTES = 1 << 16
MAX_DIGITS = 100
"""Of a number: Python takes quadratic time for long ones, and no bound of a recipe needs more."""

_shortened = reprlib.Repr()
_shortened.maxlevel, _shortened.maxstring = 2, 60


class CalibrationSpec(BaseModel):
    """Which text the statistics are taken from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    source: str = Field("self", description="self: sampled from the model; a text file; hub:ORG/DATASET/FILE")
    sequences: int = Field(32, ge=1, le=100_000)
    length: int = Field(512, ge=8, le=131_072, description="tokens of each sequence")
    seed: int = Field(0, ge=0, le=2**63 - 1)

    @property
    def public_source(self) -> str:
        """The source without the folders of this machine: `self`, `hub:...` or a file's base name."""
        if self.source == "self" or self.source.startswith("hub:"):
            return self.source
        name = Path(self.source).name
        return f"./{name}" if name == "self" or name.startswith("hub:") else name


@dataclass(frozen=True)
class Part:
    """Stages that make one model out of another: views of what is given, one main stage, and training of the result."""

    transforms: tuple[Transform, ...]
    main: WeightMethod | Reducer
    tuners: tuple[Tuner, ...]

    @property
    def methods(self) -> tuple[Method, ...]:
        return (*self.transforms, self.main, *self.tuners)

    @property
    def independent(self) -> bool:
        """True if each block follows from what the part is given alone, so that they may be made in any order."""
        if isinstance(self.main, BlockMethod):
            return self.main.independent
        return isinstance(self.main, WeightMethod) and self.main.needs is Needs.NOTHING

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        """What the main stage sees of the model that the part is given; nothing is computed before it is read."""
        for transform in self.transforms:
            checkpoint = transform.apply(checkpoint)
        return checkpoint

    @property
    def budget(self) -> bool:
        """True if the main stage has a number of bits, or of parameters, to spend by measurement."""
        if isinstance(self.main, GridMethod):
            return self.main.options.budget is not None
        return isinstance(self.main, Factorizer) and self.main.options.allocate is not None


class Recipe(BaseModel):
    """A checked recipe. `stages` holds each stage's method name and typed options."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)
    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    calibration: CalibrationSpec = Field(default_factory=lambda: CalibrationSpec.model_validate({}))
    stages: tuple[dict[str, Any], ...] = Field(min_length=1)

    def methods(self) -> list[Method]:
        """One method per stage, options validated. Raises RecipeError naming the stage and key."""
        return [_method(i, stage) for i, stage in enumerate(self.stages)]

    def parts(self) -> list[Part]:
        """The stages by the models that they make, one out of the other."""
        return _parts(self.methods())

    def quantizer(self) -> GridMethod | None:
        """The stage that decides codes on a grid, if there is one: it is the last main stage."""
        return next((m for m in self.methods() if isinstance(m, GridMethod)), None)

    def needs_calibration(self) -> bool:
        return any(part.budget or any(m.needs is not Needs.NOTHING for m in part.methods) for part in self.parts())

    def canonical(self) -> dict[str, Any]:
        """The recipe with every default written out: equal dictionaries make equal artifacts from equal tokens.

        A calibration file appears by its base name: the hash of its tokens tells which text it was, and an artifact
        names no folder of the machine that made it.
        """
        stages = [{"method": m.name, **m.options.model_dump(mode="json")} for m in self.methods()]
        plain = self.model_dump(mode="json", exclude={"stages"})
        plain["calibration"]["source"] = self.calibration.public_source
        return {**plain, "stages": stages}


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, since a few lines of them can stand for gigabytes, and every bad value a YAMLError."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "a recipe has no aliases: write the value out", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} digits", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:  # what PyYAML lets through
            message = f"{_short(node.value)} is not of type {_short(kind)}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from e


def load_recipe(name: str | Path, shipped: Path) -> Recipe:
    """A recipe by shipped name, by YAML file, or from an artifact's folder. Raises RecipeError or UnknownName.

    A shipped name means the shipped recipe, whatever lies in the working directory under that name; a folder or file of
    the same name is meant by a path: `./int4-gptq` or `int4-gptq/`.
    """
    folder = artifact_folder(name, shipped)
    if folder is not None:
        from ..checkpoint.manifest import read_manifest

        manifest = read_manifest(folder)
        if manifest is None:
            raise RecipeError(f"{folder} is a folder without gossamer.json: it records no recipe")
        return parse_recipe(manifest.recipe, str(folder / "gossamer.json"))
    path, known = Path(name), _shipped_names(shipped)
    if str(name) in known:
        path = shipped / f"{name}.yaml"
    elif not path.suffix and not os.path.exists(path):
        raise UnknownName("recipe", str(name), known)
    return parse_recipe(_read_yaml(path), str(path))


def artifact_folder(name: str | Path, shipped: Path) -> Path | None:
    """The folder that `load_recipe` replays for this name, or None if the name means a file or a shipped recipe."""
    return Path(name) if str(name) not in _shipped_names(shipped) and os.path.isdir(name) else None


def _shipped_names(shipped: Path) -> list[str]:
    return [p.stem for p in sorted(shipped.glob("*.yaml"))]


def _read_yaml(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"{path} has over {MAX_BYTES} bytes: not a recipe")
        return yaml.load(raw.decode("utf-8"), _Loader)  # noqa: S506 (a SafeLoader, only stricter)
    except OSError as e:
        raise RecipeError(f"cannot read recipe {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        raise RecipeError(f"{path} is not YAML that a recipe may use: {e!s:.400}") from e


def parse_recipe(data: Any, where: str) -> Recipe:
    """Check a parsed recipe: keys, types, bounds, methods and their order. Raises RecipeError saying where."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: a recipe is a mapping, not {type(data).__name__}")
    if data.get("version") != 1:
        raise RecipeError(
            f"{where}: version is {_short(data.get('version'))}, this Gossamer reads version 1",
            hint="the first line of a recipe is `version: 1`",
        )
    stages = data.get("stages")
    if not isinstance(stages, list | tuple):
        raise RecipeError(
            f"{where}: stages is a list of methods, not {_short(stages)}", hint="`stages: [{method: gptq}]`"
        )
    try:
        recipe = Recipe.model_validate({**data, "stages": tuple(stages)})
    except ValidationError as e:
        raise _readable(e, where, Recipe) from e
    try:
        _check_order(recipe.methods())
    except RecipeError as e:
        raise RecipeError(f"{where}: {e.message}", hint=e.hint) from e
    return recipe


def _parts(methods: list[Method]) -> list[Part]:
    """Stages in their order, which has been checked."""
    parts: list[Part] = []
    transforms: list[Transform] = []
    for method in methods:
        if isinstance(method, Transform):
            transforms.append(method)
        elif isinstance(method, WeightMethod | Reducer):
            parts.append(Part(tuple(transforms), method, ()))
            transforms = []
        else:
            assert isinstance(method, Tuner)
            last = parts.pop()
            parts.append(Part(last.transforms, last.main, (*last.tuners, method)))
    return parts


def _check_order(methods: list[Method]) -> None:
    """Raises RecipeError with the reason unless each stage finds what it works on, and leaves what others made."""
    named = [f"{i + 1} ({m.name})" for i, m in enumerate(methods)]
    mains = [i for i, m in enumerate(methods) if isinstance(m, WeightMethod | Reducer)]
    if not mains:
        names = ", ".join(sorted(name for name, cls in METHODS.items() if issubclass(cls, WeightMethod | Reducer)))
        raise RecipeError(f"no stage compresses: stage {named[0]} only prepares or trains", hint=f"add one of {names}")
    for i, method in enumerate(methods):
        before = [at for at in mains if at < i]
        if isinstance(method, Tuner) and not before:
            raise RecipeError(
                f"stage {named[i]} trains a compressed model, but nothing is compressed before stage {named[mains[0]]}",
                hint=f"put {method.name} after {methods[mains[0]].name}",
            )
        if method.family == "distill" and not before:
            raise RecipeError(
                f"stage {named[i]} brings back what earlier stages lost, but it is the first",
                hint=f"put a stage that prunes or factorizes before {method.name}",
            )
        turned = [at for at in range(i) if not getattr(methods[at], "keeps_stream", True)]
        if method.family == "distill" and turned:
            raise RecipeError(
                f"stage {named[i]} compares blocks with the original's, but stage {named[turned[0]]} has changed what "
                "the stream between them means",
                hint=f"recover end to end (distill, lora), or put {methods[turned[0]].name} behind {method.name}",
            )
        if not isinstance(method, Tuner):
            for at in before:
                _check_pair(methods[at], method, named[at], named[i])
    if isinstance(methods[-1], Transform):
        raise RecipeError(f"stage {named[-1]} only prepares, but no stage follows it", hint=f"remove {named[-1]}")
    if len(mains) > 1 and any(isinstance(m, GridMethod) and m.options.budget for m in methods):
        raise RecipeError(
            "a budget is measured on the model that the recipe begins with, but here others change it first",
            hint="compress in two steps, the second with the budget",
        )
    for i in mains[1:]:
        method = methods[i]
        if isinstance(method, Factorizer) and method.options.allocate:
            raise RecipeError(
                f"stage {named[i]} allocates ranks by the model that the recipe begins with, but others change it",
                hint="compress in two steps, the second with `allocate`",
            )
        if isinstance(method.options, OWLOptions) and method.options.allocate == "owl":
            raise RecipeError(
                f"stage {named[i]} counts outliers of the model that the recipe begins with, but others change it",
                hint="compress in two steps, the second with `allocate: owl`",
            )


def _check_pair(first: Method, second: Method, named: str, here: str) -> None:
    """Raises RecipeError if the second stage, not a tuner, would undo or could not read what the first one made."""
    if isinstance(first, GridMethod):
        if isinstance(second, GridMethod):
            raise RecipeError(
                f"stages {named} and {here} both quantize the same weights", hint="keep one quantization stage"
            )
        raise RecipeError(
            f"stage {here} changes float weights, but stage {named} has quantized them before it",
            hint=f"put {second.name} before {first.name}",
        )
    if isinstance(first, LayerMethod) and isinstance(second, LayerMethod | Reducer | Transform):
        raise RecipeError(
            f"stage {here} makes whole matrices anew, but stage {named} has left other forms of them",
            hint=f"put {second.name} before {first.name}"
            if isinstance(second, Reducer | Transform)
            else f"keep one of {first.name} and {second.name}",
        )


def _method(index: int, stage: Mapping[str, Any]) -> Method:
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
        checked = cls.options_class().model_validate(options)
    except ValidationError as e:
        raise _readable(e, f"{where} ({name})", cls.options_class()) from e
    return cls(checked)


def _readable(error: ValidationError, where: str, model: type[BaseModel]) -> RecipeError:
    first = error.errors()[0]
    key = ".".join(str(k) for k in first["loc"])
    if first["type"] == "extra_forbidden":
        parent: Any = model
        for part in first["loc"][:-1]:
            parent = _field_model(parent, str(part)) or parent
        return RecipeError(
            f"{where}: unknown key {_short(key)}", hint=did_you_mean(str(first["loc"][-1]), parent.model_fields)
        )
    if first["type"] == "value_error":  # a validator's own words: what is wrong, and what would be right
        message, _, hint = str(first["ctx"]["error"]).partition(": ")
        return RecipeError(": ".join(filter(None, (where, key, message))), hint=hint or None)
    return RecipeError(f"{where}: {key}: {first['msg'].lower()} (got {_short(first['input'])})")


def _field_model(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    if field is None:
        return None
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _short(value: object) -> str:
    """A value in at most 80 characters, and at little cost however large or nested it is."""
    return f"{_shortened.repr(value):.80}"
