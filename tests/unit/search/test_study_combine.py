"""Pairs of stages: which are tried, and what is said of those that no recipe may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.errors import UnknownName
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import SpeedPlan, WindowPlan
from gossamer.measure.run import EvalRequest
from gossamer.search.study_combine import STAGES, CombineStudy, variants


def test_stages_alone_come_first_and_pairs_in_each_order_that_is_legal() -> None:
    made, refused = variants(["rotate", "int4", "scales"], STAGES, {})
    assert made == ["int4", "rotate-then-int4", "int4-then-scales"]
    assert set(refused) == {"rotate", "scales", "rotate-then-scales", "int4-then-rotate", "scales-then-rotate"} | {
        "scales-then-int4"
    }
    assert "changes float weights" in refused["int4-then-rotate"]
    assert "no stage compresses" in refused["rotate"]


def test_every_shipped_stage_stands_in_some_recipe() -> None:
    made, _ = variants(list(STAGES), STAGES, {})
    for name in STAGES:
        assert any(name in variant.split("-then-") for variant in made)
    assert {"flap-then-int4", "svd-llm-then-int8", "sparsegpt-then-recover-local"} <= set(made)


def test_a_stage_that_is_not_known_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="int4"):
        variants(["int44"], STAGES, {})


def test_a_variant_is_a_recipe_of_its_stages(tmp_path: Path) -> None:
    request = EvalRequest("default", load_corpus("default"), WindowPlan(16, 16, 8), tokens=100, samples=0)
    study = CombineStudy("m", "f0", tmp_path, request, SpeedPlan(), calibration={"sequences": 4})
    recipe = study.recipe("rotate-then-int4")
    assert [stage["method"] for stage in recipe.stages] == ["rotate", "gptq"]
    assert recipe.calibration.sequences == 4
