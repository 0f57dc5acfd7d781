"""Low rank at several ratios: which recipes are made, and what a resumed study takes for the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.errors import RecipeError, UsageError
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import SpeedPlan, WindowPlan
from gossamer.measure.run import EvalRequest
from gossamer.search.study_rank import RankStudy, variants
from gossamer.search.work import _asked


def study(tmp_path: Path, method: str = "svd-llm") -> RankStudy:
    request = EvalRequest("default", load_corpus("default"), WindowPlan(16, 16, 8), tokens=100, samples=0)
    return RankStudy("m", "f0", tmp_path, request, SpeedPlan(), method=method, calibration={"sequences": 4})


def test_each_ratio_is_tried_uniform_and_allocated() -> None:
    assert variants(["0.9", "0.50", "0.9"]) == ("0.9", "0.9-kld", "0.5", "0.5-kld")


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.5", "half", "nan", "inf", ""])
def test_what_is_no_share_is_refused(ratio: str) -> None:
    with pytest.raises(UsageError, match="not a share"):
        variants(["0.9", ratio])


def test_a_variant_is_a_recipe_of_one_stage(tmp_path: Path) -> None:
    uniform, allocated = (study(tmp_path, "asvd").recipe(name) for name in ("0.8", "0.8-kld"))
    assert (uniform.name, allocated.name) == ("0.8", "0.8-kld")
    assert uniform.stages == ({"method": "asvd", "ratio": 0.8, "allocate": None},)
    assert allocated.stages == ({"method": "asvd", "ratio": 0.8, "allocate": "kld"},)
    assert uniform.calibration.sequences == 4
    with pytest.raises(RecipeError, match="unknown method 'svdd'"):
        study(tmp_path, "svdd").recipe("0.8")


def test_an_allocated_recipe_is_the_one_that_asked_for_it(tmp_path: Path) -> None:
    asked = study(tmp_path).recipe("0.8-kld").canonical()
    made = study(tmp_path).recipe("0.8-kld").canonical()
    made["stages"][0] |= {"settled": True, "layers": {"model.layers.0.mlp.down_proj": {"ratio": None, "rank": 32}}}
    assert made != asked
    assert _asked(made) == _asked(asked)
    assert _asked(study(tmp_path).recipe("0.8").canonical()) != _asked(asked)
