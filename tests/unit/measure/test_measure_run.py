"""Every model asked for gives one record: measured as the protocol says, or failed with the reason."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.textprint import line_hashes
from gossamer.engine import isa_in_use
from gossamer.engine.backend import choose
from gossamer.engine.reference import ReferenceBackend
from gossamer.errors import MeasureError, UnknownName, UsageError
from gossamer.measure import run
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import SpeedPlan, WindowPlan
from gossamer.measure.quality import Quality, evaluate
from gossamer.measure.records import model_block, unknown_model_block
from gossamer.measure.samples import PROMPTS, greedy
from gossamer.measure.speed import make_prompts, ordinary_tokens
from gossamer.measure.timing import Timing, rates, summary
from gossamer.measure.worker import Job, Worker
from tiny_llama import make_folder

PLAN = WindowPlan(64, 64, 32)
RECORD_KEYS = {"schema", "kind", "status", "error", "created", "model", "engine", "machine", "protocol", "results"}


pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    monkeypatch.setenv("GOSSAMER_THREADS", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(load_corpus("default").text[:3000])
    return path


def request_for(text: Path, **changes: Any) -> run.EvalRequest:
    options: dict[str, Any] = {"plan": PLAN, "tokens": 400, "samples": 2, "threads": 1} | changes
    return run.EvalRequest(str(text), load_corpus(text), **options)


def sha256_of_tokens(model: Path, text: Path, count: int) -> str:
    ids = open_checkpoint(model).tokenizer().encode(text.read_text())[:count]
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()


def evaluate_all(models: Sequence[Path | str], request: run.EvalRequest) -> list[dict[str, Any]]:
    return list(run.evaluate_models([str(m) for m in models], request, lambda *event: None))


def test_records_say_what_was_measured_and_how(tiny: Path, text: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", seed=1)
    request = request_for(text, reference=str(tiny), weights="float")
    itself, moved = evaluate_all([tiny, other], request)
    for record in (itself, moved):
        assert set(record) == RECORD_KEYS
        assert (record["kind"], record["status"], record["error"]) == ("eval", "ok", None)
        assert record["protocol"] == {
            "corpus": "text.txt",
            "corpus_sha256": request.corpus.sha256,
            "context": 64,
            "stride": 64,
            "scored": 32,
            "tokens": 400,
            "windows": 6,
            "tokens_scored": 192,
            "tokens_sha256": sha256_of_tokens(tiny, text, 384),
            "samples": 2,
            "reference": str(tiny),
            "reference_fingerprint": open_checkpoint(tiny).fingerprint(),
            "weights": "float",
            "backend": "auto",
            "activations": "auto",
            "threads": 1,
        }
        assert record["machine"]["threads"] == 1
        assert record["engine"] == {
            "name": "gossamer",
            "backend": "reference",
            "version": "0.1.0",
            "dtype": "float32",
            "kernels": isa_in_use(),
            "activations": "exact",
            "kv_cache": "fp32",
        }
        assert [s["prompt"] for s in record["results"]["samples"]] == list(PROMPTS[:2])
    assert itself["model"]["fingerprint"] == itself["protocol"]["reference_fingerprint"]
    assert itself["model"]["weight_bytes"] == open_checkpoint(tiny).weight_bytes()
    assert itself["results"]["kld_mean"] == 0
    assert itself["results"]["top1_agreement"] == 1
    assert moved["results"]["kld_mean"] > 0
    assert moved["results"]["tokens_per_second"] > 0

    here = open_checkpoint(other)
    ids = torch.tensor(here.tokenizer().encode(text.read_text())[:400])
    (expected,) = evaluate([ReferenceBackend.load(here)], None, ids, PLAN)
    assert isinstance(expected, Quality)
    assert moved["results"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)


@pytest.mark.parametrize(("asked", "held"), [("auto", "bf16"), ("int8", "int8"), ("int4", "int4")])
def test_a_kv_cache_is_judged_beside_the_same_model_with_its_usual_one(
    tiny_model: Path, text: Path, asked: str, held: str
) -> None:
    request = request_for(text, reference=str(tiny_model), backend="cpu", samples=0, kv_cache=asked)
    (record,) = evaluate_all([tiny_model], request)
    assert (record["status"], record["error"]) == ("ok", None)
    assert record["engine"]["kv_cache"] == held
    assert record["protocol"].get("kv_cache") == (None if asked == "auto" else asked)
    moved = record["results"]["kld_mean"]
    assert moved == 0 if asked == "auto" else moved > 0


@pytest.mark.parametrize("asked", ["auto", "int8", "exact"])
def test_records_say_what_rounding_activations_adds(
    tiny_model: Path, tiny_packed: Path, text: Path, asked: Any
) -> None:
    request = request_for(text, reference=str(tiny_model), activations=asked, backend="cpu", samples=0)
    (record,) = evaluate_all([tiny_packed], request)
    rounded = asked != "exact"
    assert (record["status"], record["error"]) == ("ok", None)
    assert record["engine"]["backend"] == record["protocol"]["backend"] == "cpu"
    assert record["engine"]["activations"] == ("int8" if rounded else "exact")
    added = record["results"]["activation_kld"]
    assert added > 0 if rounded else added is None


def test_models_that_fail_are_records_and_the_others_are_measured(tiny: Path, text: Path, tmp_path: Path) -> None:
    short = make_folder(tmp_path / "short", max_position_embeddings=32)
    broken = make_folder(tmp_path / "broken", poison=float("nan"))
    strange = make_folder(tmp_path / "strange", vocab_size=320)
    request = request_for(text, reference=str(tiny))
    records = evaluate_all([tmp_path / "absent", short, broken, strange, tiny], request)
    assert [r["status"] for r in records] == ["failed"] * 4 + ["ok"]
    reasons = [r["error"] for r in records]
    assert reasons[0].startswith("ModelNotFound: ")
    assert "sees 32 tokens, not 64" in reasons[1]
    assert "not finite" in reasons[2]
    assert "other tokens" in reasons[3] or "knows 320 tokens" in reasons[3]
    assert records[0]["model"]["name"].endswith("absent")
    assert records[0]["model"]["fingerprint"] is None
    assert records[2]["model"]["fingerprint"] == open_checkpoint(broken).fingerprint()
    assert all(r["results"] == {} and r["protocol"]["windows"] == 6 for r in records[:4])


def test_a_reference_that_fails_fails_every_model_by_name(tiny: Path, text: Path) -> None:
    (record,) = evaluate_all([tiny], request_for(text, reference="no-such-model"))
    assert record["status"] == "failed"
    assert "reference no-such-model" in record["error"]


def test_a_model_is_not_judged_on_the_text_that_calibrated_it(text: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "calibrated")
    manifest = {
        "schema_version": 1,
        "base": {"name": "tiny", "fingerprint": "0" * 64},
        "recipe": {"name": "some-recipe"},
        "calibration": {
            "kind": "text",
            "sha256": "1" * 64,
            "sequences": 1,
            "length": 1,
            "line_hashes": line_hashes(text.read_text()),
        },
    }
    (folder / "gossamer.json").write_text(json.dumps(manifest))
    (record,) = evaluate_all([folder], request_for(text))
    assert record["error"].startswith("Contaminated: ")
    assert str(folder) in record["error"]
    assert (record["model"]["base"], record["model"]["recipe"]) == ("tiny", "some-recipe")


def test_a_model_is_not_judged_on_a_part_that_calibrated_it_however_large_the_rest(text: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(
        text.read_text() + "\n".join(f"{n}: a line that is long enough to be known again" for n in range(9000))
    )
    folder = make_folder(tmp_path / "calibrated")
    lines = line_hashes(text.read_text())
    manifest = {
        "schema_version": 1,
        "base": {"name": "tiny", "fingerprint": "0" * 64},
        "calibration": {"kind": "text", "sha256": "1" * 64, "sequences": 1, "length": 1, "line_hashes": lines},
    }
    (folder / "gossamer.json").write_text(json.dumps(manifest))
    (record,) = evaluate_all([folder], request_for(book))
    assert record["error"].startswith("Contaminated: ")
    assert "of the judged part of corpus book.txt" in record["error"]
    (whole,) = evaluate_all([folder], request_for(book, tokens=None, plan=WindowPlan(64, 20_000, 32)))
    assert whole["status"] == "ok", "all of the book's beginning is little of the book"


def test_the_hash_of_the_tokens_is_of_those_judged_and_not_of_those_asked_for(tiny: Path, text: Path) -> None:
    records = [evaluate_all([tiny], request_for(text, tokens=n, samples=0))[0] for n in (384, 400, 448)]
    hashes = [r["protocol"]["tokens_sha256"] for r in records]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_text_below_one_window_is_refused_before_a_model_is_loaded(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.measure.jobs.choose", lambda *a, **k: pytest.fail("loaded"))
    for reference in (None, str(tiny)):
        (record,) = evaluate_all([tiny], request_for(text, tokens=50, reference=reference))
        assert "the text has 50 tokens, less than one window of 64" in record["error"]


def test_progress_goes_on_while_models_answer(tiny: Path, text: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    list(run.evaluate_models([str(tiny)], request_for(text), lambda *event: seen.append(event)))
    assert [event for event in seen if event[0] in ("judging", "answering")][-3:] == [
        ("judging", 6, 6),
        ("answering", 0, 1),
        ("answering", 1, 1),
    ]


def test_a_model_that_did_not_fit_beside_the_others_is_tried_alone(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def together(models: Sequence[str], request: Any, progress: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        asked.append(list(models))
        failure = {"error": {"kind": "WorkerDied", "message": "killed", "hint": None}}
        return {}, [failure if len(models) > 1 or m == "b" else {"results": {"perplexity": 2.0}} for m in models]

    monkeypatch.setattr(run, "_evaluate_together", together)
    records = evaluate_all(["a", "b"], request_for(text, reference="r"))
    assert asked == [["a", "b"], ["a"], ["b"]]
    assert [r["status"] for r in records] == ["ok", "failed"]


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        ("WorkerDied", True),
        ("MemoryError", True),
        ("DoesNotFit", True),
        ("ModelNotFound", False),
        ("Contaminated", False),
    ],
)
def test_only_errors_that_neighbours_may_have_caused_are_worth_another_try(kind: str, again: bool) -> None:
    assert run.worth_another_try({"kind": kind}) is again
    assert run.worth_another_try(None) is False


def test_bench_records_hold_every_sample_and_the_memory(tiny: Path, tmp_path: Path) -> None:
    plan = SpeedPlan(prompt_tokens=24, output_tokens=6, batch=2, repetitions=3)
    other = make_folder(tmp_path / "other", seed=1)
    models = [str(tiny), "nothing/here/at/all", str(other)]
    records = list(run.bench_models(models, plan, lambda *e: None, threads=1, activations="exact"))
    assert [r["status"] for r in records] == ["ok", "failed", "ok"]
    assert records[1]["error"].startswith("ModelNotFound: ")
    for record in (records[0], records[2]):
        assert set(record) == RECORD_KEYS
        assert record["protocol"] == {
            "prompt_tokens": 24,
            "output_tokens": 6,
            "batch": 2,
            "repetitions": 3,
            "warmup": 1,
            "weights": "stored",
            "backend": "auto",
            "activations": "exact",
            "threads": 1,
        }
        assert record["engine"]["activations"] == "exact"
        results = record["results"]
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s"):
            found = results[name]
            assert len(found["samples"]) == 3
            assert 0 < found["min"] == min(found["samples"]) <= found["median"] <= found["max"] == max(found["samples"])
        reads = [2 * 24 / t for t in results["ttft_s"]["samples"]]
        assert results["prefill_tokens_per_s"]["samples"] == pytest.approx(reads)
        assert results["wm_bytes"] == record["model"]["weight_bytes"]
        bytes_per_token = choose(open_checkpoint(tiny)).kv_bytes_per_token
        assert (results["rm_kv_bytes_per_token"], results["rm_kv_source"]) == (bytes_per_token, "computed")
        assert results["load_s"] > 0


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Recorder(Worker):
        def __init__(self, job: Job, progress: Any) -> None:
            self.name, self.facts = job.arguments["model"], {}

        def __next__(self) -> None:
            events.append(self.name)
            if self.name == "c" and events.count("c") == 2:
                raise run.WorkerError("broke")

        def close(self, kill: bool = False) -> None:
            events.append(f"close {self.name}")

    monkeypatch.setattr(run, "Worker", Recorder)
    records = list(run.bench_models(["a", "c", "b"], SpeedPlan(repetitions=2), lambda *e: None))
    assert events[:3] == ["a", "c", "b"]  # loading
    assert events[3:7] == ["a", "c", "close c", "b"]  # warm-up, where one breaks and is let go
    assert events[7:13] == ["a", "b", "a", "b", "a", "b"]  # two repetitions and the results
    assert [r["status"] for r in records] == ["ok", "failed", "ok"]


class Crowd:
    """Workers of models that fail as told while others are loaded; `alone` says who fails then too."""

    def __init__(self, fails: dict[str, tuple[int, str]], alone: Iterable[str] = ()) -> None:
        self.fails, self.alone = fails, set(alone)
        self.loaded: set[str] = set()

    def __call__(self, job: Job, progress: Any) -> Any:
        crowd, name = self, job.arguments["model"]

        class One:
            facts: dict[str, Any] = {}
            steps = 0

            def __next__(self) -> Any:
                crowd.loaded.add(name)
                step, kind = crowd.fails.get(name, (99, ""))
                if self.steps == step and (crowd.loaded != {name} or name in crowd.alone):
                    raise run.WorkerError("no room", kind=kind)
                self.steps += 1
                return {"load_s": 1} if self.steps == 4 else None

            def close(self, kill: bool = False) -> None:
                crowd.loaded.discard(name)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                self.close()

        return One()


@pytest.mark.parametrize(("step", "kind"), [(0, "DoesNotFit"), (2, "WorkerDied")])
def test_a_model_without_room_beside_the_others_is_benched_alone_after_them(
    step: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Worker", Crowd({"b": (step, kind)}))
    records = list(run.bench_models(["a", "b", "c"], SpeedPlan(repetitions=1), lambda *e: None))
    assert [r["status"] for r in records] == ["ok"] * 3
    assert [r["protocol"].get("turns") for r in records] == [None, "alone", None]


def test_a_model_that_does_not_fit_alone_either_is_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Worker", Crowd({"b": (0, "DoesNotFit")}, alone="b"))
    records = list(run.bench_models(["a", "b"], SpeedPlan(repetitions=1), lambda *e: None))
    assert [(r["status"], r["protocol"].get("turns")) for r in records] == [("ok", None), ("failed", "alone")]


@pytest.mark.parametrize(("models", "kind"), [(["b"], "DoesNotFit"), (["b", "a"], "ModelNotFound")])
def test_a_failure_that_others_did_not_cause_is_not_tried_again(
    models: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Worker", Crowd({"b": (0, kind)}, alone="b"))
    record = next(run.bench_models(models, SpeedPlan(repetitions=1), lambda *e: None))
    assert (record["status"], "turns" in record["protocol"]) == ("failed", False)


def test_progress_of_timing_begins_before_the_first_turn(tiny: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    list(run.bench_models([str(tiny)], SpeedPlan(16, 4, repetitions=2), lambda *event: seen.append(event)))
    assert [event for event in seen if event[0] == "timing"] == [("timing", n, 3) for n in range(4)]


def test_bench_records_name_what_ran(tiny: Path) -> None:
    plan = SpeedPlan(16, 4, repetitions=1)
    (record,) = run.bench_models([str(tiny)], plan, lambda *e: None, backend="reference")
    assert record["engine"]["kernels"] == isa_in_use()
    assert (record["engine"]["backend"], record["protocol"]["backend"]) == ("reference", "reference")
    assert (record["engine"]["activations"], record["engine"]["kv_cache"]) == ("exact", "fp32")


def test_a_model_that_cannot_be_opened_is_recorded_under_the_engine_that_it_was_meant_for(text: Path) -> None:
    asked = {"weights": "float"}
    (bench,) = run.bench_models(["no-such-model"], SpeedPlan(16, 4), lambda *e: None, **asked)
    (judged,) = evaluate_all(["no-such-model"], request_for(text, **asked))
    assert [r["status"] for r in (bench, judged)] == ["failed"] * 2
    assert [r["engine"]["backend"] for r in (bench, judged)] == ["reference"] * 2


def test_a_model_block_says_how_weights_are_stored_and_what_they_were_made_from(tiny: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "made")
    manifest = {"schema_version": 1, "base": {"name": "tiny", "fingerprint": "b" * 64}}
    (folder / "gossamer.json").write_text(json.dumps(manifest))
    made, plain = model_block(open_checkpoint(folder)), model_block(open_checkpoint(tiny))
    assert (made["base"], made["base_fingerprint"]) == ("tiny", "b" * 64)
    assert (plain["base_fingerprint"], plain["format"]) == (None, "fp32")
    assert made.keys() == unknown_model_block("x").keys()


@pytest.mark.parametrize("bad", [{"output_tokens": 1}, {"prompt_tokens": 0}, {"batch": 0}, {"repetitions": 0}])
def test_a_bench_that_cannot_be_timed_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        SpeedPlan(**bad)


def test_a_run_that_does_not_fit_the_context_is_refused() -> None:
    with pytest.raises(MeasureError, match="context of 256"):
        SpeedPlan(prompt_tokens=250, output_tokens=7).check(256)


def test_rates_are_tokens_over_seconds() -> None:
    found = rates([Timing(0.5, 2.0), Timing(0.25, 1.0), Timing(1.0, 4.0)], SpeedPlan(100, 21, 4))
    assert found["prefill_tokens_per_s"]["samples"] == [800, 1600, 400]
    assert found["decode_tokens_per_s"]["samples"] == [40, 80, 20]
    assert found["ttft_s"] == summary([0.5, 0.25, 1.0])
    assert found["ttft_s"]["median"] == 0.5


def test_prompts_are_ordinary_tokens_fixed_by_their_seed(tiny: Path) -> None:
    tokenizer = open_checkpoint(tiny).tokenizer()
    ordinary = ordinary_tokens(tokenizer, load_corpus("default").text)
    assert not tokenizer.eos_ids.intersection(ordinary)
    plan = SpeedPlan(prompt_tokens=40, batch=3)
    first = make_prompts(ordinary, plan, 7)
    assert first == make_prompts(ordinary, plan, 7) != make_prompts(ordinary, plan, 8)
    assert [len(p) for p in first] == [40, 40, 40]
    assert {token for prompt in first for token in prompt} <= set(ordinary)


def test_samples_are_the_likeliest_tokens_one_by_one(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    model = ReferenceBackend.load(checkpoint)
    ids = checkpoint.tokenizer().encode("The sky")
    found = greedy(model, ids, 6, eos_ids=())
    for token in found:
        assert token == int(model.decoder(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(found) == 6
    assert greedy(model, ids[:-6], 6, eos_ids={found[2]}) == found[: found.index(found[2])]
    assert len(greedy(model, [1] * 250, 48, eos_ids=())) == 6  # the context of 256 ends before


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'gossamer'"):
        run.check_engine("gosamer")
