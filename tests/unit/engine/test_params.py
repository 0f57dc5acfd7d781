"""Sampling parameters: every field has bounds, and says them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gossamer.engine.params import SamplingParams
from gossamer.errors import EngineError, UnknownName

BAD = [
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1 << 40), ("max_tokens", 1.5), ("max_tokens", True),
    ("temperature", -0.1), ("temperature", 1e9), ("temperature", float("nan")), ("temperature", "hot"),
    ("top_p", 0.0), ("top_p", 1.1), ("top_p", None), ("top_k", -1), ("top_k", 2.0), ("min_p", -0.5), ("min_p", 2),
    ("seed", -1), ("seed", 1 << 63), ("seed", "1"), ("ignore_eos", 1), ("min_tokens", -1), ("min_tokens", 257),
    ("stop", ("",)), ("stop", (7,)), ("stop", ("x",) * 17), ("stop", "y" * 257), ("stop", 3),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_value_out_of_bounds_is_refused_by_name(field, value):
    with pytest.raises(EngineError, match=field):
        SamplingParams(**{field: value})


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
