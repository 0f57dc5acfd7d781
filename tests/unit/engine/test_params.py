"""Sampling parameters: every field has bounds, and says them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gossamer.engine.params import MAX_GRAMMAR, Grammar, SamplingParams
from gossamer.errors import EngineError, UnknownName

BAD = [
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1 << 40), ("max_tokens", 1.5), ("max_tokens", True),
    ("temperature", -0.1), ("temperature", 1e9), ("temperature", float("nan")), ("temperature", "hot"),
    ("top_p", 0.0), ("top_p", 1.1), ("top_p", None), ("top_k", -1), ("top_k", 2.0), ("min_p", -0.5), ("min_p", 2),
    ("seed", -1), ("seed", 1 << 63), ("seed", "1"), ("ignore_eos", 1), ("min_tokens", -1), ("min_tokens", 257),
    ("stop", ("",)), ("stop", (7,)), ("stop", ("x",) * 17), ("stop", "y" * 257), ("stop", 3),
    ("n", 0), ("n", 65), ("n", 1.0), ("n", True), ("skip_special", 1), ("skip_special", None),
    ("presence_penalty", -2.1), ("presence_penalty", float("nan")), ("presence_penalty", "0"),
    ("frequency_penalty", 2.1), ("frequency_penalty", float("inf")), ("frequency_penalty", True),
    ("repetition_penalty", 0.0), ("repetition_penalty", 10.1), ("repetition_penalty", -1.0),
    ("repetition_penalty", float("inf")), ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("logprobs", 1.0),
    ("prompt_logprobs", -1), ("prompt_logprobs", 21), ("prompt_logprobs", "1"),
    ("logit_bias", {-1: 1.0}), ("logit_bias", {1 << 31: 1.0}), ("logit_bias", {3: 101}), ("logit_bias", {3: -100.5}),
    ("logit_bias", {3: float("nan")}), ("logit_bias", {3: None}), ("logit_bias", {"3": 1}), ("logit_bias", {1.0: 1}),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)), ("logit_bias", ((1, 2.0, 3),)), ("logit_bias", (1,)),
    ("logit_bias", "12"), ("logit_bias", 5), ("stop_token_ids", (-1,)), ("stop_token_ids", (1 << 31,)),
    ("stop_token_ids", (True,)), ("stop_token_ids", ("1",)), ("stop_token_ids", 5), ("stop_token_ids", "12"),
    ("stop_token_ids", tuple(range(17))), ("grammar", "json"), ("grammar", {"kind": "json"}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_value_out_of_bounds_is_refused_by_name(field, value):
    with pytest.raises(EngineError, match=field):
        SamplingParams(**{field: value})


GOOD = [
    ("n", 64), ("presence_penalty", -2), ("frequency_penalty", 2.0), ("repetition_penalty", 10), ("logprobs", 0),
    ("prompt_logprobs", 20), ("logit_bias", {(1 << 31) - 1: 100}), ("stop_token_ids", ((1 << 31) - 1,) * 16),
    ("min_tokens", 256), ("stop", "y" * 256), ("temperature", 100), ("seed", (1 << 63) - 1), ("skip_special", False),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), GOOD)
def test_the_bounds_themselves_are_allowed(field, value):
    SamplingParams(**{field: value})


def test_values_of_any_size_and_kind_are_told_in_few_characters():
    for field, value in (("stop", ["x" * 10_000] * 20), ("logit_bias", "z" * 10_000), ("stop_token_ids", "z" * 10_000)):
        with pytest.raises(EngineError) as caught:
            SamplingParams(**{field: value})
        assert len(str(caught.value)) < 300


def test_lists_and_mappings_become_tuples():
    params = SamplingParams.from_dict({"logit_bias": {5: 1, 6: -2.5}, "stop_token_ids": [3, 4], "stop": ["a"]})
    assert params.logit_bias == ((5, 1.0), (6, -2.5))
    assert params.stop_token_ids == (3, 4)
    assert SamplingParams(logit_bias=[[5, 1], [6, -2.5]]).logit_bias == params.logit_bias
    assert hash(params)


def test_the_seed_of_a_request_is_kept():
    assert SamplingParams(seed=0).seed == 0


@pytest.mark.parametrize(
    ("fields", "plain"),
    [({}, True), ({"temperature": 1.0, "top_k": 1}, True), ({"stop": "a", "min_tokens": 3, "n": 4}, True),
     ({"temperature": 0.5}, False), ({"presence_penalty": 0.1}, False), ({"frequency_penalty": -0.1}, False),
     ({"repetition_penalty": 1.1}, False), ({"logit_bias": {1: 0.0}}, False), ({"logprobs": 0}, False),
     ({"prompt_logprobs": 0}, False), ({"grammar": Grammar("json")}, False)],
)  # fmt: skip
def test_params_are_plain_where_the_likeliest_token_is_all_that_is_asked_for(fields, plain):
    assert SamplingParams(**fields).plain is plain


class TestGrammar:
    @pytest.mark.parametrize("kind", ["json", "json_schema", "regex", "choice"])
    def test_kinds(self, kind):
        assert SamplingParams(grammar=Grammar(kind, "x")).grammar == Grammar(kind, "x")

    def test_a_kind_that_does_not_exist_is_refused_with_a_suggestion(self):
        with pytest.raises(UnknownName, match="did you mean 'json_schema'"):
            Grammar("jsonschema", "{}")

    @pytest.mark.parametrize("source", [3, None, b"{}", "x" * (MAX_GRAMMAR + 1)])
    def test_a_source_that_is_no_text_or_too_long_is_refused(self, source):
        with pytest.raises(EngineError, match="the regex is no text of up to 1,048,576 characters"):
            Grammar("regex", source)


def test_an_unknown_field_is_refused_with_a_suggestion():
    with pytest.raises(UnknownName, match="did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 1})


def test_a_request_becomes_params():
    params = SamplingParams.from_dict({"stop": ["a", "b"], "temperature": 1, "seed": 3})
    assert params == SamplingParams(stop=("a", "b"), temperature=1.0, seed=3)
    assert not params.greedy
    assert SamplingParams(stop="end").stop == ("end",)


def test_params_are_checked_without_torch():
    code = "import sys; from gossamer.engine import SamplingParams; SamplingParams(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
