"""Recipes: what is accepted, and what the errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gossamer.compress.recipe import load_recipe, parse_recipe
from gossamer.errors import RecipeError, UnknownName

SHIPPED = Path(__file__).parents[3] / "recipes"


def recipe(**stage: Any) -> dict[str, Any]:
    return {"version": 1, "name": "r", "stages": [{"method": "gptq", **stage}]}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_under_its_own_name(path: Path) -> None:
    loaded = load_recipe(path.stem, SHIPPED)
    assert loaded.name == path.stem
    assert loaded.description


def test_canonical_form_is_a_recipe_that_means_the_same() -> None:
    first = parse_recipe(recipe(bits=3), "test")
    again = parse_recipe(first.canonical(), "test")
    assert again.canonical() == first.canonical()
    assert first.canonical()["stages"][0]["act_order"] is True


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (recipe(bitz=4), "unknown key 'bitz'", "bits"),
        (recipe(embedding={"bits": 8, "groupsize": 64}), "unknown key 'embedding.groupsize'", "group_size"),
        ({**recipe(), "stage": []}, "unknown key 'stage'", "stages"),
        ({"version": 1, "name": "r", "stages": [{"method": "gptqq"}]}, "stage 1: unknown method 'gptqq'", "gptq"),
        (recipe(bits=5), "bits is 5", "2, 3, 4 or 8"),
        (recipe(bits=99), "bits", None),
        (recipe(bits="4"), "bits", None),
        (recipe(group_size="row"), "group_size", None),
        (recipe(group_size=0), "group_size is 0", "positive"),
        (recipe(damping=-1.0), "damping", None),
        ({**recipe(), "version": 2}, "version is 2", None),
        ({"version": 1, "name": "r", "stages": []}, "stages", None),
        ({"version": 1, "name": "../x", "stages": [{"method": "rtn"}]}, "name", None),
        ({"version": 1, "name": "r", "stages": [{"method": "rtn"}, {"method": "gptq"}]}, "both quantize", "one"),
        ([1, 2], "a recipe is a mapping", None),
    ],
)
def test_a_bad_recipe_is_refused_with_the_place_and_the_way_out(data: Any, message: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "test")
    assert message in caught.value.message
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_unknown_shipped_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="int4-gptq"):
        load_recipe("int4-gtpq", SHIPPED)


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.system ['true']", "\x00", "[" * 100_000])
def test_text_that_is_not_a_recipe_is_a_typed_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path, SHIPPED)
