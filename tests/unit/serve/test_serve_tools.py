"""Finding tool calls in text that comes in pieces, and the schema that enforces one."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.serve.protocol import Message, Tool
from gossamer.serve.tools import MAX_CALL, Finder, call_schema, template_messages

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</b>"}}\n</tool_call>'


def found(text: str, cuts: list[int], enforced: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """What a finder makes of a text that is cut at these places."""
    finder, shown, calls = Finder(enforced), "", []
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(places):
        some, new = finder.push(text[start:end])
        shown, calls = shown + some, calls + new
    some, new = finder.flush()
    return shown + some, [(call.name, call.arguments) for call in calls + new]


@given(
    st.lists(st.sampled_from([CALL, "<tool", "<tool_call>", "</tool_call>", "text ", "<", "{}"]), max_size=6),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_where_the_text_is_cut_makes_no_difference(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    assert found(text, cuts) == found(text, [])


@given(st.lists(st.sampled_from(["<tool", "</tool_call>", "a", "<", "<tool_call", "{}"]), max_size=8), st.data())
def test_text_without_a_call_comes_out_as_it_went_in(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts).replace("<tool_call>", "")
    assert found(text, data.draw(st.lists(st.integers(0, 100), max_size=5))) == (text, [])


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (CALL, "", [("f", '{"x": "</b>"}')]),
        (f"a{CALL}b{CALL}c", "abc", [("f", '{"x": "</b>"}')] * 2),
        ('<tool_call>{"name": "f"}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', []),
        ("<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, []),
    ],
)
def test_calls_and_what_only_looks_like_one(text: str, shown: str, calls: list[tuple[str, str]]) -> None:
    assert found(text, []) == (shown, calls)


def test_text_is_shown_as_soon_as_it_cannot_begin_a_call() -> None:
    finder = Finder(False)
    assert finder.push("a <tool") == ("a ", [])
    assert finder.push("box") == ("<toolbox", [])


def test_a_call_without_end_is_not_held_for_ever() -> None:
    finder = Finder(False)
    assert finder.push("<tool_call>" + "x" * MAX_CALL) == ("", [])
    shown, calls = finder.push("x")
    assert (len(shown), calls) == (len("<tool_call>") + MAX_CALL + 1, [])


def test_an_enforced_call_that_was_cut_off_is_text() -> None:
    assert found('{"name": "f", "arguments": {}}', [3, 9], enforced=True) == ("", [("f", "{}")])
    assert found('{"name": "f", "argu', [3, 9], enforced=True) == ('{"name": "f", "argu', [])


def tool(name: str, parameters: object) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def test_references_of_a_schema_follow_where_it_goes() -> None:
    own = {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}
    one = call_schema([tool("f", own)])
    assert one["properties"]["arguments"]["$ref"] == "#/properties/arguments/$defs/x"
    two = call_schema([tool("f", None), tool("g", own)])
    assert two["anyOf"][1]["properties"]["arguments"]["$ref"] == "#/anyOf/1/properties/arguments/$defs/x"
    assert own["$ref"] == "#/$defs/x"


def test_templates_get_text_objects_and_no_empty_keys() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [call, {**call, "function": {"name": "f", "arguments": "{"}}]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    system, assistant, answer = template_messages([Message.model_validate(message) for message in said])
    assert system == {"role": "system", "content": "a\nb"}
    assert [c["function"]["arguments"] for c in assistant["tool_calls"]] == [{"a": 1}, "{"]
    assert json.dumps(answer) == '{"role": "tool", "content": "1", "tool_call_id": "c"}'
