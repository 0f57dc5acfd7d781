"""What the answers of a load come to, on made-up times."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gossamer.errors import UnknownName, UsageError
from gossamer.measure.load.plan import Length, LoadPlan, moments, parse_goodput, parse_length
from gossamer.measure.load.stats import Answer, percentile, spread, summarize


def answer(first: float, gap: float, tokens: int, prompt: int | None = 10) -> Answer:
    """One token at a time, the first after `first` seconds, the others `gap` apart."""
    arrivals = tuple(first + gap * i for i in range(tokens))
    return Answer(arrivals, arrivals[-1], tokens, prompt)


def test_latencies_of_one_answer_follow_their_definitions() -> None:
    one = answer(first=0.5, gap=0.1, tokens=11)
    assert one.ttft == 0.5
    assert one.tpot == pytest.approx(0.1)
    assert one.gaps == pytest.approx([0.1] * 10)
    assert one.e2e == pytest.approx(1.5)


def test_time_per_token_counts_tokens_and_not_the_pieces_that_they_came_in() -> None:
    pieces = Answer(arrivals=(0.5, 1.0, 1.5), e2e=1.5, output_tokens=11)
    assert pieces.tpot == pytest.approx(0.1)
    assert pieces.gaps == [0.5, 0.5]


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    assert answer(0.5, 0.0, 1).tpot is None
    assert summarize([answer(0.5, 0.0, 1)], 1.0)["tpot_s"] is None


def test_percentiles_lie_between_neighbours_by_proportion() -> None:
    values = [float(i) for i in range(101)]
    assert percentile(values, 0.99) == 99.0
    assert percentile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    assert percentile([3.0], 0.99) == 3.0
    assert spread(list(reversed(values))) == {"mean": 50.0, "median": 50.0, "p90": 90.0, "p99": 99.0}
    assert spread([]) is None


def test_rates_are_of_the_whole_load() -> None:
    results = summarize([answer(0.5, 0.1, 11, prompt=20)] * 4, duration=2.0)
    assert results["requests_per_s"] == 2.0
    assert results["output_tokens_per_s"] == 22.0
    assert results["total_tokens_per_s"] == 62.0
    assert results["prompt_tokens"] == {"total": 80, "mean": 20.0, "min": 20, "max": 20}


def test_failed_requests_are_counted_with_their_reasons_and_are_in_no_rate() -> None:
    failed = [Answer(error="HTTP 429: busy")] * 2 + [Answer(error="timeout")]
    results = summarize([answer(0.5, 0.1, 11), *failed], duration=1.0, bounds={"ttft": 1.0})
    assert (results["completed"], results["failed"]) == (1, 3)
    assert results["failures"] == {"HTTP 429: busy": 2, "timeout": 1}
    assert results["output_tokens_per_s"] == 11.0
    assert results["ttft_s"]["mean"] == 0.5
    assert results["goodput"] == {"requests_per_s": 1.0, "share": 0.25}


def test_goodput_counts_the_requests_that_keep_every_bound() -> None:
    answers = [answer(0.2, 0.01, 5), answer(0.2, 0.2, 5), answer(2.0, 0.01, 5), answer(0.2, 0.0, 1)]
    both = summarize(answers, 2.0, {"ttft": 0.5, "tpot": 0.05})["goodput"]
    assert both == {"requests_per_s": 1.0, "share": 0.5}
    assert summarize(answers, 2.0)["goodput"] is None


def test_a_load_without_an_answer_has_no_latency_and_no_false_zero_of_tokens() -> None:
    results = summarize([Answer(error="timeout")], 1.0)
    assert results["ttft_s"] is None
    assert results["total_tokens_per_s"] is None
    assert results["output_counted_by"] is None


def test_prompt_tokens_that_some_answers_do_not_tell_are_in_no_total() -> None:
    results = summarize([answer(0.1, 0.1, 2), answer(0.1, 0.1, 2, prompt=None)], 1.0)
    assert results["prompt_tokens"] is None
    assert results["total_tokens_per_s"] is None
    assert results["output_tokens_per_s"] == 4.0


def test_poisson_arrivals_have_their_rate_and_are_the_same_for_a_seed() -> None:
    times = moments(50.0, 5000, seed=1)
    assert times == moments(50.0, 5000, seed=1) != moments(50.0, 5000, seed=2)
    assert times == sorted(times)
    assert times[0] == 0.0
    assert times[-1] == pytest.approx(100, rel=0.1)
    gaps = [late - early for early, late in pairwise(times)]
    assert sum(gap > 0.02 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # 1/e: an exponential


def test_lengths_and_bounds_are_read_from_text() -> None:
    assert parse_length("128") == Length(128, 0)
    assert parse_length("272:240") == Length(272, 240)
    assert parse_goodput("ttft:500, tpot:50") == {"ttft": 0.5, "tpot": 0.05}


@pytest.mark.parametrize("text", ["", "x", "10:10", "5:-1", "1:2:3", "0"])
def test_a_length_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_length(text)


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "ttft:-1", "ttft:nan"])
def test_a_bound_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_goodput(text)


def test_an_unknown_latency_is_named() -> None:
    with pytest.raises(UnknownName, match="tttf") as caught:
        parse_goodput("tttf:5")
    assert "ttft" in str(caught.value.hint)


@pytest.mark.parametrize(
    "wrong", [{"requests": 0}, {"concurrency": 0}, {"rate": 0.0}, {"timeout": -1.0}, {"temperature": float("nan")}]
)
def test_a_plan_with_a_bad_number_names_it(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        LoadPlan(**wrong)  # type: ignore[arg-type]
