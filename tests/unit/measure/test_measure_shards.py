"""A text judged in shards: the record of one that was judged whole, whoever scored what, and whatever was killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer.measure import shards
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import WindowPlan
from gossamer.measure.run import EvalRequest, evaluate_models
from gossamer.measure.shards import Answer, evaluate_in_shards
from inline_worker import InlineWorker
from tiny_llama import make_folder

TIMES = {"seconds", "tokens_per_second"}
Works = Iterable[tuple[str, Callable[[], Answer]]]

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "Worker", InlineWorker)
    monkeypatch.setattr(shards, "WINDOWS", 3)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "other", seed=1, torch_dtype="bfloat16")


@pytest.fixture(scope="module")
def request_(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalRequest:
    text = tmp_path_factory.mktemp("corpus") / "text.txt"
    text.write_text(load_corpus("default").text[:3000])
    plan = WindowPlan(48, 40, 24)
    return EvalRequest(str(text), load_corpus(text), plan, str(tiny), tokens=450, samples=1, threads=1)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    results = {key: value for key, value in record["results"].items() if key not in TIMES}
    return {**record, "created": None, "results": results}


def whole(model: Path, request: EvalRequest) -> dict[str, Any]:
    (record,) = evaluate_models([str(model)], request, lambda *_: None)
    return without_times(record)


def sharded(model: Path, request: EvalRequest, spread: shards.Spread, work: Path | None = None) -> dict[str, Any]:
    (record,) = evaluate_in_shards([str(model)], request, lambda *_: None, spread, work)
    return without_times(record)


def in_turn(works: Works) -> Iterator[tuple[str, Answer]]:
    return ((name, work()) for name, work in works)


class Backwards:
    """Does the last piece first, and remembers what it did."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.done = stop_after, list[str]()

    def __call__(self, works: Works) -> Iterator[tuple[str, Answer]]:
        for name, work in reversed(list(works)):
            if len(self.done) == self.stop_after:
                raise KeyboardInterrupt
            self.done.append(name)
            yield name, work()


def test_shards_in_any_order_give_the_record_of_the_whole(tiny: Path, other: Path, request_: EvalRequest) -> None:
    expected = whole(other, request_)
    assert expected["status"] == "ok"
    assert expected["protocol"]["windows"] == 11
    assert expected["results"]["kld_p99"] > expected["results"]["kld_mean"] > 0
    backwards = Backwards()
    assert sharded(other, request_, backwards) == expected
    assert backwards.done == [f"shard-{n:05d}" for n in (3, 2, 1, 0)]
    assert sharded(other, request_, in_turn) == expected
    assert sharded(tiny, request_, in_turn) == whole(tiny, request_)  # the reference itself


def test_a_run_that_was_killed_goes_on_with_the_shards_that_are_missing(
    other: Path, request_: EvalRequest, tmp_path: Path
) -> None:
    work = tmp_path / ".eval.jsonl.work"
    with pytest.raises(KeyboardInterrupt):
        sharded(other, request_, Backwards(stop_after=3), work)
    (folder,) = (path for path in work.iterdir() if path.is_dir())
    (folder / "shard-00002.json").write_text("{}")  # and is not what the journal records
    again = Backwards(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        sharded(other, request_, again, work)
    last = Backwards()
    assert sharded(other, request_, last, work) == whole(other, request_)
    assert [again.done, last.done] == [["shard-00003"], ["shard-00002", "shard-00001", "shard-00000"]]
    assert not work.exists()


def test_shards_of_another_request_are_neither_used_nor_lost(
    other: Path, request_: EvalRequest, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        sharded(other, request_, Backwards(stop_after=3), work)
    fewer = EvalRequest(request_.corpus_source, request_.corpus, request_.plan, tokens=300, samples=0, threads=1)
    assert sharded(other, fewer, in_turn, work) == whole(other, fewer)
    rest = Backwards()
    assert sharded(other, request_, rest, work) == whole(other, request_)
    assert rest.done == ["shard-00000"]


def test_shards_stay_until_the_record_is_taken(other: Path, request_: EvalRequest, tmp_path: Path) -> None:
    records = evaluate_in_shards([str(other)], request_, lambda *_: None, in_turn, tmp_path / "work")
    next(records)
    assert len(list((tmp_path / "work").glob("*/shard-*.json"))) == 4
    assert list(records) == []
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("what", ["missing", "poisoned", "of another tokenizer"])
def test_a_model_that_fails_gives_the_same_record(what: str, request_: EvalRequest, tmp_path: Path) -> None:
    model = tmp_path / "model"
    if what == "poisoned":
        make_folder(model, poison=float("nan"))
    elif what == "of another tokenizer":
        make_folder(model, vocab_size=280)
    found = sharded(model, request_, in_turn, tmp_path / "work")
    assert found["status"] == "failed"
    assert found == whole(model, request_)
    assert not (tmp_path / "work").exists()


def test_a_shard_whose_process_died_fails_the_record_and_is_done_again_alone(
    other: Path, request_: EvalRequest, tmp_path: Path
) -> None:
    def one_dies(works: Works) -> Iterator[tuple[str, Answer]]:
        for name, work in works:
            died = {"error": {"kind": "WorkerDied", "message": "the worker was killed", "hint": None}}
            yield name, (({}, died) if name == "shard-00002" else work())

    found = sharded(other, request_, one_dies, tmp_path / "work")
    assert (found["status"], found["error"]) == ("failed", "WorkerDied: the worker was killed")
    rest = Backwards()
    assert sharded(other, request_, rest, tmp_path / "work") == whole(other, request_)
    assert rest.done == ["shard-00002"]


def test_nodes_that_compute_unlike_each_other_give_no_numbers(
    other: Path, request_: EvalRequest, tmp_path: Path
) -> None:
    def two_processors(works: Works) -> Iterator[tuple[str, Answer]]:
        for n, (name, work) in enumerate(works):
            facts, answer = work()
            yield name, (facts | {"engine 0": facts["engine 0"] | {"kernels": ("avx2", "avx512")[n % 2]}}, answer)

    found = sharded(other, request_, two_processors, tmp_path / "work")
    assert found["status"] == "failed"
    assert "kernels was avx2 and avx512" in found["error"]
    assert json.dumps(found["results"]) == "{}"
