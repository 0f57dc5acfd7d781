"""The official client against a real server: what it sends is taken, what it gets it understands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import Server

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": f"say:{text}"}]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "fake"
    assert client.models.retrieve("fake").model_dump()["max_model_len"] == 1024
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("fale")
    assert "did you mean 'fake'?" in caught.value.message


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=say("Hello you"), temperature=0)
    assert answer.choices[0].message.content == "Hello you"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("user: say:Hello you\n> ")
    assert answer.usage.completion_tokens == len("Hello you") + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=say("Hello you"), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    first, *chunks, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello you"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert len({chunk.id for chunk in (first, *chunks, last)}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 10
    told = last.usage.model_dump()["gossamer"]
    assert told["ttft_s"] > 0
    assert told["tokens_per_s"] > 0
    assert told["acceptance_rate"] is None


def test_a_prompt_that_was_read_before_is_found_in_the_cache(client: openai.OpenAI) -> None:
    def cached() -> int | None:
        answer = client.chat.completions.create(model="fake", messages=say("w" * 100), temperature=0, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached() == 0
    assert cached() == (len("user: say:\n> ") + 100) // 16 * 16


def test_a_conversation_with_parts_roles_and_several_turns(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "say:four"},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages, temperature=0)
    assert answer.choices[0].message.content == "four"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("system: be kind\nuser: one\ntwo\nassistant: three\nuser: say:four\n> ")


def test_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=say("Hi"), temperature=0, n=2)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "Hi"), (1, "Hi")]
    stream = client.chat.completions.create(model="fake", messages=say("Hi"), temperature=0, n=2, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hi", "Hi"]


def test_a_seed_repeats_a_sample_and_another_one_does_not(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        done = client.completions.create(model="fake", prompt="abc", temperature=5, seed=seed, max_tokens=30)
        return done.choices[0].text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"temperature": 0, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    answer = client.chat.completions.create(model="fake", messages=say("Hey"), **asked)
    assert answer.choices[0].logprobs is not None
    told = answer.choices[0].logprobs.content
    assert told is not None
    assert [row.token for row in told] == ["H", "e", "y"]
    assert [row.bytes for row in told] == [[72], [101], [121]]
    for row in told:
        assert row.top_logprobs[0].token == row.token
        assert row.top_logprobs[0].logprob == row.logprob > row.top_logprobs[1].logprob
    stream = client.chat.completions.create(model="fake", messages=say("Hey"), stream=True, **asked)
    streamed = [row for c in stream if c.choices[0].logprobs for row in c.choices[0].logprobs.content or []]
    assert [row.token for row in streamed] == ["H", "e", "y"]


def test_completions_of_text_and_of_tokens(client: openai.OpenAI) -> None:
    def texts(prompt: Any, **fields: Any) -> list[str]:
        done = client.completions.create(model="fake", prompt=prompt, temperature=0, max_tokens=3, **fields)
        assert [choice.index for choice in done.choices] == list(range(len(done.choices)))
        return [choice.text for choice in done.choices]

    assert texts("abc") == ["def"]
    assert texts(["abc", "123"]) == ["def", "456"]
    assert texts([10, 11, 12]) == ["def"]
    assert texts([[10, 11, 12], [1, 2, 3]], n=2, best_of=2) == ["def", "def", "456", "456"]
    assert texts("abc", echo=True) == ["abcdef"]
    assert texts([10, 11, 12], echo=True) == ["abcdef"]
    assert texts("abc", stop="e") == ["d"]
    assert texts("abc", stop=["f", "x"]) == ["de"]
    assert texts("abc", logit_bias={"20": 100.0}) == ["kkk"]


def test_completions_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="fake", prompt=["abc", "123"], temperature=0, max_tokens=3, stream=True, echo=True
    )
    texts, ends = ["", ""], list[str]()
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
        ends += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert texts == ["abcdef", "123456"]
    assert ends == ["length", "length"]


def test_logprobs_of_a_completion_and_its_prompt(client: openai.OpenAI) -> None:
    done = client.completions.create(model="fake", prompt="abx", temperature=0, max_tokens=2, logprobs=2, echo=True)
    told = done.choices[0].logprobs
    assert told is not None
    assert told.tokens == ["a", "b", "x", "y", "z"]
    assert told.text_offset == [0, 1, 2, 3, 4]
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1] > -0.1  # after "a" comes "b"
    assert told.token_logprobs[2] < -5  # after "b" comes "c", not "x"
    assert told.top_logprobs is not None
    assert set(told.top_logprobs[2]) == {"x", "c", "d"}
    extra = client.completions.create(
        model="fake", prompt="ab", temperature=0, max_tokens=1, extra_body={"prompt_logprobs": 1}
    ).choices[0]
    first, second = extra.model_dump()["prompt_logprobs"]
    assert first is None
    assert second["11"]["decoded_token"] == "b"


def test_a_tool_is_called_where_the_model_says_so(client: openai.OpenAI) -> None:
    said = 'Look: <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    answer = client.chat.completions.create(model="fake", messages=say(said), temperature=0, tools=[WEATHER, TIME])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Look: "
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(f"user: say:{said}\ntools: weather time\n> ")


def test_a_tool_is_called_in_a_stream(client: openai.OpenAI) -> None:
    one = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    two = '<tool_call>{"name": "time", "arguments": {}}'  # small models forget the end
    stream = client.chat.completions.create(
        model="fake", messages=say(f"a < b{one}{two}"), temperature=0, tools=[WEATHER, TIME], stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "a < b"
    assert [(c.index, c.function.name, c.function.arguments) for c in calls if c.function] == [
        (0, "weather", '{"city": "Oslo"}'),
        (1, "time", "{}"),
    ]
    assert chunks[-1].finish_reason == "tool_calls"


def test_without_tools_or_with_none_wanted_a_call_is_text(client: openai.OpenAI) -> None:
    said = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    for fields in ({}, {"tools": [TIME], "tool_choice": "none"}):
        answer = client.chat.completions.create(model="fake", messages=say(said), temperature=0, **fields)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == said
        assert answer.usage.prompt_tokens == len(f"user: say:{said}\n> ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "time"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})],
)
def test_a_call_that_is_demanded_is_made(client: openai.OpenAI, choice: Any, names: set[str], stream: bool) -> None:
    asked: Any = {"messages": say("no"), "temperature": 0, "tools": [WEATHER, TIME], "tool_choice": choice}
    answer = client.chat.completions.create(model="fake", stream=stream, **asked)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        finish = chunks[-1].finish_reason
        (function,) = [call.function for chunk in chunks for call in chunk.delta.tool_calls or ()]
    else:
        finish = answer.choices[0].finish_reason
        assert answer.choices[0].message.content is None
        (function,) = [call.function for call in answer.choices[0].message.tool_calls]
    assert finish == "tool_calls"
    assert function.name in names
    if function.name == "weather":
        assert json.loads(function.arguments)["city"] in ("Oslo", "Rome")


def test_the_answer_to_a_call_goes_back_to_the_model(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages: list[Any] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "say:rain"},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages, temperature=0)
    assert answer.choices[0].message.content == "rain"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("user: q\nassistant: [weather Oslo]\ntool: say:rain\n> ")


@pytest.mark.parametrize(
    ("form", "extra", "pattern"),
    [
        ({"type": "json_object"}, {}, dict),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": {"a": 1}}}}, {}, {"a": 1}),
        (None, {"guided_json": {"type": "boolean"}}, bool),
        (None, {"guided_regex": "[1-9]{4}"}, int),
        (None, {"guided_choice": ['"yes"', '"no"']}, str),
        ({"type": "text"}, {"guided_choice": ["1"]}, 1),
    ],
)
def test_an_answer_has_the_form_that_was_asked_for(client: openai.OpenAI, form: Any, extra: Any, pattern: Any) -> None:
    fields = {} if form is None else {"response_format": form}
    answer = client.chat.completions.create(model="fake", messages=say("no"), temperature=0, extra_body=extra, **fields)
    value = json.loads(answer.choices[0].message.content)
    assert isinstance(value, pattern) if isinstance(pattern, type) else value == pattern


def test_what_is_wrong_reaches_the_client_as_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake", messages=say("x"), max_tokens=0)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=say("x"), stream=True)
    assert missing.value.code == "model_not_found"


def test_tokens_and_back(server: Server) -> None:
    answer = server.post("/tokenize", {"prompt": "abc"}).json()
    assert answer == {"count": 3, "max_model_len": 1024, "tokens": [10, 11, 12]}
    assert server.post("/detokenize", {"model": "fake", "tokens": [10, 11, 12]}).json() == {"prompt": "abc"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "abc"}]}).json()
    assert server.post("/detokenize", {"tokens": chat["tokens"]}).json() == {"prompt": "user: abc\n> "}


def test_metrics_have_their_documented_names_and_count(server: Server) -> None:
    before = server.metrics()
    server.complete("abc", max_tokens=5)
    after = server.metrics()
    grew = {name: after[name] - before[name] for name in after}
    assert grew["prompt_tokens_total"] == 3
    assert grew["generation_tokens_total"] == 5
    assert grew["request_success_total/length"] == 1
    assert grew["time_to_first_token_seconds_count"] == grew["e2e_request_latency_seconds_count"] == 1
    assert grew["inter_token_latency_seconds_count"] == 4
    assert grew["request_queue_time_seconds_count"] == 1
    assert {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"} <= set(
        after
    )
    assert {"prefix_cache_queries_total", "prefix_cache_hits_total"} <= set(after)
    assert {"spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"} <= set(after)


def test_the_playground_is_at_the_root(server: Server) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert server.http.get("/web/app.js").status_code == 200
