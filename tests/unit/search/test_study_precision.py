"""A study of formats: what is measured, what is not measured again, and how failures are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gossamer.compress.recipe import Recipe
from gossamer.errors import RecipeError, UnknownName
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import SpeedPlan, WindowPlan
from gossamer.measure.records import append_record, make_record, unknown_model_block
from gossamer.measure.run import EvalRequest
from gossamer.search import study_precision, work
from gossamer.search.study_precision import FORMATS, PrecisionStudy, run_study, variant_recipe
from gossamer.search.work import read_lines

MODEL = "the-model"


class Measured:
    """Stands for making, judging and timing, and counts what was asked for."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.judged: list[list[str]] = []
        self.timed: list[tuple[int, list[str]]] = []
        self.broken: set[str] = set()

    @property
    def all_judged(self) -> list[str]:
        return [name for names in self.judged for name in names]

    def make(self, recipe: Recipe, out: Path, progress: Any) -> dict[str, Any]:
        self.made.append(recipe.name)
        error = "broken" if recipe.name in self.broken else None
        if error is None:
            out.mkdir(parents=True, exist_ok=True)
        model = unknown_model_block(str(out)) | {"path": str(out), "recipe": recipe.name, "base_fingerprint": "f0"}
        model["fingerprint"] = f"f-{out.name}"
        return make_record("compress", model=model, engine={}, protocol={"recipe": recipe.canonical()}, error=error)

    def evaluate(self, models: Sequence[str], request: EvalRequest, progress: Any) -> Iterator[dict[str, Any]]:
        self.judged.append([Path(m).name for m in models])
        protocol = {
            "corpus_sha256": request.corpus.sha256, "context": 16, "stride": 16, "scored": 8,
            "reference_fingerprint": "f0", "tokens": request.tokens, "samples": 0, "weights": "stored",
            "backend": "auto", "activations": "auto", "threads": 1,
        } | ({} if request.kv_cache == "auto" else {"kv_cache": request.kv_cache})  # fmt: skip
        for model in models:
            yield self.record("eval", model, protocol, {"kld_mean": 0.1})

    def bench(self, models: Sequence[str], plan: SpeedPlan, *rest: Any) -> Iterator[dict[str, Any]]:
        self.timed.append((plan.batch, [Path(m).name for m in models]))
        protocol = {"prompt_tokens": 8, "output_tokens": 4, "batch": plan.batch, "repetitions": 1, "warmup": 0}
        protocol |= {"weights": "stored", "backend": "auto", "activations": "auto", "threads": 1}
        protocol |= {} if rest[-1] == "auto" else {"kv_cache": rest[-1]}
        for model in models:
            yield self.record("bench", model, protocol, {"decode_tokens_per_s": {"median": 5.0}})

    def record(self, kind: Any, model: str, protocol: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
        name = Path(model).name
        fingerprint = "f0" if model == MODEL else f"f-{name}"
        block = unknown_model_block(model) | {"fingerprint": fingerprint}
        error = "broken" if f"{kind} {name}" in self.broken else None
        return make_record(kind, model=block, engine={}, protocol=protocol, results=results, error=error)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    stand_in = Measured()
    monkeypatch.setenv("GOSSAMER_THREADS", "1")
    monkeypatch.setattr(work, "evaluate_models", stand_in.evaluate)
    monkeypatch.setattr(work, "bench_models", stand_in.bench)
    return stand_in


def study(folder: Path, **changes: Any) -> PrecisionStudy:
    request = EvalRequest("default", load_corpus("default"), WindowPlan(16, 16, 8), tokens=100, samples=0)
    plain: dict[str, Any] = {"formats": ("int8", "int4", "nf4", "int3", "int2"), "batches": (1, 8)} | changes
    return PrecisionStudy(MODEL, "f0", folder, request, SpeedPlan(8, 4, 1, 1, 0), **plain)


def run(asked: PrecisionStudy, measured: Measured, said: list[str] | None = None) -> list[dict[str, Any]]:
    return run_study(asked, measured.make, lambda label, done, total: said.append(label) if said is not None else None)


def test_every_variant_is_made_judged_and_timed_at_every_batch_size(tmp_path: Path, measured: Measured) -> None:
    said: list[str] = []
    records = run(study(tmp_path), measured, said)
    assert measured.made == ["int8", "int4", "nf4", "int3", "int2"]
    assert measured.all_judged == [MODEL, "int8", "int4", "nf4", "int3", "int2"]
    assert [batch for batch, _ in measured.timed] == [1, 1, 8, 8]
    assert max(map(len, measured.judged)) <= study_precision.TOGETHER
    assert [r["kind"] for r in records] == ["compress"] * 5 + ["eval"] * 6 + ["bench"] * 12
    assert records == read_lines(tmp_path / "study.jsonl")
    assert "nf4, 3 of 5: making it" in said


def test_what_is_there_is_not_measured_again_and_what_is_missing_is(tmp_path: Path, measured: Measured) -> None:
    first = run(study(tmp_path), measured)
    again = Measured()
    measured.__dict__.update(again.__dict__)
    assert run(study(tmp_path), measured) == first
    assert (measured.made, measured.judged, measured.timed) == ([], [], [])
    more = run(study(tmp_path, formats=("int8", "fp4"), batches=(1, 64)), measured)
    assert measured.made == ["fp4"]
    assert measured.judged == [["fp4"]]
    assert measured.timed == [(1, ["fp4"]), (64, [MODEL, "int8", "fp4"])]
    assert [r["kind"] for r in more] == ["compress"] * 2 + ["eval"] * 3 + ["bench"] * 6


def test_a_killed_study_goes_on_after_its_last_whole_record(tmp_path: Path, measured: Measured) -> None:
    run(study(tmp_path), measured)
    lines = (tmp_path / "study.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "study.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:40])
    measured.__init__()  # type: ignore[misc]
    records = run(study(tmp_path), measured)
    assert measured.made == []
    assert measured.judged == [["nf4", "int3", "int2"][-4:]] or measured.all_judged == [
        "int4",
        "nf4",
        "int3",
        "int2",
    ]
    assert len(records) == 23


