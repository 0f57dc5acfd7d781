"""A long session: quality by position is what a plain forward pass says, and what drifts or breaks is found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.checkpoint.load import load_decoder
from gossamer.cli import main
from gossamer.engine.backend import Backend, Batch
from gossamer.engine.llm import LLM
from gossamer.engine.runner import KVPool
from gossamer.errors import MeasureError, UsageError
from gossamer.measure import run, soak
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import SoakPlan, WindowPlan
from gossamer.report.records import read_records
from tiny_llama import make_folder

PLAN = SoakPlan(minutes=60, rounds=2, context=96, windows=2, turn=8)
Change = Callable[[int, Batch, torch.Tensor], None]


class Touched(Backend):
    """The reference backend, whose logits are changed in place by `change(steps so far, batch, logits)`."""

    def __init__(self, inner: Backend, change: Change) -> None:
        self.inner, self.change, self.steps = inner, change, 0
        self.name, self.config, self.kv_bytes_per_token = inner.name, inner.config, inner.kv_bytes_per_token

    def reserve(self, num_blocks: int) -> None:
        self.inner.reserve(num_blocks)

    def hidden(self, batch: Batch) -> torch.Tensor:
        return self.inner.hidden(batch)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner.head(states)

    def forward(self, batch: Batch) -> torch.Tensor:
        logits = self.inner.forward(batch).clone()
        self.change(self.steps, batch, logits)
        self.steps += 1
        return logits

    def weight_bytes(self) -> int:
        return self.inner.weight_bytes()

    def describe(self) -> str:
        return self.inner.describe()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "other", seed=1)


def text_of(llm: LLM) -> list[int]:
    return llm.tokenizer.encode(load_corpus("default").text[:4000])


def session(model: Path, change: Change | None = None, plan: SoakPlan = PLAN, **options: Any) -> list[dict[str, Any]]:
    llm = LLM(model, max_batch=1, backend="cpu" if change is None else "reference")
    if change is not None:
        llm.backend = Touched(llm.backend, change)
        llm.pool = KVPool(llm.backend)
    watch = soak.Soak(llm, options.pop("reference", None), text_of(llm), plan, lambda *a: None, **options)
    return list(watch.run())


def kinds(results: dict[str, Any]) -> set[str]:
    return {finding["kind"] for finding in results["findings"]}


def test_a_healthy_engine_repeats_itself_to_the_bit_over_its_cache(tiny: Path) -> None:
    values = session(tiny)
    assert [value["rounds"] for value in values] == [0, 1, 2, 2]
    assert [value["complete"] for value in values] == [False, False, False, True]
    results = values[-1]
    assert results["findings"] == []
    assert results["bound"] == results["probe_drift"] == results["position_drift"] == 0.0
    assert results["probes"] == 3
    assert results["generated_tokens"] == sum(part["generated_tokens"] for part in results["positions"]) == 2 * 6 * 8
    assert results["cached_prompt_tokens"] > 0
    json.dumps(values, allow_nan=False)


def test_figures_by_position_are_those_of_a_plain_forward_pass(tiny: Path, other: Path) -> None:
    llm = LLM(other, backend="reference")
    results = session(tiny, lambda *a: None, reference=llm.backend)[-1]
    nll, kld = [], []
    for window in range(2):
        ids = torch.tensor(text_of(llm)[window * 96 :][:96])
        ours, theirs = (
            load_decoder(LLM(m, backend="reference").checkpoint)(ids[None])[0, :-1].double().log_softmax(-1)
            for m in (tiny, other)
        )
        nll.append(-ours.gather(1, ids[1:, None])[:, 0])
        kld.append((theirs.exp() * (theirs - ours)).sum(-1))
    assert len(results["positions"]) == soak.PARTS
    for part in results["positions"]:
        place = slice(part["from"], part["to"])
        assert part["nll"] == pytest.approx(float(torch.stack(nll)[:, place].mean()), abs=1e-4)
        assert part["perplexity"] == pytest.approx(math.exp(part["nll"]))
        assert part["kld"] == pytest.approx(float(torch.stack(kld)[:, place].mean()), abs=1e-4)
    assert [results["positions"][0]["from"], results["positions"][-1]["to"]] == [0, 96]


def test_an_engine_that_drifts_is_found_by_probe_and_positions(tiny: Path) -> None:
    def drift(steps: int, batch: Batch, logits: torch.Tensor) -> None:
        logits[:, 7] += 0.02 * max(0, steps - 30)

    results = session(tiny, drift)[-1]
    assert kinds(results) == {"drift"}
    assert not results["sound"]
    assert results["probe_drift"] > results["bound"] == 1e-3
    assert results["position_drift"] > 1e-3
    assert {finding["position"] is None for finding in results["findings"]} == {True, False}
    loose = session(tiny, drift, SoakPlan(**{**vars(PLAN), "bound": 10.0}))[-1]
    assert loose["probe_drift"] > 1e-3
    assert loose["findings"] == []


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")])
def test_what_is_not_finite_is_found_with_its_position_and_the_session_ends(
    value: float, kind: str, tiny: Path
) -> None:
    def break_far_out(steps: int, batch: Batch, logits: torch.Tensor) -> None:
        first = int(batch.context_lens[0]) - len(batch.tokens)
        logits[[i for i, row in enumerate(batch.logit_rows.tolist()) if first + row >= 70]] = value

    values = session(tiny, break_far_out)
    results = values[-1]
    found = [finding for finding in results["findings"] if finding["kind"] == kind]
    assert [finding["position"] for finding in found] == [70] * 4  # two windows, before and after
    assert {"stopped", kind} <= kinds(results)
    assert results["rounds"] == 0
    assert results["complete"]
    assert results["positions"][-1]["nll"] is None
    assert results["positions"][0]["nll"] is not None
    json.dumps(values, allow_nan=False)


def test_a_number_that_is_none_any_more_has_moved_far() -> None:
    before = torch.tensor([1.0, math.nan, -math.inf, 2.0])
    assert soak._moved(before, before) == 0.0
    assert soak._moved(before, torch.tensor([1.5, math.nan, -math.inf, 2.0])) == 0.5
    assert soak._moved(before, torch.tensor([1.0, math.nan, -math.inf, math.nan])) == soak.FAR
    assert soak._moved(before, torch.tensor([1.0, math.nan, 0.0, 2.0])) == soak.FAR


def test_a_session_ends_with_its_time(tiny: Path) -> None:
    now = iter(float(second) for second in range(10_000))
    values = session(tiny, plan=SoakPlan(minutes=0.5, context=96, turn=8), clock=lambda: next(now))
    assert values[-1]["complete"]
    assert 1 <= values[-1]["rounds"] <= 30
    assert values[-1]["seconds"] >= 30
    at_once = session(tiny, plan=SoakPlan(minutes=0, context=96, turn=8))[-1]
    assert (at_once["rounds"], at_once["complete"], at_once["sound"]) == (0, True, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": -1.0}, "minutes is -1"),
        ({"minutes": math.nan}, "minutes is nan"),
        ({"bound": -1.0}, "bound is -1"),
        ({"context": 8}, "context is 8"),
        ({"windows": 0}, "windows is 0"),
        ({"turn": 0}, "turn is 0"),
    ],
)
def test_bad_numbers_are_refused_when_a_plan_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SoakPlan(**options)


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    assert SoakPlan(context=None).check(512, 600) == 512
    for plan, message in ((SoakPlan(context=600), "sees 512"), (SoakPlan(turn=300), "a turn of 300"),
                          (SoakPlan(windows=2), "600 tokens, less than 2 x 512")):  # fmt: skip
        with pytest.raises(MeasureError, match=message):
            plan.check(512, 600)


# --- the record -------------------------------------------------------------------------------------------------------


def request_for(reference: Path | None = None) -> run.EvalRequest:
    text = load_corpus("default")
    named = None if reference is None else str(reference)
    return run.EvalRequest("default", text, WindowPlan(), reference=named, threads=1)


@pytest.mark.usefixtures("inline")
def test_a_record_has_the_whole_protocol(tiny: Path, other: Path) -> None:
    record = run.soak_model(str(tiny), request_for(other), PLAN, lambda *a: None)
    assert (record["kind"], record["status"], record["error"]) == ("soak", "ok", None)
    assert record["protocol"] | vars(PLAN) == record["protocol"]
    assert record["protocol"]["reference_fingerprint"]
    assert record["engine"]["backend"] == "cpu"
    assert record["results"]["complete"]
    assert all(part["kld"] > 0 for part in record["results"]["positions"])


@pytest.mark.usefixtures("inline")
def test_ctrl_c_ends_a_session_with_what_there_is(tiny: Path) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        if label == "soaking":
            raise KeyboardInterrupt

    record = run.soak_model(str(tiny), request_for(), PLAN, interrupt)
    assert record["status"] == "ok"
    assert not record["results"]["complete"]
    assert record["results"]["positions"][0]["perplexity"] > 1

    def at_once(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.soak_model(str(tiny), request_for(), PLAN, at_once)


class Dying(Iterator[Any]):
    """A worker that gives one value and dies."""

    def __init__(self, *arguments: Any) -> None:
        self.facts: dict[str, Any] = {}
        self.values = iter([{"sound": True, "complete": False}])

    def __next__(self) -> Any:
        try:
            return next(self.values)
        except StopIteration:
            raise run.WorkerError("the worker was killed by SIGKILL", kind="WorkerDied") from None

    def __enter__(self) -> Dying:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_a_session_whose_process_dies_failed_and_keeps_what_it_found(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Worker", Dying)
    record = run.soak_model(str(tiny), request_for(), PLAN, lambda *a: None)
    assert (record["status"], record["results"]["sound"]) == ("failed", True)
    assert "SIGKILL" in record["error"]


@pytest.mark.usefixtures("inline")
def test_the_command_shows_and_appends_a_session(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "soak.jsonl"
    asked = ["soak", str(tiny), "--rounds", "1", "--context", "96", "--turn", "8", "--out", str(out)]
    assert main([*asked, "--backend", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "90-96" in shown
    assert "1 rounds in" in shown
    assert "2 probes moved by 0, positions by 0, bound 0" in shown
    assert json.loads(out.read_text())["kind"] == "soak"
    assert read_records([out]) == []  # it has no row in the tables, and does not keep others out of them
    poisoned = make_folder(tmp_path / "poisoned", poison=math.nan)
    assert main(["soak", str(poisoned), "--rounds", "1", "--context", "96", "--turn", "8"]) == 1
    printed = capsys.readouterr()
    assert "nan in round 0: judging before: logits of 64 of 64 tokens, first at position 0" in printed.err
    assert "stopped in round 0" in printed.err
    assert main(["soak", str(tmp_path / "absent"), "--rounds", "1"]) == 1
    assert "ModelNotFound" in capsys.readouterr().err
