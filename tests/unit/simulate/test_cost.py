"""Costs of steps: the line through them, the engine that they are taken from, and the file that keeps it."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_doubles import CheckedBackend, make_engine
from gossamer.engine.backend import Batch
from gossamer.errors import MeasureError, UsageError
from gossamer.simulate.cost import StepCost, StepWork, fit, read_cost, write_cost
from gossamer.simulate.measure import timed_steps
from gossamer.simulate.trace import Request, read_trace

TRUE = StepCost(step_s=0.008, prompt_token_s=4e-4, decode_token_s=2e-3, context_token_s=3e-6)


def random_works(count: int, seed: int = 0) -> list[StepWork]:
    dice = random.Random(seed)
    return [
        StepWork(dice.choice([0, dice.randint(1, 512)]), dice.randint(0, 32), dice.randint(1, 9000))
        for _ in range(count)
    ]


def test_a_line_is_found_again() -> None:
    found = fit([(work, TRUE.seconds(work)) for work in random_works(50)], {"model": "m"})
    assert found.numbers() == pytest.approx(TRUE.numbers())
    assert found.about["model"] == "m"
    assert found.about["steps"] == 50
    assert found.about["median_relative_error"] == 0


def test_noise_moves_neither_the_line_nor_the_sum_by_much() -> None:
    dice = random.Random(1)
    steps = [(work, TRUE.seconds(work) * dice.uniform(0.97, 1.03)) for work in random_works(400)]
    found = fit(steps)
    assert found.numbers() == pytest.approx(TRUE.numbers(), rel=0.15)
    assert sum(found.seconds(work) for work, _ in steps) == pytest.approx(sum(s for _, s in steps), rel=1e-6)


def test_no_coefficient_is_below_zero() -> None:
    falling = [(work, 1.0 - 0.00005 * work.context_tokens) for work in random_works(60)]
    found = fit(falling)
    assert found.context_token_s == 0.0
    assert min(found.numbers().values()) >= 0


def test_few_steps_tell_nothing() -> None:
    with pytest.raises(MeasureError, match="15 steps"):
        fit([(work, 1.0) for work in random_works(15)])


class TimedBackend(CheckedBackend):
    """Counts, and lets a clock go on by what a step costs, told from the batch alone."""

    now = 0.0

    def forward(self, batch: Batch) -> torch.Tensor:
        ends = set(batch.logit_rows.tolist())
        lengths = zip(batch.query_lens.tolist(), batch.query_start[1:].tolist(), strict=True)
        decode = sum(count == 1 and stop - 1 in ends for count, stop in lengths)
        prompt = len(batch.tokens) - decode
        self.now += TRUE.seconds(StepWork(prompt, decode, int(batch.context_lens.sum())))
        return super().forward(batch)


def test_the_steps_of_an_engine_give_back_what_they_cost() -> None:
    backend = TimedBackend(max_positions=256)
    engine = make_engine(backend, 600, batch_tokens=128, sequences=32)
    backend.engine = None  # the steps are those of another engine over it
    found = fit(timed_steps(engine, lambda label, done, total: None, clock=lambda: backend.now))
    assert found.numbers() == pytest.approx(TRUE.numbers(), rel=1e-3)


def test_a_cost_comes_back_from_its_file(tmp_path: Path) -> None:
    cost = StepCost(0.1, 0.2, 0.3, 0.0, 0.4, {"model": "m"})
    write_cost(tmp_path / "cost.json", cost)
    assert read_cost(tmp_path / "cost.json") == cost
    with pytest.raises(UsageError, match="cannot be written"):
        write_cost(tmp_path / "no" / "cost.json", cost)


GOOD = {"step_s": 0.1, "prompt_token_s": 0.1, "decode_token_s": 0.1, "context_token_s": 0.0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "not JSON"),
        ("[1]", "no cost"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({**GOOD, "step": 1}), "step"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "step_s"}), "step_s"),
        (json.dumps({**GOOD, "step_s": -1}), "step_s"),
        (json.dumps({**GOOD, "step_s": "1"}), "step_s"),
        (json.dumps({**GOOD, "step_s": True}), "step_s"),
        (json.dumps({**GOOD, "context_token_s": float("nan")}), "context_token_s"),
        (json.dumps({**GOOD, "step_s": 0, "decode_token_s": 0}), "no time"),
        (json.dumps({**GOOD, "about": 3}), "no cost"),
    ],
)
def test_a_file_that_is_no_cost_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=said):
        read_cost(path)
    with pytest.raises(UsageError):
        read_cost(tmp_path / "absent.json")


def test_a_trace_is_read_in_the_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    late = {"arrival": 2, "input_tokens": 9, "output_tokens": 3}
    early = {"arrival": 0.5, "input_tokens": 20, "output_tokens": 4, "prefix": 3, "prefix_tokens": 12}
    path.write_text(f"{json.dumps(late)}\n\n{json.dumps(early)}\n")
    assert read_trace(path) == [Request(0.5, 20, 4, 3, 12), Request(2, 9, 3)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "2 is no request"),
        ("[1, 2]", "2"),
        ('"text"', "2"),
        ("3", "2 is no request"),
        ('{"arrival": 1, "input_tokens": 5}', "2 is no request"),
        ('{"arrival": 1, "input_tokens": 5, "output_tokens": 0}', "2: output_tokens is 0"),
        ('{"arrival": 1, "input_tokens": 5.5, "output_tokens": 1}', "2: input_tokens is 5.5"),
        ('{"arrival": null, "input_tokens": 5, "output_tokens": 1}', "2 has no arrival"),
        ('{"arrival": "1", "input_tokens": 5, "output_tokens": 1}', "2: arrival is '1'"),
        ('{"arrival": Infinity, "input_tokens": 5, "output_tokens": 1}', "2: arrival is inf"),
        ('{"arrival": 1, "input_tokens": 5, "output_tokens": 1, "prefix_tokens": 6}', "2: prefix_tokens is 6"),
        ('{"arrival": 1, "input_tokens": 5, "output_tokens": 1, "model": "m"}', "2 has 'model'"),
        ('{"arrival": 1, "input_tokens": 99999999999, "output_tokens": 1}', "2: input_tokens"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"arrival": 0, "input_tokens": 5, "output_tokens": 1}}\n{line}\n')
    with pytest.raises(UsageError) as caught:
        read_trace(path)
    assert f"trace.jsonl:{said}" in caught.value.message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_trace_and_a_cost_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(data)
        for read in (read_trace, read_cost):
            with contextlib.suppress(UsageError):
                read(path)