def test_another_protocol_or_recipe_is_measured_anew(tmp_path: Path, measured: Measured) -> None:
    run(study(tmp_path), measured)
    measured.__init__()  # type: ignore[misc]
    request = EvalRequest("default", load_corpus("default"), WindowPlan(16, 16, 8), tokens=99, samples=0)
    other = study(tmp_path)
    run(PrecisionStudy(MODEL, "f0", tmp_path, request, other.speed, other.batches, other.formats), measured)
    assert measured.made == measured.timed == []
    assert len(measured.all_judged) == 6
    measured.__init__()  # type: ignore[misc]
    run(study(tmp_path, method="rtn"), measured)
    assert measured.made == ["int8", "int4", "nf4", "int3", "int2"]


def test_a_smaller_kv_cache_is_the_model_itself_judged_and_timed_once_more(tmp_path: Path, measured: Measured) -> None:
    asked = study(tmp_path, formats=("int8", "kv-int4"))
    records = run(asked, measured)
    assert measured.made == ["int8"]
    assert measured.judged == [[MODEL, "int8"], [MODEL]]
    assert measured.timed == [(1, [MODEL, "int8"]), (8, [MODEL, "int8"]), (1, [MODEL]), (8, [MODEL])]
    assert [r["protocol"].get("kv_cache") for r in records[-3:]] == ["int4"] * 3
    measured.__init__()  # type: ignore[misc]
    assert run(asked, measured) == records
    assert (measured.made, measured.judged, measured.timed) == ([], [], [])


def test_a_failure_is_a_record_and_is_tried_again(tmp_path: Path, measured: Measured) -> None:
    measured.broken = {"int4", "eval nf4", "bench int2"}
    records = run(study(tmp_path), measured)
    failed = [(r["kind"], Path(r["model"]["name"]).name) for r in records if r["status"] == "failed"]
    assert failed == [("compress", "int4"), ("eval", "nf4"), ("bench", "int2"), ("bench", "int2")]
    assert "int4" not in measured.all_judged
    measured.__init__()  # type: ignore[misc]
    assert all(r["status"] == "ok" for r in run(study(tmp_path), measured))
    assert measured.made == ["int4"]
    assert measured.all_judged == ["int4", "nf4"]
    assert measured.timed == [(1, ["int4", "int2"]), (8, ["int4", "int2"])]


def test_a_spent_budget_is_known_by_what_was_asked(tmp_path: Path, measured: Measured) -> None:
    asked = study(tmp_path, formats=("mixed-4.5",))
    recipe = asked.recipe("mixed-4.5").canonical()
    stage = recipe["stages"][0]
    stage["budget"]["settled"] = True
    stage["layers"] = {"model.layers.0.mlp.down_proj": {"bits": 8}}
    stage["embedding"] = {"bits": 5}
    asked.artifact("mixed-4.5").mkdir(parents=True)
    model = unknown_model_block("m") | {"path": str(asked.artifact("mixed-4.5")), "base_fingerprint": "f0"}
    model["fingerprint"] = "f-mixed-4.5"
    append_record(asked.records, make_record("compress", model=model, engine={}, protocol={"recipe": recipe}))
    run(asked, measured)
    assert measured.made == []


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"kind": "eval"}\n[1]\nnot json\n\xff\xfe\n{"kind": "bench"}\n{"cut')
    assert [r["kind"] for r in read_lines(path)] == ["eval", "bench"]
    assert read_lines(tmp_path / "absent") == []


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_variant_is_a_recipe(name: str, method: str) -> None:
    recipe = variant_recipe(name, method, {"sequences": 2})
    assert recipe.name == name
    assert recipe.calibration.sequences == 2
    assert json.loads(json.dumps(recipe.canonical()))["stages"][0]["method"] in (method, "squeezellm")


def test_unknown_formats_and_methods_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as caught:
        study(tmp_path).recipe("int44")
    assert "'int4'" in str(caught.value)
    with pytest.raises(RecipeError, match="format int4 of the study"):
        study(tmp_path, method="gptqq").recipe("int4")
