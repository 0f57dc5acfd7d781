"""A request's text: stop texts never leak, characters are never broken, and the end has the right reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine.params import SamplingParams
from gossamer.engine.sequence import Sequence, StopText, TokenLogprobs


class Letters:
    """Tokens are code points; `~` stays inside until the next token or the end, as half a character would."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token: int) -> str:
        text, self.held = self.held + chr(token), ""
        if text.endswith("~"):
            text, self.held = text[:-1], "~"
        return text

    def flush(self) -> str:
        return self.held


def run(text: str, limit: int = 1000, eos: str = "", **fields: object) -> tuple[Sequence, list[str]]:
    sequence = Sequence([1], SamplingParams(**fields), limit, {ord(c) for c in eos}, Letters())
    shown = []
    for character in text:
        shown.append(sequence.push(ord(character)).text)
        if sequence.finish_reason:
            break
    return sequence, shown


def test_a_stop_text_ends_it_and_is_not_shown():
    sequence, _ = run("one two three", stop=("two",))
    assert (sequence.text, sequence.finish_reason) == ("one ", "stop")
    assert len(sequence.tokens) == len("one two")


def test_text_that_only_begins_like_a_stop_is_shown_after_all():
    sequence, shown = run("abab!", stop=("abc",), limit=5)
    assert shown == ["", "", "ab", "", "ab!"]
    assert sequence.finish_reason == "length"


def test_what_was_held_back_is_shown_at_the_end():
    assert run("xa", limit=2, stop=("ab",))[0].text == "xa"
    assert run("xa$", eos="$", stop=("ab",))[0].text == "xa"
    assert run("x~", limit=2)[0].text == "x~"


def test_a_stop_text_that_the_last_flush_completes_still_stops():
    sequence = run("xa~", limit=3, stop=("a~",))[0]
    assert (sequence.text, sequence.finish_reason) == ("x", "stop")


def test_an_end_token_ends_it_and_has_no_text():
    sequence, _ = run("ab$cd", eos="$")
    assert (sequence.text, sequence.finish_reason, sequence.tokens[-1]) == ("ab", "stop", ord("$"))


def test_ignore_eos_goes_on():
    assert run("ab$cd", eos="$", ignore_eos=True, limit=5)[0].text == "ab$cd"


def test_no_stop_before_min_tokens():
    sequence, _ = run("ababab", stop=("ab",), min_tokens=3)
    assert (sequence.text, len(sequence.tokens), sequence.finish_reason) == ("abab", 6, "stop")
    assert run("a$b$c", eos="$", min_tokens=2)[0].text == "a$b"


def test_the_earliest_of_several_stops_wins():
    assert run("xxcb", stop=("b", "cb"))[0].text == "xx"


class TestStopReason:
    def test_is_the_stop_text_that_was_found(self):
        assert run("one two", stop=("tw", "ne"))[0].stop_reason == "ne"
        assert run("xxcb", stop=("b", "cb"))[0].stop_reason == "cb"
        assert run("xa~", limit=3, stop=("a~",))[0].stop_reason == "a~"

    def test_is_the_requests_own_stop_token(self):
        sequence, shown = run("abcd", stop_token_ids=(ord("c"),))
        assert (sequence.text, sequence.finish_reason, sequence.stop_reason) == ("ab", "stop", ord("c"))
        assert shown == ["a", "b", ""]

    def test_is_not_told_of_the_models_end_token_or_of_the_limit(self):
        assert run("ab$", eos="$", stop=("x",))[0].stop_reason is None
        assert run("abc", limit=2, stop=("x",))[0].stop_reason is None

    def test_is_the_token_where_it_is_an_end_token_as_well(self):
        assert run("ab$", eos="$", stop_token_ids=(ord("$"),))[0].stop_reason == ord("$")


def test_a_stop_token_counts_even_where_end_tokens_are_ignored():
    sequence, _ = run("a$b!", eos="$", ignore_eos=True, stop_token_ids=(ord("!"),))
    assert (sequence.text, sequence.finish_reason) == ("a$b", "stop")
    assert run("a!b!", stop_token_ids=(ord("!"),), min_tokens=2)[0].text == "a!b"


def test_a_stop_at_the_last_token_is_a_stop():
    assert run("ab", limit=2, stop=("b",))[0].finish_reason == "stop"
    assert run("a$", limit=2, eos="$")[0].finish_reason == "stop"


def test_a_stop_text_that_began_before_min_tokens_does_not_count():
    assert run("abcabd", stop=("bc",), min_tokens=2, limit=6)[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "eos", "wanted"),
    [({}, "$", True), ({"min_tokens": 3}, "$", False), ({"min_tokens": 3}, "", True),
     ({"min_tokens": 3, "ignore_eos": True}, "$", True), ({"min_tokens": 3, "stop_token_ids": (5,)}, "", False),
     ({"temperature": 1.0}, "$", False), ({"logprobs": 0}, "", False)],
)  # fmt: skip
def test_the_likeliest_token_will_do_where_nothing_is_changed_or_forbidden(fields, eos, wanted):
    sequence = Sequence([1], SamplingParams(**fields), 10, {ord(c) for c in eos}, Letters())
    assert sequence.wants_likeliest is wanted
    for _ in range(3):
        sequence.push(ord("a"))
    assert sequence.wants_likeliest is sequence.params.plain


def test_it_counts_what_is_there_and_what_is_missing():
    sequence = Sequence([1, 2, 3], SamplingParams(), 10, (), Letters(), request_id="r", choice=2, seed=9)
    assert (sequence.missing, sequence.generated, sequence.tokens) == (3, 0, [])
    sequence.computed = 3
    sequence.push(ord("a"))
    assert (sequence.missing, sequence.generated, sequence.tokens) == (1, 1, [ord("a")])
    assert (sequence.prompt, sequence.prompt_tokens) == ([1, 2, 3], 3)
    assert (sequence.request_id, sequence.choice, sequence.seed) == ("r", 2, 9)


def test_a_token_carries_its_logprobs_and_the_reason_for_the_end():
    sequence = Sequence([1], SamplingParams(logprobs=1), 2, (), Letters())
    logprobs = TokenLogprobs(-0.5, ((97, -0.5),))
    first, last = sequence.push(ord("a"), logprobs), sequence.push(ord("b"), logprobs)
    assert (first.id, first.text, first.logprobs, first.finish_reason) == (ord("a"), "a", logprobs, None)
    assert (last.text, last.finish_reason) == ("b", "length")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_pieces_show_exactly_what_stands_before_the_first_stop(text, stops):
    stopper, shown, stopped = StopText(stops), "", False
    for character in text:
        piece, stopped = stopper.push(character)
        shown += piece
        if stopped:
            break
    if not stopped:
        shown += stopper.flush()
    ends = {text.find(s) + len(s): text.find(s) for s in stops if s in text}
    if ends:
        first_end = min(ends)  # the first stop to be complete, from its longest possible beginning
        assert stopped
        assert shown == text[: min(text[:first_end].find(s) for s in stops if s in text[:first_end])]
    else:
        assert not stopped
        assert shown == text
